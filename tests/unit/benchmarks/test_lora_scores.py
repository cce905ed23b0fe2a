"""The scores that are compared: equal to the dense formula, and equal to each other where the estimate is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.benchmarks.lora_scores import agreement, both_scores, fill, line, true_scores
from compress.benchmarks.protocol import Rows
from compress.data.windows import Windows
from compress.importance.base import GroupScores, LayerScores
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny")


IDS = torch.randint(4, 128, (12, 32), generator=torch.Generator().manual_seed(3))


def test_true_scores_are_the_dense_formula(model: Path) -> None:
    arch = checkpoint_architecture(Checkpoint(model))
    network: Any = load_model(model, dtype=torch.float32)
    network(input_ids=IDS, labels=IDS).loss.backward()
    scores = true_scores(network, arch)
    for layer, found in zip(network.model.layers, scores.layers, strict=True):
        expected = torch.zeros(arch.channels, dtype=torch.float64)
        for linear, axis in ((layer.mlp.gate_proj, 1), (layer.mlp.up_proj, 1), (layer.mlp.down_proj, 0)):
            sums = (linear.weight.detach().double() * linear.weight.grad.double()).square().sum(dim=axis)
            expected += sums / sums.norm()
        torch.testing.assert_close(found.channels, expected, rtol=1e-4, atol=1e-6)


def test_the_moving_average_of_one_step_agrees_with_itself_and_a_projection_does_not(model: Path) -> None:
    arch = checkpoint_architecture(Checkpoint(model))
    one = both_scores(model, arch, IDS[:4], 2)
    assert agreement(one["true"], one["all steps"]) == pytest.approx({"spearman": 1.0, "shared": 1.0})
    assert agreement(one["lora"], one["true"])["spearman"] < 0.999
    more = both_scores(
        model, arch, IDS, 64
    )  # as wide as the model: A^T A is nearer to a multiple of the identity
    few = both_scores(model, arch, IDS, 1)
    assert agreement(more["lora"], more["true"])["spearman"] > agreement(few["lora"], few["true"])["spearman"]


def test_agreement_counts_what_both_keep() -> None:
    def of(*channels: float) -> GroupScores:
        none = torch.zeros(1, dtype=torch.float64)
        layer = LayerScores(
            kv_groups=none, channels=torch.tensor(channels, dtype=torch.float64), query_heads=none
        )
        return GroupScores(layers=(layer,))

    assert agreement(of(4, 3, 2, 1), of(4, 1, 3, 2)) == pytest.approx({"spearman": 0.4, "shared": 0.5})


def test_rows_are_made_once(model: Path, tmp_path: Path) -> None:
    rows = Rows(tmp_path / "out.json", {"benchmark": "lora scores"})
    test = Windows(ids=IDS[:2], labels=IDS[:2].clone(), protocol={"text": "made up"})
    said: list[str] = []
    fill(model, rows, [2], 0.5, IDS, test, said.append)
    fill(model, rows, [2], 0.5, IDS, test, said.append)
    assert said == [line(2, rows.get("rank 2"))]
    assert set(rows.get("rank 2")["cuts"]) == {"lora", "true", "all steps"}
