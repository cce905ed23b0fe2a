"""How a product is computed, by device, width, direction, shape and number of tokens: a table of rules in JSON.

A rule holds for some widths, one direction, at most so many tokens and, where it says so, one shape; the first that
holds decides. ``tables/default.json`` is arithmetic (``python -m compress.benchmarks.roofline --write-table``) with
limits in tokens that an H100 measured. ``python -m compress.benchmarks.kernels_gpu --write-table`` measures and writes
a table for its device beside it, which then decides on devices of that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError
from compress.kernels.cuda.product import serves
from compress.kernels.packed import Geometry

TABLES = Path(__file__).with_name("tables")
"""Where the tables lie."""
DEFAULT = "default"
FORMAT_VERSION = 1

_INTERPRETER_PROCESSORS = 2
"""Multiprocessors that the interpreter is taken to have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Fused decoding: sizes of a program.

    Attributes:
        rows: Of the matrix, a power of two of at least 16.
        chunks: Of 32 columns, a power of two.
        tokens: A power of two of at least 16.
        splits: Most shares that the terms of a sum are cut into.
        warps: Of a program.
        stages: Of the compiler's software pipeline; more than 1 has it copy the look-up table over and over.
        ranks: Rows of a factor, a power of two of at least 16.
    """

    rows: int = 64
    chunks: int = 2
    tokens: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 1
    ranks: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """Dequantized slices and torch's product.

    Attributes:
        nbytes: Of a slice; never more than :data:`compress.kernels.triton.dense.WORKSPACE`.
    """

    nbytes: int = 44 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """The CUDA C++ kernels of :mod:`compress.kernels.cuda.product`, where they serve; rules that follow stand in."""


Choice = Fused | Tiles | Slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What holds where.

    Attributes:
        bits: Widths of codes.
        transposed: Whether it is for the gradient in the input.
        most_tokens: Tokens up to which it holds; None: any number.
        shape: (O, I) that it is for; None: any.
        choice: What to do; of tiles, ``splits`` counts only where ``programs`` is 0.
        programs: Programs per multiprocessor to aim at by splitting.
    """

    bits: tuple[int, ...]
    transposed: bool
    most_tokens: int | None
    shape: tuple[int, int] | None
    choice: Choice
    programs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rules and where they come from.

    Attributes:
        name: Of its file.
        origin: In words.
        measured: Whether a device measured it.
        rules: In the order they are tried.
    """

    name: str
    origin: str
    measured: bool
    rules: tuple[Rule, ...]


def slug(device_name: str) -> str:
    """The table's name for a device: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _rule(entry: Mapping[str, Any]) -> Rule:
    rest = dict(entry)
    ways = {"fused": Fused, "tiles": Tiles, "slices": Slices}
    (way,) = ways.keys() & rest.keys()
    choice = ways[way](**rest.pop(way))
    shape = rest.pop("shape", None)
    return Rule(
        bits=tuple(rest.pop("bits")),
        shape=None if shape is None else (shape[0], shape[1]),
        choice=choice,
        **rest,
    )


def read_table(path: Path) -> Table:
    """A table from its file.

    Raises:
        CompressError: It cannot be read, or is of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {content['format_version']}")
        rules = tuple(_rule(entry) for entry in content["rules"])
        table = Table(name=path.stem, origin=content["origin"], measured=content["measured"], rules=rules)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(
            f"The table of GPU kernels {path} cannot be read: {error}.", "Remove it, or write it again."
        ) from error
    return table


@cache
def table_of(device_name: str | None) -> Table:
    """The table for a device: its own if one was measured, else the default one.

    Raises:
        CompressError: It cannot be read.
    """
    own = None if device_name is None else TABLES / f"{slug(device_name)}.json"
    return read_table(own if own is not None and own.is_file() else TABLES / f"{DEFAULT}.json")


@cache
def _device(index: int | None) -> tuple[str, int]:
    found = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return found.name, found.multi_processor_count


def choose(
    device: torch.device,
    geometry: Geometry,
    tokens: int,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    fused: bool = True,
) -> Choice:
    """What the table of a device says of a product; see :func:`explain`."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return _chosen(torch.device(device.type, index), geometry, tokens, dtype, transposed, fused)


@lru_cache(maxsize=4096)  # a layer asks at every call
def _chosen(
    device: torch.device, geometry: Geometry, tokens: int, dtype: torch.dtype, transposed: bool, fused: bool
) -> Choice:
    return explain(device, geometry, tokens, dtype, transposed=transposed, fused=fused)[0]


def forget_tables() -> None:
    """Read the tables again when they are next asked for."""
    table_of.cache_clear()
    _chosen.cache_clear()


def explain(
    device: torch.device,
    geometry: Geometry,
    tokens: int,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    fused: bool = True,
) -> tuple[Choice, str]:
    """What the table of a device says of a product, and why, in words.

    Args:
        device: Of all tensors.
        geometry: Of the matrix.
        tokens: T.
        dtype: Of the input.
        transposed: Whether it is the gradient in the input.
        fused: Whether the CUDA C++ kernels may do it.

    Raises:
        CompressError: The table cannot be read, or has no rule for the product.
    """
    name, processors = _device(device.index) if device.type == "cuda" else (None, _INTERPRETER_PROCESSORS)
    table = table_of(name)
    shape = (geometry.rows, geometry.columns)
    for rule in table.rules:
        if geometry.bits not in rule.bits or transposed != rule.transposed or rule.shape not in (None, shape):
            continue
        if rule.most_tokens is not None and tokens > rule.most_tokens:
            continue
        if isinstance(rule.choice, Fused) and not (fused and serves(device, geometry, dtype)):
            continue
        limit = "any number of tokens" if rule.most_tokens is None else f"up to {rule.most_tokens} tokens"
        why = f"{table.origin}: {limit}" + ("" if rule.shape is None else f", {shape[0]} x {shape[1]}")
        if not isinstance(rule.choice, Tiles):
            return rule.choice, why
        # products of float32 are no work for tensor cores, and larger tiles of theirs spill
        tiles = (
            replace(rule.choice, rows=min(rule.choice.rows, 32)) if dtype == torch.float32 else rule.choice
        )
        if not rule.programs:
            return tiles, why
        return with_splits(tiles, rule.programs * processors, shape, tokens, transposed=transposed), why
    raise CompressError(
        f"The table of GPU kernels {table.name} has no rule for this product.", "Write it again."
    )


def describe(device_name: str | None, bits: int = 4) -> str:
    """How products of a width are computed on a device, by number of tokens, and whose table says so; one line."""
    table = table_of(device_name)
    native, fused, slices = 0, 0, None
    for rule in table.rules:
        if bits in rule.bits and not rule.transposed and rule.shape is None:
            if isinstance(rule.choice, Slices):
                slices = rule.choice
                break
            if isinstance(rule.choice, Fused):
                native = max(native, rule.most_tokens or 0)
            else:
                fused = max(fused, rule.most_tokens or 0)
    ways = [f"CUDA C++ up to {native} tokens where it serves"] if native else []
    if fused:
        ways.append(f"decoding fused with the product by Triton up to {fused} tokens")
    if slices is not None:
        ways.append(
            f"{'then ' if ways else ''}dequantized slices of {slices.nbytes >> 20} MB and torch's product"
        )
    return f"{bits} bits: {', '.join(ways)} (table {table.name}: {table.origin})"


def with_splits(
    tiles: Tiles, programs: int, shape: tuple[int, int], tokens: int, *, transposed: bool = False
) -> Tiles:
    """The same tiles with so many shares that about ``programs`` programs come of it, or as many as there can."""
    depth = 32 * tiles.chunks
    steps, parts = -(-shape[1] // depth), -(-shape[0] // tiles.rows)
    if transposed:
        steps, parts = parts, steps
    parts *= -(-max(1, tokens) // tiles.tokens)
    return replace(tiles, splits=max(1, min(steps, round(programs / parts))))
