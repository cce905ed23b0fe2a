"""fit: train the parameters of a model that ask for gradients on token windows, resumable bit for bit."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.adapters.distill import Distillation
from compress.adapters.fit_config import FitConfig, window_order
from compress.adapters.loss import trained_tokens
from compress.adapters.run import Run, SkipHook, StatefulHook, StepHook
from compress.adapters.state import FitState, load_state, save_state
from compress.data.windows import Windows
from compress.errors import CompressError
from compress.progress import Progress

if TYPE_CHECKING:  # one process needs none of it
    from compress.adapters.ranks import Ranks

__all__ = ["Distillation", "FitConfig", "FitResult", "SkipHook", "StatefulHook", "StepHook", "fit"]


SAVE_SECONDS = 60.0
"""A state is saved after so long, whatever the number of steps."""
SAVE_COST = 20.0
"""But not before so many times what the last one took."""
MOST_SKIPPED = 5
"""Training ends with an error after so many steps in a row whose gradients are not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What training did.

    Attributes:
        losses: Training loss of every step (nats per trained token); that of a skipped step may be no finite number.
        validation_before: Mean loss on the validation windows before the first step; None without windows.
        validation_after: The same after the last step.
        tokens: Trained tokens, counted every time they were used.
        seconds: Time in training, over all resumed parts, validation left out.
        steps: Steps done, skipped ones included.
        skipped: Steps whose gradients were not finite: the optimizer did not take them.
    """

    losses: tuple[float, ...]
    validation_before: float | None
    validation_after: float | None
    tokens: int
    seconds: float
    steps: int
    skipped: int = 0


def fit(
    model: nn.Module,
    windows: Windows,
    config: FitConfig,
    *,
    hooks: Sequence[StepHook] = (),
    state_dir: Path | None = None,
    progress: Progress | None = None,
    validation: Windows | None = None,
    distillation: Distillation | None = None,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> FitResult:
    """Train every parameter of ``model`` that asks for a gradient: adapters, or what alignment released.

    With ``state_dir`` the state is saved every ``config.save_every`` steps, once a minute where steps are long, at
    the end, and on Ctrl-C; the same call then goes on from it and ends bit for bit where an uninterrupted run ends.
    The caller deletes the file when the result is safe. The model is left in eval mode.

    A step whose gradients are not finite changes nothing: the optimizer does not take it, hooks do not see its
    gradients, and it is counted. After `MOST_SKIPPED` of them in a row, or when there are no others, training gives up.

    With ``config.recompute`` activations inside of decoder layers are not kept; losses and parameters are the same.

    With ``distillation`` the loss compares with a teacher at the positions that carry a label; validation keeps the
    labels' own loss.

    With ``ranks`` every one of them calls this with the same windows and settings, and the windows of each step are
    divided among them: see `compress.adapters.together`. State, progress and what is measured are those of the first.
    With ``sharded`` the model is one that `compress.adapters.sharded.shard` was called on.

    Raises:
        UsageError: Layers are to be run again, and the architecture cannot do so.
        CompressError: There is nothing to train or to train on, the gradients are not finite time and again, the saved
            state belongs to a different run, several processes were launched without ``ranks``, or another of them
            failed.
    """
    usable = (windows.labels[:, 1:] != -100).any(dim=1).nonzero().flatten()
    for text, given in (("training", windows), ("validation", validation)):
        if given is not None and trained_tokens(given.labels) == 0:
            raise CompressError(f"The {text} text has no token to predict.", "Give a longer text.")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise CompressError("The model has no parameter to train.", "Attach an adapter first.")
    if ranks is None:
        run = Run(model, trained, config, distillation)
    else:
        from compress.adapters.together import Together

        run = Together(model, trained, config, distillation, ranks=ranks, sharded=sharded)
    identity = {
        **config.identity,
        "data": _digest(windows.ids, windows.labels),
        "parameters": sorted(trained),
    }
    if distillation is not None:
        identity["objective"] = ["distillation", distillation.text_share, distillation.feature_weight]
    state = None if state_dir is None else load_state(state_dir, identity)
    state = run.agreed(state)
    if state is not None:
        run.restore(state, hooks)
    before, seconds, done, losses = None, 0.0, 0, torch.zeros(0, dtype=torch.float64)
    skipped = in_a_row = 0
    if state is not None:
        before, seconds, done, losses = state.notes["before"], state.seconds, state.step, state.losses
        skipped, in_a_row = state.notes.get("skipped", (0, 0))
    elif validation is not None:
        before = run.evaluate(validation)
    begun = time.perf_counter() - seconds

    def save() -> None:
        tensors = run.tensors(hooks)
        if state_dir is not None:
            elapsed = time.perf_counter() - begun
            notes = {"before": before, "skipped": [skipped, in_a_row]}
            save_state(
                state_dir,
                FitState(
                    step=done, seconds=elapsed, losses=losses, tensors=tensors, run=identity, notes=notes
                ),
            )

    model.train()
    saved, cost = time.perf_counter(), 0.0
    per_step = config.micro_batch * config.accumulation
    while done < config.steps:
        rows = usable[window_order(len(usable), config.seed, done * per_step, per_step)]
        try:
            loss = run.gradients(windows.ids[rows], windows.labels[rows], done)
        except KeyboardInterrupt:  # parameters, moments and hooks still are those of ``done`` whole steps
            if run.can_save and state_dir is not None:
                save()
            raise
        taken = run.finite() and math.isfinite(loss)
        if taken:
            for hook in hooks:
                hook.before_step(done)
            run.update(done)
        else:
            for hook in hooks:
                if isinstance(hook, SkipHook):
                    hook.skip_step(done)
            run.drop()
        skipped, in_a_row = skipped + (not taken), 0 if taken else in_a_row + 1
        done += 1
        if in_a_row == min(MOST_SKIPPED, config.steps):
            raise CompressError(
                f"The gradients of {in_a_row} training steps in a row, up to step {done}, are not finite "
                f"(its loss is {loss:.4g}).",
                "Give a lower learning rate, or --dtype float32.",
            )
        losses = torch.cat([losses, torch.tensor([loss], dtype=torch.float64)])
        stopped: KeyboardInterrupt | None = None
        if progress is not None:
            try:
                progress(done, config.steps, f"loss {loss:.3f}" if taken else "skipped: not finite")
            except KeyboardInterrupt as interrupt:
                stopped = interrupt
        waited = time.perf_counter() - saved
        due = (
            stopped is not None
            or done % config.save_every == 0
            or done == config.steps
            or waited > max(SAVE_SECONDS, SAVE_COST * cost)
        )
        saves, stops = run.decided(save=due and state_dir is not None, stop=stopped is not None)
        if saves:
            start = time.perf_counter()
            save()
            saved = time.perf_counter()
            cost = saved - start
        if stops:
            raise KeyboardInterrupt if stopped is None else stopped
    seconds = time.perf_counter() - begun
    model.eval()
    after = None if validation is None else run.evaluate(validation)
    used = usable[window_order(len(usable), config.seed, 0, per_step * config.steps)]
    return FitResult(
        losses=tuple(losses.tolist()),
        validation_before=before,
        validation_after=after,
        tokens=int((windows.labels[:, 1:] != -100).sum(dim=1)[used].sum()),
        seconds=seconds,
        steps=done,
        skipped=skipped,
    )


def _digest(*tensors: Tensor) -> str:
    """sha256 of shapes and contents."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
