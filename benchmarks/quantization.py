"""Quantized models at the same stored bits: ours, LQ-LoRA as published, GPTQ, NF4, HQQ and AutoRound.

``python -m compress.benchmarks.quantization [--quick] [--part table|files|headline] [--only "a;b"] [--peers DIR]
[--moved] [--work DIR] [--out FILE]``

Protocol. Model SmolLM2-135M-Instruct (dequantized baseline); its weights come from a GGUF file, so they lie on a 4-bit
grid. With ``--moved`` it is a copy that has left this grid: 200 steps of training on all weights. Calibration: the same
64 windows of 512 tokens of WikiText-2 train for everybody. Test: raw WikiText-2 test, blank lines kept, joined by two
line ends, no BOS, consecutive windows of 512, first 20,480 tokens; the part headline: windows of 2048, the whole text.
All models are scored by the same code in the same dtype, peers by the weights that their own checkpoints stand for.
Bits: stored bytes of every tensor that belongs to a quantized linear (codes, scales, zeros, orders, tables, factors;
no bias), counted on the files that each method wrote, per weight. Nothing is trained unless the row says so.

The part files: ours at the same size of the whole file, embeddings included, which are kept in 16 bits, stored in 8, or
chosen for like every matrix.

Ours is what ``compress quantize --budget Nbit --calibration-tokens 32768`` gives with the effort quick. LQ-LoRA is
data-free, with the paper's menu and iterations, at rank 8, and at rank 64 in the paper's count, which leaves the
factors out; ``bits`` counts them. Trained rows: 200 steps of 1,024 tokens, the same windows and settings for all, the
trained factors stored in 8 bits before they are scored and counted.

Seconds are those of quantization alone. They compare only when nothing else runs: the load average of the machine
stands beside them. Rows are on disk as soon as they are known: run it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from compress.benchmarks.peers.environment import ENVIRONMENTS
from compress.benchmarks.protocol import LENGTH, TOKENS, Rows
from compress.benchmarks.quantization_models import moved_model
from compress.benchmarks.quantization_rows import FILES, RECIPES, Bench, row_of
from compress.errors import UsageError
from compress.model.checkpoint import Checkpoint
from compress.model.load import resolve
from compress.pipelines.dispatch import quiet_libraries
from compress.pipelines.model_input import device_and_dtype
from compress.pipelines.settings import Common
from compress.pipelines.workspace import read_json

TAKES = ("hours", "minutes")
NEEDS = ("wikitext2",)

SOURCE = "wikitext2"
DTYPE = "float32"
"""Of everything that is computed here, whatever the machine prefers, so that rows compare across machines."""
CALIBRATION = 64 * LENGTH
TRAINING: dict[str, Any] = {
    "steps": 200,
    "micro_batch": 2,
    "accumulation": 1,
    "sequence": LENGTH,
    "lr": 1e-3,
    "rank": 8,
    "alpha": 16,
    "dropout": 0.0,
}
"""Of the trained rows; rank is that of matrices without factors of their own."""
HEADLINE = (
    "dense",
    "ours 4.25",
    "ours 3.25",
    "ours 2.75",
    "ours 2.25",
    "lq-lora 2.75, rank 8",
    "gptqmodel 4",
    "gptqmodel 3",
    "bitsandbytes nf4",
)

Found = Mapping[str, Mapping[str, Any]]


def chosen(patterns: str | None, part: str) -> list[str]:
    """Names of the rows to make, in the order of ``RECIPES``.

    Args:
        patterns: Names or shell patterns separated by ``;``; None: all rows of the part.
        part: ``table``, ``files`` or ``headline``.

    Raises:
        UsageError: A pattern matches no row.
    """
    if patterns is None:
        parts = {
            "table": tuple(name for name in RECIPES if name not in FILES),
            "files": ("dense", *FILES),
            "headline": HEADLINE,
        }
        return list(parts[part])
    wanted = [pattern.strip() for pattern in patterns.split(";")]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in RECIPES):
            raise UsageError(f"There is no row {pattern!r}.", f"Rows: {'; '.join(RECIPES)}.")
    return [name for name in RECIPES if any(fnmatchcase(name, pattern) for pattern in wanted)]


def fill(bench: Bench, rows: Rows, names: Sequence[str]) -> None:
    """Make the rows that are not there, and those that could not run."""
    for name in names:
        if not rows.has(name) or "not_run" in rows.get(name):
            rows.put(name, row_of(bench, RECIPES[name]))


def table(rows: Found) -> str:
    """The rows as text, by stored bits; then what was not run, and how perplexity was measured."""
    run = {name: row for name, row in rows.items() if "not_run" not in row}
    dense = run["dense"]["perplexity"] if "dense" in run else None
    titles = {
        "bits": 8,
        "file MB": 9,
        "perplexity": 12,
        "to dense": 10,
        "seconds": 9,
        "peak GB": 9,
        "load": 7,
    }
    header = f"{'row':30}" + "".join(f"{title:>{width}}" for title, width in titles.items())
    lines = [header]
    for name, row in sorted(run.items(), key=lambda item: (item[1]["bits_per_weight"], item[0])):
        seconds = row.get("seconds")
        cells = (
            f"{row['bits_per_weight']:8.3f}",
            f"{format(row['file_bytes'] / 1e6, '.1f') if row.get('file_bytes') else '-':>9}",
            f"{row['perplexity']:12.2f}",
            f"{'-' if dense is None else format(row['perplexity'] / dense, '.3f'):>10}",
            f"{'-' if seconds is None else format(seconds, '.0f'):>9}",
            f"{format(row['peak_bytes'] / 1e9, '.2f') if row.get('peak_bytes') else '-':>9}",
            f"{'-' if row.get('load_before') is None else format(row['load_before'], '.1f'):>7}",
        )
        lines.append(f"{name:30}" + "".join(cells))
    lines += [f"{name:30} not run: {row['not_run']}" for name, row in rows.items() if "not_run" in row]
    protocols = sorted({row["protocol_line"] for row in run.values()})
    return "\n".join([*lines, *(f"perplexity: {line}" for line in protocols)])


def checks(rows: Found) -> list[str]:
    """The goals, each ``ok``, ``missed`` or, where a row is missing, ``not measured``; with both figures.

    GPTQModel's figure is the better of its rows with and without zero points: both store the same bits.
    """
    goals: list[tuple[str, tuple[str, ...], Callable[..., tuple[float, float]]]] = [
        (
            "4.25 bits: excess over dense at most 1/5 of GPTQModel's at 4 bits",
            ("ours 4.25", "gptqmodel 4", "dense"),
            lambda ours, peer, dense: (ours - dense, (peer - dense) / 5),
        ),
        (
            "3.25 bits: at least 40 % below GPTQModel at 3 bits",
            ("ours 3.25", "gptqmodel 3"),
            lambda ours, peer: (ours, 0.6 * peer),
        ),
        (
            "2.75 bits: no worse than GPTQModel at 3 bits",
            ("ours 2.75", "gptqmodel 3"),
            lambda ours, peer: (ours, peer),
        ),
        (
            "2.75 bits: at least 40 % below LQ-LoRA at the same stored bits",
            ("ours 2.75", "lq-lora 2.75, rank 8"),
            lambda ours, peer: (ours, 0.6 * peer),
        ),
        (
            "2.75 bits, trained, factors included: within 25 % of dense",
            ("ours 2.75, rank 8, trained", "dense"),
            lambda ours, dense: (ours, 1.25 * dense),
        ),
    ]
    lines = []
    for text, names, compared in goals:
        found = [_perplexity(rows, name) for name in names]
        if None in found:
            lines.append(f"not measured  {text}")
            continue
        value, bound = compared(*found)
        lines.append(f"{'ok' if value <= bound else 'missed':12}  {text}: {value:.3f}, bound {bound:.3f}")
    return lines


def _perplexity(rows: Found, name: str) -> float | None:
    """Of a row, or of its twin with zero points where that is better; None: neither was run."""
    twins = (rows.get(own, {}) for own in (name, f"{name}, zero points"))
    return min((row["perplexity"] for row in twins if "perplexity" in row), default=None)


def main() -> int:
    """Command line; the table and the checks are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.quantization", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few tokens and steps, to see that it runs")
    parser.add_argument("--part", choices=("table", "files", "headline"), default="table")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--only", help="rows by name or shell pattern, separated by ;")
    parser.add_argument(
        "--peers", type=Path, default=ENVIRONMENTS, help="where `make peers` put environments"
    )
    parser.add_argument("--moved", action="store_true", help="a copy that was trained off its 4-bit grid")
    parser.add_argument(
        "--work", type=Path, default=Path("quantization-work"), help="quantized models, kept to go on with"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: quantization-PART[-moved].json)")
    arguments = parser.parse_args()
    names = chosen(arguments.only, arguments.part)
    quiet_libraries()
    headline = arguments.part == "headline"
    sizes: dict[str, Any] = {
        "calibration_tokens": CALIBRATION,
        "training": TRAINING,
        "test_length": 2048 if headline else LENGTH,
        "test_tokens": None if headline else TOKENS,
    }
    moving: dict[str, Any] = {}
    moved: dict[str, Any] | None = None
    if arguments.quick:
        sizes |= {"calibration_tokens": 4 * LENGTH, "training": TRAINING | {"steps": 4}, "test_tokens": 4096}
        moving = {"steps": 4, "warmup_steps": 0}
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = resolve(arguments.model)
    device, dtype = device_and_dtype(Common(dtype=DTYPE))
    if arguments.moved:
        model = moved_model(model, SOURCE, arguments.work, length=LENGTH, device=device, **moving)
        about = read_json(model / "moved.json")
        moved = {**about["identity"], "relative_change": about["relative_change"]}
    bench = Bench(
        model=model,
        work=arguments.work,
        peers=arguments.peers,
        source=SOURCE,
        device=device,
        dtype=dtype,
        **sizes,
    )
    identity = {
        "benchmark": "quantization",
        "part": arguments.part,
        "source": SOURCE,
        "model": Checkpoint(model).fingerprint(),
        "moved": moved,
        "scored_in": str(dtype).removeprefix("torch."),
        **sizes,
    }
    suffix = "-moved" if arguments.moved else ""
    rows = Rows(arguments.out or Path(f"quantization-{arguments.part}{suffix}.json"), identity)
    fill(bench, rows, names)
    print("\n".join([table(rows.rows), *checks(rows.rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
