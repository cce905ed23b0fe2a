"""Alignment by the library: what trains, what is frozen, how the result is stored, and that GaLore resumes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.adapters.align import release_weights, write_weights
from compress.adapters.fit_config import FitConfig
from compress.adapters.optimizer import GALORE_RANK, galore_numbers, is_projected, make_optimizer
from compress.adapters.state import STATE_FILE
from compress.adapters.train import fit
from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model
from tests.tiny import DENSE, tiny_checkpoint, tiny_model
from tests.unit.adapters.test_train import Stop, assert_same, trained, windows

CONFIG = FitConfig(steps=5, micro_batch=2, lr=1e-3, precision="float32", save_every=2)


def released(kind: str) -> Any:
    model = tiny_model(kind)
    release_weights(model)
    return model


@pytest.mark.parametrize("kind", [*DENSE, "gpt2"])
def test_everything_trains_but_the_output_matrix(kind: str) -> None:
    model = tiny_model(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = release_weights(model)
    head: Any = model.get_output_embeddings()
    fit(model, windows(), replace(CONFIG, steps=2, lr=1e-2))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert torch.equal(head.weight, before["lm_head.weight" if "lm_head.weight" in before else _tied(before)])
    frozen = {name for name, p in model.named_parameters() if p is head.weight}
    assert frozen == ({"lm_head.weight"} if "lm_head.weight" in before else {_tied(before)})
    # a key bias shifts all scores of a query alike: softmax does not see it
    blind = {name for name in before if name.endswith("k_proj.bias")}
    assert changed | blind == set(before) - frozen | blind
    assert count == sum(p.numel() for name, p in before.items() if name not in frozen)


def _tied(before: dict[str, Any]) -> str:
    return next(name for name in ("model.embed_tokens.weight", "transformer.wte.weight") if name in before)


def test_weights_must_be_held_in_float32() -> None:
    with pytest.raises(CompressError, match="not held in float32"):
        release_weights(tiny_model("llama_gqa").to(torch.bfloat16))


def test_a_step_is_plain_adamw_on_all_weights() -> None:
    """Against torch's own optimizer and Hugging Face's loss."""
    model, plain = released("llama_gqa"), released("llama_gqa")
    data = windows(2, ignored=False)
    fit(model, data, replace(CONFIG, steps=1, micro_batch=2, max_grad_norm=0.0))
    plain(input_ids=data.ids, labels=data.labels).loss.backward()
    torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0).step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5, msg=name)


def test_small_updates_survive_bfloat16_weights(tmp_path: Path) -> None:
    """Steps below half a unit in the last place of bfloat16 add up in float32; the file keeps its dtype."""
    source = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "small", dtype=torch.bfloat16))
    model = load_model(source.path, dtype=torch.float32)
    release_weights(model)
    fit(model, windows(), replace(CONFIG, steps=8, lr=3e-5, schedule="constant"))
    write_weights(model, source, tmp_path / "out")
    out = Checkpoint(tmp_path / "out")
    assert out.names == source.names
    moved = 0
    for name, parameter in model.named_parameters():
        assert out.dtype(name) == torch.bfloat16
        assert torch.equal(out.read(name), parameter.detach().to(torch.bfloat16))
        moved += int((out.read(name) != source.read(name)).sum())
    step = load_model(source.path, dtype=torch.float32).get_parameter("model.layers.0.mlp.up_proj.weight")
    once = (step - 3e-5 * step.sign()).to(torch.bfloat16)  # what one step of AdamW changes when it is rounded
    assert float((once == step.to(torch.bfloat16)).float().mean()) > 0.9
    assert moved > 0.1 * source.parameters


def test_a_checkpoint_without_the_body_prefix_is_written_as_it_was(tmp_path: Path) -> None:
    """GPT-2 on the hub leaves out ``transformer.``; what is no parameter is copied."""
    from safetensors.torch import load_file, save_file

    tiny_checkpoint("gpt2", tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.tril(torch.ones(1, 1, 256, 256, dtype=torch.uint8))
    save_file(tensors, file, metadata={"format": "pt"})
    source, model = Checkpoint(tmp_path / "small"), load_model(tmp_path / "small", dtype=torch.float32)
    release_weights(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(1.0)
    write_weights(model, source, tmp_path / "out")
    out = Checkpoint(tmp_path / "out")
    assert out.names == source.names
    changed = {name for name in source.names if not torch.equal(out.read(name), source.read(name))}
    assert changed == {"h.0.mlp.c_fc.weight"}


def test_a_trained_weight_without_a_place_is_not_lost(tmp_path: Path) -> None:
    source = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "small"))
    model = load_model(source.path, dtype=torch.float32)
    release_weights(model)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(CompressError, match=r"2 trained weights have other names .* 'extra\.weight'"):
        write_weights(model, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def wide_model() -> Any:
    """Two matrices that GaLore projects, a norm and an embedding that it does not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Wide()


class _Wide(nn.Module):
    """The parts of a causal model that the loss looks for."""

    def __init__(self) -> None:
        super().__init__()
        width = GALORE_RANK + 32
        self.embedding = nn.Embedding(16, width)
        self.up, self.down = nn.Linear(width, width + 8, bias=False), nn.Linear(width + 8, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.config: Any = type("Config", (), {"final_logit_softcapping": None})()

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        x = self.embedding(input_ids)
        x = self.norm(x + self.down(torch.tanh(self.up(x))))
        return type("Output", (), {"logits": x @ self.embedding.weight.T})()


def hide_galore(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "galore_torch" else there(n))


@pytest.fixture
def galore() -> None:
    pytest.importorskip("galore_torch")


@pytest.mark.usefixtures("galore")
def test_galore_holds_small_moments_of_large_matrices() -> None:
    model, config = wide_model(), replace(CONFIG, optimizer="galore")
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(model, parameters, config)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    shapes = {name: tuple(optimizer.state[p]["exp_avg"].shape) for name, p in parameters.items()}
    width = GALORE_RANK + 32
    assert shapes["up.weight"] == (width + 8, GALORE_RANK)
    assert shapes["down.weight"] == (GALORE_RANK, width + 8)
    assert shapes["embedding.weight"] == (16, width)
    assert shapes["norm.weight"] == (width,)
    for name in ("up.weight", "down.weight"):
        state = optimizer.state[parameters[name]]
        tensors = (state["exp_avg"], state["exp_avg_sq"], state["projector"].ortho_matrix)
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert held == 4 * galore_numbers(tuple(parameters[name].shape))
    assert is_projected((GALORE_RANK + 1, 2 * GALORE_RANK))
    assert not is_projected((GALORE_RANK, 2 * GALORE_RANK))


@pytest.mark.usefixtures("galore")
def test_the_first_galore_step_is_adam_in_the_subspace() -> None:
    """By hand: project on the top singular vectors, one step of Adam, back, times the scale."""
    model, config = wide_model(), replace(CONFIG, steps=1, optimizer="galore", max_grad_norm=0.0)
    start = model.up.weight.detach().clone()
    data = windows(2, ignored=False)
    fit(model, data, config)
    plain = wide_model()
    logits = plain(data.ids).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), data.labels[:, 1:].flatten()).backward()
    gradient = plain.up.weight.grad
    assert gradient is not None
    _, _, right = torch.linalg.svd(gradient, full_matrices=False)
    inside = gradient @ right[:GALORE_RANK].T
    # gradients of 16 tokens have few directions: what is zero but for rounding has a step of any sign
    change = (model.up.weight.detach() - start) @ right[:GALORE_RANK].T
    solid = inside.abs() > 1e-4
    assert solid.float().mean() > 0.01
    torch.testing.assert_close(change[solid], -0.25 * 1e-3 * inside[solid].sign(), rtol=5e-3, atol=1e-7)


@pytest.mark.usefixtures("galore")
def test_galore_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two projections and right at a new one, it ends where an uninterrupted run ends."""
    monkeypatch.setattr("compress.adapters.optimizer.GALORE_GAP", 3)
    config = replace(CONFIG, steps=7, optimizer="galore")
    whole = wide_model()
    expected = fit(whole, windows(), config)
    for stop in (2, 3, 4):
        folder, broken = tmp_path / str(stop), wide_model()
        seen = iter(range(stop))

        def hook(*_: Any, seen: Any = seen) -> None:
            if next(seen, None) is None:
                raise Stop

        broken.up.register_forward_pre_hook(hook)
        with pytest.raises(Stop):
            fit(broken, windows(), config, state_dir=folder)
        assert (folder / STATE_FILE).is_file()
        again = wide_model()
        result = fit(again, windows(), config, state_dir=folder)
        assert result.losses == expected.losses
        assert_same(trained(again), trained(whole))


def test_galore_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_galore(monkeypatch)
    with pytest.raises(CompressError, match="galore-torch, which is not installed"):
        fit(wide_model(), windows(), replace(CONFIG, optimizer="galore"))
