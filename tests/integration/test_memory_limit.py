"""``--memory-limit``: the same bytes whole and layer by layer, or a refusal before anything is touched."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.model.states import Room
from compress.pipelines import ways
from compress.pipelines.settings import Common
from compress.pipelines.way import Way
from tests.integration.common import PRUNING, TRAINING, run
from tests.tiny import tiny_checkpoint

SCORING = {"ratio": 0.4, "calibration_tokens": 2048}


@pytest.fixture
def common(tmp_path: Path, text_file: Path) -> Common:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full", dtype=torch.bfloat16)
    return Common(
        run=tmp_path / "whole",
        model=str(full),
        data=str(text_file),
        dtype="float32",
        threads=1,
        effort="quick",
    )


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch, common: Common) -> Callable[[str], Common]:
    """From now on nothing fits whole; the same settings in another workspace."""

    def switch(name: str) -> Common:
        def streamed(*_: Any, **__: Any) -> ways.Fit:
            way = Way(streamed=True, room=Room(bytes=1 << 14, folder=common.run.parent / name))
            return ways.Fit(way=way, needs=0.0, phase="", term="", fits=True, change=None)

        monkeypatch.setattr(ways, "best_fit", streamed)
        return dataclasses.replace(common, run=common.run.parent / name)

    return switch


def files(record: dict[str, Any]) -> dict[str, Any]:
    """What a stage left, by name: size and hash."""
    return dict(record["files"])


@pytest.mark.slow
@pytest.mark.usefixtures("forked_reopen")
def test_a_chain_has_the_same_bytes(common: Common, layer_by_layer: Callable[[str], Common]) -> None:
    verbs: list[tuple[str, dict[str, Any]]] = [
        ("prune", SCORING),
        ("quantize", {"budget": "4.5bit", "objective": "hessian", "calibration_tokens": 2048}),
        ("train", TRAINING),
        ("recover", {"merge": True}),
    ]
    whole = [run(verb, common, **given) for verb, given in verbs]
    other = layer_by_layer("streamed")
    streamed = [run(verb, other, **given) for verb, given in verbs]
    for expected, found in zip(whole, streamed, strict=True):
        assert files(found) == files(expected), expected["verb"]
        assert found["id"] == expected["id"]
        for key in ("before", "after"):
            assert found["metrics"].get(key) == expected["metrics"].get(key)
    assert {file.name for file in other.run.iterdir()} == {file.name for file in common.run.iterdir()}


@pytest.mark.usefixtures("forked_reopen")
@pytest.mark.parametrize(
    ("verb", "given"),
    [
        ("prune", {**PRUNING, "ratio": 0.4, "criterion": "magnitude"}),
        pytest.param(
            "prune",
            {**SCORING, "criterion": "flap", "repair": "bias", "shape": "global"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "prune",
            {**PRUNING, "ratio": 0.4, "criterion": "random", "repair": "none", "repair_steps": 2},
            marks=pytest.mark.slow,
        ),
        ("prune", {"shape": "semi", "criterion": "wanda", "pattern": "2:4", "calibration_tokens": 2048}),
        ("quantize", {"budget": "4bit", "objective": "frobenius", "embeddings": "8bit"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("criterion") or value["objective"],
)
def test_a_stage_has_the_same_bytes(
    verb: str, given: dict[str, Any], common: Common, layer_by_layer: Callable[[str], Common]
) -> None:
    whole = run(verb, common, **given)
    streamed = run(verb, layer_by_layer("streamed"), **given)
    assert files(streamed) == files(whole)
    assert streamed["metrics"]["after"] == whole["metrics"]["after"]


@pytest.mark.usefixtures("forked_reopen")
def test_what_does_not_fit_is_refused_before_anything_is_touched(common: Common) -> None:
    small = dataclasses.replace(common, memory_limit="64MiB")
    for verb in ("prune", "quantize", "train"):
        with pytest.raises(CompressError, match=rf"^{verb} needs .* and --memory-limit is 64MiB") as refused:
            run(verb, small)
        assert re.search(r"^Give --memory-limit \d\.\dGiB or more", refused.value.remedy)
    with pytest.raises(CompressError, match=r"^eval needs .* and --memory-limit is 64MiB"):
        run(
            "eval",
            dataclasses.replace(small, model=None),
            models=(str(common.model),),
            sequence=32,
            windows=2,
        )
    assert not common.run.is_dir() or not any(path.is_dir() for path in common.run.iterdir())
    with pytest.raises(UsageError, match="is no memory size"):
        run("prune", dataclasses.replace(common, memory_limit="3bit"))
    plenty = dataclasses.replace(common, memory_limit="8GiB")
    enough = run("prune", plenty, criterion="magnitude", repair="none", repair_steps=0, trials=1)
    assert enough["verb"] == "prune"


def test_a_model_cannot_write_its_text_layer_by_layer(
    common: Common, layer_by_layer: Callable[[str], Common]
) -> None:
    with pytest.raises(CompressError, match="lets the model write its text"):
        run("prune", dataclasses.replace(layer_by_layer("streamed"), data="self"), **SCORING)
