from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError, UsageError
from compress.pipelines.identity import differences, stage_id
from compress.pipelines.workspace import Workspace, read_json, write_json

MODEL = {"name": "m", "path": "/nowhere", "fingerprint": "f0"}


def make(
    workspace: Workspace, verb: str, config: dict[str, Any], inputs: dict[str, str] | None = None
) -> Path:
    inputs = inputs or {"model": "f0"}
    partial = workspace.open_partial(verb, config, inputs, redo=False)
    (partial / "artifact").write_text(verb)
    record = {
        "format_version": 1,
        "id": stage_id(verb, config, inputs),
        "verb": verb,
        "config": config,
        "inputs": inputs,
        "metrics": {},
    }
    return workspace.complete(partial, record).path


def test_a_stage_appears_only_when_complete(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "run")
    workspace.set_model(MODEL)
    partial = workspace.open_partial("prune", {"ratio": 0.5}, {"model": "f0"}, redo=False)
    assert partial.name == "01-prune.partial"
    assert Workspace(tmp_path / "run").stages == []
    (partial / "steps").mkdir()
    (partial / "steps" / "one").write_text("x")
    (partial / "half").write_text("x")
    again = Workspace(tmp_path / "run").open_partial("prune", {"ratio": 0.5}, {"model": "f0"}, redo=False)
    assert (again / "steps" / "one").read_text() == "x"
    assert not (again / "half").exists()


def test_chain_is_numbered_and_read_back(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.set_model(MODEL)
    paths = [make(workspace, verb, {"v": i}) for i, verb in enumerate(("prune", "quantize", "train"))]
    assert [p.name for p in paths] == ["01-prune", "02-quantize", "03-train"]
    again = Workspace(tmp_path)
    assert [s.verb for s in again.stages] == ["prune", "quantize", "train"]
    assert again.model == MODEL
    assert again.model_before("quantize") is not None
    before_train, before_quantize = again.model_before("train"), again.model_before("quantize")
    assert before_train is not None
    assert before_quantize is not None
    assert (before_train.verb, before_quantize.verb) == ("quantize", "prune")
    assert again.model_before("prune") is None


def test_redo_drops_what_came_after(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.set_model(MODEL)
    for verb in ("prune", "quantize", "train"):
        make(workspace, verb, {})
    assert workspace.drop_from("quantize") == ["02-quantize", "03-train"]
    assert [s.verb for s in Workspace(tmp_path).stages] == ["prune"]
    assert not (tmp_path / "03-train").exists()
    assert make(workspace, "quantize", {"b": 2}).name == "02-quantize"


def test_a_new_measurement_replaces_the_old(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.set_model(MODEL)
    make(workspace, "prune", {})
    old = make(workspace, "eval", {})
    make(workspace, "quantize", {})
    new = make(workspace, "eval", {"again": True})
    assert not old.exists()
    assert [s.path.name for s in workspace.stages] == ["01-prune", "03-quantize", new.name]


def test_partial_with_other_settings_is_refused_unless_redone(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.set_model(MODEL)
    partial = workspace.open_partial("prune", {"ratio": 0.5}, {"model": "f0"}, redo=False)
    (partial / "half").write_text("x")
    with pytest.raises(UsageError, match=r"ratio: 0.5 -> 0.6"):
        workspace.open_partial("prune", {"ratio": 0.6}, {"model": "f0"}, redo=False)
    fresh = workspace.open_partial("prune", {"ratio": 0.6}, {"model": "f0"}, redo=True)
    assert not (fresh / "half").exists()


def test_another_model_is_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.set_model(MODEL)
    workspace.set_model(MODEL | {"name": "same weights"})
    with pytest.raises(UsageError, match="starts from m"):
        workspace.set_model({"name": "other", "path": "", "fingerprint": "f1"})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not a workspace"):
        Workspace(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def test_two_commands_cannot_hold_one_workspace(tmp_path: Path) -> None:
    first, second = Workspace(tmp_path / "run"), Workspace(tmp_path / "run")
    with first.locked():
        first.set_model(MODEL)
        make(first, "prune", {})
        with pytest.raises(CompressError, match="Another compress command"), second.locked():
            raise AssertionError("entered a held workspace")
    with second.locked():
        assert second.model == MODEL


def test_a_workspace_in_which_nothing_came_to_be_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Workspace(tmp_path / "run").locked():
        raise RuntimeError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format_version": 99})])
def test_unreadable_manifest_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CompressError):
        Workspace(tmp_path)


def test_differences_name_each_changed_setting() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == "b: 2 -> 3, c: unset -> 4"


def test_write_json_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"format_version": 1, "a": 1})
    write_json(path, {"format_version": 1, "a": 2})
    assert read_json(path)["a"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
