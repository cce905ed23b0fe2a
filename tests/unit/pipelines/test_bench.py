"""``compress bench``: finding, listing, choosing, skipping and counting benchmarks."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from compress.__main__ import app
from compress.errors import UsageError
from compress.pipelines import bench as module
from compress.pipelines.bench import Benchmark, bench, choose, find_benchmarks, missing, regression_options
from compress.pipelines.reporter import Reporter
from tests.commands import parsed
from tests.sources import ROOT

SOURCE = '''"""{summary}

More.
"""

TAKES = ("hours", "minutes")
NEEDS = {needs}

import pathlib, sys

if __name__ == "__main__":
    pathlib.Path({log!r}).open("a").write(" ".join(["{name}", *sys.argv[1:]]) + "\\n")
    sys.exit({code})
'''


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Benchmarks that note how they were called; returns their notes."""
    folder, log = tmp_path / "site" / "made_up", tmp_path / "log"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "helper.py").write_text("X = 1\n", encoding="utf-8")
    cases = {
        "good": ("It works.", "()", 0),
        "bad": ("It fails.", "()", 3),
        "gpu": ("It needs a device.", '("gpu",)', 0),
        "peer": ("It compares.", '("peer:nobody",)', 0),
        "regression": ("The chain.", "()", 0),
    }
    for name, (summary, needs, code) in cases.items():
        text = SOURCE.format(summary=summary, needs=needs, log=str(log), name=name, code=code)
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "PACKAGE", "made_up")
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.syspath_prepend(str(folder.parent))
    sys.modules.pop("made_up", None)
    log.touch()
    return log


def ran(**given: Any) -> dict[str, Any]:
    return bench(Reporter(quiet=True), given)


def test_every_benchmark_says_what_it_takes_and_needs() -> None:
    """Those of the repository: every module that runs by itself, with classes and needs that are known."""
    found = find_benchmarks(ROOT / "benchmarks")
    runs = {
        f.stem for f in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in f.read_text("utf-8")
    }
    assert {"smoke", "regression", "plan_check", "quantization"} <= set(found)
    assert runs - set(found) == {"results_page"}  # it writes a page and measures nothing
    for each in found.values():
        assert set(each.takes) <= {"seconds", "minutes", "hours"}, each.name
        assert all(need in ("gpu", "wikitext2") or need.startswith("peer:") for need in each.needs), each.name
        assert '"--out"' in (ROOT / "benchmarks" / f"{each.name}.py").read_text(encoding="utf-8"), each.name
        assert '"--quick"' in (ROOT / "benchmarks" / f"{each.name}.py").read_text(encoding="utf-8"), each.name


def test_names_are_chosen_in_their_order_once() -> None:
    known = {
        name: Benchmark(name=name, summary="", takes=("hours", "minutes"), needs=())
        for name in ("a", "regression")
    }
    assert [each.name for each in choose([], known)] == ["regression"]
    assert [each.name for each in choose(["all"], known)] == ["a", "regression"]
    assert [each.name for each in choose(["regression", "a", "a"], known)] == ["regression", "a"]
    with pytest.raises(UsageError, match="no benchmark 'b'") as refused:
        choose(["b"], known)
    assert "all, a, regression" in refused.value.remedy


def test_runs_are_counted_and_a_failure_is_one(made_up: Path, tmp_path: Path) -> None:
    result = ran(names=["good", "bad"], quick=True, out=tmp_path / "out")
    assert result["counts"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert result["ok"] is False
    assert [each.get("exit_code") for each in result["benchmarks"]] == [0, 3]
    assert made_up.read_text(encoding="utf-8").splitlines() == [
        f"{name} --quick --out {tmp_path / 'out' / name}.json" for name in ("good", "bad")
    ]


def test_what_is_not_here_is_skipped_and_said(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_gpu", lambda: False)
    result = ran(names=["gpu", "peer", "good"])
    assert result["counts"] == {"passed": 1, "failed": 0, "skipped": 2}
    assert result["ok"] is True
    reasons = {each["name"]: each.get("reason", "") for each in result["benchmarks"]}
    assert "GPU" in reasons["gpu"]
    assert "make peers PEERS=nobody" in reasons["peer"]
    monkeypatch.setattr(module, "_has_gpu", lambda: True)
    assert ran(names=["gpu"])["counts"]["passed"] == 1
    assert made_up.read_text(encoding="utf-8").split() == ["good", "gpu"]


def test_a_peer_that_was_made_is_found(tmp_path: Path) -> None:
    each = Benchmark(name="x", summary="", takes=("hours", "minutes"), needs=("peer:hqq", "wikitext2"))
    assert any("hqq" in reason for reason in missing(each, tmp_path / "benchmarks"))
    python = tmp_path / ".venv-peers" / "hqq" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert not any("hqq" in reason for reason in missing(each, tmp_path / "benchmarks"))


def test_options_of_the_suite_go_to_it_alone(made_up: Path) -> None:
    ran(update=True, repeats=2, baselines=Path("here"), model=None, data=None)
    assert made_up.read_text(encoding="utf-8") == "regression --update --repeats 2 --baselines here\n"
    with pytest.raises(UsageError, match="--update is about the benchmark regression"):
        ran(names=["good"], update=True)
    with pytest.raises(UsageError, match="--repeats counts the runs behind a baseline"):
        ran(repeats=2)
    with pytest.raises(UsageError, match="--finished takes a chain that was run, and --quick"):
        ran(finished=Path("work"), quick=True)
    assert regression_options({"finished": Path("work")}, ["regression"]) == ["--finished", "work"]
    assert regression_options({"model": "m", "update": False}, ["regression"]) == ["--model", "m"]


def test_the_command_line(made_up: Path) -> None:
    listed = CliRunner().invoke(app, ["bench", "--list", "--json"])
    assert listed.exit_code == 0, listed.output
    rows = {row["name"]: row for row in json.loads(listed.stdout)["benchmarks"]}
    assert set(rows) == {"good", "bad", "gpu", "peer", "regression"}
    assert rows["good"] == {
        "name": "good",
        "summary": "It works.",
        "takes": {"full": "hours", "quick": "minutes"},
        "missing": [],
    }
    table = CliRunner().invoke(app, ["bench", "--list"], env={"COLUMNS": "80"})
    assert "It compares." in table.stdout
    assert "peer would be skipped" in table.stdout
    assert made_up.read_text(encoding="utf-8") == ""
    failed = CliRunner().invoke(app, ["bench", "bad"])
    assert failed.exit_code == 1
    assert "failed: bad" in failed.stdout
    assert CliRunner().invoke(app, ["bench", "nothing"]).exit_code == 2


def test_the_workflow_to_copy_says_what_the_command_line_takes() -> None:
    text = (ROOT / "docs" / "examples" / "compress-model.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    steps = workflow["jobs"]["compress"]["steps"]
    shell = [line for step in steps for line in step.get("run", "").splitlines()]
    env = {**workflow["env"]}
    ran = [
        re.sub(r"\$([A-Z]+)", lambda found: env[found[1]], line)
        for line in shell
        if line.startswith("compress ")
    ]
    found = [parsed(line) for line in ran]
    assert [each.verb for each in found] == ["plan", "run", "verify", "report", "bench"]
    plan, run, verify, report, bench = found
    assert plan.given["check"] is True  # else the step could not fail
    # what is compared is what the recipe made, and the baseline is of the same
    assert run.common.run == verify.common.run == report.common.run == bench.given["finished"] == Path("work")
    written = [
        parsed(line.removeprefix("#   ")) for line in text.splitlines() if line.startswith("#   compress ")
    ]
    assert [each.verb for each in written] == ["run", "bench"]
    assert written[0].common == run.common
    assert written[0].given == run.given
    assert written[1].given["finished"] == bench.given["finished"]
    assert written[1].given["update"] is True
    assert written[1].given["baselines"] == bench.given["baselines"]
    # nothing is installed that no index has
    checkout = next(
        step["with"]["path"]
        for step in steps
        if "path" in step.get("with", {}) and "repository" in step["with"]
    )
    installs = [line for line in shell if line.startswith("pip install")]
    assert installs[-1].endswith(f"./{checkout}")
    assert not any("compress-llm" in line for line in installs)
    kept = next(step for step in steps if "upload-artifact" in step.get("uses", ""))
    assert kept["if"] == "always()"
    assert "bench/*.json" in kept["with"]["path"]
