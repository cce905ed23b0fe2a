"""The life of one stage: find it done, go on with it, or make it; then record what was measured."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compress.engine import Engine, LocalEngine
from compress.errors import UsageError
from compress.pipelines.identity import changed_inputs, differences, same_request, stage_id
from compress.pipelines.integrity import describe_files
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common
from compress.pipelines.workspace import FORMAT_VERSION, MEASUREMENTS, MODEL_VERBS, Stage, Workspace

if TYPE_CHECKING:  # one process needs none of it
    from compress.pipelines.team import Team

ASIDE = ("recompute",)
"""Settings that decide what a stage takes and nothing of its result: recorded, and no part of its identity."""
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "scipy", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every verb works with.

    Attributes:
        common: The options that all verbs share.
        workspace: The chain.
        reporter: Says what happens.
        team: The processes that train together; None where this is the only one.
    """

    common: Common
    workspace: Workspace
    reporter: Reporter
    engine: Engine = dataclasses.field(default_factory=LocalEngine)
    team: Team | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a verb came to.

    Attributes:
        stage: The stage; None on a dry run that would make it.
        fresh: Whether it was made just now.
        plan: On such a dry run, the ``verb`` and the ``config`` it would have.
    """

    stage: Stage | None
    fresh: bool
    plan: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def summary(self) -> Mapping[str, Any]:
        """JSON values: the stage's record and path, or the plan."""
        return self.plan if self.stage is None else {"path": str(self.stage.path), **self.stage.record}


def run_stage(
    context: Context,
    verb: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    work: Callable[[Path], Mapping[str, Any]],
    scratch: Sequence[str] = (),
    disk: Callable[[], float] | None = None,
    aside: Mapping[str, Any] = MappingProxyType({}),
) -> Outcome:
    """Make the stage ``verb``, unless it is there already.

    Args:
        context: Common options, workspace and reporter.
        verb: Name of the stage.
        config: Every setting that decides the result; JSON values.
        inputs: Identity of each input by name.
        work: Writes the artifact into the folder it is given and returns the metrics. Steps worth keeping when it
            is interrupted go into sub-folders, which it finds again on the next run of the same request.
        scratch: Patterns of sub-folders that are no part of the artifact. They go once the stage's record is on disk,
            so that nothing is done again if the process is killed before that.
        disk: Bytes that the stage holds on disk at its peak; not asked where there is nothing to do.
        aside: Settings that do not decide the result (`aside_dict`): a finished stage stays whatever they are, and
            unfinished work goes on with others.

    Raises:
        UsageError: The stage exists with other settings and ``--redo`` was not given.
        CompressError: The disk has not got that room.
    """
    workspace, reporter = context.workspace, context.reporter
    wanted = stage_id(verb, config, inputs)
    done = workspace.find(verb)
    redone = done is not None and workspace.was_carried_out(done)
    if (
        done is not None
        and same_request(done.record, verb, config, inputs)
        and (redone or not context.common.redo)
    ):
        reporter.say(f"{verb}: already done in {done.path} with these settings; nothing to do.")
        return Outcome(stage=done, fresh=False)
    if done is not None and not context.common.redo and verb not in MEASUREMENTS:
        changed = differences(done.record["config"], config) or changed_inputs(done.record["inputs"], inputs)
        raise UsageError(
            f"{done.path} was made with other settings ({changed}).",
            "Give --redo to replace it and drop the stages after it, or start another chain with --run DIR.",
        )
    if context.common.data is None and (note := _other_text(workspace, verb, config)):
        reporter.say(note)
    if note := _unfinished_before(workspace, verb):
        reporter.say(note)
    if context.common.dry_run:
        show_plan(reporter, verb, {**config, **aside})
        return Outcome(stage=None, fresh=False, plan={"verb": verb, "config": {**config, **aside}})
    import torch

    partial = workspace.open_partial(
        verb, config, inputs, redo=context.common.redo, threads=torch.get_num_threads()
    )
    own, begun = torch.get_num_threads(), workspace.threads_of(partial)
    replaces = verb if done is not None and verb not in MEASUREMENTS else None
    record = workspace.finished(partial)
    if record is None:
        if begun is not None and begun != own:
            reporter.say(
                f"{verb}: going on with {begun} threads, as it began: their number decides the last bits."
            )
            torch.set_num_threads(begun)
        try:
            record = _work(
                context,
                verb,
                partial,
                wanted,
                config=config,
                inputs=inputs,
                work=work,
                scratch=scratch,
                disk=disk,
                aside=aside,
            )
        finally:
            torch.set_num_threads(own)
    else:
        reporter.say(f"{verb}: an interrupted run had done all the work in {partial.name}.")
    dropped = [] if replaces is None else workspace.names_from(replaces)
    stage = workspace.complete(partial, record, scratch=scratch, replaces=replaces)
    if dropped:
        reporter.say(f"{verb}: --redo dropped {', '.join(dropped)}.")
    reporter.say(f"{verb}: {stage.path} in {record['seconds']:.0f} s, peak memory {_peaks(record)}.")
    return Outcome(stage=stage, fresh=True)


def _work(
    context: Context,
    verb: str,
    partial: Path,
    wanted: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    work: Callable[[Path], Mapping[str, Any]],
    scratch: Sequence[str],
    disk: Callable[[], float] | None,
    aside: Mapping[str, Any],
) -> dict[str, Any]:
    """Do the work of a stage and measure it; returns what its ``stage.json`` says."""
    workspace, reporter = context.workspace, context.reporter
    if any(path.is_dir() for path in partial.iterdir()):
        reporter.say(f"{verb}: going on with the interrupted run in {partial.name}.")
    effort = context.common.effort
    shown = sorted({**config, **aside}.items())
    reporter.say(f"{verb}: effort {effort}; {', '.join(f'{k} {v}' for k, v in shown)}")
    started = time.monotonic()
    from compress.evaluate.memory import PeakMemory
    from compress.evaluate.memory_timeline import MemoryTimeline
    from compress.pipelines.model_input import device_and_dtype  # it needs this module

    device, _ = device_and_dtype(context.common)
    gpu = None if device == "cpu" else device

    try:
        if disk is not None:
            from compress.pipelines.disk import require_space

            require_space(workspace.root, verb, disk(), partial)
        with PeakMemory(device) as peak, MemoryTimeline(device=gpu) as timeline:
            metrics = work(partial)
    except BaseException:
        workspace.abandon(partial)
        raise
    # Work that measures peaks of its own resets the high-water marks: what was sampled before that counts too.
    host_peak = max(peak.host_bytes, timeline.host_peak)
    device_peak = None if gpu is None else max(peak.device_bytes or 0, timeline.device_peak)
    return {
        "format_version": FORMAT_VERSION,
        "id": wanted,
        "verb": verb,
        "config": dict(config),
        "aside": dict(aside),
        "inputs": dict(inputs),
        "effort": effort,
        "seed": context.common.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "host": host(),
        "command": ["compress", *sys.argv[1:]],
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": device_peak or host_peak,
        "peak_host_bytes": host_peak,
        "peak_device_bytes": device_peak,
        "memory_timeline": timeline.record(),
        "metrics": dict(metrics),
        "files": describe_files(partial, scratch=scratch),
    }


def _peaks(record: Mapping[str, Any]) -> str:
    """Peaks in words; of the host alone without more, as there is nothing to tell it from."""
    host, device = record.get("peak_host_bytes"), record.get("peak_device_bytes")
    if not device or host is None:
        return f"{record['peak_memory_bytes'] / 1e9:.2f} GB"
    return f"{device / 1e9:.2f} GB on the GPU, {host / 1e9:.2f} GB on the host"


def _other_text(workspace: Workspace, verb: str, config: Mapping[str, Any]) -> str | None:
    """A note that the stages before read a text that was named to them, while this one has the default."""
    if "data" not in config:
        return None
    for stage in reversed(workspace.stages):
        before = stage.record["config"].get("data", config["data"])
        if stage.verb != verb and before != config["data"]:
            return (
                f"note: {stage.path.name} read {before}. No text is named here, so {verb} reads {config['data']}: "
                f"--data {before} would go on with the same."
            )
    return None


def _unfinished_before(workspace: Workspace, verb: str) -> str | None:
    """A note that the verb works on an older model than the one that an interrupted stage would make."""
    if verb not in ("align", "quantize", "train"):
        return None
    unfinished = [(other, workspace.partial(other)) for other in MODEL_VERBS if other != verb]
    found = [(other, path) for other, path in unfinished if path is not None]
    if not found:
        return None
    other, path = found[-1]
    before = workspace.model_before(verb)
    name = (workspace.model or {}).get("name", "the original model") if before is None else before.path.name
    return (
        f"note: {path.name} is the unfinished work of an interrupted {other}. {verb} does without it and works on "
        f"{name}: to have its model, repeat the command of {other} first."
    )


def show_plan(reporter: Reporter, verb: str, config: Mapping[str, Any]) -> None:
    """Print the settings that a verb would run with."""
    rows = [(key, str(value)) for key, value in sorted(config.items())]
    reporter.table(f"{verb} would run with", ("setting", "value"), rows)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries a result depends on."""
    found = {"python": platform.python_version(), "compress": importlib.metadata.version("compress-llm")}
    return found | {name: importlib.metadata.version(name) for name in LIBRARIES}


def host() -> dict[str, Any]:
    """The machine, without names that identify it."""
    import torch

    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def settings_dict(settings: Any) -> dict[str, Any]:
    """What of a settings dataclass decides the result, as JSON values."""
    given = dataclasses.asdict(settings).items()
    return {key: value for key, value in given if value is not None and key not in ASIDE}


def aside_dict(settings: Any) -> dict[str, Any]:
    """The rest of it, `ASIDE`, as JSON values."""
    return {key: value for key, value in dataclasses.asdict(settings).items() if key in ASIDE}
