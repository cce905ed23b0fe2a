"""A short run of the fuzzers, and configs, headers and recipes that hypothesis makes up."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.tensor_file import DTYPES, read_header
from compress.pipelines.recipe import read_recipe
from compress.pipelines.settings import VERBS
from tests.fuzz import run, targets
from tests.sources import ROOT
from tests.tiny import tiny_checkpoint

EXECUTIONS = os.environ.get("COMPRESS_FUZZ", "4000")
"""Of the short run; the long one has 200,000 or more."""

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.integers(min_value=-2, max_value=8),
    st.floats(),
    st.text(max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "rope_parameters", "rope_scaling",
    "rope_theta", "quantization_config", "num_local_experts", "text_config", "attention_bias", "mlp_bias",
    "architectures", "torch_dtype", "dtype", "max_position_embeddings", "layer_types", "pad_token_id",
)  # fmt: skip


def test_a_short_run_of_the_fuzzers_finds_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "--executions", EXECUTIONS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    count = int(done.stdout.splitlines()[-1].split()[1])
    assert count >= int(EXECUTIONS)


def test_a_fuzzer_says_so_when_something_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(data: bytes) -> None:
        if len(data) > 3:
            raise RuntimeError("found")

    monkeypatch.setitem(targets.TARGETS, "header", (broken, [b"abcdef"]))
    with pytest.raises(RuntimeError, match="found"):  # which ends the process of this target with 1
        run.main(["--only", "header", "--executions", "50", "--blind"])
    assert "input: b'" in capsys.readouterr().err


def test_a_target_that_failed_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def process(name: str, executions: int, seed: int, *, blind: bool) -> tuple[int, str]:
        return executions, "RuntimeError: found" if name == "index" else ""

    monkeypatch.setattr(run, "_in_a_process", process)
    assert run.main(["--executions", "100"]) == 1
    said = capsys.readouterr().out
    assert "index: 40 executions, FAILED\nRuntimeError: found" in said
    assert said.splitlines()[-1].endswith("1 of 4 targets failed")


def test_every_target_has_its_share() -> None:
    assert set(run.SHARES) == set(targets.TARGETS)
    assert sum(run.SHARES.values()) == pytest.approx(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("configs") / "model")


@pytest.mark.filterwarnings("ignore")  # transformers and torch warn of what they are given here
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
@example({"num_hidden_layers": 10**12})
@example({"num_attention_heads": 0})
@example({"hidden_size": 2**70})
@example({"layer_types": [[]]})
@example({"head_dim": -1})
@example({"vocab_size": -1})
@example({"pad_token_id": 2**31})
@example({"rope_parameters": {"rope_type": "x"}})
@example({"dtype": True})
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_config_is_understood_or_refused(model: Path, changes: dict[str, Any]) -> None:
    plain = model / "config.json"
    original = plain.read_text(encoding="utf-8")
    try:
        plain.write_text(json.dumps(json.loads(original) | changes), encoding="utf-8")
        try:
            arch = checkpoint_architecture(Checkpoint(model))
        except CompressError:
            return
        assert arch.layers == 2
        assert arch.hidden == 64
    finally:
        plain.write_text(original, encoding="utf-8")


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F128"]),
        "shape": st.lists(st.integers(min_value=-1, max_value=5), max_size=3),
        "data_offsets": st.lists(st.integers(min_value=0, max_value=64), min_size=1, max_size=3),
    }
)


@given(
    st.dictionaries(st.text(max_size=6), ENTRY | VALUES, max_size=3), st.integers(min_value=0, max_value=96)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_is_read_or_refused(tmp_path: Path, content: dict[str, Any], size: int) -> None:
    text = json.dumps(content).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    try:
        entries, _ = read_header(file)
    except CompressError:
        return
    assert sum(entry.nbytes for entry in entries.values()) == size
    for entry in entries.values():
        assert tuple(entry.read().shape) == entry.shape


STEP = st.one_of(
    st.sampled_from([*VERBS, "report", "bake"]),
    st.dictionaries(
        st.sampled_from([*VERBS, "report"]),
        st.dictionaries(
            st.sampled_from(["ratio", "steps", "budget", "task", "rank", "x"]), VALUES, max_size=3
        )
        | VALUES,
        max_size=2,
    ),
    VALUES,
)


@given(
    st.dictionaries(
        st.sampled_from(["model", "data", "seed", "effort", "dtype", "unknown"]), VALUES, max_size=3
    ),
    st.lists(STEP, max_size=3) | VALUES,
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_recipe_is_taken_or_refused(tmp_path: Path, shared: dict[str, Any], steps: Any) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**shared, "steps": steps}), encoding="utf-8")
    try:
        recipe = read_recipe(str(file))
    except CompressError:
        return
    assert {verb for verb, _ in recipe.steps} <= {*VERBS, "report"}
