"""Which grid is best at equal stored bits, NormalFloat, learned or affine, and what alternation with factors does.

``python -m compress.benchmarks.grids [--quick] [--layers 2,15,27] [--model NAME] [--work DIR] [--out FILE]``

The linears of three layers of the embedded model; second moments of their inputs in the dense model, on 64
windows of 512 tokens of WikiText-2 train (no layer is quantized before another, as ``compress quantize`` does it).
Every family is rounded by the same code: searched ranges, error feedback (same order, same damping), double-quantized
scales, then one pass of descent; and once more with a correction of rank 8 in 8 bits. Errors are
``tr(E H E^T) / tr(W H W^T)``; held out: on 16 windows of WikiText-2 validation. Bits: everything stored, zero points
(b bits a block), tables and padding too. Equal bits: the logarithm of the error is linear between two block sizes of a
width; with factors, whose bits are the same for all, at equal bits of Q. Blocks are 16, 32 or 64 wide: 128 does not
divide 576 columns, and no budget here needs it.

The embedded model comes from a file in Q4_1: its weights lie on an affine grid of 16 levels in blocks of 32, which
affine grids of such blocks can hit. So its weights are first moved off that grid: each by at most half a
step at random, as much as rounding had taken. The rows ``on the source's grid`` say what that grid is worth.

Alternation: NormalFloat, blocks of 64, exact factors of rank 16, five turns; see `grids_alternation`. Nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.benchmarks.grids_alternation import VARIANTS, all_variants
from compress.benchmarks.grids_inputs import known_moments, off_the_grid, source_steps, weights_of
from compress.benchmarks.grids_rounding import FAMILIES, measured
from compress.benchmarks.grids_summary import ON_GRID_VARIANTS, report, rounded, summarize
from compress.benchmarks.protocol import LENGTH, Rows, calibration
from compress.data.sources import load_text
from compress.data.windows import token_windows
from compress.errors import CompressError, UsageError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_tokenizer, resolve
from compress.pipelines.dispatch import prepare_torch, quiet_libraries
from compress.pipelines.identity import digest
from compress.pipelines.measure import CALIBRATION_SEED
from compress.pipelines.settings import Common
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import factor_bits
from compress.quantize.hessian import InputStatistics, input_statistics
from compress.quantize.output_aware import decompose_outputs

TAKES = ("minutes", "minutes")
NEEDS = ("wikitext2",)

SOURCE = "wikitext2"
LAYERS = "2,15,27"
WINDOWS, HELD_OUT = 64, 16
MENU = {(2, 16): 0, (2, 32): 8, (2, 64): 8, (3, 32): 8, (3, 64): 8, (4, 32): 8, (4, 64): 8}
"""Width and block size -> rank of the correction."""
ON_GRID = ((3, 32), (3, 64), (4, 32), (4, 64))
ON_GRID_FAMILIES = ("NormalFloat", "learned", "affine")
WIDTHS, RANK, TURNS = (3, 4), 16, 5


def menu_of(
    wide_OI: Tensor,
    statistics: InputStatistics,
    held_out: InputStatistics,
    configs: dict[tuple[int, int], int],
    families: tuple[str, ...],
) -> dict[str, Any]:
    """Bits and errors of every configuration and family of a matrix."""
    shape = (wide_OI.shape[0], wide_OI.shape[1])
    found: dict[str, Any] = {}
    for (bits, size), rank in configs.items():
        config = QuantConfig(bits=bits, block_size=size)
        found[f"{bits} bits, block {size}"] = {
            name: {
                "bits": FAMILIES[name].bits(shape, config) / wide_OI.numel(),
                "factor_bits": factor_bits(shape, rank, FACTOR_8BIT) / wide_OI.numel(),
                **measured(wide_OI, config, statistics, held_out, FAMILIES[name], rank),
            }
            for name in families
        }
    return found


def row_of(
    weight_OI: Tensor, gram_II: Tensor, other_II: Tensor, seed: int, *, quick: bool = False
) -> dict[str, Any]:
    """All figures of a matrix.

    Args:
        weight_OI: As the checkpoint has it.
        gram_II: Second moments of its inputs.
        other_II: The same on held-out text.
        seed: Of what moves it off its grid.
        quick: Three configurations and two turns.
    """
    statistics, held_out = input_statistics(gram_II), input_statistics(other_II)
    configs = {key: MENU[key] for key in ((3, 32), (3, 64))} if quick else MENU
    row: dict[str, Any] = {"weights": weight_OI.numel(), "on_grid": False}
    steps, wide_OI = source_steps(weight_OI), weight_OI
    if steps is not None:
        wide_OI = off_the_grid(weight_OI, steps, seed)
        row["on_grid"] = True
        row["moved_by"] = float((wide_OI - weight_OI).norm() / weight_OI.norm())
        known = dict.fromkeys(ON_GRID if not quick else configs, 0)
        row["menu_on_grid"] = menu_of(weight_OI, statistics, held_out, known, ON_GRID_FAMILIES)
        row["alternation_on_grid"] = turns_by_width(weight_OI, statistics, held_out, ON_GRID_VARIANTS, quick)
    row["menu"] = menu_of(wide_OI, statistics, held_out, configs, tuple(FAMILIES))
    row["alternation"] = turns_by_width(wide_OI, statistics, held_out, tuple(VARIANTS), quick)
    row["output_aware"] = {
        width: shipped(wide_OI, int(width[2:]), statistics, held_out) for width in row["alternation"]
    }
    figures: dict[str, Any] = rounded(row)
    return figures


def turns_by_width(
    wide_OI: Tensor,
    statistics: InputStatistics,
    held_out: InputStatistics,
    names: tuple[str, ...],
    quick: bool,
) -> dict[str, Any]:
    """The turns of some variants of NF3 and NF4."""
    return {
        f"NF{bits}": all_variants(
            wide_OI, QuantConfig(bits=bits), statistics, held_out, RANK, 2 if quick else TURNS, names
        )
        for bits in (WIDTHS[:1] if quick else WIDTHS)
    }


def shipped(
    wide_OI: Tensor, bits: int, statistics: InputStatistics, held_out: InputStatistics
) -> dict[str, float]:
    """Relative errors of the order of ``compress quantize`` under the settings of the turns."""
    made = decompose_outputs(wide_OI, QuantConfig(bits=bits), statistics, rank=RANK, factor_config=None)
    rest = wide_OI - made.decomposition.dequantize()
    return {
        "fitted": made.output_error / made.output_norm,
        "held_out": held_out.output_error(rest) / held_out.output_error(wide_OI),
    }


def fill(
    matrices: Rows,
    rows: Rows,
    model: Path,
    layers: list[int],
    train: Any,
    other: Any,
    work: Path,
    say: Callable[[str], None],
    *,
    quick: bool,
) -> None:
    """Make the rows of the matrices that are not there, then those of the record."""
    grams, others = (known_moments(model, layers, windows.ids, work) for windows in (train, other))
    for seed, (name, weight) in enumerate(weights_of(model, layers)):
        key = f"layer {name.replace('.', ', ', 1)}"
        if not matrices.has(key):
            matrices.put(key, row_of(weight, grams[name], others[name], seed, quick=quick))
        say(f"{key}: done")
    summarize(matrices.rows, rows)


def layers_of(text: str, count: int) -> list[int]:
    """Layer numbers separated by commas.

    Raises:
        UsageError: One is not a number, or the model has no such layer.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < count for part in parts):
        raise UsageError(
            f"--layers is {text!r}.", f"Give numbers from 0 to {count - 1}, separated by commas."
        )
    return sorted({int(part) for part in parts})


def main() -> int:
    """Command line; the means are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.grids", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one layer, few tokens, 3 bits")
    parser.add_argument("--layers", help=f"numbers separated by commas; default: {LAYERS}")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("grids-work"),
        help="folder for what a record leaves out: second moments, all figures of the matrices",
    )
    parser.add_argument("--out", type=Path, default=Path("grids.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    prepare_torch(Common())
    try:
        path = resolve(arguments.model)
        tokenizer, count = load_tokenizer(path), checkpoint_architecture(Checkpoint(path)).layers
        layers = layers_of(arguments.layers or ("0" if arguments.quick else LAYERS), count)
        windows, held_out = (4, 2) if arguments.quick else (WINDOWS, HELD_OUT)
        train = calibration(tokenizer, SOURCE, windows * LENGTH, CALIBRATION_SEED)
        other = token_windows(load_text(SOURCE, "validation"), tokenizer, length=LENGTH, count=held_out)
        identity = {
            "benchmark": "grids",
            "model": Checkpoint(path).fingerprint(),
            "layers": layers,
            "calibration": dict(train.protocol),
            "held_out": dict(other.protocol),
            "factors": "8 bit, correction of rank 8; exact, rank 16 in turns",
            "quick": arguments.quick,
        }
        rows = Rows(arguments.out, identity)
        matrices = Rows(arguments.work / f"matrices-{digest(identity)[:16]}.json", identity)
        fill(matrices, rows, path, layers, train, other, arguments.work, print, quick=arguments.quick)
    except CompressError as error:
        print(f"error: {error.cause}\n{error.remedy}", file=sys.stderr)
        return error.exit_code
    print(report(rows.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
