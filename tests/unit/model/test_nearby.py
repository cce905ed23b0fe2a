from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError, choose, nearest
from compress.model.load import resolve
from compress.model.nearby import meant


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("my-model", "compress-run/01-prune", "compress-run/02-quantize", "deep/er/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "weights.gguf").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "my-modal").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given_name", "expected"),
    [
        ("my-modl", "my-model"),
        ("./my-mode", "my-model"),
        ("01-prun", "compress-run/01-prune"),
        ("compress-run/02-quantise", "compress-run/02-quantize"),
        ("weight.gguf", "weights.gguf"),
        ("smolm2-135m", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("entirely/else", None),
        ("notes.tx", None),
    ],
)
def test_the_nearest_model_is_meant(given_name: str, expected: str | None, place: Path) -> None:
    assert meant(given_name, ("smollm2-135m",)) == expected


def test_a_path_elsewhere_is_looked_up_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "my-modal"
    monkeypatch.chdir(elsewhere)
    assert meant(str(tmp_path / "my-modl")) == str(tmp_path / "my-model")
    assert meant(os.path.join("..", "my-modl")) == "../my-model"


def test_errors_suggest_it(place: Path) -> None:
    for name, near in (
        ("my-modl", "my-model"),
        ("compress-run/01-prun", "compress-run/01-prune"),
        ("x.gguf", None),
    ):
        with pytest.raises(CompressError) as caught:
            resolve(name)
        assert (f"did you mean {near!r}?" in caught.value.remedy) is (near is not None)
        assert caught.value.remedy[-1] in ".?"


NAMES = st.lists(st.text("abcdefgh-", min_size=1, max_size=8), min_size=1, max_size=6, unique=True)


@given(NAMES, st.text(max_size=10))
def test_what_is_suggested_is_there(names: list[str], typed: str) -> None:
    near = nearest(typed, names)
    assert near is None or near in names
    remedy = choose(typed, names)
    assert all(name in remedy for name in names)
    assert remedy[-1] == ("." if near is None else "?")


@given(NAMES, st.data())
def test_a_name_in_capitals_is_found(names: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names))
    assert nearest(name.upper(), names) == name
