"""Moments of the embedding and the output matrix against the curvature of the loss, by autograd in float64."""

from __future__ import annotations

import pytest
import torch

from compress.quantize.vocabulary import HeadMoments, embedding_moments, tied_moments

TOKENS, HIDDEN, VOCAB = 300, 6, 11


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g)
    return hidden, torch.randn(VOCAB, HIDDEN, generator=g)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_output_matrix_has_the_diagonal_of_the_fisher_information(softcap: float | None) -> None:
    hidden, weight = drawn()
    sums = HeadMoments()
    for part in hidden.split(77):
        sums.add(part, lambda x: x @ weight.T, softcap=softcap)
    head, expected = sums.moments()
    wide = hidden.double()

    def raw_to_capped(raw: torch.Tensor) -> torch.Tensor:
        return raw if softcap is None else torch.tanh(raw / softcap) * softcap

    variances, probabilities = [], []
    for row in wide:
        raw = (weight.double() @ row).requires_grad_(True)
        logp = raw_to_capped(raw).log_softmax(-1)
        p = logp.exp().detach()
        square = torch.zeros(VOCAB, dtype=torch.float64)
        for token in range(VOCAB):  # Fisher: mean over the model's own tokens of squared gradients
            (gradient,) = torch.autograd.grad(logp[token], raw, retain_graph=True)
            square += p[token] * gradient.square()
        variances.append(square)
        probabilities.append(p)
    torch.testing.assert_close(
        head.minds.double(), 0.5 * torch.stack(variances).mean(0), rtol=1e-4, atol=1e-8
    )
    torch.testing.assert_close(expected, torch.stack(probabilities).mean(0), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(head.gram, wide.T @ wide / TOKENS)
    assert float(expected.sum()) == pytest.approx(1.0, abs=1e-5)


def test_a_tied_matrix_pays_for_both_of_its_uses() -> None:
    hidden, weight = drawn(1)
    sums = HeadMoments()
    sums.add(hidden, lambda x: x @ weight.T, softcap=None)
    head, expected = sums.moments()
    sensitivity = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(2))
    embedding = embedding_moments(sensitivity, expected)
    assert torch.equal(embedding.gram, (0.5 * sensitivity.double()).diag())
    both = tied_moments(head, embedding)

    def cost(moments: object, error: torch.Tensor) -> float:
        gram, minds = moments.gram, moments.minds.double()  # type: ignore[attr-defined]
        return float((minds * ((error @ gram) * error).sum(1)).sum())

    # errors alike in every row cost the sum of both exactly; others nearly so, as both weigh rows alike
    same = torch.randn(1, HIDDEN, dtype=torch.float64).expand(VOCAB, -1)
    assert cost(both, same) == pytest.approx(cost(head, same) + cost(embedding, same), rel=1e-9)
