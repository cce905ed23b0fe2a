"""Reading records that may lack anything, and writing numbers for people."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

DASH = "—"
Record = Mapping[str, Any]


def at(record: Any, *path: str) -> Any:
    """The value under nested keys, or None when any of them is missing."""
    for key in path:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def numbers(value: Any) -> list[float]:
    """The finite numbers of a list; empty for anything else."""
    return [n for n in map(number, sequence(value)) if n is not None]


def records(value: Any) -> list[Record]:
    """The objects of a list; empty for anything else."""
    return [item for item in sequence(value) if isinstance(item, Mapping)]


def sequence(value: Any) -> Sequence[Any]:
    """A list, or an empty one."""
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else []


def string(value: Any) -> str:
    """Text as it is, other scalars as JSON, nothing as a dash."""
    if value is None or value == "":
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def fixed(value: Any, digits: int = 2) -> str:
    """A number with so many decimals."""
    found = number(value)
    return DASH if found is None else f"{found:,.{digits}f}"


def general(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits."""
    found = number(value)
    if found is None:
        return DASH
    if 1000 <= abs(found) < 1e9:
        return f"{found:,.0f}"
    return f"{found:.{digits}g}"


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage."""
    found = number(value)
    return DASH if found is None else f"{100 * found:.{digits}f}\u202f%"


def short_percent(value: float) -> str:
    """A share as a tick of an axis: 50 %, 47.5 %."""
    return f"{100 * value:.3g}\u202f%"


def change(ratio: float) -> str:
    """How far a ratio lies from 1, signed: −4.0 %."""
    return f"{100 * (ratio - 1):+.1f}\u202f%".replace("-", "\u2212")


def count(value: Any) -> str:
    """Parameters or tokens: 134.5 M."""
    return _scaled(value, 1000, ["", "K", "M", "B", "T"])


def size(value: Any) -> str:
    """Bytes in powers of 1000: 90.1 MB."""
    return _scaled(value, 1000, ["B", "kB", "MB", "GB", "TB"])


def short_size(value: float) -> str:
    """Bytes as a tick of an axis: 50 MB, 2.5 GB, 0."""
    return re.sub(r"(\.[0-9]*?)0+(?=\D)", r"\1", size(value)).replace(".\u202f", "\u202f") if value else "0"


def seconds(value: Any) -> str:
    """A duration: 0.05 s, 12.4 s, 3 min 20 s, 2 h 05 min."""
    found = number(value)
    if found is None:
        return DASH
    if found < 60:
        return f"{found:.2g}\u202fs" if found < 1 else f"{found:.1f}\u202fs"
    whole = round(found)
    if whole < 3600:
        return f"{whole // 60}\u202fmin {whole % 60:02d}\u202fs"
    return f"{whole // 3600}\u202fh {whole % 3600 // 60:02d}\u202fmin"


def flatten(record: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a nested record as (dotted key, short text)."""
    if isinstance(record, Mapping) and record:
        for key, value in record.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif sequence(record):
        yield prefix, _listed(sequence(record))
    else:
        yield prefix, string(record)


def _listed(values: Sequence[Any]) -> str:
    scalars = all(not isinstance(v, Mapping) and not sequence(v) for v in values)
    if scalars and len(values) <= 12:
        return ", ".join(string(v) for v in values)
    return f"{len(values)} values" if len(values) != 1 else "1 value"


def _scaled(value: Any, base: int, units: list[str]) -> str:
    found = number(value)
    if found is None:
        return DASH
    scaled, unit = found, 0
    while abs(scaled) >= base - 0.5 and unit < len(units) - 1:
        scaled /= base
        unit += 1
    digits = 0 if unit == 0 else 2 if abs(scaled) < 10 else 1
    return f"{scaled:,.{digits}f}\u202f{units[unit]}".rstrip("\u202f")
