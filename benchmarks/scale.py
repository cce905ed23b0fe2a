"""Peak memory of every stage on a model that is larger than its limit: random weights of a published shape.

``python -m compress.benchmarks.scale [--quick] [--shape NAME] [--stages A,B] [--work DIR] [--out FILE]``

Writes a bf16 checkpoint of the shape of LLaMA-2-7B (13.5 GB, in shards, seeded; ``--quick``: a small one). Runs
``plan``, ``prune --ratio 0.5`` by magnitude, ``quantize --budget 2.75bit`` for the objective frobenius, ``recover``
of a random adapter, each under ``--memory-limit 3GiB``, and ``quantize`` for the objective hessian on 16 x 512
tokens under 6 GiB. Each is a process of its own, sampled with every process it starts. Two peaks are reported:
resident memory, and its anonymous part, without the pages of mapped files. The bar chart sets them against the
model's size.

Pruning has no repair and no trials here: weights are random, so there is nothing that a refit could keep, and each
would run the model again. Seconds are those of this machine as it was: the load average stands beside them. The
checkpoint takes twice its size on disk while it is written; ``--work`` keeps it, and stages that are done there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.benchmarks.model_shapes import CONFIGS
from compress.benchmarks.process_memory import compress_command, measure
from compress.benchmarks.scale_chart import bar_chart
from compress.benchmarks.scale_model import write_random_adapter, write_random_model
from compress.errors import CompressError, UsageError, choose
from compress.evaluate.memory import file_bytes
from compress.pipelines.stage import host, versions
from compress.pipelines.workspace import FORMAT_VERSION, write_json
from compress.solvers.budget import parse_budget

TAKES = ("hours", "minutes")
NEEDS = ()

SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 128,
}
BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "LLaMA-2-7B": CONFIGS["LLaMA-2-7B"],
    "1B": {**CONFIGS["LLaMA-2-7B"], **BILLION},
    "small": {**CONFIGS["LLaMA-2-7B"], **SMALL, "vocab_size": 8192},
}
LIMITS = {"LLaMA-2-7B": ("3GiB", "6GiB"), "1B": ("2GiB", "3GiB"), "small": ("1.5GiB", "2GiB")}
"""By shape: of all stages, and of the hessian objective."""
STAGES = ("plan", "prune", "quantize", "recover", "hessian")
TOKENS = 16 * 512


def commands(stage: str, work: Path, model: Path, limits: tuple[str, str]) -> tuple[str, list[str]]:
    """Verb and options of a stage."""
    run, common = work / "run", ["--json", "--effort", "quick"]
    chain = ["--run", str(run), "--data", "pydoc", "--memory-limit", limits[0]]
    if stage == "plan":
        asked = ["--ratio", "0.5", "--budget", "2.75bit", "--objective", "frobenius"]
        return "plan", [str(model), *asked, "--memory-limit", limits[0], "--no-time", *common]
    if stage == "prune":
        how = ["--ratio", "0.5", "--criterion", "magnitude", "--repair", "none", "--repair-steps", "0"]
        return "prune", ["--model", str(model), *how, "--trials", "1", *chain, *common]
    if stage == "quantize":
        return "quantize", ["--budget", "2.75bit", "--objective", "frobenius", *chain, *common]
    if stage == "recover":
        adapter = write_random_adapter(work / "adapter", run / "01-prune")
        return "recover", ["--adapter", str(adapter), *chain, *common]
    how = ["--budget", "2.75bit", "--objective", "hessian", "--calibration-tokens", str(TOKENS)]
    place = ["--run", str(work / "hessian"), "--model", str(run / "01-prune"), "--data", "pydoc"]
    return "quantize", [*place, *how, "--memory-limit", limits[1], *common]


def run_benchmark(shape: str, stages: Sequence[str], work: Path, out: Path) -> dict[str, Any]:
    """Make the model, run the stages that are asked, write JSON and chart; the result.

    Raises:
        CompressError: A stage failed.
    """
    limits = LIMITS[shape]
    model = write_random_model(work / "model", SHAPES[shape])
    size = file_bytes(model)
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "benchmark": "scale",
        "shape": shape,
        "model_bytes": size,
        "versions": versions(),
        "host": host(),
        "stages": {},
    }
    for stage in stages:
        verb, options = commands(stage, work, model, limits)
        load = os.getloadavg()[0]
        found = measure(compress_command(verb, options), env={**os.environ, "PYTHONWARNINGS": "ignore"})
        if found.returncode != 0:
            lines = [line for line in found.errors.strip().splitlines() if line.strip()] or ["no message"]
            raise CompressError(f"The stage {stage} failed: {lines[-2:]}", "Run the command by itself.")
        limit = parse_budget(limits[stage == "hessian"]).value
        result["stages"][stage] = found.to_dict() | {
            "verb": verb,
            "options": options,
            "limit_bytes": limit,
            "within_limit": found.peak.resident <= limit,
            "load_average_before": load,
        }
        write_json(out, result)
        print(
            f"{stage}: peak resident {found.peak.resident / 2**30:.2f} GiB, anonymous "
            f"{found.peak.anonymous / 2**30:.2f} GiB, limit {limit / 2**30:.2f} GiB, {found.seconds:.0f} s "
            f"({found.cpu_seconds:.0f} s of processor, load {load:.1f})",
            flush=True,
        )
    out.with_suffix(".svg").write_text(bar_chart(result), encoding="utf-8")
    print(f"model: {size / 1e9:.2f} GB; {out}, {out.with_suffix('.svg')}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="compress.benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shape")
    parser.add_argument("--shape", default=None, help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, separated by commas")
    parser.add_argument("--work", type=Path, default=None, help="folder that is kept")
    parser.add_argument("--out", type=Path, default=Path("scale.json"))
    options = parser.parse_args(arguments)
    shape = options.shape or ("small" if options.quick else "LLaMA-2-7B")
    stages = [stage for stage in options.stages.split(",") if stage]
    try:
        for name, known in ((shape, SHAPES), *((stage, STAGES) for stage in stages)):
            if name not in known:
                raise UsageError(f"There is no {name!r} here.", choose(name, list(known)))
        if options.work is not None:
            options.work.mkdir(parents=True, exist_ok=True)
            run_benchmark(shape, stages, options.work, options.out)
        else:
            with tempfile.TemporaryDirectory(prefix="compress-scale-") as folder:
                run_benchmark(shape, stages, Path(folder), options.out)
    except CompressError as error:
        print(f"{error.cause}\n{error.remedy}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
