"""Budgets as people write them: ``2.75bit``, ``90MB``, ``0.5GiB``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from compress.errors import UsageError

_BYTES = {
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_FORM = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*([a-z]+)", re.ASCII)
_REMEDY = "Write bits per weight or a file size, such as 2.75bit, 90MB (10^6 bytes), 90MiB or 0.5GiB."


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit on stored size.

    Attributes:
        kind: ``bits``: average stored bits per weight of the quantized linears; ``bytes``: whole weight file.
        value: Bits per weight, or bytes.
        text: What the user wrote.
    """

    kind: Literal["bits", "bytes"]
    value: float
    text: str


def parse_budget(text: str) -> Budget:
    """Read a budget; case and surrounding blanks do not matter.

    Units: bit or bits; kB, MB, GB, TB (powers of 1000); KiB, MiB, GiB, TiB (powers of 1024).

    Raises:
        UsageError: The text is not a number with a known unit, or the number is not above zero.
    """
    match = _FORM.fullmatch(text.strip().lower())
    unit = match.group(2) if match else ""
    if match is None or not (unit in ("bit", "bits") or unit in _BYTES):
        raise UsageError(f"The budget {text!r} is not understood.", _REMEDY)
    number = float(match.group(1))
    if not 0 < number < math.inf:
        raise UsageError(f"The budget {text!r} is not above zero, or is past all measure.", _REMEDY)
    if unit in _BYTES:
        return Budget(kind="bytes", value=number * _BYTES[unit], text=text)
    return Budget(kind="bits", value=number, text=text)
