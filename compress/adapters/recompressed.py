"""Deltas of an adapter, measured and perhaps cut to a smaller rank: module by module, or batched on a device."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from compress.adapters.adapter_file import AdapterFile
from compress.adapters.batched import Job, Spec, run_batched
from compress.adapters.factors import Recompressed, difference_factors, recompress, squared_norm
from compress.adapters.initial_factors import PREFIX
from compress.adapters.lanes import Lanes, device_lanes
from compress.adapters.stacked import Recompress

LIMIT = 8 << 20
"""Bytes of a window of factors, which take some sixteen times as many in float64 while they are decomposed."""


class Trained:
    """What training changed in a module: the delta ``B A``, or ``B A - B0 A0`` where the start was kept.

    Args:
        file: The adapter.
        module: A module with a factor pair.
    """

    def __init__(self, file: AdapterFile, module: str) -> None:
        self.module = module
        self._file = file
        started = file.initial_rank(module)
        self.started = started is not None
        (shape_a, dtype_a), (shape_b, dtype_b) = (
            file.spec(f"{PREFIX}{module}.lora_{side}.weight") for side in "AB"
        )
        more = 0 if started is None else started
        self.specs = (
            Spec((shape_a[0] + more, shape_a[1]), dtype_a),
            Spec((shape_b[0], shape_b[1] + more), dtype_b),
        )

    @property
    def rank(self) -> int:
        """Of the delta: r, or r + r0."""
        return self.specs[0].shape[0]

    def kept(self, rank: int | None) -> int:
        """What is left of it when it is cut to ``rank``."""
        into, out = self.specs[0].shape[1], self.specs[1].shape[0]
        return self.rank if rank is None or self.rank <= rank else min(rank, into, out)

    def read(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank]."""
        factors, initial = self._file.factors(self.module), self._file.initial_factors(self.module)
        return factors if initial is None else difference_factors(*factors, *initial)


def recompressed(
    deltas: Sequence[Trained], rank: int | None, lanes: Lanes | None = None, *, limit: int = LIMIT
) -> Generator[Recompressed]:
    """Each delta with its norm, cut to ``rank`` where it has more, in the order given.

    Args:
        deltas: Of the modules.
        rank: None: nothing is cut.
        lanes: Those of a device; None: the host, module by module.
        limit: Bytes of a window on lanes.

    Raises:
        CompressError: The device has no room for one delta.
    """
    if lanes is None:
        for delta in deltas:
            factor_a, factor_b = delta.read()
            if rank is not None and delta.rank > rank:
                yield recompress(factor_a, factor_b, rank)
            else:
                norm = squared_norm(factor_a, factor_b)
                yield Recompressed(a=factor_a, b=factor_b, norm=norm, lost=0.0)
        return
    jobs = [_job(delta, rank) for delta in deltas]
    with closing(run_batched(jobs, lanes, limit=limit)) as results:
        for delta, found in zip(deltas, results, strict=True):
            norm, lost = found[-1].tolist()
            # what is not cut is what lies in the file
            factors = (found[0].clone(), found[1].clone()) if len(found) == 3 else delta.read()
            yield Recompressed(a=factors[0], b=factors[1], norm=norm, lost=lost)


def truncation_error(file: AdapterFile, rank: int, device: torch.device | str = "cpu") -> float:
    """What cutting every delta of an adapter to ``rank`` would lose: ``||D - D_r||_F / ||D||_F`` over all modules.

    Pruned rows and columns are zero in a recovered adapter, so that this of the small one holds for it too.

    Args:
        file: The adapter.
        rank: At least 1; smaller deltas stay whole.
        device: Where they are decomposed.
    """
    deltas, norm, lost = [Trained(file, module) for module in file.modules], 0.0, 0.0
    with closing(recompressed(deltas, rank, device_lanes(device))) as results:
        for delta, found in zip(deltas, results, strict=True):
            square = file.scaling(delta.module).value ** 2
            norm, lost = norm + square * found.norm, lost + square * found.lost
    return math.sqrt(lost / norm) if norm > 0 else 0.0


def _job(delta: Trained, rank: int | None) -> Job:
    spec_a, spec_b = delta.specs
    into, out = spec_a.shape[1], spec_b.shape[0]
    cut: tuple[Spec, ...] = ()
    if rank is not None and delta.rank > rank:
        kept = delta.kept(rank)
        cut = (Spec((kept, into), spec_a.dtype), Spec((out, kept), spec_b.dtype))

    def fill(targets: Sequence[Tensor]) -> None:
        for target, factor in zip(targets, delta.read(), strict=True):
            target.copy_(factor)

    return Job(
        operation=Recompress(rank=rank if cut else None),
        inputs=delta.specs,
        outputs=(*cut, Spec((2,), torch.float64)),
        fill=fill,
    )
