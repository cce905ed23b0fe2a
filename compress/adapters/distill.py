"""Distillation: the divergence from a teacher's next-token distributions, without full tables of logits.

Repair after pruning is trained with this rather than on the text alone: a small model that learned the text would
keep for itself what adapters are to learn, and what recovery is to carry over (LoRAM, arXiv 2502.13533, aligns for
the same reason).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.adapters.loss import IGNORED, TokenLoss, shifted
from compress.errors import CompressError, UsageError

# N: scored positions, D: hidden size, V: vocabulary


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distillation:
    """What a student is trained towards.

    Attributes:
        teacher: The full model: same tokenizer, frozen, in eval mode.
        text_share: Share of the text's own next token in the target distribution; the rest is the teacher's.
        feature_weight: Weight of ``||h_student - h_teacher||^2 / ||h_teacher||^2`` of the hidden states, a mean
            over the layers, beside the divergence; 0 leaves it out.
    """

    teacher: nn.Module
    text_share: float = 0.0
    feature_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.text_share < 1 or not self.feature_weight >= 0:
            raise UsageError(
                f"Distillation cannot have a text share of {self.text_share} and a feature weight of "
                f"{self.feature_weight}.",
                "Give a share in [0, 1) and a weight of 0 or more.",
            )


class _FrozenHeadDivergence(torch.autograd.Function):
    """``(1 - w) KL(teacher || student) + w NLL(text)`` behind frozen linear heads.

    The gradient is taken while the logits exist.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        teacher_ND: Tensor,
        teacher_head_VD: Tensor,
        text_N: Tensor,
        text_share: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            target = _log_probabilities(F.linear(teacher_ND[rows], teacher_head_VD), softcap)
            raw = F.linear(hidden_ND[rows], head_VD)
            ours = _log_probabilities(raw, softcap)
            weight = target.exp()
            picked = text_N[rows, None]
            total += (1 - text_share) * (weight * (target - ours)).sum()
            total -= text_share * ours.gather(1, picked).sum()
            if gradient_ND is None:
                continue
            weight *= 1 - text_share
            weight.scatter_add_(1, picked, torch.full_like(weight[:, :1], text_share))
            slope = ours.exp_().sub_(weight)
            if softcap is not None:
                slope *= 1 - torch.tanh(raw.float() / softcap) ** 2
            gradient_ND[rows] = slope.to(head_VD.dtype) @ head_VD
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream[0].to(gradient_ND.dtype), *(None,) * 7


def _log_probabilities(logits: Tensor, softcap: float | None) -> Tensor:
    wide = logits.float()
    return (wide if softcap is None else torch.tanh(wide / softcap) * softcap).log_softmax(-1)


class DistillationLoss(nn.Module):
    """``(ids, labels) -> summed loss`` towards a teacher over the positions that carry a label.

    Args:
        model: The student, with or without adapters.
        distillation: The teacher and what counts beside its predictions.
        chunk: Rows of logits held at once.

    Raises:
        CompressError: Hidden states are to be compared, and the two models have no equal stack of layers.
    """

    def __init__(self, model: nn.Module, distillation: Distillation, *, chunk: int = 256) -> None:
        super().__init__()
        self.student = TokenLoss(model, chunk=chunk)
        self._teacher = [
            TokenLoss(distillation.teacher, chunk=chunk)
        ]  # in a list: no part of this module's state
        self.text_share, self.feature_weight = distillation.text_share, distillation.feature_weight
        self.chunk = chunk
        self._layers: list[tuple[nn.Module, nn.Module]] = []
        if self.feature_weight > 0:
            stacks = [part.layers for part in (self.student, self._teacher[0])]
            if not stacks[0] or len(stacks[0]) != len(stacks[1]):
                raise CompressError(
                    f"The hidden states of {len(stacks[0])} and {len(stacks[1])} layers cannot be compared.",
                    "Distil the predictions alone (no feature weight).",
                )
            self._layers = list(zip(*stacks, strict=True))

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Sum of the losses (nats, float32 scalar) of one micro batch of ``[B, S]`` ids and labels."""
        parts = (self.student, self._teacher[0])
        separable = [part.separable(ids_BS[:1, :8]) for part in parts]  # both, before anything is watched
        simple = all(separable) and all(part.plain_head for part in parts)
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        mine, its = (pair[0] for pair in self._layers), (pair[1] for pair in self._layers)
        with _watched(mine, ours), _watched(its, theirs):
            total = self._divergence(ids_BS, labels_BS, simple=simple)
        if ours:
            chosen_BT = shifted(labels_BS) != IGNORED
            distance = torch.stack(
                [
                    _relative(a[:, :-1][chosen_BT], b[:, :-1][chosen_BT])
                    for a, b in zip(ours, theirs, strict=True)
                ]
            )
            total = total + self.feature_weight * distance.mean() * chosen_BT.sum()
        return total

    def _divergence(self, ids_BS: Tensor, labels_BS: Tensor, *, simple: bool) -> Tensor:
        teacher = self._teacher[0]
        text_BT = shifted(labels_BS)
        chosen_BT = text_BT != IGNORED
        with torch.no_grad():
            given = (teacher.hidden(ids_BS) if simple else teacher.logits(ids_BS))[:, :-1][chosen_BT]
        own = (self.student.hidden(ids_BS) if simple else self.student.logits(ids_BS))[:, :-1][chosen_BT]
        if not simple:
            own, given = own.float().log_softmax(-1), given.float().log_softmax(-1)
            text = F.nll_loss(own, text_BT[chosen_BT], reduction="sum")
            divergence = F.kl_div(own, given, log_target=True, reduction="sum")
            return (1 - self.text_share) * divergence + self.text_share * text
        head_VD, teacher_head_VD = self.student.head.weight, teacher.head.weight
        with torch.autocast(ids_BS.device.type, enabled=False):
            total: Tensor = _FrozenHeadDivergence.apply(
                own.to(head_VD.dtype),
                head_VD,
                given.to(teacher_head_VD.dtype),
                teacher_head_VD,
                text_BT[chosen_BT],
                self.text_share,
                self.student.softcap,
                self.chunk,
            )
        return total


def _relative(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    wide = theirs_ND.float()
    return (ours_ND.float() - wide).square().sum() / wide.square().sum()


@contextmanager
def _watched(layers: Iterator[nn.Module], found: list[Tensor]) -> Iterator[None]:
    """Append the output of every layer to ``found``."""

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hook: Callable[..., None] = keep
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
