"""What a GPU could do at most with packed weights, by arithmetic, and the default table of kernels that follows.

``python -m compress.benchmarks.roofline [--quick] [--markdown] [--write-table] [--out FILE]``

Nothing is measured: bytes, operations and instructions are counted and divided by the peaks of the makers' data sheets.
A product of T tokens reads every packed weight once from memory and takes 2 T operations a weight. Fused tiles also
execute instructions for every weight, once for each tile of tokens, at most one a cycle on each of 128 lanes of a
multiprocessor; for tiles, these and the operations are taken one after the other. Slices write each weight dequantized,
read it again at the speed of memory, and then multiply. Where slices come out faster, the table changes over to them.
``--write-table`` writes ``compress/kernels/triton/tables/default.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.benchmarks.protocol import write_json
from compress.kernels.triton.choice import DEFAULT, FORMAT_VERSION, TABLES, Slices

TAKES = ("seconds", "seconds")
NEEDS = ()

WIDTHS = (2, 3, 4, 8)
TOKENS = (1, 16, 64, 256, 2048)
SHAPE = (11008, 4096)
"""Out and in of LLaMA-2-7B's up projection: 45 M weights."""
BLOCK, SCALE_BITS, GROUP, STEP_BYTES = 64, 8, 256, 4
TOKEN_TILES = (16, 32, 64)
"""Tokens of a tile, and up to how many tokens each of the first two is taken."""
MOST_OF_TILES = 64
"""Tokens from which an H100 found slices faster, whatever the arithmetic says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Peaks of a data sheet.

    Attributes:
        name: Of the product.
        bandwidth: Bytes of memory per second.
        products: bfloat16 operations per second, dense, two for a multiplication and an addition.
        instructions: Per second, of one lane each: multiprocessors times clock times 128.
    """

    name: str
    bandwidth: float
    products: float
    instructions: float


INSTRUCTIONS = {2: 501 / 64, 3: 569 / 64, 4: 506 / 64, 8: 522 / 64}
"""A weight's instructions in the loop of the fused kernel, of 128 rows x 64 columns a step and 64 weights a thread,
built for compute capability 9.0 by Triton 3.9: ``python -m tests.unit.kernels.triton.compiler widths`` counts them."""

DEVICES = (
    Device(name="H100 SXM", bandwidth=3.35e12, products=989e12, instructions=132 * 1.83e9 * 128),
    Device(name="A100 SXM 80GB", bandwidth=2.039e12, products=312e12, instructions=108 * 1.41e9 * 128),
)


def bits_per_weight(bits: int) -> float:
    """Bits of a weight in memory: its code, its share of a scale's code, and of a second-level scale in float32."""
    return bits + (SCALE_BITS + 8 * STEP_BYTES / GROUP) / BLOCK


def token_tile(tokens: int) -> int:
    """Tokens of a tile."""
    return next((tile for tile in TOKEN_TILES if tokens <= tile), TOKEN_TILES[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One width, one number of tokens, one device; microseconds.

    Attributes:
        device: Its name.
        bits: Of a code.
        tokens: T.
        dense: Floor of a bfloat16 product.
        memory: Reading the packed weights, input and output.
        products: Multiplying.
        instructions: Executing those of one pass over the weights.
        tiles: Fused tiles, by the account above.
        slices: Slices, likewise.
    """

    device: str
    bits: int
    tokens: int
    dense: float
    memory: float
    products: float
    instructions: float
    tiles: float
    slices: float

    @property
    def floor(self) -> float:
        """No way of computing it takes less."""
        return max(self.memory, self.products)


def row(device: Device, bits: int, tokens: int, shape: tuple[int, int] = SHAPE) -> Row:
    """The account of a product with a matrix (O, I)."""
    weights = shape[0] * shape[1]
    packed, moved = weights * bits_per_weight(bits) / 8, 2 * tokens * sum(shape)
    products = 2 * tokens * weights / device.products
    memory = (packed + moved) / device.bandwidth
    instructions = weights * INSTRUCTIONS[bits] / device.instructions
    tiles = max(memory, instructions * -(-tokens // token_tile(tokens)) + products)
    slices = (packed + 2 * weights) / device.bandwidth + max(products, 2 * weights / device.bandwidth)
    return Row(
        device=device.name,
        bits=bits,
        tokens=tokens,
        dense=1e6 * max((2 * weights + moved) / device.bandwidth, products),
        memory=1e6 * memory,
        products=1e6 * products,
        instructions=1e6 * instructions,
        tiles=1e6 * tiles,
        slices=1e6 * slices,
    )


def last_of_tiles(device: Device, bits: int) -> int:
    """Most tokens, a power of two, up to which tiles take no longer than slices."""
    tokens = TOKEN_TILES[-1]
    while True:
        found = row(device, bits, 2 * tokens)
        if found.tiles > found.slices:
            return tokens
        tokens *= 2


def default_table() -> dict[str, Any]:
    """The table for devices that have none of their own, with the changeover of the first device."""
    limits = {bits: min(last_of_tiles(DEVICES[0], bits), MOST_OF_TILES) for bits in WIDTHS}
    rules: list[dict[str, Any]] = []
    for transposed in (False, True):
        if not transposed:  # as far as the H100 found them faster
            for own, most in (([2, 3, 4], 128), ([8], 64)):
                rules.append({"bits": own, "transposed": False, "most_tokens": most, "fused": {}})
        for limit in sorted(set(limits.values())):
            own = [bits for bits in WIDTHS if limits[bits] == limit]
            for tile in TOKEN_TILES:
                rows = 128 if tile == TOKEN_TILES[0] and not transposed else 64
                tiles = {"rows": rows, "chunks": 2, "tokens": tile, "warps": 4, "stages": 1}
                most = tile if tile < TOKEN_TILES[-1] else limit
                rules.append(
                    {
                        "bits": own,
                        "transposed": transposed,
                        "most_tokens": most,
                        "tiles": tiles,
                        "programs": 4,
                    }
                )
        rules.append(
            {
                "bits": list(WIDTHS),
                "transposed": transposed,
                "most_tokens": None,
                "slices": {"nbytes": Slices().nbytes},
            }
        )
    origin = f"arithmetic for an {DEVICES[0].name}, with the limits in tokens that one measured"
    return {"format_version": FORMAT_VERSION, "origin": origin, "measured": False, "rules": rules}


def table_text(content: dict[str, Any]) -> str:
    """A table as its file holds it: a line a rule."""
    head = {name: value for name, value in content.items() if name != "rules"}
    rules = ",\n".join("  " + json.dumps(rule) for rule in content["rules"])
    return json.dumps(head)[:-1] + ', "rules": [\n' + rules + "\n]}\n"


def report(rows: Sequence[Row], *, markdown: bool) -> str:
    """Microseconds by device, tokens and width, and what the floor is to that of a bfloat16 product."""
    head = (
        *("device", "tokens", "bits", "bf16 floor", "memory", "products", "floor", "bf16 / floor"),
        *("instructions", "tiles", "slices"),
    )
    lines = [
        (
            row.device,
            str(row.tokens),
            str(row.bits),
            *(f"{value:.1f}" for value in (row.dense, row.memory, row.products, row.floor)),
            f"{row.dense / row.floor:.2f}",
            f"{row.instructions:.1f}",
            f"{row.tiles:.1f}",
            f"{row.slices:.1f}",
        )
        for row in rows
    ]
    if markdown:
        return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *lines))
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *lines)
    )


def main() -> int:
    """Command line; the table is printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.roofline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one token and 2048 only")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--write-table", action="store_true", help="write the default table of kernels")
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    arguments = parser.parse_args()
    tokens = (TOKENS[0], TOKENS[-1]) if arguments.quick else TOKENS
    rows = [row(device, bits, count) for device in DEVICES for count in tokens for bits in WIDTHS]
    if arguments.write_table:
        TABLES.mkdir(exist_ok=True)
        (TABLES / f"{DEFAULT}.json").write_text(table_text(default_table()), encoding="utf-8")
    if arguments.out is not None:
        write_json(arguments.out, {"format_version": 1, "measured": False, "rows": [asdict(r) for r in rows]})
    print(report(rows, markdown=arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
