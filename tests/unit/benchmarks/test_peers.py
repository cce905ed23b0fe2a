from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.benchmarks.peers import autoround, bitsandbytes, environment, gptqmodel, hqq
from compress.benchmarks.peers.environment import ENVIRONMENTS
from tests.sources import ROOT, tree
from tests.tiny import _config, tiny_tokenizer

PEERS: dict[str, Any] = {
    "gptqmodel": gptqmodel.quantize_with_gptqmodel,
    "bitsandbytes": bitsandbytes.quantize_with_bitsandbytes,
    "hqq": hqq.quantize_with_hqq,
    "autoround": autoround.quantize_with_autoround,
}
CALIBRATED = ("gptqmodel", "autoround")
FOLDER = ROOT / "benchmarks" / "peers"
IDS = torch.randint(4, 128, (8, 64), generator=torch.Generator().manual_seed(1))


def requirements(name: str) -> dict[str, str]:
    """Pinned version by distribution."""
    found = {}
    for line in (FOLDER / "requirements" / f"{name}.txt").read_text().splitlines():
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert pin.operator == "==", line
        found[requirement.name] = pin.version
    return found


def call(name: str, model: Path, out: Path, **given: Any) -> Any:
    positional = (model, IDS, out) if name in CALIBRATED else (model, out)
    return PEERS[name](*positional, **given)


@pytest.mark.parametrize(
    ("name", "given", "settings"),
    [
        (
            "gptqmodel",
            {"bits": 3, "group_size": 32},
            {"bits": 3, "group_size": 32, "symmetric": True},
        ),
        ("gptqmodel", {"symmetric": False}, {"bits": 4, "group_size": 64, "symmetric": False}),
        (
            "bitsandbytes",
            {"double_quantization": False},
            {"bits": 4, "group_size": 64, "double_quantization": False},
        ),
        ("bitsandbytes", {}, {"bits": 4, "group_size": 64, "double_quantization": True}),
        ("hqq", {"bits": 2, "axis": 0}, {"bits": 2, "group_size": 64, "axis": 0}),
        ("autoround", {"iterations": 7}, {"bits": 4, "group_size": 64, "iterations": 7}),
    ],
)
def test_what_is_asked_for_reaches_the_peer(
    name: str, given: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    module = {"gptqmodel": gptqmodel, "bitsandbytes": bitsandbytes, "hqq": hqq, "autoround": autoround}[name]
    monkeypatch.setattr(module, "run_peer", lambda *args, **kwargs: calls.append((args, kwargs)))
    call(name, Path("model"), Path("out"), threads=2, timeout=5.0, **given)
    ((arguments, keywords),) = calls
    runner, model, ids, out = arguments
    assert (runner, model, out) == (FOLDER / f"{name}_runner.py", Path("model"), Path("out"))
    assert ids is (IDS if name in CALIBRATED else None)
    assert keywords["settings"] == settings
    assert (keywords["threads"], keywords["timeout"]) == (2, 5.0)
    assert keywords["environment"] == ROOT / ".venv-peers" / name
    assert keywords.get("variables", {}) == ({"GPTQMODEL_CPU_WORKERS": "2"} if name == "gptqmodel" else {})
    assert set(keywords["distributions"]) == set(requirements(name)) - {"torch", "transformers"}


@pytest.mark.parametrize("name", PEERS)
def test_peers_run_with_our_torch_and_transformers(name: str) -> None:
    ours = dict(
        re.findall(r"^(torch|transformers)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    assert {key: requirements(name)[key] for key in ours} == ours


def test_make_peers_knows_every_peer() -> None:
    listed = re.search(r"^PEERS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed is not None
    files = {file.stem for file in (FOLDER / "requirements").iterdir()}
    assert set(listed[1].split()) == files == set(PEERS)


@pytest.mark.parametrize("name", ["environment", *PEERS])
def test_what_runs_beside_a_peer_needs_nothing_of_ours(name: str) -> None:
    source = tree(FOLDER / f"{name}_runner.py")
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(source)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported.isdisjoint({"compress", "tests"})
    if name != "environment":
        defined = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
        assert defined == {"load", "quantize", "save", "reopen", "weight", "dtype"}


def stored_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of ``bits`` bits from a stream of 32-bit words down the columns."""
    stream = torch.stack([(words.to(torch.int64) >> i) & 1 for i in range(32)], dim=1).reshape(
        -1, words.shape[1]
    )
    digits = stream.reshape(-1, bits, words.shape[1])
    return sum((digits[:, i] << i for i in range(bits)), torch.zeros_like(digits[:, 0]))


def by_hand(name: str, state: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """A linear's weight from its stored tensors, read without the peer."""
    if name in CALIBRATED:
        codes_IO = stored_codes(state["qweight"], bits)
        zeros_GO = stored_codes(state["qzeros"].T.contiguous(), bits).T + 1
        group_I = torch.arange(codes_IO.shape[0]) // 64
        return ((codes_IO - zeros_GO[group_I]) * state["scales"].float()[group_I]).T
    if name == "hqq":
        packed = state["W_q"]
        codes = torch.cat([packed >> 4, packed & 15]).float()
        return ((codes - state["zero"].float()) * state["scale"].float()).flatten()
    packed = state["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    return (state["weight.quant_map"][codes].reshape(-1, 64) * state["weight.absmax"][:, None]).flatten()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("gptqmodel", {"bits": 4}),
        ("gptqmodel", {"bits": 3}),
        ("gptqmodel", {"bits": 4, "symmetric": False}),
        ("bitsandbytes", {"double_quantization": False}),
        ("hqq", {"bits": 4}),
        ("autoround", {"bits": 4, "iterations": 2}),
        ("autoround", {"bits": 2, "iterations": 2}),
    ],
)
def test_an_installed_peer_returns_what_its_own_checkpoint_says(
    name: str, given: dict[str, Any], tmp_path: Path
) -> None:
    if not (ENVIRONMENTS / name).is_dir():
        pytest.skip(f"`make peers PEERS={name}` was not run")
    config = _config("LlamaConfig", hidden_size=128, intermediate_size=256)()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    result = call(name, tmp_path / "model", tmp_path / "out", **given)
    bits = given.get("bits", 4)
    assert bits < result.bits_per_weight < bits + 1
    assert result.weight_error < 2.0 ** (2 - bits)  # GPTQ gives up some of it for that of the outputs
    pinned = requirements(name)
    assert {key: result.versions[key].partition("+")[0] for key in pinned} == pinned
    stored, dense = (
        load_file(result.stored / "model.safetensors"),
        load_file(result.model / "model.safetensors"),
    )
    for linear in (key.removesuffix(".weight") for key in dense if "_proj." in key):
        own = {k.removeprefix(f"{linear}."): v for k, v in stored.items() if k.startswith(f"{linear}.")}
        expected = by_hand(name, own, bits).reshape(dense[f"{linear}.weight"].shape)
        torch.testing.assert_close(dense[f"{linear}.weight"], expected, rtol=1e-6, atol=1e-7)
    assert result.forward_difference < environment.FORWARD_TOLERANCE
