"""Sizes of pruned models as they are asked for and reached, with the biases that a repair adds."""

from __future__ import annotations

from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import PruneSettings
from compress.prune.goal import parse_count
from compress.prune.slice import with_biases
from compress.solvers.budget import parse_budget

OUTPUT_OF = {"heads": "o", "mlp": "down"}
"""Target -> the role of the linear that reads what is removed."""


def added_parameters(model: ModelInput, settings: PruneSettings, targets: tuple[str, ...]) -> int:
    """Most parameters that the biases of ``--repair bias`` add: counted before rows are cut.

    Raises:
        CompressError: The family's configuration has no such biases.
    """
    arch = model.architecture
    if settings.repair != "bias":
        return 0
    repaired = with_biases(model.checkpoint, arch, [OUTPUT_OF[target] for target in targets])[1]
    before = {spec.name for spec in arch.linears if spec.bias}
    new = [spec for spec in repaired.linears if spec.bias and spec.name not in before]
    return arch.layers * sum(arch.linear_shape(spec)[0] for spec in new)


def sized_reason(settings: PruneSettings, parameters: int, size: int) -> str | None:
    """The size asked for beside the one reached; None where a ratio was asked for.

    Args:
        settings: With ``--params`` or ``--size``.
        parameters: Of the result.
        size: Its weight bytes.
    """
    if settings.params is not None:
        asked, reached, what = float(parse_count(settings.params)), parameters, "parameters"
    elif settings.size is not None:
        asked, reached, what = parse_budget(settings.size).value, size, "bytes"
    else:
        return None
    return f"{reached:,} {what} for {asked:,.0f} asked for ({reached / asked - 1:+.2%})"
