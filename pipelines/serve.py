"""The other processes of several: each waits for the first one's notes, builds what they say, and trains along."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.adapters.align import write_weights
from compress.adapters.distill import Distillation
from compress.adapters.fit_config import FitConfig
from compress.adapters.followed import MaskFollower
from compress.adapters.ranks import Broken, Ranks, broken, was_left
from compress.adapters.train import StepHook, fit
from compress.data.windows import Windows
from compress.errors import CompressError
from compress.heap import keep_nothing
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.pipelines.align import weights_to_train
from compress.pipelines.dispatch import quiet_libraries
from compress.pipelines.exhausted import memory_failure
from compress.pipelines.launch import POLL, Launch
from compress.pipelines.prune_find import scored_adapter
from compress.pipelines.prune_repair import repair_to_train
from compress.pipelines.train import adapter_to_train
from compress.stopping import Stop, Stopped

MEETING = ("align",)
"""Jobs whose processes meet within each pass: the first one learns that this one failed when its connections close."""
HEARD = 15.0
"""Seconds for the first process to say why all end, before this one says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained along.

    Attributes:
        model: As `compress.adapters.train.fit` takes it.
        hooks: Those of this process.
        distillation: What the loss compares with.
        sharded: The weights are divided among the processes.
        after: What the first process needs this one for once training is done.
    """

    model: nn.Module
    hooks: list[StepHook] = field(default_factory=list)
    distillation: Distillation | None = None
    sharded: bool = False
    after: Callable[[], None] = lambda: None


def serve(launch: Launch) -> int:
    """Train along until the first process says that all is done; returns the exit code.

    Nothing is printed, unless this process failed and the first cannot say so. Requests to stop are left to the first
    process while both train, and end this one while it waits.
    """
    try:
        return _serve(launch)
    finally:
        with suppress(RuntimeError):  # the first process may be gone
            launch.post(f"left/{launch.rank}", {})


def _serve(launch: Launch) -> int:
    stop, number = Stop(), 0
    with stop.listening():
        quiet_libraries()
        while True:
            try:
                stop.check()
                if launch.note("end") is not None:
                    return _left(launch)
                note = launch.note(f"job/{number}")
            except Stopped as stopped:
                return 128 + stopped.number
            except RuntimeError:  # whoever kept the notes is gone, and with it the first process
                return 1
            if note is None:
                time.sleep(POLL)
                continue
            try:
                # on an interrupt the first process has saved; of a failure elsewhere another says why
                with suppress(KeyboardInterrupt, Broken):
                    _take_part(launch, note)
            except Exception as error:
                told = memory_failure(error, note["kind"]) or error
                return _failed(launch, told, meets=note["kind"] in MEETING)
            number += 1
            gc.collect()


def _left(launch: Launch) -> int:
    end = launch.note("end") or {}
    code = int(end.get("code", 1))
    if code == 0:
        launch.leave()
    return code


def _failed(launch: Launch, error: Exception, *, meets: bool) -> int:
    """Tell the first process why; returns the exit code once it has said so, or says it here."""
    size = launch.size
    if was_left(error):
        error = broken(size, str(error))
    code = error.exit_code if isinstance(error, CompressError) else 1
    cause = (
        error.cause if isinstance(error, CompressError) else f"{type(error).__name__}: {error}".split("\n")[0]
    )
    remedy = (
        error.remedy
        if isinstance(error, CompressError)
        else "Run it without torchrun and with --debug, and report what that shows."
    )
    with suppress(RuntimeError):  # when the notes are gone
        launch.post_first(
            "failed",
            {"rank": launch.rank, "cause": f"{cause.rstrip('.')}.", "remedy": remedy, "code": code},
        )
        if launch.gloo:  # over NCCL the first one would not notice
            if meets:
                return code
            launch.leave()
        if launch.wait(("heard", "end"), HEARD) is not None:
            return code
    sys.stderr.write(f"error: Process {launch.rank} of {size} failed: {cause.rstrip('.')}.\n{remedy}\n")
    return code


def _take_part(launch: Launch, note: Mapping[str, Any]) -> None:
    torch.set_num_threads(int(note["threads"]))
    ranks = launch.ranks(note["device"])
    job = JOBS[note["kind"]](ranks, note["device"], note["what"])
    said = ranks.value(None)
    if said["config"]["recompute"]:
        keep_nothing()
    given = [Windows(**ranks.tensors(None), protocol={}) for _ in range(1 + bool(said["validated"]))]
    fit(
        job.model,
        given[0],
        FitConfig(**said["config"]),
        hooks=job.hooks,
        validation=given[1] if said["validated"] else None,
        distillation=job.distillation,
        ranks=ranks,
        sharded=job.sharded,
    )
    job.after()


def _train(ranks: Ranks, device: str, what: Mapping[str, Any]) -> Job:
    return Job(model=adapter_to_train(device=device, **what)[0])


def _repair(ranks: Ranks, device: str, what: Mapping[str, Any]) -> Job:
    model, distillation = repair_to_train(device=device, **what)
    return Job(model=model, distillation=distillation)


def _score(ranks: Ranks, device: str, what: Mapping[str, Any]) -> Job:
    arch = checkpoint_architecture(Checkpoint(what["path"]))
    network = load_model(what["path"], dtype=what["dtype"], device=device)
    model = scored_adapter(network, arch, **what["adapter"])
    return Job(model=model, hooks=[MaskFollower(model, arch, ranks)])


def _align(ranks: Ranks, device: str, what: Mapping[str, Any]) -> Job:
    model, _, distillation = weights_to_train(device=device, ranks=ranks, **what)
    source = Checkpoint(what["path"])
    return Job(
        model=model,
        distillation=distillation,
        sharded=True,
        after=lambda: write_weights(model, source, Path(), ranks=ranks),
    )


JOBS: dict[str, Callable[[Ranks, str, Mapping[str, Any]], Job]] = {
    "train": _train,
    "repair": _repair,
    "score": _score,
    "align": _align,
}
"""What a note can ask for."""
