from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.benchmarks import protocol
from compress.benchmarks.peers.environment import PeerResult
from compress.benchmarks.protocol import Rows, score
from compress.benchmarks.quantization import HEADLINE, TRAINING, checks, chosen, fill, table
from compress.benchmarks.quantization_rows import (
    CALIBRATED,
    PEERS,
    RECIPES,
    Bench,
    Recipe,
    Stopwatch,
    chain_name,
    row_of,
)
from compress.errors import UsageError
from compress.model.load import load_model, load_tokenizer
from compress.pipelines.measure import calibration_windows, validation_windows
from compress.pipelines.settings import TrainSettings
from compress.pipelines.settings import resolve as resolve_settings
from compress.pipelines.workspace import read_json
from compress.quantize.linear import LQLinear
from tests.tiny import tiny_checkpoint
from tests.unit.benchmarks.test_protocol import needs_wikitext

SMALL = {**TRAINING, "steps": 2, "sequence": 64}
OURS = Recipe(quantize={"budget": "4.25bit"})


pytestmark = pytest.mark.usefixtures("forked_reopen")


def tiny_bench(folder: Path) -> Bench:
    return Bench(
        model=tiny_checkpoint("llama_gqa", folder / "model", dtype=torch.bfloat16),
        work=folder / "work",
        peers=folder / "peers",
        source="pydoc",
        device="cpu",
        dtype=torch.float32,
        calibration_tokens=1024,
        training=SMALL,
        test_length=128,
        test_tokens=512,
        quiet=True,
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return tiny_bench(tmp_path_factory.mktemp("quantization"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """What every decoder linear of an LQ checkpoint multiplies with."""
    layers = load_model(folder, dtype=torch.float32).named_modules()
    return {name: layer.dequantized_weight() for name, layer in layers if isinstance(layer, LQLinear)}


def test_every_row_has_settings_that_are_taken(bench: Bench) -> None:
    for recipe in RECIPES.values():
        if recipe.peer is not None:
            assert recipe.peer in PEERS
        elif recipe.quantize:
            settings = bench.settings(recipe)
            assert settings.calibration_tokens == 1024
            assert all(getattr(settings, key) == value for key, value in recipe.quantize.items())
        if recipe.train is not None:
            resolve_settings(TrainSettings, {**TRAINING, "method": recipe.train}, "quick")
    assert set(HEADLINE) <= set(RECIPES)
    assert sorted([*chosen(None, "table"), *chosen(None, "files")[1:]]) == sorted(RECIPES)
    paper = bench.settings(RECIPES["lq-lora 2.75 + rank 64"])
    assert (paper.objective, paper.menu, paper.rank, paper.budget_includes) == (
        "frobenius",
        "paper",
        "64",
        "none",
    )


def test_trained_rows_go_on_from_the_untrained_ones(bench: Bench) -> None:
    folders = {
        name: chain_name(bench, recipe)
        for name, recipe in RECIPES.items()
        if recipe.quantize and not recipe.peer
    }
    assert folders["ours 2.75"] == folders["ours 2.75, trained"]
    assert folders["lq-lora 2.75, rank 8"] == folders["lq-lora 2.75, rank 8, trained"]
    assert folders["ours 2.75, rank 8"] == folders["ours 2.75, rank 8, trained"]
    assert len(set(folders.values())) == len(folders) - 3
    assert chain_name(replace(bench, calibration_tokens=2048), OURS) != chain_name(bench, OURS)


@needs_wikitext
def test_a_row_of_ours_is_counted_on_its_files_and_scored_like_any_model(bench: Bench) -> None:
    row = row_of(bench, OURS)
    assert row["bits_per_weight"] == pytest.approx(row["bits_recorded"], rel=1e-12)
    assert 3.5 < row["bits_per_weight"] <= 4.25
    assert set(row["seconds_by_part"]) == {"sensitivities", "error tables", "decompose", "solve"}
    assert row["seconds"] == pytest.approx(sum(row["seconds_by_part"].values()))
    assert 0 < row["seconds"] < row["seconds_of_the_verb"]
    assert min(row["peak_bytes"], row["load_before"] + 1, row["load_after"] + 1) > 0
    assert sum(row["widths"].values()) == sum(row["ranks"].values()) == 14
    stage = bench.work / chain_name(bench, OURS) / "chain" / "01-quantize"
    network = load_model(bench.model, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in weights_of(stage).items():
            network.get_parameter(f"{name}.weight").copy_(weight)
    windows = protocol.test_windows(load_tokenizer(bench.model), length=128, tokens=512)
    assert row["perplexity"] == pytest.approx(score(network, windows)["perplexity"], rel=1e-4)
    allocation = read_json(stage / "allocation.json")
    costs = [matrix["expected_cost"] for matrix in allocation["matrices"]]
    assert row["loss_rise_predicted"] == pytest.approx(math.fsum(costs))
    context = bench.context(bench.work / "nothing")
    validation = validation_windows(context, bench.model, "pydoc")
    losses = [
        math.log(score(model, validation)["perplexity"])
        for model in (network, load_model(bench.model, dtype=torch.float32))
    ]
    assert row["loss_rise_on_validation"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    changed = (stage / "stage.json").stat().st_mtime_ns
    assert row_of(bench, OURS) == row  # what is finished is not made again
    assert (stage / "stage.json").stat().st_mtime_ns == changed


@needs_wikitext
@pytest.mark.parametrize("name", ["gptqmodel", "hqq"])
def test_a_peer_gets_our_calibration_windows_and_is_scored(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def peer(model: Path, *others: Any, **given: Any) -> PeerResult:
        calls.append((model, *others, given))
        others[-1].mkdir(parents=True)
        return PeerResult(
            peer=name,
            settings={"bits": 3},
            model=bench.model,
            stored=others[-1],
            stored_bytes={"qweight": 3},
            weights=8,
            weight_error=0.1,
            forward_difference=0.0,
            seconds=4.0,
            peak_bytes=5,
            versions={},
        )

    recipe = Recipe(peer=name, quantize={"bits": 3})
    here = replace(bench, peers=bench.work / f"environments-{name}")
    missing = row_of(here, recipe)
    assert set(missing) == {"not_run"}
    assert f"make peers PEERS={name}" in missing["not_run"]
    python = here.peers / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setitem(PEERS, name, peer)
    row = row_of(here, recipe)
    ((model, *others, given),) = calls
    assert (model, given["bits"], given["environment"]) == (bench.model, 3, here.peers / name)
    assert len(others) == (2 if name in CALIBRATED else 1)
    if name in CALIBRATED:
        context = bench.context(bench.work / "nothing")
        expected = calibration_windows(context, bench.model, "pydoc", tokens=1024)
        assert torch.equal(others[0], expected.ids)
    assert row["perplexity"] == pytest.approx(row_of(bench, RECIPES["dense"])["perplexity"])
    assert (row["bits_per_weight"], row["seconds"], row["peak_bytes"]) == (3.0, 4.0, 5)
    assert not others[-1].exists()


def test_only_missing_rows_and_those_that_could_not_run_are_made(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(tmp_path / "rows.json", {})
    rows.put("dense", {"perplexity": 1.0})
    rows.put("hqq 4", {"not_run": "no environment"})
    made: list[Recipe] = []
    monkeypatch.setattr(
        "compress.benchmarks.quantization.row_of", lambda bench, recipe: made.append(recipe) or {"made": True}
    )
    fill(bench, rows, ["dense", "hqq 4", "ours 3.25"])
    assert made == [RECIPES["hqq 4"], RECIPES["ours 3.25"]]
    assert Rows(tmp_path / "rows.json", {}).rows == {
        "dense": {"perplexity": 1.0},
        "hqq 4": {"made": True},
        "ours 3.25": {"made": True},
    }


def test_rows_are_chosen_by_name_or_pattern() -> None:
    assert chosen("gptqmodel *; dense", "table") == [
        "dense",
        "gptqmodel 4",
        "gptqmodel 3",
        "gptqmodel 2",
        "gptqmodel 4, zero points",
        "gptqmodel 3, zero points",
    ]
    assert chosen(None, "headline") == list(HEADLINE)
    with pytest.raises(UsageError, match="no row 'ours 5'"):
        chosen("dense;ours 5", "table")


def made_up() -> dict[str, dict[str, Any]]:
    figures = {
        "dense": (16.0, 30.0),
        "ours 4.25": (4.25, 31.0),
        "gptqmodel 4": (4.36, 36.0),
        "ours 3.25": (3.25, 36.0),
        "gptqmodel 3": (3.36, 60.0),
        "ours 2.75": (2.75, 60.5),
        "ours 2.75, rank 8, trained": (2.75, 37.4),
    }
    rows: dict[str, dict[str, Any]] = {
        name: {"bits_per_weight": bits, "perplexity": value, "protocol_line": "some text"}
        for name, (bits, value) in figures.items()
    }
    rows["ours 4.25"] |= {
        "file_bytes": 95_000_000,
        "seconds": 61.4,
        "peak_bytes": 1_500_000_000,
        "load_before": 1.06,
    }
    return rows | {"hqq 3": {"not_run": "no environment"}}


def test_the_table_is_sorted_by_stored_bits() -> None:
    lines = table(made_up()).splitlines()
    names = [line[:30].strip() for line in lines[1:8]]
    assert names == [
        "ours 2.75",
        "ours 2.75, rank 8, trained",
        "ours 3.25",
        "gptqmodel 3",
        "ours 4.25",
        "gptqmodel 4",
        "dense",
    ]
    assert lines[5][30:].split() == ["4.250", "95.0", "31.00", "1.033", "61", "1.50", "1.1"]
    assert lines[7][30:].split() == ["16.000", "-", "30.00", "1.000", "-", "-", "-"]
    assert lines[8].split(maxsplit=2) == ["hqq", "3", "not run: no environment"]
    assert lines[9:] == ["perplexity: some text"]
    assert len({len(line) for line in lines[:8]}) == 1


def test_checks_hold_missed_goals_and_missing_rows_apart() -> None:
    rows = made_up()
    verdicts = [line.split("  ")[0].strip() for line in checks(rows)]
    assert verdicts == ["ok", "ok", "missed", "not measured", "ok"]
    assert checks(rows)[0].endswith("1.000, bound 1.200")
    rows["ours 4.25"]["perplexity"] = 31.3
    rows["ours 3.25"]["perplexity"] = 36.1
    rows["ours 2.75"]["perplexity"] = 60.0
    rows["ours 2.75, rank 8, trained"]["perplexity"] = 37.6
    rows["lq-lora 2.75, rank 8"] = {"perplexity": 99.0}
    verdicts = [line.split("  ")[0].strip() for line in checks(rows)]
    assert verdicts == ["missed", "missed", "ok", "missed", "missed"]
    assert checks({}) == checks({"gptqmodel 4": {"not_run": "x"}})


def test_goals_are_held_against_the_better_of_a_peers_two_forms() -> None:
    rows = made_up() | {"gptqmodel 4, zero points": {"perplexity": 34.0}}
    assert checks(rows)[0].endswith("1.000, bound 0.800")
    rows["gptqmodel 4, zero points"] = {"perplexity": 37.0}
    assert checks(rows)[0].endswith("1.000, bound 1.200")
    rows["gptqmodel 4, zero points"] = {"not_run": "x"}
    assert checks(rows)[0].endswith("1.000, bound 1.200")


def test_the_stopwatch_adds_up_bars_of_one_label() -> None:
    watch = Stopwatch(quiet=True)
    for label in ("a", "b", "a"):
        with watch.bar(label) as progress:
            progress(1, 1, "")
    assert set(watch.seconds) == {"a", "b"}
    assert watch.seconds["a"] >= 0
