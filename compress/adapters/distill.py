"""The divergence from a teacher's next-token distributions, without full tables of logits.

Repair after pruning is trained with this rather than on the text itself: a small model that learned the text would
keep for itself what adapters are to learn, and what recovery is to carry over (LoRAM, arXiv 2502.13533, aligns for
the same reason).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.adapters.loss import IGNORED, TokenLoss, shifted

# N: scored positions, D: hidden size, V: vocabulary


class _FrozenHeadDivergence(torch.autograd.Function):
    """``KL(teacher || student)`` behind frozen linear heads; the gradient is taken while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        teacher_ND: Tensor,
        teacher_head_VD: Tensor,
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
            total += (weight * (target - ours)).sum()
            if gradient_ND is None:
                continue
            slope = ours.exp_().sub_(weight)
            if softcap is not None:
                slope *= 1 - torch.tanh(raw.float() / softcap) ** 2
            gradient_ND[rows] = slope.to(head_VD.dtype) @ head_VD
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream[0].to(gradient_ND.dtype), None, None, None, None, None


def _log_probabilities(logits: Tensor, softcap: float | None) -> Tensor:
    wide = logits.float()
    return (wide if softcap is None else torch.tanh(wide / softcap) * softcap).log_softmax(-1)


class DistillationLoss(nn.Module):
    """``(ids, labels) -> summed KL(teacher || student)`` over the positions that carry a label.

    Args:
        model: The student, with or without adapters.
        teacher: The full model: same tokenizer, frozen, in eval mode.
        chunk: Rows of logits held at once.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, *, chunk: int = 256) -> None:
        super().__init__()
        self.student = TokenLoss(model, chunk=chunk)
        self._teacher = [TokenLoss(teacher, chunk=chunk)]  # in a list: no part of this module's state
        self.chunk = chunk

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Sum of the divergences (nats, float32 scalar) of one micro batch of ``[B, S]`` ids and labels."""
        teacher = self._teacher[0]
        chosen_BT = shifted(labels_BS) != IGNORED
        simple = all(part.separable(ids_BS[:1, :8]) and part.plain_head for part in (self.student, teacher))
        if not simple:
            ours = self.student.logits(ids_BS)[:, :-1][chosen_BT].float().log_softmax(-1)
            with torch.no_grad():
                target = teacher.logits(ids_BS)[:, :-1][chosen_BT].float().log_softmax(-1)
            return F.kl_div(ours, target, log_target=True, reduction="sum")
        with torch.no_grad():
            teacher_ND = teacher.hidden(ids_BS)[:, :-1][chosen_BT]
        hidden_ND = self.student.hidden(ids_BS)[:, :-1][chosen_BT]
        head_VD, teacher_head_VD = self.student.head.weight, teacher.head.weight
        with torch.autocast(ids_BS.device.type, enabled=False):
            total: Tensor = _FrozenHeadDivergence.apply(
                hidden_ND.to(head_VD.dtype),
                head_VD,
                teacher_ND.to(teacher_head_VD.dtype),
                teacher_head_VD,
                self.student.softcap,
                self.chunk,
            )
        return total
