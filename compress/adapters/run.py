"""One model, its optimizer and what a step of training does with them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from compress.adapters.distill import Distillation, DistillationLoss
from compress.adapters.fit_config import FitConfig, learning_rate
from compress.adapters.loss import TokenLoss, trained_tokens
from compress.adapters.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from compress.adapters.state import FitState
from compress.data.windows import Windows
from compress.errors import CompressError
from compress.model.load import preferred_dtype
from compress.model.recompute import recomputing


@runtime_checkable
class StepHook(Protocol):
    """Sees the gradients of a step: averaged over accumulation, unscaled, before clipping and the update."""

    def before_step(self, step: int) -> None:
        """Act on step ``step`` (from 0), whose gradients are finite."""


@runtime_checkable
class SkipHook(StepHook, Protocol):
    """A hook that wants to know of steps that are not taken, as their gradients are not finite."""

    def skip_step(self, step: int) -> None:
        """Act on step ``step`` in the place of ``before_step``."""


@runtime_checkable
class StatefulHook(StepHook, Protocol):
    """A hook whose own state belongs into the resume file."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state, as CPU tensors."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a state that ``state_dict`` returned."""


class Run:
    """One model, optimizer and accelerator, wired for ``fit``.

    Args:
        model: What is trained.
        trained: Its parameters that ask for gradients, by name.
        config: How.
        distillation: The teacher, where the loss compares with one.
    """

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
        self.optimizer = make_optimizer(model, trained, config)
        self.token_loss = TokenLoss(model)
        self.objective = self.token_loss if distillation is None else DistillationLoss(model, distillation)
        self._wire()

    def _wire(self) -> None:
        """Hand both to accelerate.

        Raises:
            CompressError: Several processes were launched, and this one does not know of the others.
        """
        # The same arguments always, because accelerate keeps them for the whole process: autocast is ours
        # (``_compute``), and the model stays where it is.
        self.accelerator = Accelerator(device_placement=False, mixed_precision="no")
        if self.accelerator.num_processes > 1:
            raise CompressError(
                f"Training was launched in {self.accelerator.num_processes} processes.",
                "Launch one process, or train through the command line: torchrun -m -- compress train.",
            )
        self.loss, self.prepared = self.accelerator.prepare(self.objective, self.optimizer)

    @contextmanager
    def _compute(self) -> Iterator[None]:
        """Bfloat16 where chosen; without the second context PEFT copies each input to float32 and back."""
        # Here, as it takes seconds to load and `plan` comes by this module.
        from peft.helpers import disable_input_dtype_casting

        with (
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16),
            disable_input_dtype_casting(self.model, active=self.bfloat16),
        ):
            yield

    @contextmanager
    def _both_ways(self) -> Iterator[None]:
        """Around forward and backward pass: where the latter runs layers again, it does so as the former did.

        Autocast is not in it: backward has its own, that of the forward pass where that is run again.
        """
        from peft.helpers import disable_input_dtype_casting

        with (
            recomputing(self.model) if self.config.recompute else nullcontext(),
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
            with seeded(f"{self.config.seed}/{step}/{index}", self.device), self._both_ways():
                with self._compute():
                    loss = self.loss(ids.to(self.device), labels.to(self.device)) / tokens
                self.accelerator.backward(loss)
            total += loss.detach()
        return float(total)

    def finite(self) -> bool:
        """Whether all gradients are, the same on every process."""
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        return math.isfinite(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))

    def drop(self) -> None:
        """Forget the gradients of a step that is not taken."""
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, step: int) -> None:
        """Clip and take optimizer step ``step``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self._update()
        self.optimizer.zero_grad(set_to_none=True)

    def _update(self) -> None:
        if self.config.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(list(self.trained.values()), self.config.max_grad_norm)
        self.prepared.step()

    def evaluate(self, windows: Windows) -> float:
        """Mean loss (nats) over the trained tokens of ``windows``, in eval mode."""
        self.model.eval()
        total, micro = 0.0, self.config.micro_batch
        with torch.no_grad(), self._compute():
            for ids, labels in zip(windows.ids.split(micro), windows.labels.split(micro), strict=True):
                total += float(self.token_loss(ids.to(self.device), labels.to(self.device)))
        return total / trained_tokens(windows.labels)

    def agreed(self, state: FitState | None) -> FitState | None:
        """The state that every process goes on from."""
        return state

    def decided(self, *, save: bool, stop: bool) -> tuple[bool, bool]:
        """Whether every process saves, and stops, after this step."""
        return save, stop

    @property
    def can_save(self) -> bool:
        """Whether ``tensors`` can be asked for in the middle of a step."""
        return True

    def tensors(self, hooks: Sequence[StepHook]) -> dict[str, Tensor]:
        """Parameters, the optimizer's state and that of the hooks."""
        found = {f"parameter.{name}": self._fetched(p.detach()) for name, p in self.trained.items()}
        found |= optimizer_tensors(self.optimizer, self.trained, self._fetched)
        for index, hook in enumerate(hooks):
            if isinstance(hook, StatefulHook):
                found |= {f"hook.{index}.{name}": value.clone() for name, value in hook.state_dict().items()}
        return found

    def _fetched(self, tensor: Tensor) -> Tensor:
        """A tensor of the state, whole and on the CPU."""
        return tensor.cpu()

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
def seeded(stream: str, device: torch.device) -> Iterator[None]:
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
