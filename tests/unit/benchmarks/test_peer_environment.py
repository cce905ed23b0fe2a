from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.benchmarks.peers import environment, environment_runner
from compress.benchmarks.peers.environment import peer_command, peer_variables, run_peer
from compress.benchmarks.peers.environment_storage import linear_shapes, stored_bytes, write_dense
from compress.errors import CompressError, UsageError
from compress.model.load import load_model
from tests.tiny import tiny_checkpoint

FAKE = Path(__file__).with_name("fake_peer_runner.py")
LINEARS = ("model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj")


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """An environment whose interpreter is ours."""
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python.parents[1]


def fake(model: Path, out: Path, folder: Path, ids: torch.Tensor | None = None, **given: Any) -> Any:
    timeout = given.pop("timeout", 120.0)
    return run_peer(
        FAKE,
        model,
        ids,
        out,
        settings=given,
        distributions=("safetensors",),
        environment=folder,
        threads=1,
        timeout=timeout,
        variables={"PEER_WORKERS": "2"},
    )


def test_bytes_are_counted_for_the_linears_alone_over_all_files(tmp_path: Path) -> None:
    one, two = LINEARS
    first = {
        f"{one}.qweight": torch.zeros(3, 5, dtype=torch.int32),
        f"{one}.scales": torch.zeros(7, dtype=torch.float16),
        f"{one}.bias": torch.zeros(100),
        "model.embed_tokens.weight": torch.zeros(50, 2),
        f"{one}_norm.weight": torch.zeros(9),
    }
    second = {
        f"{two}.qweight": torch.zeros(11, dtype=torch.int32),
        f"{two}.weight.quant_state.nf4": torch.zeros(13, dtype=torch.uint8),
        f"{two}.g_idx": torch.zeros(17, dtype=torch.int64),
        "lm_head.weight": torch.zeros(4),
    }
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    expected = {"qweight": 4 * 15 + 4 * 11, "scales": 14, "g_idx": 8 * 17, "weight.quant_state.nf4": 13}
    assert stored_bytes(tmp_path, LINEARS) == expected


def test_a_linear_that_is_not_stored_is_an_error(tmp_path: Path) -> None:
    save_file(
        {f"{LINEARS[0]}.codes": torch.zeros(2), f"{LINEARS[1]}.bias": torch.zeros(2)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CompressError, match=r"nothing of 1 linears, first 'model\.layers\.10\.mlp\.up_proj'"):
        stored_bytes(tmp_path, LINEARS)


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "qwen2", "phi3"])
def test_linear_shapes_are_those_of_the_modules(kind: str, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint(kind, tmp_path))
    found = linear_shapes(tmp_path)
    expected = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    assert found == expected


def test_the_dense_model_has_the_given_linears_and_else_what_it_had(tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2", tmp_path / "source", dtype=torch.bfloat16)
    model = load_model(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    given, difference, total = {}, 0.0, 0.0
    for name, shape in linear_shapes(source).items():
        new = torch.randn(shape, generator=generator)
        old = model.get_parameter(f"{name}.weight").data
        difference += float((new.double() - old.double()).square().sum())
        total += float(old.double().square().sum())
        given[f"{name}.weight"] = new
        model.get_parameter(f"{name}.weight").data = new
    save_file(given, tmp_path / "weights.safetensors")
    error = write_dense(
        source, tmp_path / "weights.safetensors", tmp_path / "dense", list(linear_shapes(source))
    )
    assert error == pytest.approx(math.sqrt(difference / total), rel=1e-9)
    dense = load_model(tmp_path / "dense")
    assert dense.dtype == torch.float32
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    for name, value in model.state_dict().items():
        assert torch.equal(dense.state_dict()[name], value), name


@pytest.mark.parametrize(
    "broken", [torch.zeros(3, 3), torch.full((96, 32), math.nan), torch.full((96, 32), math.inf)]
)
def test_weights_of_another_shape_or_without_value_are_refused(broken: torch.Tensor, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama_mha", tmp_path / "source")
    name = "model.layers.0.mlp.up_proj"
    save_file({f"{name}.weight": broken}, tmp_path / "weights.safetensors")
    with pytest.raises(CompressError, match=name):
        write_dense(source, tmp_path / "weights.safetensors", tmp_path / "dense", [name])


@pytest.mark.parametrize("returned", [[], ["up", "down"], ["up", "gate", "down"]])
def test_a_peer_that_returns_other_linears_is_refused(returned: list[str], tmp_path: Path) -> None:
    source = tiny_checkpoint("llama_mha", tmp_path / "source")
    prefix = "model.layers.0.mlp."
    weights = {f"{prefix}{role}_proj.weight": torch.zeros(96, 32) for role in returned}
    save_file(weights, tmp_path / "weights.safetensors")
    asked = [f"{prefix}up_proj", f"{prefix}gate_proj"]
    with pytest.raises(CompressError, match="other weights than the decoder's linears"):
        write_dense(source, tmp_path / "weights.safetensors", tmp_path / "dense", asked)
    assert not (tmp_path / "dense").exists()


def test_a_peer_gets_the_windows_and_its_checkpoint_is_counted_and_scored(tmp_path: Path, ours: Path) -> None:
    source = tiny_checkpoint("llama_gqa", tmp_path / "source", dtype=torch.bfloat16)
    ids = torch.randint(4, 128, (5, 16), generator=torch.Generator().manual_seed(3))
    result = fake(source, tmp_path / "out", ours, ids)
    stored = load_file(result.stored / "model.safetensors")
    assert torch.equal(stored["calibration"], ids)
    assert stored["calibration"].dtype == torch.int64

    shapes = linear_shapes(source)
    weights = sum(rows * columns for rows, columns in shapes.values())
    rows = sum(rows for rows, _ in shapes.values())
    assert result.stored_bytes == {"codes": weights, "scales": 4 * rows}
    assert result.weights == weights
    assert result.bits_per_weight == pytest.approx(8 + 32 * rows / weights, rel=1e-12)

    model, before = load_model(result.model), load_model(source, dtype=torch.float32)
    for name in shapes:
        expected = stored[f"{name}.codes"] * stored[f"{name}.scales"][:, None]
        before.get_parameter(f"{name}.weight").data = expected
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before(ids).logits)

    facts = json.loads((result.stored / "facts.json").read_text())
    variables = facts["environment"]
    assert (variables["OMP_NUM_THREADS"], variables["PEER_WORKERS"], facts["threads"]) == ("1", "2", 1)
    assert facts["cwd"] == str(tmp_path / "out")
    assert str(Path(environment.__file__).parent) not in facts["path"]

    told = result.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["settings"] == {"windows": 5, "length": 16, "threads": 1}
    assert set(told["versions"]) == {"torch", "transformers", "safetensors", "python"}
    assert 0 < told["weight_error"] < 0.01
    assert told["forward_difference"] < 1e-5
    assert told["seconds"] > 0
    assert told["peak_bytes"] > 1 << 26
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"stored", "model", "log.txt", "request.json", "answer.json"}
    with pytest.raises(UsageError, match="not empty"):
        fake(source, tmp_path / "out", ours)


def test_a_peer_that_computes_with_other_weights_is_refused(tmp_path: Path, ours: Path) -> None:
    source = tiny_checkpoint("llama_mqa", tmp_path / "source")
    with pytest.raises(CompressError, match="computes with other weights"):
        fake(source, tmp_path / "out", ours, factor=1.05)


def test_a_failing_peer_is_quoted_and_nothing_of_it_goes_on(tmp_path: Path, ours: Path) -> None:
    source = tiny_checkpoint("llama_mqa", tmp_path / "source")
    child = tmp_path / "child"
    with pytest.raises(CompressError, match="the disk of this peer is full"):
        fake(source, tmp_path / "out", ours, fails=True, child=str(child))
    status = Path("/proc") / child.read_text() / "stat"
    deadline = time.monotonic() + 10
    while status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the peer's child is still running"
        time.sleep(0.05)


def test_a_slow_peer_is_given_up(tmp_path: Path, ours: Path) -> None:
    source = tiny_checkpoint("llama_mqa", tmp_path / "source")
    with pytest.raises(CompressError, match="did not finish in 0 seconds"):
        fake(source, tmp_path / "out", ours, timeout=0.1)


def test_without_its_environment_nothing_is_written(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama_mqa", tmp_path / "source")
    with pytest.raises(UsageError, match="make peers"):
        fake(source, tmp_path / "out", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_the_command_keeps_our_files_off_the_import_path(ours: Path) -> None:
    command = peer_command(ours, Path("request.json"))
    assert command[:2] == [str(ours / "bin" / "python"), "-P"]
    assert Path(command[2]) == Path(environment_runner.__file__)
    assert command[3] == str(Path.cwd() / "request.json")


def test_the_peers_variables_leave_our_interpreter_behind() -> None:
    base = {"PATH": "/bin", "PYTHONPATH": "x", "PYTHONHOME": "y", "VIRTUAL_ENV": "z", "OMP_NUM_THREADS": "8"}
    assert peer_variables(base, 2, {"MORE": "1"}) == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MORE": "1",
    }


@pytest.mark.parametrize("bias", [False, True])
def test_the_forward_difference_of_a_linear_is_its_rounding_alone(bias: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        linear = torch.nn.Linear(24, 40, bias=bias)
    weight = linear.weight.detach()
    offset = linear.bias.detach() if bias else None
    assert environment_runner.forward_difference(linear, weight, offset, torch.float32) < 1e-6
    wrong = environment_runner.forward_difference(linear, 2 * weight, None, torch.float32)
    assert wrong > 0.4
    rounded = environment_runner.forward_difference(linear.bfloat16(), weight, offset, torch.bfloat16)
    assert 1e-4 < rounded < environment.FORWARD_TOLERANCE


def test_peak_memory_is_read_in_bytes() -> None:
    assert (
        environment_runner.peak_resident_bytes("Name:\tpython\nVmHWM:\t  123 kB\nThreads:\t1\n") == 123 * 1024
    )
    assert environment_runner.peak_resident_bytes("Name:\tpython\nThreads:\t1\n") == 0
