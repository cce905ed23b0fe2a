from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.benchmarks.peers.torch_pruning import main, prune_with_torch_pruning
from compress.errors import CompressError, UsageError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from tests.tiny import TINY, _config, tiny_checkpoint, tiny_model

IDS = torch.randint(4, 128, (4, 24), generator=torch.Generator().manual_seed(1))
LLAMA = ("llama_mha", "llama_gqa", "llama_mqa", "llama_head_dim", "llama_tied", "llama_three")


@pytest.fixture(autouse=True)
def three_queries_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # The heads of SmolLM2-135M: nine query heads, three KV heads.
    sizes = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
    monkeypatch.setitem(TINY, "llama_three", _config("LlamaConfig", **sizes))


def kept_rows(full: torch.Tensor, small: torch.Tensor) -> list[int]:
    """Which rows of ``full`` are the rows of ``small``."""
    return [int((full == row).all(dim=1).nonzero().squeeze()) for row in small]


def linears(model: Any) -> int:
    return sum(
        p.numel() for name, p in model.named_parameters() if ".layers." in name and "_proj.weight" in name
    )


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize("kind", LLAMA)
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_pruned_model_computes_what_the_full_one_does_without_the_lost_parts(
    kind: str, importance: Any, ratio: float
) -> None:
    full = tiny_model(kind)
    small, facts = prune_with_torch_pruning(
        copy.deepcopy(full), ratio, importance=importance, calibration_ids=IDS
    )
    config: Any = full.config
    assert facts["achieved_ratio"] == pytest.approx(ratio, abs=0.01)
    assert facts["decoder_linear_parameters"] == linears(small)
    assert facts["decoder_linear_parameters_before"] == linears(full)
    width = config.head_dim
    for before, after in zip(full.get_decoder().layers, small.get_decoder().layers, strict=True):
        channels = kept_rows(before.mlp.up_proj.weight, after.mlp.up_proj.weight)
        assert channels == kept_rows(before.mlp.gate_proj.weight, after.mlp.gate_proj.weight)
        queries = kept_rows(before.self_attn.q_proj.weight, after.self_attn.q_proj.weight)
        heads = [row // width for row in queries[::width]]
        assert queries == [head * width + i for head in heads for i in range(width)]
        group = config.num_attention_heads // config.num_key_value_heads
        keys = kept_rows(before.self_attn.k_proj.weight, after.self_attn.k_proj.weight)
        assert sorted({head // group for head in heads}) == sorted({row // width for row in keys})
        with torch.no_grad():  # masking the inputs of o and down is what the cut must amount to
            gone = [i for i in range(config.num_attention_heads * width) if i not in set(queries)]
            before.self_attn.o_proj.weight[:, gone] = 0
            gone = [i for i in range(config.intermediate_size) if i not in set(channels)]
            before.mlp.down_proj.weight[:, gone] = 0
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, full(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "ratio", "kept", "reached"),
    [
        ("llama_mha", 0.5, (2, 2), True),
        ("llama_mqa", 0.5, (2, 1), True),
        ("llama_three", 0.2, (6, 3), True),
        ("llama_three", 0.5, (6, 3), False),  # one query head per KV head is out of reach
        ("llama_gqa", 0.5, (8, 4), False),
    ],
)
def test_heads_go_as_far_as_the_grouped_queries_allow(
    kind: str, ratio: float, kept: tuple[int, int], reached: bool
) -> None:
    small, facts = prune_with_torch_pruning(tiny_model(kind), ratio, importance="magnitude")
    assert (facts["heads"], facts["kv_heads"]) == kept
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == kept
    assert (facts["note"] == "") == reached


def test_taylor_keeps_the_channels_with_the_largest_products() -> None:
    full = tiny_model("llama_gqa")
    full(IDS, labels=IDS).loss.backward()
    products = {n: (p * p.grad).abs().detach() for n, p in full.named_parameters() if p.grad is not None}
    full.zero_grad()
    small, facts = prune_with_torch_pruning(
        copy.deepcopy(full), 0.3, importance="taylor", calibration_ids=IDS, heads=False
    )
    assert facts["note"] == ""
    for index, (before, after) in enumerate(
        zip(full.get_decoder().layers, small.get_decoder().layers, strict=True)
    ):
        prefix = f"model.layers.{index}.mlp."
        score = sum(products[f"{prefix}{name}_proj.weight"].sum(dim=1) for name in ("gate", "up"))
        score = score + products[f"{prefix}down_proj.weight"].sum(dim=0)
        best = score.topk(facts["channels"]).indices.sort().values.tolist()
        assert kept_rows(before.mlp.up_proj.weight, after.mlp.up_proj.weight) == best


def test_magnitude_keeps_the_heads_with_the_largest_norms() -> None:
    full = tiny_model("llama_mha")
    small, _ = prune_with_torch_pruning(copy.deepcopy(full), 0.5, importance="magnitude")
    for before, after in zip(full.get_decoder().layers, small.get_decoder().layers, strict=True):
        parts = before.self_attn
        score = sum(
            p.weight.square().sum(dim=1).view(4, -1).sum(dim=1)
            for p in (parts.q_proj, parts.k_proj, parts.v_proj)
        )
        score = score + parts.o_proj.weight.square().sum(dim=0).view(4, -1).sum(dim=1)
        best = score.topk(2).indices.sort().values
        rows = kept_rows(parts.v_proj.weight, after.self_attn.v_proj.weight)
        assert rows == [int(head) * 8 + i for head in best for i in range(8)]


def test_nothing_is_printed_or_warned(capfd: pytest.CaptureFixture[str]) -> None:
    prune_with_torch_pruning(tiny_model("llama_three"), 0.5, importance="taylor", calibration_ids=IDS)
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(UsageError, match="not between 0 and 1"):
        prune_with_torch_pruning(tiny_model("llama_mha"), 1.0, importance="magnitude")
    with pytest.raises(UsageError, match="no importance 'hessian'"):
        prune_with_torch_pruning(tiny_model("llama_mha"), 0.5, importance="hessian")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs calibration text"):
        prune_with_torch_pruning(tiny_model("llama_mha"), 0.5, importance="taylor")
    with pytest.raises(UsageError, match="reaches no shape"):
        prune_with_torch_pruning(tiny_model("llama_gqa"), 0.9, importance="magnitude")
    with pytest.raises(CompressError, match="fused or missing projections"):
        prune_with_torch_pruning(tiny_model("phi3"), 0.5, importance="magnitude")


def test_command_writes_a_folder_that_transformers_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny_checkpoint("llama_mha", tmp_path / "full", dtype=torch.bfloat16), tmp_path / "small"
    command = ["--model", str(source), "--ratio", "0.5", "--importance", "taylor", "--data", "pydoc"]
    command += ["--tokens", "256", "--length", "32", "--out", str(out)]
    assert main(command) == 0
    assert "2 query heads, 2 KV heads, 48 channels" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    arch = checkpoint_architecture(Checkpoint(out))
    facts = json.loads((out / "peer.json").read_text())
    assert facts["decoder_linear_parameters"] == arch.decoder_linear_parameters() == linears(model)
    assert (facts["calibration_tokens"], facts["calibration"]["split"]) == (256, "train")
    assert (out / "tokenizer.json").is_file()
    assert main(command) == 1
    assert "already holds weights" in capsys.readouterr().err
