"""The whole chain on the real model, and the comparisons that it must win; exits with 1 when one is lost.

``python -m compress.benchmarks.smoke [--quick] [--short] [--out FILE] [--run DIR]``

``--short`` is for CI: the same chain and checks with fewer shapes tried and shorter repairs, as in ``make demo``, and
without the distances and speeds that no check reads.

Checks (each on the chain's own data; perplexities on validation text unless said otherwise):

1. the pruned model has a lower perplexity than a randomly pruned one of the same shape, with the same repair on
   the same windows;
2. the quantized model has a lower perplexity than plain NF3 rounding at the very same stored bits;
3. at 4.5 stored bits the perplexity stays within 1.3 times that of the model it was given;
4. the recovered adapter is not zero, and full + adapter has a lower held-out loss on the training source
   than the full model;
5. every artifact reopened in a fresh process with the logits it recorded (the stages fail otherwise).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from compress.benchmarks.plain_rounding import plain_rounding_perplexity
from compress.importance.base import GroupScores
from compress.model.architecture import LayerShape
from compress.model.load import EMBEDDED
from compress.pipelines.dispatch import run_verb
from compress.pipelines.measure import validation_perplexity, validation_windows
from compress.pipelines.model_input import device_and_dtype, open_model
from compress.pipelines.prune import prune_in_rounds
from compress.pipelines.prune_goal import DEFAULT_RATIO, Goal, Measure, parse_targets
from compress.pipelines.prune_place import Place
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, PruneSettings, resolve
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace
from compress.prune.shape import ShapePlan
from compress.quantize.config import QuantConfig

TAKES = ("hours", "minutes")
NEEDS = ()

NF3 = QuantConfig(bits=3)
SHORT: dict[str, dict[str, Any]] = {
    "prune": {"trials": 2, "repair_steps": 12},
    "eval": {"kl_windows": 0, "speed": "none"},
}
"""Settings of ``--short``."""


def run(verb: str, common: Common, **given: Any) -> dict[str, Any]:
    """One verb, its progress on standard error."""
    return run_verb(verb, common, given)


def smoke(folder: Path, *, effort: str, short: bool = False) -> dict[str, Any]:
    """Run everything in ``folder`` and return the figures and the verdicts."""
    less = SHORT if short else {"prune": {}, "eval": {}}
    chain = Common(run=folder / "chain", effort=effort)
    pruned = run("prune", chain, ratio=0.5, **less["prune"])
    quantized = run("quantize", chain, budget="2.75bit")
    recovered = run("recover", chain)
    evaluated = run("eval", chain, **less["eval"])
    run("report", chain)

    random = randomly_pruned(pruned, folder / "random", effort=effort)
    small = str(pruned["path"])
    higher = run("quantize", Common(run=folder / "higher", model=small, effort=effort), budget="4.5bit")
    plain = plain_rounding_perplexity(Path(small), NF3, folder / "plain", effort=effort)
    same_bits = run(
        "quantize",
        Common(run=folder / "same-bits", model=small, effort=effort),
        budget=f"{plain['stored_bits_per_weight']:.9f}bit",
    )

    rows = {row["name"]: row for row in evaluated["metrics"]["rows"]}
    given = pruned["metrics"]["after"]["perplexity"]
    checks = [
        check("pruned below randomly pruned", given, random["perplexity"]),
        check(
            "LQ below plain NF3 at the same stored bits",
            same_bits["metrics"]["after"]["perplexity"],
            plain["perplexity"],
        ),
        check("4.5 bit within 1.3x of its input", higher["metrics"]["after"]["perplexity"], 1.3 * given),
        check("recovered adapter is not zero", 0.0, recovered["metrics"]["delta_norm"]),
        check(
            "full + recovered below full, held-out loss",
            rows["full + recovered"]["held_out_loss"],
            rows["original"]["held_out_loss"],
        ),
    ]
    return {
        "format_version": 1,
        "effort": effort,
        "short": short,
        "checks": checks,
        "rows": evaluated["metrics"]["rows"],
        "protocol_line": evaluated["metrics"]["protocol_line"],
        "validation_protocol_line": pruned["metrics"]["after"]["protocol_line"],
        "stored_bits_per_weight": quantized["metrics"]["stored_bits_per_weight"],
        "same_bits": {
            "plain": plain,
            "lq_bits": same_bits["metrics"]["stored_bits_per_weight"],
        },
        "seconds": {stage["verb"]: stage["seconds"] for stage in (pruned, quantized, recovered, evaluated)},
        "versions": pruned["versions"],
        "host": pruned["host"],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SameShape(Goal):
    """A goal whose shape is that of another pruned model."""

    shape: LayerShape

    def choose(self, scores: GroupScores, measure: Measure) -> ShapePlan:
        """That shape, whatever the scores."""
        return self.uniform(self.shape)


def randomly_pruned(pruned: dict[str, Any], folder: Path, *, effort: str) -> dict[str, Any]:
    """Perplexity on validation text of random pruning to the shape of ``pruned``, with the same settings."""
    config = pruned["config"]
    common = Common(run=folder, effort=effort, data=config["data"])
    context = Context(common=common, workspace=Workspace(folder), reporter=Reporter(quiet=False))
    model = open_model(context, EMBEDDED)
    device, dtype = device_and_dtype(common)
    place = Place(context=context, source=config["data"], device=device, dtype=dtype)
    known = {field.name for field in fields(PruneSettings)}
    given = {name: value for name, value in config.items() if name in known} | {"criterion": "random"}
    settings = resolve(PruneSettings, given, effort)
    goal = SameShape(
        model=model,
        ratio=settings.ratio or DEFAULT_RATIO,
        settings=settings,
        targets=parse_targets(settings.targets),
        multiple=config["multiple"],
        shape=LayerShape(**pruned["metrics"]["shape"]),
    )
    out = folder / "model"
    out.mkdir(parents=True)
    found = prune_in_rounds(place, goal, out)
    if found["shape"] != pruned["metrics"]["shape"]:
        raise RuntimeError(f"random pruning gave {found['shape']}, not {pruned['metrics']['shape']}")
    windows = validation_windows(context, model.path, place.source)
    return validation_perplexity(context, place.load(out), windows, "the randomly pruned model")


def check(name: str, value: float, bound: float) -> dict[str, Any]:
    """A comparison ``value < bound`` and its verdict."""
    return {"name": name, "value": value, "bound": bound, "passed": value < bound}


def main() -> int:
    """Command line; the verdicts are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.smoke", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="the effort 'quick' even on a GPU")
    parser.add_argument(
        "--short", action="store_true", help="less repair, and no measurements that no check reads"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--run", type=Path, help="keep the workspaces in this folder")
    arguments = parser.parse_args()
    effort = "quick" if arguments.quick else "standard"
    if arguments.run is not None:
        result = smoke(arguments.run, effort=effort, short=arguments.short)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = smoke(Path(folder), effort=effort, short=arguments.short)
    if arguments.out is not None:
        arguments.out.write_text(
            json.dumps(result, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
        )
    print(f"\nvalidation: {result['validation_protocol_line']}\ntest: {result['protocol_line']}\n")
    for item in result["checks"]:
        print(
            f"{'ok  ' if item['passed'] else 'FAIL'} {item['name']}: {item['value']:.4f} < {item['bound']:.4f}"
        )
    failed = sum(not item["passed"] for item in result["checks"])
    print(f"{len(result['checks']) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
