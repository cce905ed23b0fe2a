"""The next-token loss of a causal language model without its full table of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from compress.model.resident import resident
from compress.quantize.embedding import LQTiedHead
from compress.quantize.linear import LQLinear

IGNORED = -100
"""The label of a position that is neither trained nor scored."""

# N: trained positions, D: hidden size, V: vocabulary


def _capped(logits_NV: Tensor, softcap: float | None) -> Tensor:
    return logits_NV if softcap is None else torch.tanh(logits_NV / softcap) * softcap


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy behind a frozen linear head; the gradient is taken while the logits exist.

    Saving logits for backward would cost N·V numbers and recomputing them a third product with the head. The
    head is frozen, so the gradient of the hidden states, N·D numbers, is all that backward needs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            raw = F.linear(hidden_ND[rows], weight_VD, bias_V)
            logits = _capped(raw, softcap).float()
            normalizer = torch.logsumexp(logits, dim=-1)
            picked = logits.gather(1, target_N[rows, None]).squeeze(1)
            loss += (normalizer - picked).sum()
            if gradient_ND is None:
                continue
            slope = logits.sub_(normalizer[:, None]).exp_()
            slope.scatter_add_(1, target_N[rows, None], torch.full_like(normalizer[:, None], -1.0))
            if softcap is not None:
                slope *= 1 - torch.tanh(raw.float() / softcap) ** 2
            gradient_ND[rows] = slope.to(weight_VD.dtype) @ weight_VD
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream[0].to(gradient_ND.dtype), None, None, None, None, None


def summed_cross_entropy(
    hidden_ND: Tensor, head: nn.Module, target_N: Tensor, *, softcap: float | None = None, chunk: int = 256
) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of ``target_N`` under ``head(hidden_ND)``.

    Never holds more than ``chunk`` rows of logits. The logits have the dtype of the computation, the softmax
    is float32, as in Hugging Face's own loss.

    Args:
        hidden_ND: Final hidden states, one row for each trained position.
        head: Hidden states to logits: a frozen linear layer, quantized or not (fast), or any module (recomputed in
            backward).
        target_N: int64 token ids, none of them ``IGNORED``.
        softcap: Gemma 2's ``final_logit_softcapping``.
        chunk: Rows of logits held at once.

    Returns:
        A float32 scalar.
    """
    if type(head) in (nn.Linear, LQLinear, LQTiedHead) and not any(
        p.requires_grad for p in head.parameters()
    ):
        device = hidden_ND.device.type
        dtype = hidden_ND.dtype if type(head) is not nn.Linear else head.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = getattr(head, "bias", None)
        # backward runs outside autocast, so forward does too
        with resident(head), torch.autocast(device, enabled=False):
            bias_V = None if bias is None else bias.to(dtype)
            total: Tensor = _FrozenHeadLoss.apply(
                hidden_ND.to(dtype), _frozen_weight(head, dtype), bias_V, target_N, softcap, chunk
            )
        return total

    def part(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(_capped(head(hidden), softcap).float(), target, reduction="sum")

    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for start in range(0, hidden_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        loss = loss + checkpoint(part, hidden_ND[rows], target_N[rows], use_reentrant=False)
    return loss


def _frozen_weight(head: Any, dtype: torch.dtype) -> Tensor:
    """The matrix [V, D]; a quantized one is unpacked once for all chunks."""
    if isinstance(head, LQLinear | LQTiedHead):
        return head.dequantized_weight(dtype)
    weight: Tensor = head.weight.to(dtype)
    return weight


def shifted(labels_BS: Tensor) -> Tensor:
    """Targets of positions 0..S-2: the next position's label, ``IGNORED`` kept. Shape [B, S-1]."""
    return labels_BS[:, 1:]


def trained_tokens(labels_BS: Tensor) -> int:
    """How many positions of ``labels_BS`` carry a loss: all but first ones and ``IGNORED`` ones."""
    return int((shifted(labels_BS) != IGNORED).sum())


class TokenLoss(nn.Module):
    """``(ids, labels) -> summed loss`` around a Hugging Face causal model, with or without adapters.

    The body runs once; the head runs on trained positions only and in chunks. Models whose logits are more
    than ``softcap(head(body(ids)))`` are found by comparing both on a few tokens, and go through their own
    forward.

    Args:
        model: A causal language model (a ``PreTrainedModel`` or a ``PeftModel`` around one).
        chunk: Rows of logits held at once.
    """

    def __init__(self, model: nn.Module, *, chunk: int = 256) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        self._separable: bool | None = None

    @property
    def _inner(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def softcap(self) -> float | None:
        """The bound that the model puts on its logits (Gemma 2); None for none."""
        return getattr(self._inner.config, "final_logit_softcapping", None)

    @property
    def head(self) -> Any:
        """The module from hidden states to logits."""
        return self._inner.get_output_embeddings()

    @property
    def body(self) -> Any:
        """The module from ids to hidden states; None where the model does not tell."""
        return self._inner.get_decoder() if hasattr(self._inner, "get_decoder") else None

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers: the longest list of modules in the body; empty where there is none."""
        children = () if self.body is None else self.body.children()
        return max((list(c) for c in children if isinstance(c, nn.ModuleList)), key=len, default=[])

    @property
    def plain_head(self) -> bool:
        """Whether the head is a frozen linear layer without bias."""
        head = self.head
        parameters = dict(head.named_parameters())
        return (
            type(head) is nn.Linear
            and list(parameters) == ["weight"]
            and not parameters["weight"].requires_grad
        )

    def separable(self, ids_BS: Tensor) -> bool:
        """Whether ``softcap(head(body(ids)))`` gives the model's own logits; looked at once, on these tokens."""
        if self._separable is None:
            self._separable = self._is_separable(ids_BS)
        return self._separable

    def hidden(self, ids_BS: Tensor) -> Tensor:
        """Final hidden states [B, S, D]."""
        states: Tensor = self._inner.get_decoder()(input_ids=ids_BS, use_cache=False).last_hidden_state
        return states

    def logits(self, ids_BS: Tensor) -> Tensor:
        """The model's own logits [B, S, V]."""
        logits: Tensor = self._inner(input_ids=ids_BS, use_cache=False).logits
        return logits

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Sum of the losses (nats, float32 scalar) of one micro batch of ``[B, S]`` ids and labels."""
        target_BT = shifted(labels_BS)
        chosen_BT = target_BT != IGNORED
        if not self.separable(ids_BS[:1, :8]):
            logits_BTV = self.logits(ids_BS)[:, :-1]
            return F.cross_entropy(logits_BTV[chosen_BT].float(), target_BT[chosen_BT], reduction="sum")
        return summed_cross_entropy(
            self.hidden(ids_BS)[:, :-1][chosen_BT],
            self.head,
            target_BT[chosen_BT],
            softcap=self.softcap,
            chunk=self.chunk,
        )

    @torch.no_grad()
    def _is_separable(self, ids_BS: Tensor) -> bool:
        """Whether ``softcap(head(body(ids)))`` gives the model's own logits."""
        if not hasattr(self._inner, "get_decoder") or self._inner.get_output_embeddings() is None:
            return False
        modes = [(module, module.training) for module in self._inner.modules()]
        self._inner.eval()  # dropout would make the two passes differ
        own = self.logits(ids_BS)
        ours = _capped(self.head(self.hidden(ids_BS)), self.softcap)
        for module, training in modes:  # one by one: they need not be alike
            module.training = training
        return own.shape == ours.shape and torch.allclose(own.float(), ours.float(), rtol=1e-3, atol=1e-3)
