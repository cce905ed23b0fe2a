"""What turns of rounding and factors do to a whole model: its perplexity after one and after three.

``python -m compress.benchmarks.grids_perplexity [--quick] [--model NAME] [--out FILE]``

Every decoder matrix is NF3 in blocks of 64 plus exact factors of rank 16 in the whitened space, chosen for its inputs
in the dense model on 64 windows of 512 tokens of WikiText-2 train; see `grids_alternation` for the turns. The weights
are those of the checkpoint. Test as in ``compress.benchmarks.quantization``, the first 10,240 tokens. Nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.benchmarks.grids_alternation import halves
from compress.benchmarks.grids_inputs import decoder_moments
from compress.benchmarks.protocol import LENGTH, Rows, calibration, score, test_windows
from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model, load_tokenizer, resolve
from compress.pipelines.dispatch import prepare_torch, quiet_libraries
from compress.pipelines.measure import CALIBRATION_SEED
from compress.pipelines.settings import Common
from compress.quantize.config import QuantConfig
from compress.quantize.hessian import InputStatistics, input_statistics
from compress.quantize.output_aware import decompose_outputs

TAKES = ("minutes", "minutes")
NEEDS = ("wikitext2",)

CONFIG, RANK, TURNS = QuantConfig(bits=3), 16, 3
TOKENS = 10240


def approximations(wide_OI: Tensor, statistics: InputStatistics) -> dict[str, Tensor]:
    """What stands for a matrix, by row of the results, float32 [O, I]."""
    found: dict[str, Tensor] = {}
    for first in ("rounding", "factors"):
        endless = halves(wide_OI, CONFIG, statistics, rank=RANK, how="feedback", first=first)
        for turn, (left, values, product) in enumerate(islice(endless, TURNS), start=1):
            if turn in (1, TURNS):
                found[f"{first} first, {turn} turns"] = values + product
            if turn == TURNS:
                found[f"{first} first, {turn} turns, factors of the turn before"] = values + (wide_OI - left)
    made = decompose_outputs(wide_OI, CONFIG, statistics, rank=RANK, factor_config=None)
    return {**found, "order of compress quantize": made.decomposition.dequantize()}


def fill(path: Path, rows: Rows, train_NS: Tensor, test: Any, say: Callable[[str], None]) -> None:
    """Decompose all matrices, then every row that is not there yet."""
    network = load_model(path, dtype=torch.float32)
    arch = checkpoint_architecture(Checkpoint(path))
    if not rows.has("dense"):
        rows.put("dense", score(network, test))
    made: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    for layer, grams in decoder_moments(path, range(arch.layers), train_NS):
        for spec in arch.linears_at(layer):
            name = arch.tensor_name(layer, spec)
            stored = network.get_parameter(name).detach()
            wide = (stored.t() if spec.transposed else stored).contiguous()
            statistics = input_statistics(grams[spec.name])
            norm = statistics.output_error(wide)
            for key, values in approximations(wide, statistics).items():
                errors[key] = errors.get(key, 0.0) + statistics.output_error(wide - values) / norm
                made.setdefault(key, {})[name] = values.t() if spec.transposed else values
        say(f"layer {layer}: done")
    for key, weights in made.items():
        if not rows.has(key):
            with torch.no_grad():
                for name, values in weights.items():
                    network.get_parameter(name).copy_(values)
            rows.put(key, {**score(network, test), "mean_output_error": errors[key] / len(weights)})
        say(f"{key}: {rows.get(key)['perplexity']:.2f}")


def main() -> int:
    """Command line; one line a row."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.grids_perplexity", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that it runs")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--out", type=Path, default=Path("grids-perplexity.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    prepare_torch(Common())
    try:
        path = resolve(arguments.model)
        tokenizer = load_tokenizer(path)
        windows, tokens = (4, 1024) if arguments.quick else (64, TOKENS)
        train = calibration(tokenizer, "wikitext2", windows * LENGTH, CALIBRATION_SEED)
        identity = {
            "benchmark": "grids perplexity",
            "model": Checkpoint(path).fingerprint(),
            "calibration": dict(train.protocol),
            "configuration": CONFIG.to_dict(),
            "rank": RANK,
        }
        rows = Rows(arguments.out, identity)
        fill(path, rows, train.ids, test_windows(tokenizer, tokens=tokens), print)
    except CompressError as error:
        print(f"error: {error.cause}\n{error.remedy}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
