"""The first of several processes: it does what the command says, and has the others train with it.

The others wait (`compress.pipelines.serve`). Where a stage is about to train, the first leaves a note that says what
to build; all build it, and train together. Everything else, locks, files, measurements, proofs and what is printed,
is done by the first alone, as if it were the only one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.adapters.fit_config import FitConfig
from compress.adapters.ranks import Broken, Ranks, broken, was_left
from compress.adapters.shares import shares
from compress.adapters.train import FitResult, fit
from compress.data.windows import Windows
from compress.errors import CompressError, UsageError
from compress.importance import CRITERIA
from compress.pipelines.launch import Launch
from compress.pipelines.prune_masks import MASKED
from compress.pipelines.settings import (
    AlignSettings,
    Common,
    LoopSettings,
    PruneSettings,
    TrainSettings,
    resolve,
)

VERBS = ("prune", "align", "train", "run")
"""Verbs that several processes can do together."""
TOLD = 5.0
"""Seconds for the reason of a failure to arrive, and for the others to end."""


class Team:
    """The processes, as the first one sees them.

    Args:
        launch: The first process.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._jobs = 0
        self.size = launch.size

    def require(self, verb: str, common: Common) -> None:
        """Refuse what several processes cannot do together, before anything is touched.

        Raises:
            UsageError: The verb does not train, one device is named for all, there are too few GPUs, or a limit is set
                that is counted for one process.
        """
        if verb not in VERBS:
            raise UsageError(
                f"{self.size} processes were launched, and compress {verb} is done by one.",
                f"Run it without torchrun; {', '.join(VERBS[:-1])} and {VERBS[-1]} train in several.",
            )
        if common.memory_limit is not None:
            raise UsageError(
                f"--memory-limit is counted for one process, and {self.size} were launched.",
                "Leave it out, or run without torchrun.",
            )
        if common.device.startswith("cuda:"):
            raise UsageError(
                f"--device {common.device} is one GPU, and {self.size} processes were launched.",
                "Give --device cuda: each process takes a GPU of its own.",
            )
        gpus = torch.cuda.device_count()
        if common.device != "cpu" and 0 < gpus < self._launch.local_size:
            raise UsageError(
                f"{self._launch.local_size} processes were launched on a machine with {gpus} GPUs.",
                f"Launch {gpus}, or give --device cpu.",
            )

    def require_training(self, steps: Sequence[tuple[str, Any]], effort: str) -> None:
        """Refuse a command that trains nothing, or that leaves a process without windows to train.

        Args:
            steps: Verbs with their settings, those of a recipe or one.
            effort: Gives the settings of a training that ``recover`` begins by itself.

        Raises:
            UsageError: No step trains, a step of training has fewer windows than there are processes, or the optimizer
                needs whole matrices.
        """
        verbs = [verb for verb, _ in steps]
        trained: list[LoopSettings] = []
        for verb, settings in steps:
            if isinstance(settings, AlignSettings) and settings.optimizer == "galore":
                raise UsageError(
                    f"GaLore projects whole matrices, and {self.size} processes each hold a part of them.",
                    "Use --optimizer adamw, or run without torchrun.",
                )
            if verb in ("train", "align") or (isinstance(settings, PruneSettings) and prune_trains(settings)):
                trained.append(settings)
            elif verb == "recover" and "train" not in verbs:
                trained.append(resolve(TrainSettings, {}, effort))
        if not trained:
            raise UsageError(
                f"{self.size} processes were launched, and nothing is trained here.",
                "Run it without torchrun.",
            )
        for loop in trained:
            shares(loop.micro_batch * loop.accumulation, loop.micro_batch, self.size)

    def announce(self, kind: str, device: str, what: Mapping[str, Any]) -> Ranks:
        """Have the others build what is trained next; see `compress.pipelines.serve`.

        Args:
            kind: Of job.
            device: "cpu" or "cuda".
            what: Its arguments, as JSON values.

        Returns:
            The process group to train with.
        """
        note = {"kind": kind, "device": device, "threads": torch.get_num_threads(), "what": dict(what)}
        self._launch.post(f"job/{self._jobs}", note)
        self._jobs += 1
        return self._launch.ranks(device)

    def fit(
        self, ranks: Ranks, model: nn.Module, windows: Windows, config: FitConfig, **more: Any
    ) -> FitResult:
        """Train together what was announced.

        Raises:
            CompressError: What another process failed with.
        """
        validation: Windows | None = more.get("validation")
        try:
            ranks.value({"config": dataclasses.asdict(config), "validated": validation is not None})
            for given in filter(None, (windows, validation)):
                ranks.tensors({"ids": given.ids, "labels": given.labels})
            return fit(model, windows, config, ranks=ranks, **more)
        except (RuntimeError, Broken) as error:
            if not was_left(error):
                raise
            raise self._reason(error) from error

    def _reason(self, error: Exception) -> CompressError:
        """Why training broke off: what another process says of it, else that one is gone."""
        said = self._launch.wait(("failed",), TOLD)
        if said is None:
            return error if isinstance(error, Broken) else broken(self.size, str(error))
        self._launch.post("heard", {})
        kind = UsageError if said["code"] == UsageError.exit_code else CompressError
        return kind(f"Process {said['rank']} of {self.size} failed: {said['cause']}", said["remedy"])

    def end(self, code: int) -> None:
        """Let the others end with this exit code."""
        self._launch.post("end", {"code": code})
        if code == 0 or self._launch.gloo:
            self._launch.leave()
        if not self._launch.hosted:  # with this process goes the board that the others read it from
            self._launch.wait_all([f"left/{rank}" for rank in range(1, self.size)], TOLD)


def prune_trains(settings: PruneSettings) -> bool:
    """Whether pruning with these settings trains, to score or to repair."""
    if settings.shape in MASKED:
        return False
    scoring = settings.repair == "lora" or CRITERIA.get(settings.criterion).needs == "adapters"
    return scoring or settings.repair_steps > 0
