"""Deltas measured and cut in batches: what one at a time gives, and the best approximation of their rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.adapters import recover as recover_module
from compress.adapters.adapter_file import PREFIX, AdapterFile, write_adapter
from compress.adapters.factors import recompress, squared_norm
from compress.adapters.lanes import Lanes
from compress.adapters.recompressed import Trained, recompressed
from compress.adapters.recover import recover_adapter
from tests.unit.adapters.common import add_initial_factors, make_pair, save_random_adapter
from tests.unit.adapters.simulated import SimulatedLanes, every_lanes

LANES = every_lanes()
SHAPES = ((24, 40), (24, 40), (40, 24), (24, 40), (2, 40))
RANK = 4


def made(folder: Path, dtype: torch.dtype, *, started: bool) -> tuple[AdapterFile, list[Trained]]:
    """An adapter on random modules, all of one rank but the third."""
    generator = torch.Generator().manual_seed(4)
    kept: list[dict[str, Tensor]] = [{}, {}]
    for tensors in kept:
        for index, (out, into) in enumerate(SHAPES):
            rank = 2 if index == 2 else RANK
            for side, shape in (("A", (rank, into)), ("B", (out, rank))):
                values = torch.randn(shape, generator=generator)
                tensors[f"{PREFIX}m.{index}.lora_{side}.weight"] = values.to(dtype)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "rank_pattern": {"2": 2}}
    write_adapter(folder, config, kept[0], kept[1] if started else None)
    file = AdapterFile(folder)
    return file, [Trained(file, f"m.{index}") for index in range(len(SHAPES))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("make", LANES.values(), ids=LANES)
def test_batches_give_what_one_at_a_time_gives(
    make: Callable[[], Lanes], rank: int | None, started: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    _, deltas = made(tmp_path, dtype, started=started)
    alone = list(recompressed(deltas, rank))
    for limit in (0, 1 << 20):
        together = list(recompressed(deltas, rank, make(), limit=limit))
        for delta, one, other in zip(deltas, alone, together, strict=True):
            factor_a, factor_b = (factor.double() for factor in delta.read())
            product = factor_b @ factor_a
            size = float(product.square().sum())
            assert delta.started is started
            assert one.a.dtype == other.a.dtype == other.b.dtype == dtype
            assert one.a.shape == other.a.shape
            assert other.norm == pytest.approx(size, rel=1e-10)
            kept = delta.rank if rank is None else rank
            tail = float(torch.linalg.svdvals(product)[kept:].square().sum())
            assert other.lost == pytest.approx(tail, abs=1e-10 * size)
            if rank is None or delta.rank <= rank:
                assert torch.equal(other.a, one.a)
                assert torch.equal(other.b, one.b)
            # singular vectors are free in their sign, products are not
            error = (other.b.double() @ other.a.double() - product).square().sum()
            room = 1e-10 if dtype == torch.float32 else 1e-3
            assert float(error) == pytest.approx(tail, rel=1e-2, abs=room * size)


def test_on_the_host_nothing_has_changed(tmp_path: Path) -> None:
    _, deltas = made(tmp_path, torch.bfloat16, started=True)
    for delta, found in zip(deltas, recompressed(deltas, 3), strict=True):
        factor_a, factor_b = delta.read()
        assert found.norm == squared_norm(factor_a, factor_b)
        expected = recompress(factor_a, factor_b, 3)
        assert torch.equal(found.a, expected.a)
        assert torch.equal(found.b, expected.b)
    for delta, found in zip(deltas, recompressed(deltas, None), strict=True):
        assert torch.equal(found.a, delta.read()[0])
        assert found.lost == 0.0


def test_equal_shapes_are_decomposed_by_one_call(tmp_path: Path) -> None:
    _, deltas = made(tmp_path, torch.float32, started=False)
    lanes = SimulatedLanes()
    list(recompressed(deltas, 3, lanes))
    assert (
        lanes.events.count(("queued", "compute")) == 3
    )  # three of one shape, one that is not cut, a narrow one


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_a_recovered_adapter_is_the_same_from_batches(
    rank: int | None, started: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter")
    if started:
        add_initial_factors(adapter)

    def recover(out: Path) -> object:
        done: list[str] = []
        report = recover_adapter(
            adapter,
            pair.structure,
            pair.arch,
            pair.full,
            out,
            full_name="full",
            compress_rank=rank,
            progress=lambda step, total, name: done.append(name),
        )
        with AdapterFile(out) as file:
            assert sorted(done) == sorted(file.modules)
        return report

    alone = recover(tmp_path / "alone")
    for number, make in enumerate(LANES.values()):
        monkeypatch.setattr(recover_module, "device_lanes", lambda device, make=make: make())
        out = tmp_path / str(number)
        together = recover(out)
        for name in ("delta_norm", "truncation_overall"):
            assert getattr(together, name) == pytest.approx(getattr(alone, name), rel=1e-9)
        same = {name: getattr(alone, name) for name in ("delta_norm", "truncation", "truncation_overall")}
        assert replace(together, **same) == alone  # type: ignore[type-var]
        config = "adapter_config.json"
        assert (out / config).read_text() == (tmp_path / "alone" / config).read_text()
        with AdapterFile(tmp_path / "alone") as one, AdapterFile(out) as other:
            assert one.names == other.names
            for module in one.modules:
                products = [b.double() @ a.double() for a, b in (one.factors(module), other.factors(module))]
                torch.testing.assert_close(*products, rtol=1e-5, atol=1e-5)
