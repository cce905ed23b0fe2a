"""What ``compress plan`` counts against what a chain then takes: memory, files and, as lower bounds, seconds.

``python -m compress.benchmarks.plan_check [--quick] [--model M] [--data D] [--run DIR] [--out FILE]``

Every stage runs in a process of its own. The peak that was counted for the same options is set against what it took:
on the CPU the process's peak resident memory; on a GPU what torch allocated there, and beside it the host's (a stage
that used no GPU: the host's alone). The weight files are set against the sizes that were counted. The shape is
the plan's own: where scores choose a near one, sizes differ by that. A chain that lies in ``--run`` is not run again.
Times are products and transfers alone: what they leave out is the ratio. They are measured when this runs, so a machine
that does other things compares nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.benchmarks.regression import SUITES, Steps
from compress.benchmarks.stages import Runner, in_fresh_process, run_stages, stage_records
from compress.errors import CompressError
from compress.evaluate.memory import file_bytes
from compress.evaluate.speed import Speed, measure_speed
from compress.machine import capacity
from compress.model.checkpoint import checkpoint_architecture
from compress.model.load import EMBEDDED
from compress.model.planned import headers_of
from compress.pipelines.model_input import ModelInput, device_and_dtype
from compress.pipelines.plan import Chain, planned_chain
from compress.pipelines.plan_verdict import Limits, verdict
from compress.pipelines.settings import Common, PlanSettings
from compress.pipelines.stage import host, versions
from compress.pipelines.workspace import write_json

TAKES = ("minutes", "minutes")
NEEDS = ()

ROWS = {"prune": "pruned", "quantize": "quantized", "train": "small + adapter", "recover": "full + recovered"}
"""By verb: what `eval` calls what it leaves."""


def chain_for(common: Common, steps: Steps) -> Chain:
    """The plan of exactly these steps."""
    checkpoint, _ = headers_of(common.model)
    model = ModelInput(
        name=str(common.model),
        path=checkpoint.path,
        id="",
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )
    exact = {verb: dict(given) for verb, given in steps}
    _, dtype = device_and_dtype(common)
    return planned_chain(model, PlanSettings(), common.effort or "quick", dtype, exact=exact)


def check(
    chain: Chain, records: Mapping[str, Mapping[str, Any]], common: Common, speed: Speed | None
) -> dict[str, Any]:
    """Predicted and measured, and their ratios, for every stage that ran.

    Args:
        chain: The plan.
        records: What the stages recorded, by verb.
        common: Gives the device.
        speed: Measured rates; None: no times.
    """
    device, _ = device_and_dtype(common)
    machine = capacity(common.run, device)
    limits = Limits(device=machine.device_total, host=machine.host_total, disk=machine.disk_free)
    full = chain.models[0]
    files = {model.name: model.file_bytes for model in chain.models}
    files["small + adapter"] = chain.models[-1].file_bytes + 4 * chain.adapters[0]
    files["full + recovered"] = full.file_bytes + 4 * chain.adapters[1]
    measured_rows = (
        {row["name"]: row for row in records["eval"]["metrics"]["rows"]} if "eval" in records else {}
    )
    stages = {}
    for footprint, work in chain.stages:
        verb = footprint.verb
        if verb not in records:
            continue
        found = verdict(footprint, work, limits, speed)
        record = records[verb]
        host_peak = record.get("peak_host_bytes", record["peak_memory_bytes"])
        host_pair = _pair(found["process_bytes"], host_peak)
        on_device = [each for each in found["resources"] if each["resource"] == "device memory"]
        if on_device and record.get("peak_device_bytes"):
            stages[verb] = {
                "peak_of": "device",
                "peak_bytes": _pair(on_device[0]["needs"], record["peak_device_bytes"]),
                "phase": on_device[0]["phase"],
                "host_peak_bytes": host_pair,
            }
        else:
            stages[verb] = {"peak_of": "host", "peak_bytes": host_pair, "phase": found["process_phase"]}
        stages[verb]["seconds"] = _pair(found["at_least_seconds"], record["seconds"])
        if ROWS.get(verb) in measured_rows:
            stages[verb]["file_bytes"] = _pair(files[ROWS[verb]], measured_rows[ROWS[verb]]["bytes"])
        elif verb in ("prune", "align", "quantize") and "path" in record:
            stages[verb]["file_bytes"] = _pair(
                files[ROWS.get(verb, "pruned")], file_bytes(Path(record["path"]))
            )
    return {"format_version": 1, "stages": stages, "planned_shape": (chain.rounding or {}).get("shape")}


def plan_check(
    steps: Steps,
    common: Common,
    *,
    known: Path | None = None,
    timed: bool = True,
    runner: Runner = in_fresh_process,
) -> dict[str, Any]:
    """Plan the steps, run them (or take the chain in ``known``), and compare."""
    chain = chain_for(common, steps)
    speed = None
    if timed:
        device, dtype = device_and_dtype(common)
        speed = measure_speed(common.run, device, dtype)
    records = run_stages(steps, common, runner=runner) if known is None else stage_records(known)
    result = check(chain, records, common, speed)
    shape = records["prune"]["metrics"].get("shape") if "prune" in records else None
    return result | {
        "chosen_shape": shape,
        "model": common.model,
        "settings": [[verb, dict(given)] for verb, given in steps],
        "versions": versions(),
        "host": host(),
    }


def report(result: Mapping[str, Any]) -> str:
    """Predicted over measured, a line for each stage, the worst last."""
    lines = []
    for verb, stage in result["stages"].items():
        parts = []
        labels = {
            "peak_bytes": f"peak_bytes of the {stage['peak_of']}",
            "host_peak_bytes": "peak_bytes of the host",
            "file_bytes": "file_bytes",
            "seconds": "seconds",
        }
        for name, label in labels.items():
            pair = stage.get(name)
            if pair is not None and pair["ratio"] is not None:
                parts.append(
                    f"{label} {pair['predicted']:,.4g} / {pair['measured']:,.4g} = {pair['ratio']:.2f}"
                )
        lines.append(f"{verb}: {'; '.join(parts)} (peak in: {stage['phase']})")
    ratios = {verb: stage["peak_bytes"]["ratio"] for verb, stage in result["stages"].items()}
    worst = max(ratios, key=lambda verb: abs(ratios[verb] - 1))
    return "\n".join([*lines, f"farthest peak, predicted / measured: {worst} {ratios[worst]:.2f}"])


def _pair(predicted: float | None, measured: float) -> dict[str, float | None]:
    ratio = predicted / measured if predicted is not None and measured else None
    return {"predicted": predicted, "measured": measured, "ratio": ratio}


def main(arguments: list[str] | None = None) -> int:
    """Command line; the ratios are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.plan_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few tokens and steps")
    parser.add_argument("--model", default=EMBEDDED, help="default: the embedded model")
    parser.add_argument("--data", default="pydoc", help="text source (default: pydoc)")
    parser.add_argument("--dtype", default="float32", help="compute dtype (default: float32)")
    parser.add_argument(
        "--run", type=Path, help="a workspace: of a chain that was run so, or to keep this one"
    )
    parser.add_argument("--out", type=Path, help="write the comparison as JSON to this file")
    given = parser.parse_args(arguments)
    steps = SUITES["quick" if given.quick else "chain"]
    done = given.run is not None and (given.run / "run.json").is_file()
    with tempfile.TemporaryDirectory() as folder:
        place = given.run or Path(folder) / "run"
        common = Common(run=place, model=given.model, data=given.data, dtype=given.dtype, effort="quick")
        try:
            result = plan_check(steps, common, known=place if done else None)
        except CompressError as error:
            sys.stderr.write(f"error: {error.cause}\n{error.remedy}\n")
            return error.exit_code
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, result)
    print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
