"""The packed layout made on the device is that of the C library bit for bit, and turns back without loss."""

from __future__ import annotations

import pytest
import torch

from compress.errors import UsageError
from compress.kernels import packed
from compress.kernels.packed import Geometry
from compress.kernels.triton.launch import runs_on

from .cases import DEVICE, needs_kernels

if runs_on(DEVICE):
    from compress.kernels.triton.layout import tile, untile

pytestmark = needs_kernels


def plain(geometry: Geometry, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes, scales = packed.plain_bytes(geometry)
    groups = -(-geometry.rows * geometry.blocks // geometry.group_size)
    return {
        "codes": torch.randint(256, (codes,), generator=generator, dtype=torch.uint8),
        "scale_codes": torch.randint(256, (scales,), generator=generator, dtype=torch.uint8),
        "scale_max": torch.rand(groups, generator=generator).bfloat16(),
        "offset": torch.rand(1, generator=generator),
        "table": torch.rand(2**geometry.bits, generator=generator),
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "block_size"), [(37, 153, 24), (16, 64, 32), (1, 8, 8)])
def test_tiles_are_those_of_the_c_library(bits: int, rows: int, columns: int, block_size: int) -> None:
    # the width of scale codes differs from that of codes, so that neither can stand in for the other
    geometry = Geometry(
        rows=rows,
        columns=columns,
        bits=bits,
        scale_bits={2: 3, 3: 4, 4: 8, 8: 2}[bits],
        block_size=block_size,
        group_size=7,
    )
    given = plain(geometry, bits)
    expected = packed.tile(geometry, **given)
    found = tile(geometry, **{name: tensor.to(DEVICE) for name, tensor in given.items()})
    for name in ("codes", "scale_codes", "steps", "offset", "table"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    back = untile(geometry, found.codes, found.scale_codes)
    known = packed.untile(geometry, expected.codes, expected.scale_codes)
    assert torch.equal(back[0].cpu(), given["codes"])
    assert torch.equal(back[1].cpu(), known[1])


def test_tensors_of_the_wrong_size_or_type_are_refused() -> None:
    geometry = Geometry(rows=5, columns=40, bits=4, scale_bits=8, block_size=8, group_size=7)
    given = {name: tensor.to(DEVICE) for name, tensor in plain(geometry, 0).items()}
    with pytest.raises(UsageError, match="got table as"):
        tile(geometry, **{**given, "table": given["table"][:3]})
    with pytest.raises(UsageError, match="got codes as"):
        tile(geometry, **{**given, "codes": given["codes"].to(torch.int32)})
    with pytest.raises(UsageError, match="got codes as"):
        untile(geometry, given["codes"], given["scale_codes"])
