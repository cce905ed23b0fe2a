"""The chain against a committed baseline: perplexity, bytes and peak memory; exits with 1 on a regression.

``python -m compress.benchmarks.regression [--quick] [--update] [--repeats N] [--baselines DIR] [--model M] [--data D]
[--finished DIR] [--out FILE] [--run DIR]``

Every stage runs in a process of its own, as a user would run it, on text that every Python has (pydoc). The suite
``quick`` (few tokens and steps) takes minutes; the other has the defaults of the effort ``quick``. `smoke` asks whether
the chain beats what it must beat; this asks whether it is still as good as it was.

A baseline holds for one protocol: model, text, settings, dtype and device. Under another one nothing is compared, and
that is an error. ``--update`` writes the baseline from ``--repeats`` runs with different numbers of threads; the
noise between them is what figures may rise by (see `figures`). Where no baseline ships for a suite, figures are printed
and nothing is compared; a folder of baselines that is named has to have one.

``--finished`` runs nothing: the figures of a chain that lies in a workspace, whatever its recipe was, are compared with
the baseline ``recipe``, or become it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.benchmarks.figures import (
    Figures,
    Kind,
    as_json,
    check_protocol,
    compare,
    make_baseline,
)
from compress.benchmarks.stages import Given, Runner, in_fresh_process, run_stages, stage_records
from compress.errors import CompressError
from compress.model.load import EMBEDDED
from compress.pipelines.settings import Common
from compress.pipelines.stage import host, versions
from compress.pipelines.workspace import read_json, write_json

TAKES = ("minutes", "minutes")
NEEDS = ()

BASELINES = Path(__file__).with_name("baselines")
REPEATS = 3
"""Runs behind a baseline."""
RECIPE = "recipe"
"""Name of the baseline of a chain that was run by itself."""
Steps = tuple[tuple[str, Given], ...]
SUITES: Mapping[str, Steps] = {
    "quick": (
        ("prune", {"ratio": 0.5, "calibration_tokens": 4096, "trials": 1, "repair_steps": 8}),
        ("quantize", {"budget": "2.75bit", "calibration_tokens": 2048}),
        ("train", {"steps": 8}),
        ("recover", {}),
        ("eval", {"windows": 6, "sequence": 256}),
    ),
    "chain": (
        ("prune", {"ratio": 0.5}),
        ("quantize", {"budget": "2.75bit"}),
        ("train", {}),
        ("recover", {}),
        ("eval", {}),
    ),
}
"""What is run: verbs with their options."""


def measure(
    steps: Steps, common: Common, *, runner: Runner = in_fresh_process
) -> tuple[dict[str, tuple[Kind, float]], dict[str, Any]]:
    """Run the chain once: its figures, and the protocol they hold for."""
    records = run_stages(steps, common, runner=runner)
    return figures_of(records), protocol_of(records, steps, common)


def figures_of(records: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Kind, float]]:
    """Perplexity, bytes and peak memory, by name."""
    found: dict[str, tuple[Kind, float]] = {}
    for verb, record in records.items():
        found[f"{verb}: peak memory"] = ("peak_memory", float(record["peak_memory_bytes"]))
        if verb in ("prune", "align", "quantize"):
            found[f"{verb}: perplexity"] = ("perplexity", float(record["metrics"]["after"]["perplexity"]))
        for row in record["metrics"].get("rows", ()):
            found[f"{verb}, {row['name']}: perplexity"] = ("perplexity", float(row["perplexity"]))
            found[f"{verb}, {row['name']}: bytes"] = ("bytes", float(row["bytes"]))
    return found


def protocol_of(records: Mapping[str, Mapping[str, Any]], steps: Steps, common: Common) -> dict[str, Any]:
    """What figures must have in common to be compared; of the text its hash."""
    prune, evaluation = records["prune"], records["eval"]
    return {
        "model": prune["inputs"]["model"],
        "steps": [[verb, dict(given)] for verb, given in steps],
        "validation_text": prune["metrics"]["after"]["protocol"]["sha256"],
        "test_text": evaluation["metrics"]["protocol"]["sha256"],
        "seed": common.seed,
        "effort": prune["effort"],
        "dtype": evaluation["config"]["dtype"],
        "device": evaluation["config"]["device"],
    }


def finished_protocol(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """As `protocol_of`, of a chain with whatever stages it has: all their settings count, and every text."""
    first = next(iter(records.values()))
    texts = {
        f"{verb}_text": side["protocol"]["sha256"]
        for verb, record in records.items()
        for side in (record["metrics"], record["metrics"].get("after"))
        if isinstance(side, Mapping) and "protocol" in side
    }
    return {
        "model": first["inputs"].get("model"),
        "steps": [[verb, dict(record["config"])] for verb, record in records.items()],
        **texts,
        "seed": first["seed"],
        "effort": first["effort"],
    }


def regression(
    suite: str,
    common: Common,
    *,
    baselines: Path = BASELINES,
    update: bool = False,
    repeats: int = REPEATS,
    steps: Steps | None = None,
    runner: Runner = in_fresh_process,
) -> dict[str, Any]:
    """Measure the suite and compare it with its baseline, or write that.

    Args:
        suite: A name in `SUITES`; the baseline is ``NAME.json``.
        common: Workspace, model, text, dtype and seed.
        baselines: Folder of baselines; in the one that ships there need not be one for the suite.
        update: Write the baseline instead of comparing with it.
        repeats: Runs for a baseline.
        steps: Instead of those of the suite.
        runner: Runs one stage.

    Raises:
        CompressError: A folder that was named has no baseline, it belongs to another protocol, or a stage failed.
    """
    steps, file = steps or SUITES[suite], baselines / f"{suite}.json"
    if not update:
        known = _baseline(file)
        return _verdict(suite, known, file, *measure(steps, common, runner=runner))
    runs: list[Figures] = []
    protocol: dict[str, Any] = {}
    for number in range(repeats):
        threads = 1 + number % (os.cpu_count() or 1)
        again = replace(common, run=common.run / f"repeat-{number}", threads=threads)
        figures, protocol = measure(steps, again, runner=runner)
        runs.append(figures)
    return _written(suite, file, protocol, runs)


def finished(folder: Path, *, baselines: Path = BASELINES, update: bool = False) -> dict[str, Any]:
    """Compare the chain in a workspace with the baseline ``recipe.json``, or write that of its one run.

    Raises:
        CompressError: There is no chain or no baseline, or the baseline belongs to another protocol.
    """
    records = stage_records(folder)
    if not records:
        raise CompressError(f"There is no finished stage in {folder}.", "Run a recipe there first.")
    figures, protocol = figures_of(records), finished_protocol(records)
    file = baselines / f"{RECIPE}.json"
    if update:
        return _written(RECIPE, file, protocol, [figures])
    return _verdict(RECIPE, _baseline(file), file, figures, protocol)


def _baseline(file: Path) -> dict[str, Any] | None:
    """The baseline; None where none ships. In a folder of the user's own there has to be one."""
    if not file.is_file() and file.parent != BASELINES:
        raise CompressError(f"There is no baseline {file.name} in {file.parent}.", "Write one with --update.")
    return read_json(file) if file.is_file() else None


def _verdict(
    suite: str, baseline: dict[str, Any] | None, file: Path, figures: Figures, protocol: dict[str, Any]
) -> dict[str, Any]:
    result = _head(suite, protocol)
    if baseline is None:
        measured = {name: {"kind": kind, "value": value} for name, (kind, value) in figures.items()}
        return result | {"figures": measured, "lacks": str(file), "passed": True}
    check_protocol(baseline, protocol)
    comparisons = compare(baseline, figures)
    return result | {
        "comparisons": as_json(comparisons),
        "regressions": [each.sentence() for each in comparisons if not each.passed],
        "passed": all(each.passed for each in comparisons),
    }


def _written(suite: str, file: Path, protocol: dict[str, Any], runs: list[Figures]) -> dict[str, Any]:
    baseline = make_baseline(suite, protocol, runs) | {"versions": versions(), "host": host()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, baseline)
    return _head(suite, protocol) | {"written": str(file), "passed": True}


def _head(suite: str, protocol: dict[str, Any]) -> dict[str, Any]:
    return {
        "format_version": 1,
        "suite": suite,
        "versions": versions(),
        "host": host(),
        "protocol": protocol,
    }


def report(result: Mapping[str, Any]) -> str:
    """The verdict as lines of text, what regressed last."""
    if "written" in result:
        return f"baseline written: {result['written']}"
    if "lacks" in result:
        lines = [f"measured  {name}: {each['value']}" for name, each in result["figures"].items()]
        lacks = (
            f"nothing to compare with: there is no {result['lacks']}; --update writes this machine's figures"
        )
        return "\n".join([*lines, lacks])
    lines = [
        f"{each['verdict']:<9} {each['name']}: {each['value']} (baseline {each['baseline']}, bar {each['bar']})"
        for each in result["comparisons"]
    ]
    failed = result["regressions"]
    lines += [f"REGRESSED {sentence}" for sentence in failed]
    return "\n".join([*lines, f"{len(lines) - 2 * len(failed)} passed, {len(failed)} failed"])


def main(arguments: list[str] | None = None) -> int:
    """Command line; exits with 1 on a regression, naming it, by how much, and the bar."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.regression", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few tokens and steps: minutes on two cores")
    parser.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("--repeats", type=int, help="with --update: runs behind a baseline (default: 3)")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help="folder of baselines")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--data", help="text source (default: pydoc)")
    parser.add_argument("--dtype", help="compute dtype (default: float32)")
    parser.add_argument("--finished", type=Path, help="run nothing: take the chain in this workspace")
    parser.add_argument("--out", type=Path, help="write figures and verdicts as JSON to this file")
    parser.add_argument("--run", type=Path, help="keep the workspaces in this folder")
    given = parser.parse_args(arguments)
    if given.repeats is not None and given.repeats < 1:
        parser.error("--repeats is below 1")
    if given.repeats is not None and not given.update:
        parser.error("--repeats counts the runs behind a baseline, and without --update none is written")
    measuring = ("model", "data", "dtype", "run", "repeats", "quick")
    if given.finished is not None and (idle := [name for name in measuring if getattr(given, name)]):
        parser.error(f"--{idle[0]} says how to run a chain, and --finished takes one that was run")
    with tempfile.TemporaryDirectory() as folder:
        common = Common(
            run=given.run or Path(folder) / "run",
            model=given.model or EMBEDDED,
            data=given.data or "pydoc",
            dtype=given.dtype or "float32",
            effort="quick",
        )
        try:
            if given.finished is not None:
                result = finished(given.finished, baselines=given.baselines, update=given.update)
            else:
                result = regression(
                    "quick" if given.quick else "chain",
                    common,
                    baselines=given.baselines,
                    update=given.update,
                    repeats=given.repeats or REPEATS,
                )
        except CompressError as error:
            sys.stderr.write(f"error: {error.cause}\n{error.remedy}\n")
            return error.exit_code
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(report(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
