"""fit: train the parameters of a model that ask for gradients on token windows, resumable bit for bit."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from compress.adapters.distill import Distillation, DistillationLoss
from compress.adapters.fit_config import FitConfig, learning_rate, window_order
from compress.adapters.loss import TokenLoss, trained_tokens
from compress.adapters.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from compress.adapters.state import FitState, load_state, save_state
from compress.data.windows import Windows
from compress.errors import CompressError
from compress.model.load import preferred_dtype
from compress.progress import Progress

__all__ = ["Distillation", "FitConfig", "FitResult", "StatefulHook", "StepHook", "fit"]


SAVE_SECONDS = 60.0
"""A state is saved after so long, whatever the number of steps."""
SAVE_COST = 20.0
"""But not before so many times what the last one took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What training did.

    Attributes:
        losses: Training loss of every step (nats per trained token).
        validation_before: Mean loss on the validation windows before the first step; None without windows.
        validation_after: The same after the last step.
        tokens: Trained tokens, counted every time they were used.
        seconds: Time in training, over all resumed parts, validation left out.
        steps: Optimizer steps done.
    """

    losses: tuple[float, ...]
    validation_before: float | None
    validation_after: float | None
    tokens: int
    seconds: float
    steps: int


@runtime_checkable
class StepHook(Protocol):
    """Sees the gradients of a step: averaged over accumulation, unscaled, before clipping and the update."""

    def before_step(self, step: int) -> None:
        """Act on step ``step`` (from 0)."""


@runtime_checkable
class StatefulHook(StepHook, Protocol):
    """A hook whose own state belongs into the resume file."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state, as CPU tensors."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a state that ``state_dict`` returned."""


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
) -> FitResult:
    """Train every parameter of ``model`` that asks for a gradient: adapters, or what alignment released.

    With ``state_dir`` the state is saved every ``config.save_every`` steps, once a minute where steps are long, at
    the end, and on Ctrl-C; the same call then goes on from it and ends bit for bit where an uninterrupted run ends.
    The caller deletes the file when the result is safe. The model is left in eval mode.

    With ``distillation`` the loss compares with a teacher at the positions that carry a label; validation keeps the
    labels' own loss.

    Raises:
        CompressError: There is nothing to train or to train on, the loss is not finite, the saved state
            belongs to a different run, or several processes were launched.
    """
    usable = (windows.labels[:, 1:] != -100).any(dim=1).nonzero().flatten()
    for text, given in (("training", windows), ("validation", validation)):
        if given is not None and trained_tokens(given.labels) == 0:
            raise CompressError(f"The {text} text has no token to predict.", "Give a longer text.")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise CompressError("The model has no parameter to train.", "Attach an adapter first.")
    run = _Run(model, trained, config, distillation)
    identity = {**asdict(config), "data": _digest(windows.ids, windows.labels), "parameters": sorted(trained)}
    if distillation is not None:
        identity["objective"] = ["distillation", distillation.text_share, distillation.feature_weight]
    state = None if state_dir is None else load_state(state_dir, identity)
    if state is not None:
        run.restore(state, hooks)
    before, seconds, done, losses = None, 0.0, 0, torch.zeros(0, dtype=torch.float64)
    if state is not None:
        before, seconds, done, losses = state.notes["before"], state.seconds, state.step, state.losses
    elif validation is not None:
        before = run.evaluate(validation)
    begun = time.perf_counter() - seconds

    def save() -> None:
        if state_dir is not None:
            tensors = run.tensors(hooks)
            elapsed = time.perf_counter() - begun
            notes = {"before": before}
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
            save()
            raise
        if not math.isfinite(loss):
            raise CompressError(
                f"The training loss of step {done + 1} is {loss}.", "Give a lower learning rate."
            )
        for hook in hooks:
            hook.before_step(done)
        run.update(done)
        done += 1
        losses = torch.cat([losses, torch.tensor([loss], dtype=torch.float64)])
        waited = time.perf_counter() - saved
        if (
            done % config.save_every == 0
            or done == config.steps
            or waited > max(SAVE_SECONDS, SAVE_COST * cost)
        ):
            start = time.perf_counter()
            save()
            saved = time.perf_counter()
            cost = saved - start
        if progress is not None:
            try:
                progress(done, config.steps, f"loss {loss:.3f}")
            except KeyboardInterrupt:
                save()
                raise
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
    )


class _Run:
    """One model, optimizer and accelerator, wired for ``fit``."""

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        config: FitConfig,
        distillation: Distillation | None,
    ) -> None:
        self.model, self.trained, self.config = model, trained, config
        device = next(iter(trained.values())).device
        self.device = device
        self.bfloat16 = _use_bfloat16(model, config, device)
        # The same arguments always, because accelerate keeps them for the whole process: autocast is ours
        # (``_compute``), and the model stays where it is.
        self.accelerator = Accelerator(device_placement=False, mixed_precision="no")
        if self.accelerator.num_processes > 1:
            raise CompressError(
                f"Training was launched in {self.accelerator.num_processes} processes.", "Launch one process."
            )
        self.optimizer = make_optimizer(model, trained, config)
        self.token_loss = TokenLoss(model)
        objective = self.token_loss if distillation is None else DistillationLoss(model, distillation)
        self.loss, self.prepared = self.accelerator.prepare(objective, self.optimizer)

    @contextmanager
    def _compute(self) -> Iterator[None]:
        """Bfloat16 where chosen; without the second context PEFT copies each input to float32 and back."""
        with (
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16),
            disable_input_dtype_casting(self.model, active=self.bfloat16),
        ):
            yield

    def gradients(self, ids_NS: Tensor, labels_NS: Tensor, step: int) -> float:
        """Fill ``.grad`` with the gradient of the mean loss over the trained tokens; returns that loss."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens = trained_tokens(labels_NS)
        micro = self.config.micro_batch
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        parts = zip(ids_NS.split(micro), labels_NS.split(micro), strict=True)
        for index, (ids, labels) in enumerate(parts):
            with _seeded(f"{self.config.seed}/{step}/{index}", self.device):
                with self._compute():
                    loss = self.loss(ids.to(self.device), labels.to(self.device)) / tokens
                self.accelerator.backward(loss)
            total += loss.detach()
        return float(total)

    def update(self, step: int) -> None:
        """Clip and take optimizer step ``step``."""
        if self.config.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(list(self.trained.values()), self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.prepared.step()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, windows: Windows) -> float:
        """Mean loss (nats) over the trained tokens of ``windows``, in eval mode."""
        self.model.eval()
        total, micro = 0.0, self.config.micro_batch
        with torch.no_grad(), self._compute():
            for ids, labels in zip(windows.ids.split(micro), windows.labels.split(micro), strict=True):
                total += float(self.token_loss(ids.to(self.device), labels.to(self.device)))
        return total / trained_tokens(windows.labels)

    def tensors(self, hooks: Sequence[StepHook]) -> dict[str, Tensor]:
        """Parameters, the optimizer's state and that of the hooks."""
        found = {f"parameter.{name}": p.detach().cpu() for name, p in self.trained.items()}
        found |= optimizer_tensors(self.optimizer, self.trained)
        for index, hook in enumerate(hooks):
            if isinstance(hook, StatefulHook):
                found |= {f"hook.{index}.{name}": value.clone() for name, value in hook.state_dict().items()}
        return found

    def restore(self, state: FitState, hooks: Sequence[StepHook]) -> None:
        """Take up what ``tensors`` returned after ``state.step`` steps."""
        for name, parameter in self.trained.items():
            with torch.no_grad():
                parameter.copy_(state.tensors[f"parameter.{name}"])
        restore_optimizer(self.optimizer, self.trained, state.tensors)
        for index, hook in enumerate(hooks):
            if isinstance(hook, StatefulHook):
                prefix = f"hook.{index}."
                hook.load_state_dict(
                    {n.removeprefix(prefix): t for n, t in state.tensors.items() if n.startswith(prefix)}
                )


@contextmanager
def _seeded(stream: str, device: torch.device) -> Iterator[None]:
    """Dropout draws from a generator seeded by ``stream``; the global one is left as it was."""
    digest = hashlib.sha256(stream.encode()).digest()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        yield


def _use_bfloat16(model: nn.Module, config: FitConfig, device: torch.device) -> bool:
    if config.precision != "auto":
        return config.precision == "bfloat16"
    frozen = [p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    if torch.bfloat16 in frozen:
        return True
    return preferred_dtype(device) == torch.bfloat16


def _digest(*tensors: Tensor) -> str:
    """sha256 of shapes and contents."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
