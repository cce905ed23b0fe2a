"""Undeclared families: what the dependency graph proves, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from compress.errors import CompressError
from compress.model import traced
from compress.model.architecture import accepted_kv_heads, architecture_of, expected_shapes, resized_config
from tests.tiny import TINY, tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_gpt2_channels_are_prunable_and_heads_are_not() -> None:
    model = tiny_model("gpt2")
    config = model.config.to_dict()
    arch = architecture_of(config, dict(model.named_parameters()))
    assert [(s.name, s.role, s.transposed, s.bias) for s in arch.linears] == [
        ("mlp.c_fc", "up", True, True),
        ("mlp.c_proj", "down", True, True),
    ]
    assert (arch.channels, arch.channels_key, arch.tied) == (128, "n_inner", True)
    for name, shape in expected_shapes(arch).items():
        assert tuple(model.get_parameter(name).shape) == shape
    assert not arch.prunable_heads
    assert accepted_kv_heads(config, arch) == (4,)
    with pytest.raises(CompressError, match=r"attn\.c_attn.*'gpt2'"):
        resized_config(config, arch, heads=2, kv_heads=2, channels=64)


def test_slicing_by_the_traced_architecture_equals_zeroing_the_channels() -> None:
    model = tiny_model("gpt2")
    config = model.config.to_dict()
    arch = architecture_of(config)
    kept = torch.arange(0, arch.channels, 2)
    small_config = resized_config(config, arch, heads=4, kv_heads=4, channels=len(kept))
    small = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**small_config), dtype=torch.float32
    ).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    up, down = arch.linears
    for layer in range(arch.layers):
        for name, axis in (
            (arch.tensor_name(layer, up), 1),
            (arch.tensor_name(layer, up, "bias"), 0),
            (arch.tensor_name(layer, down), 0),
        ):
            state[name] = state[name].index_select(axis, kept)
        weight = model.get_parameter(arch.tensor_name(layer, down))
        keep = torch.zeros(arch.channels, 1).index_fill_(0, kept, 1.0)
        weight.data.mul_(keep)
    small.load_state_dict(state)
    ids = torch.randint(0, arch.vocab, (2, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_gated_mlp_shows_which_projection_is_the_gate() -> None:
    config = transformers.Olmo2Config(**SMALL).to_dict()
    roles = {spec.name: spec.role for spec in architecture_of(config).linears}
    assert roles == {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}


def test_tracing_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    architecture_of(TINY["gpt2"]().to_dict())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BertConfig", "looks at later tokens"),  # an encoder with a language-model head
        ("MambaConfig", "proven to be the MLP"),  # no MLP at all
        ("Glm4Config", "proven to be the MLP"),  # fused gate_up without a declaration
        ("Gemma3nTextConfig", "no causal language model"),
    ],
)
def test_what_cannot_be_proven_is_refused(name: str, reason: str) -> None:
    with pytest.raises(CompressError, match=reason):
        architecture_of(getattr(transformers, name)(**SMALL).to_dict())


def test_a_base_model_checkpoint_without_the_prefix_is_refused_with_a_remedy() -> None:
    model = tiny_model("gpt2")
    names = [name.removeprefix("transformer.") for name, _ in model.named_parameters()]
    with pytest.raises(CompressError, match="save_pretrained"):
        architecture_of(model.config.to_dict(), names)


def test_decoder_weights_that_two_modules_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = traced.meta_model

    def sharing(config: Any) -> Any:
        model = made(config)
        if len(model.transformer.h) > 1:
            model.transformer.h[1].mlp.c_proj.weight = model.transformer.h[0].mlp.c_proj.weight
        return model

    monkeypatch.setattr(traced, "meta_model", sharing)
    with pytest.raises(
        CompressError, match=r"h\.0\.mlp\.c_proj\.weight and .*h\.1\.mlp\.c_proj\.weight share one tensor"
    ):
        traced.trace_architecture(tiny_model("gpt2").config)
