"""The regression suite and the check of the plan, on one tiny chain: what was injected is caught, noise is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.benchmarks import plan_check as checker
from compress.benchmarks import regression as suite
from compress.benchmarks.regression import Steps, main, regression, report
from compress.benchmarks.stages import in_fresh_process, options, stage_records
from compress.errors import CompressError
from compress.machine import Capacity
from compress.pipelines.settings import Common
from tests.integration.common import PRUNING, TRAINING, run
from tests.tiny import tiny_checkpoint

STEPS: Steps = (
    ("prune", {**PRUNING, "ratio": 0.3, "repair_steps": 2, "trials": 1}),
    ("quantize", {"budget": "4bit", "objective": "frobenius", "iterations": 1}),
    ("train", TRAINING),
    ("recover", {}),
    ("eval", {"windows": 2, "sequence": 32}),
)

pytestmark = pytest.mark.usefixtures("forked_reopen")


def here(verb: str, common: Common, given: Mapping[str, Any]) -> dict[str, Any]:
    return run(verb, common, **given)


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Common:
    folder = tmp_path_factory.mktemp("regression")
    model = tiny_checkpoint("llama_gqa", folder / "tiny", dtype=torch.bfloat16)
    return Common(run=folder / "run", model=str(model), data=str(text_file), dtype="float32", effort="quick")


@pytest.fixture
def records(common: Common, forked_reopen: None) -> dict[str, Any]:
    """One chain, run once; the stages say that they are done when it is asked for again."""
    return {verb: here(verb, common, given) for verb, given in STEPS}


def test_regressions_are_caught_and_noise_is_not(
    common: Common, records: dict[str, Any], tmp_path: Path
) -> None:
    def again(verb: str, _: Common, __: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = records[verb]
        return found

    asked: dict[str, Any] = {"baselines": tmp_path, "steps": STEPS, "runner": again}
    with pytest.raises(CompressError, match=r"no baseline quick\.json"):
        regression("quick", common, **asked)
    written = regression("quick", common, update=True, repeats=2, **asked)
    file = tmp_path / "quick.json"
    assert written["written"] == str(file)
    known = json.loads(file.read_text(encoding="utf-8"))
    assert known["runs"] == 2
    names = set(known["figures"])
    assert {"prune: perplexity", "quantize: perplexity", "eval, full + recovered: bytes"} <= names
    assert {f"{verb}: peak memory" for verb, _ in STEPS} <= names
    rows = {row["name"]: row for row in records["eval"]["metrics"]["rows"]}
    assert known["figures"]["eval, quantized: bytes"]["values"] == [rows["quantized"]["bytes"]] * 2
    assert regression("quick", common, **asked)["passed"] is True

    def with_(name: str, factor: float) -> dict[str, Any]:
        changed = json.loads(json.dumps(known))
        figure = changed["figures"][name]
        figure["values"] = [value * factor for value in figure["values"]]
        file.write_text(json.dumps(changed), encoding="utf-8")
        return regression("quick", common, **asked)

    assert with_("quantize: perplexity", 0.995)["passed"] is True  # half of the floor
    for name, factor in (
        ("quantize: perplexity", 0.9),
        ("train: peak memory", 0.8),
        ("eval, pruned: bytes", 1 + 1 / rows["pruned"]["bytes"]),
    ):
        result = with_(name, factor)
        assert result["passed"] is False
        (sentence,) = result["regressions"]
        assert sentence.startswith(name)
        assert "the bar" in sentence
        assert report(result).splitlines()[-1].endswith("1 failed")
    file.write_text(
        json.dumps(known | {"protocol": known["protocol"] | {"dtype": "bfloat16"}}), encoding="utf-8"
    )
    with pytest.raises(CompressError, match="dtype: bfloat16 there, float32 here"):
        regression("quick", common, **asked)


def test_without_a_baseline_that_ships_figures_are_shown_and_nothing_fails(
    common: Common, records: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.benchmarks.regression.BASELINES", tmp_path)
    result = regression(
        "chain", common, baselines=tmp_path, steps=STEPS, runner=lambda verb, *_: records[verb]
    )
    assert result["passed"] is True
    assert result["figures"]["train: peak memory"]["value"] == records["train"]["peak_memory_bytes"]
    *lines, last = report(result).splitlines()
    assert f"measured  train: peak memory: {float(records['train']['peak_memory_bytes'])}" in lines
    assert last.startswith(
        f"nothing to compare with: there is no {tmp_path / 'chain.json'}; --update writes it"
    )


def test_a_chain_that_was_run_is_compared_as_it_lies(
    common: Common, records: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = ["--finished", str(common.run), "--baselines", str(tmp_path)]
    assert main(finished) == 1
    assert "no baseline recipe.json" in capsys.readouterr().err
    assert main([*finished, "--update"]) == 0
    file = tmp_path / "recipe.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    assert (known["runs"], known["protocol"]["model"]) == (1, records["prune"]["inputs"]["model"])
    assert known["protocol"]["steps"][0] == ["prune", records["prune"]["config"]]
    assert known["protocol"]["eval_text"] == records["eval"]["metrics"]["protocol"]["sha256"]
    assert main(finished) == 0
    known["figures"]["quantize: perplexity"]["values"] = [
        0.9 * records["quantize"]["metrics"]["after"]["perplexity"]
    ]
    file.write_text(json.dumps(known), encoding="utf-8")
    assert main(finished) == 1
    assert "REGRESSED quantize: perplexity" in capsys.readouterr().out
    for option in (["--quick"], ["--model", "x"], ["--repeats", "2", "--update"]):
        with pytest.raises(SystemExit):
            main([*finished, *option])
    with pytest.raises(SystemExit):
        main(["--repeats", "2"])
    assert "without --update none is written" in capsys.readouterr().err
    assert main(["--finished", str(tmp_path / "nothing"), "--update"]) == 1


def test_the_plan_is_set_against_what_was_measured(
    common: Common, records: dict[str, Any], tmp_path: Path
) -> None:
    assert stage_records(common.run).keys() == records.keys()
    found = checker.plan_check(STEPS, common, known=common.run, timed=False)
    stages = found["stages"]
    assert list(stages) == [verb for verb, _ in STEPS]
    for verb, stage in stages.items():
        peak = stage["peak_bytes"]
        assert peak["measured"] == records[verb]["peak_memory_bytes"]
        assert peak["ratio"] == pytest.approx(peak["predicted"] / peak["measured"])
        assert 0.3 < peak["ratio"] < 3  # libraries alone: the test's own process is another one
    for verb in ("quantize", "recover"):
        assert stages[verb]["file_bytes"]["ratio"] == pytest.approx(
            1, abs=0.35
        )  # headers weigh in tiny files
    assert stages["train"]["seconds"]["ratio"] is None
    assert {stage["peak_of"] for stage in stages.values()} == {"host"}
    assert checker.report(found).splitlines()[-1].startswith("farthest peak")


def test_of_a_gpu_the_plan_is_set_against_what_was_held_there_and_on_the_host(
    common: Common, records: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Capacity(host_total=1, host_free=1, device_total=80 << 30, device_free=80 << 30, disk_free=1)
    chain = checker.chain_for(common, STEPS)
    monkeypatch.setattr(checker, "device_and_dtype", lambda _: ("cuda", None))
    monkeypatch.setattr(checker, "capacity", lambda *_: there)
    held = {
        verb: record | {"peak_device_bytes": 123, "peak_host_bytes": 456} for verb, record in records.items()
    }
    found = checker.check(chain, held, common, None)["stages"]
    for verb in ("prune", "train", "eval"):
        assert found[verb]["peak_of"] == "device"
        assert found[verb]["peak_bytes"]["measured"] == 123
        assert found[verb]["host_peak_bytes"]["measured"] == 456
        assert found[verb]["host_peak_bytes"]["predicted"] > found[verb]["peak_bytes"]["predicted"]
    assert (found["recover"]["peak_of"], found["recover"]["peak_bytes"]["measured"]) == ("host", 456)
    text = checker.report({"stages": found})
    assert "train: peak_bytes of the device" in text
    assert "recover: peak_bytes of the host" in text


def test_a_stage_runs_in_a_process_of_its_own(common: Common, tmp_path: Path) -> None:
    """Recording a failure in the process's own words; it ends before it needs torch."""
    given = {"merge": True, "onto": None, "compress_rank": 2}
    wanted = ["--run", "w", "--dtype", "float32", "--seed", "3", "--merge", "--compress-rank", "2"]
    found = options(Common(run=Path("w"), dtype="float32", seed=3), given)
    assert [word for word in found if word not in ("--device", "auto")] == wanted
    refused = r"The stage recover failed: Invalid value for '--compress-rank'"
    with pytest.raises(CompressError, match=refused) as failed:
        in_fresh_process("recover", replace(common, run=tmp_path / "empty"), {"compress_rank": "few"})
    assert "compress recover --help" in failed.value.remedy


def test_the_command_line_exits_with_the_verdict(
    common: Common,
    records: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def known(steps: Steps, common: Common, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return suite.figures_of(records), suite.protocol_of(records, steps, common)

    monkeypatch.setattr(suite, "measure", known)
    place = ["--quick", "--baselines", str(tmp_path)]
    assert suite.main(place) == 1
    assert "no baseline" in capsys.readouterr().err
    assert suite.main([*place, "--update", "--repeats", "1"]) == 0
    out = tmp_path / "out" / "verdict.json"
    assert suite.main([*place, "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["passed"] is True
    worse = {name: (kind, 2 * value) for name, (kind, value) in suite.figures_of(records).items()}
    monkeypatch.setattr(suite, "figures_of", lambda _: worse)
    assert suite.main(place) == 1
    assert "REGRESSED quantize: perplexity" in capsys.readouterr().out
