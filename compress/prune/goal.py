"""From a size the whole model shall have to the ratio of decoder linear parameters to remove."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from compress.errors import CompressError, UsageError
from compress.model.architecture import Architecture
from compress.prune.shape import NEAR, TARGETS, HeadUnit, choices_of

_POWERS = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}
_FORM = re.compile(r"((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+]?[0-9]{1,2})?)\s*([kmbt]?)", re.ASCII)


def parse_count(text: str) -> int:
    """Read a number of parameters: ``80M``, ``1.3B``, ``80e6``, ``120000000``.

    Units: K, M, B and T, powers of 1000; case and blanks around them do not matter.

    Raises:
        UsageError: The text is no such number, or not a whole number above zero.
    """
    match = _FORM.fullmatch(text.strip().lower())
    number = Decimal(match.group(1)).scaleb(_POWERS[match.group(2)]) if match else Decimal(0)
    if number <= 0 or number != number.to_integral_value():
        raise UsageError(
            f"The number of parameters {text!r} is not understood.",
            "Write a whole number above zero, such as 80M, 1.3B, 80e6 or 120000000.",
        )
    return int(number)


def ratio_for_parameters(
    total_parameters: int,
    arch: Architecture,
    target: int,
    *,
    targets: Sequence[str] = TARGETS,
    multiple: int = 64,
    head_unit: HeadUnit = "auto",
) -> float:
    """The ratio of decoder linear parameters to remove so that the whole model has ``target`` parameters.

    Biases that go with their rows are not counted.

    Args:
        total_parameters: Parameters of the whole model now, tied ones counted once.
        arch: The model.
        target: Parameters it shall have.
        targets: Any of "heads", "mlp".
        multiple: Kept channels are a multiple of this (or all channels).
        head_unit: What of the attention goes; see :func:`~compress.prune.shape.choices_of`.

    Raises:
        CompressError: No pruning reaches that size; names the range.
    """
    smallest = _most_removed(arch, targets, multiple, head_unit)
    return _ratio(total_parameters, 1.0, arch, target, smallest, lambda n: f"{round(n):,} parameters")


def ratio_for_bytes(
    total_bytes: int,
    bytes_per_weight: float,
    arch: Architecture,
    target: float,
    *,
    targets: Sequence[str] = TARGETS,
    multiple: int = 64,
    head_unit: HeadUnit = "auto",
) -> float:
    """The ratio of decoder linear parameters to remove so that the weights of the model take ``target`` bytes.

    Args:
        total_bytes: Bytes of the whole model's weights now.
        bytes_per_weight: Stored bytes of one decoder linear weight.
        arch: The model.
        target: Bytes they shall take.
        targets: Any of "heads", "mlp".
        multiple: Kept channels are a multiple of this (or all channels).
        head_unit: What of the attention goes; see :func:`~compress.prune.shape.choices_of`.

    Raises:
        CompressError: No pruning reaches that size; names the range.
    """
    smallest = _most_removed(arch, targets, multiple, head_unit)
    return _ratio(total_bytes, bytes_per_weight, arch, target, smallest, _written_bytes)


def _written_bytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _most_removed(arch: Architecture, targets: Sequence[str], multiple: int, head_unit: HeadUnit) -> float:
    reach = choices_of(arch, targets=targets, multiple=multiple, head_unit=head_unit).reach()
    return 0.0 if reach is None else reach[1]


def _ratio(
    total: float,
    weight: float,
    arch: Architecture,
    target: float,
    most: float,
    written: Callable[[float], str],
) -> float:
    linears = weight * arch.decoder_linear_parameters()
    ratio = (total - target) / linears
    if not 0 < ratio <= most + NEAR:
        raise CompressError(
            f"Pruning can bring this model of {written(total)} down to {written(total - most * linears)}, "
            f"not to {written(target)}.",
            "Ask for a size between these two, or choose other targets or a smaller channel multiple.",
        )
    return ratio
