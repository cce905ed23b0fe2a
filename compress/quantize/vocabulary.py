"""What the loss minds of the embedding and of the output matrix, in nats per token like every other matrix.

With p the model's distribution of the next token, the Fisher information of the logits has the diagonal
``p (1 - p)``, and a row of the embedding is read as often as p expects. The model's own p is used in both, not the
counts of a calibration text, which has never seen most of a vocabulary.

Shapes: V vocabulary, D hidden size, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256
"""Rows of logits held at once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatrixMoments:
    """An error E [V, D] of a matrix costs ``sum_v minds[v] * E[v] gram E[v]^T`` nats per token.

    Attributes:
        gram: float64 [D, D].
        minds: float32 [V].
    """

    gram: Tensor
    minds: Tensor


class HeadMoments:
    """Sums over final hidden states; see :meth:`moments`."""

    def __init__(self) -> None:
        self._tokens = 0
        self._gram_DD = self._expected_V = self._variance_V = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add(self, hidden_TD: Tensor, head: Callable[[Tensor], Tensor], *, softcap: float | None) -> None:
        """Take in some tokens.

        Args:
            hidden_TD: Final hidden states, as the output matrix reads them.
            head: Hidden states to logits before the cap.
            softcap: The bound of the logits (Gemma 2); None for none.
        """
        for rows_TD in hidden_TD.split(CHUNK):
            raw_TV = head(rows_TD).float()
            capped_TV = raw_TV if softcap is None else torch.tanh(raw_TV / softcap) * softcap
            p_TV = torch.softmax(capped_TV, dim=-1)
            variance_TV = p_TV * (1 - p_TV)
            if softcap is not None:
                variance_TV *= (1 - (capped_TV / softcap).square()).square()
            wide_TD = rows_TD.double()
            self._gram_DD = self._gram_DD.to(wide_TD.device) + wide_TD.T @ wide_TD
            self._expected_V = self._expected_V.to(wide_TD.device) + p_TV.sum(dim=0, dtype=torch.float64)
            self._variance_V = self._variance_V.to(wide_TD.device) + variance_TV.sum(
                dim=0, dtype=torch.float64
            )
            self._tokens += len(rows_TD)

    def moments(self) -> tuple[MatrixMoments, Tensor]:
        """Moments of the output matrix, and how often each token is expected, float64 [V], which sums to 1."""
        head = MatrixMoments(
            gram=self._gram_DD / self._tokens, minds=(0.5 * self._variance_V / self._tokens).float()
        )
        return head, self._expected_V / self._tokens


def embedding_moments(sensitivity_D: Tensor, expected_V: Tensor) -> MatrixMoments:
    """Moments of an embedding that the output matrix does not share.

    Args:
        sensitivity_D: Mean squared gradient of the summed loss at the embedding's rows.
        expected_V: How often each token is expected.
    """
    return MatrixMoments(gram=(0.5 * sensitivity_D.double()).diag(), minds=expected_V.float())


def tied_moments(head: MatrixMoments, embedding: MatrixMoments) -> MatrixMoments:
    """Moments of a matrix that is embedding and output matrix at once.

    The sum of both costs has another quadratic form in every row. A token that is read often is also predicted often,
    so the embedding's share is added with the output matrix's weights of the rows, scaled to the same sum.
    """
    share = float(embedding.minds.double().sum() / head.minds.double().sum())
    return MatrixMoments(gram=head.gram + share * embedding.gram, minds=head.minds)
