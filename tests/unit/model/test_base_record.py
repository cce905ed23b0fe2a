"""The record of the model behind a small one: the checkpoint's fingerprint, and the first difference by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.model.base_record import BaseRecord
from compress.model.checkpoint import Checkpoint
from tests.tiny import tiny_checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path / "full")


def record(path: Path) -> BaseRecord:
    return BaseRecord(name="org/full", tensors=Checkpoint(path).digests())


def changed(path: Path, change: dict[str, torch.Tensor | None]) -> Checkpoint:
    file = path / "model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})
    return Checkpoint(path)


def test_it_survives_the_file_and_has_the_checkpoints_fingerprint(full: Path, tmp_path: Path) -> None:
    ours = record(full)
    assert ours.fingerprint == Checkpoint(full).fingerprint()
    ours.save(tmp_path / "base.json")
    again = BaseRecord.load(tmp_path / "base.json")
    assert again == ours
    assert again.difference(Checkpoint(full).digests()) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {NAME: t[NAME] + 1e-3}, f"its tensor {NAME} has other values"),
        (lambda t: {NAME: t[NAME].half()}, f"its tensor {NAME} is F16"),
        (lambda t: {NAME: t[NAME][:-1]}, f"its tensor {NAME} is F32 [95, 64] instead of F32 [96, 64]"),
        (lambda t: {NAME: None}, f"it has no tensor {NAME}"),
        (lambda t: {"zz": torch.ones(2)}, "it has a tensor zz"),
        # the first in alphabetical order, not the first that was changed
        (
            lambda t: {NAME: t[NAME] + 1, "lm_head.weight": t["lm_head.weight"] * 2},
            "its tensor lm_head.weight",
        ),
    ],
)
def test_the_first_difference_is_named(full: Path, change: object, words: str) -> None:
    ours = record(full)
    assert callable(change)
    other = changed(full, change(load_file(full / "model.safetensors")))
    difference = ours.difference(other.digests())
    assert difference is not None
    assert difference.startswith(words)
    assert ours.fingerprint != other.fingerprint()


def test_damaged_records_are_refused(full: Path, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    record(full).save(path)
    content = json.loads(path.read_text())
    content["tensors"][NAME]["sha256"] = "0" * 64
    for text, message in (
        (json.dumps(content), "is not that of its tensors"),
        (json.dumps({**content, "format_version": 2}), "format version 2, not 1"),
        (json.dumps({"format_version": 1}), "no record of a base"),
        ("[1]", "no record of a base"),
        ("{", "no record of a base"),
    ):
        path.write_text(text)
        with pytest.raises(CompressError, match=message):
            BaseRecord.load(path)
