from __future__ import annotations

import dataclasses
import json
import mmap
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.evaluate.memory import PeakMemory, resident_now
from compress.evaluate.memory_timeline import MemoryTimeline
from compress.pipelines.identity import FORMATS, TEXT
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import AlignSettings, Common, PruneSettings, TrainSettings, resolve
from compress.pipelines.stage import Context, Outcome, aside_dict, run_stage, settings_dict
from compress.pipelines.workspace import Workspace

MODEL = {"name": "m", "path": "/nowhere", "fingerprint": "f0"}


class Chain:
    """Stages whose work is a file, in one workspace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.worked: list[str] = []
        self.threads: list[int] = []

    def make(self, verb: str, *, fail: BaseException | None = None, **changes: Any) -> Outcome:
        """Run ``verb`` with the setting ``v``; ``fail`` is raised after the setting's file was written."""
        v, write = changes.pop("v", 0), changes.pop("write", True)
        text, aside = changes.pop("text", None), changes.pop("aside", {})
        inputs = {"model": "f0"} | ({} if text is None else {TEXT: text})
        workspace = Workspace(self.root)
        common = dataclasses.replace(Common(run=self.root, effort="quick"), **changes)
        context = Context(common=common, workspace=workspace, reporter=Reporter(quiet=True))

        def work(folder: Path) -> Mapping[str, Any]:
            self.worked.append(verb)
            self.threads.append(torch.get_num_threads())
            if write:
                (folder / "steps").mkdir(exist_ok=True)
                with (folder / "steps" / "one").open("a") as file:
                    file.write(f"{v};")
                (folder / "artifact").write_text((folder / "steps" / "one").read_text())
            if fail is not None:
                (folder / "half-written").write_text("x")
                raise fail
            shutil.rmtree(folder / "steps", ignore_errors=True)
            return {"v": v}

        if common.dry_run:
            return run_stage(context, verb, config={"v": v}, inputs=inputs, work=work, aside=aside)
        with workspace.locked():
            workspace.set_model(MODEL)
            return run_stage(context, verb, config={"v": v}, inputs=inputs, work=work, aside=aside)

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "run")


def test_a_stage_is_made_once(chain: Chain) -> None:
    made = chain.make("prune")
    assert made.fresh
    assert made.stage is not None
    record = json.loads((chain.root / "01-prune" / "stage.json").read_text())
    assert (record["verb"], record["config"], record["metrics"]) == ("prune", {"v": 0}, {"v": 0})
    assert record["effort"] == "quick"
    if sys.platform.startswith("linux"):
        timeline = record["memory_timeline"]
        assert timeline["interval_seconds"] == 1.0
        # Resident memory, so below the peak of the same block; a process with torch holds tens of megabytes.
        assert 50e6 < max(timeline["host_bytes"]) <= record["peak_memory_bytes"] * 1.01
    assert not (chain.root / "01-prune" / "partial.json").exists()
    again = chain.make("prune")
    assert not again.fresh
    assert chain.worked == ["prune"]
    assert made.summary() == again.summary()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_peak_before_one_that_the_work_measures_itself_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MemoryTimeline.__init__.__kwdefaults__, "interval", 0.01)
    workspace = Workspace(tmp_path / "run")
    context = Context(
        common=Common(run=tmp_path / "run", effort="quick"),
        workspace=workspace,
        reporter=Reporter(quiet=True),
    )
    start = resident_now() or 0

    def work(folder: Path) -> Mapping[str, Any]:
        with mmap.mmap(-1, 300 << 20) as pages:
            for place in range(0, len(pages), 4096):
                pages[place] = 1
            time.sleep(1)  # a hundred samples
        with PeakMemory() as inner:
            folder.joinpath("artifact").write_text("x")
        return {"inner": inner.host_bytes}

    with workspace.locked():
        workspace.set_model(MODEL)
        stage = run_stage(context, "eval", config={}, inputs={"model": "f0"}, work=work).stage
    assert stage is not None
    assert stage.record["peak_memory_bytes"] - start > 250 << 20


@pytest.mark.parametrize(("used", "lead"), [(7_000_000_000, 7_000_000_000), (0, None)])
def test_the_peak_of_a_stage_on_a_gpu_is_the_gpus_and_the_hosts_beside_it(
    chain: Chain,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    used: int,
    lead: int | None,
) -> None:
    asked: list[str] = []

    class Peak(PeakMemory):
        def __init__(self, device: str) -> None:
            super().__init__("cpu")
            asked.append(device)

        def __exit__(self, *raised: Any) -> None:
            super().__exit__(*raised)
            self._reading.device_bytes = used

    monkeypatch.setattr(
        "compress.pipelines.model_input.device_and_dtype", lambda _: ("cuda:1", torch.float32)
    )
    monkeypatch.setattr("compress.evaluate.memory.PeakMemory", Peak)
    monkeypatch.setattr(MemoryTimeline, "device_peak", property(lambda _: used // 2))
    made = chain.make("prune").stage
    assert made is not None
    assert asked == ["cuda:1"]
    record = made.record
    assert record["peak_device_bytes"] == used
    assert record["peak_host_bytes"] > 50_000_000
    assert record["peak_memory_bytes"] == (lead or record["peak_host_bytes"])


def test_other_settings_need_redo(chain: Chain) -> None:
    for verb in ("prune", "quantize", "train"):
        chain.make(verb)
    with pytest.raises(UsageError, match=r"\(v: 0 -> 1\)"):
        chain.make("quantize", v=1)
    chain.make("quantize", v=1, redo=True)
    assert chain.names == ["01-prune", "02-quantize"]
    assert (chain.root / "02-quantize" / "artifact").read_text() == "1;"


def test_a_redo_that_fails_or_is_interrupted_keeps_the_old_stages(chain: Chain) -> None:
    for verb in ("prune", "quantize"):
        chain.make(verb)
    with pytest.raises(CompressError):
        chain.make("prune", v=1, redo=True, write=False, fail=CompressError("Bad.", "Mend."))
    assert chain.names == ["01-prune", "02-quantize"]
    with pytest.raises(KeyboardInterrupt):
        chain.make("prune", v=1, redo=True, fail=KeyboardInterrupt())
    assert chain.names == ["01-prune", "01-prune.partial", "02-quantize"]
    chain.make("prune", v=1, redo=True)
    assert chain.names == ["01-prune"]
    assert (chain.root / "01-prune" / "artifact").read_text() == "1;1;"


def test_a_failure_before_any_work_leaves_no_workspace(chain: Chain) -> None:
    with pytest.raises(CompressError):
        chain.make("prune", write=False, fail=CompressError("Bad.", "Mend."))
    assert not chain.root.exists()


def test_an_interrupted_stage_goes_on(chain: Chain) -> None:
    chain.make("prune")
    with pytest.raises(KeyboardInterrupt):
        chain.make("quantize", fail=KeyboardInterrupt())
    assert chain.names == ["01-prune", "02-quantize.partial"]
    with pytest.raises(UsageError, match=r"unfinished quantize .*\(v: 0 -> 1\)"):
        chain.make("quantize", v=1)
    chain.make("quantize")
    assert (chain.root / "02-quantize" / "artifact").read_text() == "0;0;"
    assert not (chain.root / "02-quantize" / "half-written").exists()


def test_what_decides_no_result_is_recorded_and_makes_no_other_stage(chain: Chain) -> None:
    with pytest.raises(KeyboardInterrupt):
        chain.make("train", fail=KeyboardInterrupt(), aside={"recompute": False})
    made = chain.make("train", aside={"recompute": True})
    assert made.stage is not None
    assert (chain.root / "01-train" / "artifact").read_text() == "0;0;"  # it went on
    record = json.loads((chain.root / "01-train" / "stage.json").read_text())
    assert (record["config"], record["aside"]) == ({"v": 0}, {"recompute": True})
    again = chain.make("train", aside={"recompute": False})
    assert not again.fresh
    assert chain.worked == ["train", "train"]
    planned = chain.make("quantize", dry_run=True, aside={"recompute": True})
    assert planned.summary() == {"verb": "quantize", "config": {"v": 0, "recompute": True}}


def test_recomputation_is_set_aside() -> None:
    for kind in (PruneSettings, AlignSettings, TrainSettings):
        given = [resolve(kind, {"recompute": recompute}, "quick") for recompute in (False, True)]
        assert settings_dict(given[0]) == settings_dict(given[1])
        assert "steps" in settings_dict(given[0])
        assert [aside_dict(each) for each in given] == [{"recompute": False}, {"recompute": True}]


def test_a_text_of_other_content_is_another_request(chain: Chain) -> None:
    assert chain.make("prune", text="a").fresh
    assert not chain.make("prune", text="a").fresh
    with pytest.raises(UsageError, match=r"the content of its text changed"):
        chain.make("prune", text="b")
    assert not chain.make("prune").fresh  # the file is not there any more
    with pytest.raises(KeyboardInterrupt):
        chain.make("quantize", text="a", fail=KeyboardInterrupt())
    with pytest.raises(UsageError, match=r"unfinished quantize .*the content of its text changed"):
        chain.make("quantize", text="b")
    chain.make("quantize", text="b", redo=True)
    assert (chain.root / "02-quantize" / "artifact").read_text() == "0;"


def test_a_stage_that_knows_no_content_of_its_text_stays(chain: Chain) -> None:
    """As an earlier version recorded it."""
    chain.make("prune")
    assert not chain.make("prune", text="a").fresh
    with pytest.raises(UsageError, match="v: 0 -> 1"):
        chain.make("prune", text="a", v=1)


def test_other_code_does_not_go_on_with_unfinished_work(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain.make("prune")
    with pytest.raises(KeyboardInterrupt):
        chain.make("quantize", fail=KeyboardInterrupt())
    monkeypatch.setitem(FORMATS, "prune", 1000)
    monkeypatch.setitem(FORMATS, "quantize", 1000)
    assert not chain.make("prune").fresh  # what is finished is kept
    with pytest.raises(UsageError, match=r"unfinished quantize of other code .*/1000\)"):
        chain.make("quantize")
    chain.make("quantize", redo=True)
    assert (chain.root / "02-quantize" / "artifact").read_text() == "0;"


def test_an_interrupted_stage_goes_on_with_its_number_of_threads(chain: Chain) -> None:
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        chain.make("prune", fail=KeyboardInterrupt())
    torch.set_num_threads(1)
    made = chain.make("prune")
    assert chain.threads == [2, 2]
    assert torch.get_num_threads() == 1
    assert made.stage is not None
    assert made.stage.record["host"]["threads"] == 2
    chain.make("quantize")
    assert chain.threads == [2, 2, 1]


def test_a_stage_whose_record_is_written_is_not_made_again(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(
            Workspace, "_carry_out", lambda self: None if "pending" not in self._manifest else killed()
        )
        chain.make("prune")
    assert chain.names == ["01-prune.partial"]
    made = chain.make("prune")
    assert chain.worked == ["prune"]
    assert made.stage is not None
    assert chain.names == ["01-prune"]


def test_a_redo_that_was_complete_is_not_done_again(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in ("prune", "quantize"):
        chain.make(verb)
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(source).endswith(".partial"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(os, "replace", killed)
        chain.make("prune", v=1, redo=True)
    assert chain.names == ["01-prune.partial"], "dropped already; what replaces it is whole"
    chain.make("prune", v=1, redo=True)
    assert chain.worked == ["prune", "quantize", "prune"]
    assert chain.names == ["01-prune"]
    assert (chain.root / "01-prune" / "artifact").read_text() == "1;"


def test_stages_are_numbered_in_the_order_they_were_finished(chain: Chain) -> None:
    chain.make("prune")
    with pytest.raises(KeyboardInterrupt):
        chain.make("quantize", fail=KeyboardInterrupt())
    chain.make("train")
    chain.make("quantize")
    assert chain.names == ["01-prune", "02-train", "03-quantize"]


def test_dropping_a_stage_drops_the_unfinished_work_after_it(chain: Chain) -> None:
    chain.make("prune")
    with pytest.raises(KeyboardInterrupt):
        chain.make("quantize", fail=KeyboardInterrupt())
    chain.make("prune", v=1, redo=True)
    assert chain.names == ["01-prune"]


def test_a_folder_left_by_a_killed_run_is_replaced(chain: Chain) -> None:
    chain.make("prune")
    (chain.root / "02-quantize").mkdir()
    (chain.root / "02-quantize" / "artifact").write_text("unlisted")
    chain.make("quantize")
    assert (chain.root / "02-quantize" / "artifact").read_text() == "0;"


def test_a_newer_measurement_replaces_the_older(chain: Chain) -> None:
    chain.make("prune")
    chain.make("eval")
    chain.make("eval", v=1)
    assert chain.names == ["01-prune", "03-eval"]


def test_a_dry_run_plans_and_does_nothing(chain: Chain) -> None:
    outcome = chain.make("prune", v=3, dry_run=True)
    assert outcome.summary() == {"verb": "prune", "config": {"v": 3}}
    assert not chain.root.exists()
    chain.make("prune")
    assert chain.make("prune", dry_run=True).stage is not None
    assert chain.make("prune", v=1, redo=True, dry_run=True).stage is None
    assert chain.worked == ["prune"]


@pytest.mark.parametrize(
    ("named", "first", "second", "told"),
    [
        (None, "notes.txt", "pydoc", True),
        ("pydoc", "notes.txt", "pydoc", False),  # asked for
        (None, "pydoc", "pydoc", False),
        (None, "notes.txt", None, False),  # reads no text
    ],
)
def test_a_stage_says_that_the_one_before_read_a_text_that_was_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    named: str | None,
    first: str,
    second: str | None,
    *,
    told: bool,
) -> None:
    workspace = Workspace(tmp_path / "run")
    for verb, text, given in (("prune", first, first), ("recover", None, None), ("quantize", second, named)):
        common = Common(run=workspace.root, effort="quick", data=given)
        context = Context(common=common, workspace=workspace, reporter=Reporter())
        with workspace.locked():
            workspace.set_model(MODEL)
            config = {"v": 0} if text is None else {"v": 0, "data": text}
            run_stage(context, verb, config=config, inputs={"model": "f0"}, work=lambda _: {})
    found = capsys.readouterr()
    notes = [line for line in (found.out + found.err).splitlines() if line.startswith("note:")]
    assert len(notes) == told
    if told:
        assert "01-prune read notes.txt" in notes[0]
