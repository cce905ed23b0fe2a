"""What calibration text told of a matrix, as the piece of work that quantizes it takes it along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from compress.engine import Engine, Handle
from compress.quantize.fisher import Fisher
from compress.quantize.hessian import InputStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixKnowledge:
    """What is known of one matrix; nothing for the objective ``frobenius``.

    Attributes:
        inputs: `InputStatistics` of its inputs (``hessian``), which matrices with the same inputs share.
        minds: What a unit of squared output error costs, [O] (``hessian``); None: all outputs alike.
        fisher: Fisher information (``fisher``).
    """

    inputs: Handle | None = None
    minds: Tensor | None = None
    fisher: Fisher | None = None

    @property
    def statistics(self) -> InputStatistics | None:
        """Of its inputs."""
        return None if self.inputs is None else cast(InputStatistics, self.inputs.get())


def layer_knowledge(
    engine: Engine,
    modules: Iterable[str],
    *,
    statistics: Mapping[str, InputStatistics],
    minds: Mapping[str, Tensor],
    fisher: Mapping[str, Fisher],
) -> dict[str, MatrixKnowledge]:
    """Module name -> what is known of its matrix; what several have in common is shared once.

    Args:
        engine: Computes the work.
        modules: The matrices of a layer.
        statistics: Of the inputs, by module name; empty for other objectives than ``hessian``.
        minds: By module name; also of other layers.
        fisher: By module name; empty for other objectives than ``fisher``.
    """
    handles = {id(each): engine.share(each) for each in {id(s): s for s in statistics.values()}.values()}
    return {
        name: MatrixKnowledge(
            inputs=handles[id(statistics[name])] if name in statistics else None,
            minds=minds.get(name) if name in statistics else None,
            fisher=fisher.get(name),
        )
        for name in modules
    }
