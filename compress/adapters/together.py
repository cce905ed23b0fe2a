"""One training by several processes: the windows of a step divided, gradients summed, one state.

The loss of a step is the mean over all its trained tokens, whichever process computes them: every rank divides its
summed loss by the tokens of the whole step, and gradients are added up. So a step is that of one process but for the
order in which float32 numbers are added.

Adapters are whole on every rank, their gradients summed once a step, after all backward passes. Full parameters are
cut (`compress.adapters.sharded`); their gradients are summed layer by layer in each backward pass, for which every
rank makes the same number of passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.adapters.distill import Distillation
from compress.adapters.fit_config import FitConfig
from compress.adapters.loss import trained_tokens
from compress.adapters.ranks import Ranks
from compress.adapters.run import Run, StepHook, seeded
from compress.adapters.shares import Piece, RowDropout, shares
from compress.adapters.state import FitState
from compress.data.windows import Windows
from compress.errors import CompressError


class Together(Run):
    """A run that is one of several on the same training; every method is collective.

    Args:
        model: What is trained, the same on every rank.
        trained: Its parameters that ask for gradients, by name.
        config: How.
        distillation: The teacher, where the loss compares with one.
        ranks: The processes.
        sharded: The trained parameters are cut.

    Raises:
        UsageError: There are more processes than windows in a step.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        config: FitConfig,
        distillation: Distillation | None,
        *,
        ranks: Ranks,
        sharded: bool,
    ) -> None:
        self.ranks, self.sharded = ranks, sharded
        every = shares(config.micro_batch * config.accumulation, config.micro_batch, ranks.size)
        self.pieces = every[ranks.rank]
        self.passes = max(map(len, every)) if sharded else len(self.pieces)
        super().__init__(model, trained, config, distillation)
        self.dropout = RowDropout(model)

    def _wire(self) -> None:
        """Nothing: what accelerate would do is done here, once a step."""

    def gradients(self, ids_NS: Tensor, labels_NS: Tensor, step: int) -> float:
        """Fill ``.grad`` with the gradient of the step's mean loss over all ranks' tokens; returns that loss."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens = trained_tokens(labels_NS)

        def compute() -> list[float]:
            total = torch.zeros((), dtype=torch.float32, device=self.device)
            for piece, weight in self._passes():
                start = piece.index * self.config.micro_batch + piece.first
                rows = slice(start, start + piece.count)
                with (
                    seeded(f"{self.config.seed}/{step}/{piece.index}", self.device),
                    self.dropout.rows(piece),
                    self._both_ways(),
                ):
                    with self._compute():
                        summed = self.objective(ids_NS[rows].to(self.device), labels_NS[rows].to(self.device))
                        loss = summed / tokens * weight
                    loss.backward()
                total += loss.detach()
            return [float(total), *(float(p.grad is not None) for p in parameters)]

        parameters = list(self.trained.values())
        loss, *reached = self.ranks.sums(1 + len(parameters), compute, meets=self.sharded)
        if not self.sharded:
            self.ranks.sum_gradients([p for p, here in zip(parameters, reached, strict=True) if here])
        return loss

    def _passes(self) -> Iterator[tuple[Piece, float]]:
        """The pieces of this rank with weight 1; with cut weights one of weight 0 while others still have some."""
        for number in range(self.passes):
            if number < len(self.pieces):
                yield self.pieces[number], 1.0
            else:
                yield Piece(index=0, first=0, count=1, of=1), 0.0

    def _update(self) -> None:
        if self.config.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.max_grad_norm)
        self.optimizer.step()

    def evaluate(self, windows: Windows) -> float:
        """Mean loss (nats) over the trained tokens of ``windows``, in eval mode; micro batches are divided.

        Where parameters are cut, every rank computes all of them.
        """
        self.model.eval()
        micro = self.config.micro_batch
        parts = list(zip(windows.ids.split(micro), windows.labels.split(micro), strict=True))

        def compute() -> list[float]:
            found = [0.0] * len(parts)
            with torch.no_grad(), self._compute():
                for index, (ids, labels) in enumerate(parts):
                    if self.sharded or index % self.ranks.size == self.ranks.rank:
                        found[index] = float(self.token_loss(ids.to(self.device), labels.to(self.device)))
            return found if self.ranks.first or not self.sharded else [0.0] * len(parts)

        sums = self.ranks.sums(len(parts), compute, meets=self.sharded)
        return sum(sums) / trained_tokens(windows.labels)

    def agreed(self, state: FitState | None) -> FitState | None:
        """The first rank's state, each rank its part; without one, the first rank's parameters."""
        known = (
            None
            if state is None
            else {"step": state.step, "seconds": state.seconds, "run": state.run, "notes": state.notes}
        )
        header = self.ranks.value(known)
        if header is None:
            self._begin_alike()
            return None
        tensors = self.ranks.tensors(
            None if state is None else {"losses": state.losses, **state.tensors}, self._kept
        )
        losses = tensors.pop("losses")
        return FitState(losses=losses, tensors=tensors, **header)

    def _begin_alike(self) -> None:
        """Take the first rank's parameters where they are whole, down to the last bit.

        Raises:
            CompressError: They are not the same but for rounding: this rank has made another model.
        """
        if self.sharded:
            return
        with torch.no_grad():
            for name, value in self.ranks.tensors({n: p.detach() for n, p in self.trained.items()}).items():
                own = self.trained[name]
                if not torch.allclose(own.cpu(), value, rtol=1e-2, atol=1e-4):
                    raise CompressError(
                        f"Process {self.ranks.rank} starts from another {name} than the first.",
                        "Have all processes read the same files with the same versions of the libraries.",
                    )
                own.copy_(value)

    def _kept(self, name: str, value: Tensor) -> Tensor:
        """What this rank keeps of a tensor of the state."""
        owner = self.trained.get(name.partition(".")[2]) if self.sharded else None
        if owner is None:
            return value
        from compress.adapters.sharded import part_of

        return part_of(value, owner, self.ranks)

    def decided(self, *, save: bool, stop: bool) -> tuple[bool, bool]:
        """What the first rank decides."""
        saves, stops = self.ranks.sums(
            2, lambda: [float(save), float(stop)] if self.ranks.first else [0.0, 0.0]
        )
        return saves > 0, stops > 0

    @property
    def can_save(self) -> bool:
        """Not while others compute, where each has a part."""
        return not self.sharded

    def tensors(self, hooks: Sequence[StepHook]) -> dict[str, Tensor]:
        """What the first rank saves; nothing elsewhere."""
        if not self.ranks.first and not self.sharded:
            return {}
        return super().tensors(hooks)

    def _fetched(self, tensor: Tensor) -> Tensor:
        if not self.sharded:
            return tensor.cpu()
        from compress.adapters.sharded import whole

        return whole(tensor, self.ranks)
