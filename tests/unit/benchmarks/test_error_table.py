"""The benchmark of the error table: its plain loop is the paper's, its figures follow from what it measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.benchmarks import error_table
from compress.benchmarks.error_table import (
    benchmark,
    decomposed,
    heavy_tailed,
    measure_allocation,
    measure_order,
    measure_speed,
    plain_loop,
    rank_for,
    report,
    settled,
)
from compress.benchmarks.protocol import Rows
from compress.pipelines.quantize import TURNS
from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import MENU, QuantConfig


@pytest.fixture
def short_menu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight configurations, two of a width."""
    menu = tuple(
        QuantConfig(bits=b, block_size=s, scale_dtype="float16") for b in (2, 3, 4, 8) for s in (16, 64)
    )
    assert set(menu) <= set(MENU)
    monkeypatch.setattr(error_table, "MENU", menu)


def test_matrices_are_heavy_tailed_and_seeded() -> None:
    weight = heavy_tailed((64, 96), 3)
    assert torch.equal(weight, heavy_tailed((64, 96), 3))
    assert not torch.equal(weight, heavy_tailed((64, 96), 4))
    units = (weight / weight.std()).double()
    assert float(units.pow(4).mean()) > 4  # 3 is normal


def test_the_plain_loop_alternates_and_stops_when_the_error_rises() -> None:
    weight = heavy_tailed((96, 64), 0)
    config = QuantConfig(bits=3)
    errors, seconds = plain_loop(weight, config, 4, 40, 0)
    assert len(errors) == len(seconds) < 40
    assert list(seconds) == sorted(seconds)
    assert (np.diff(errors[:-1]) < 0).all()
    assert errors[-1] >= errors[-2]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    product = (u[:, :4] * s[:4]) @ vh[:4]
    first = (weight - product - quantize_dequantize(weight - product, config)).double().square().sum()
    assert errors[0] == pytest.approx(float(first), rel=0.02)
    assert decomposed(weight, 4, 40, 0, [config])[0] == min(errors)


def test_ranks_keep_their_share() -> None:
    assert [rank_for(shape) for shape in ((4096, 4096), (1024, 1024), (1536, 576), (64, 96))] == [
        64,
        16,
        9,
        2,
    ]


@pytest.mark.usefixtures("short_menu")
def test_speed_is_extrapolated_from_what_was_timed() -> None:
    found = measure_speed(128, 2)
    assert (found["rank"], found["configurations"], found["computed"]) == (2, 8, 8)
    for values in (*found["speedup"].values(), *found["seconds"].values()):
        assert 0 < values["least"] <= values["median"] <= values["largest"]
    plain, ours = found["plain_seconds_extrapolated"]["10"], found["seconds"]["table"]
    ratio = found["speedup"]["table, 10 rounds"]
    assert plain["least"] / ours["largest"] <= ratio["median"] <= plain["largest"] / ours["least"]
    assert found["plain_seconds_extrapolated"]["5"]["median"] <= plain["median"]
    assert all(0.8 < share < 2 for share in found["table_over_decomposed"]["5"].values())


@pytest.mark.usefixtures("short_menu")
def test_order_and_allocation_of_a_short_menu() -> None:
    found = measure_order(heavy_tailed((128, 128), 1), 3, again=True)
    assert found["tau"] > 0.999  # widths and block sizes are far apart
    assert found["tau_of_decompositions_with_other_seeds"] > 0.999
    costs = measure_allocation(1, 64, 3)
    assert costs["matrices"] == 7
    for kind in ("table", "sampled", "settled"):
        assert all(-1e-9 <= excess < 0.2 for excess in costs[f"excess_cost_{kind}"].values())


def test_choices_settle_when_all_of_them_are_computed_from_all_rows() -> None:
    generator = np.random.default_rng(3)
    whole = [generator.uniform(1, 2, 30) for _ in range(6)]
    sampled = [costs * np.exp(generator.normal(0, 0.4, 30)) for costs in whole]
    asked: list[list[np.ndarray]] = []

    def choose(costs: Sequence[np.ndarray]) -> tuple[int, ...]:
        asked.append([each.copy() for each in costs])
        return tuple(int(each.argmin()) for each in costs)

    before = [each.copy() for each in sampled]
    choices = settled(choose, sampled, whole)
    assert all(np.array_equal(a, b) for a, b in zip(sampled, before, strict=True))
    for at, costs, full in zip(choices, asked[-1], whole, strict=True):
        assert costs[at] == full[at]  # nothing chosen rests on the sample
        assert full[at] <= min(costs)
    assert len(asked) == 2  # one matrix does not change what another is given here

    never: list[tuple[int, ...]] = []

    def restless(costs: Sequence[np.ndarray]) -> tuple[int, ...]:
        never.append((len(never),) * 6)
        return never[-1]

    assert settled(restless, sampled, whole) == never[-1]
    assert len(never) == TURNS + 1


def test_rows_are_reported_with_the_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = {"median": 120.0, "least": 100.0, "largest": 130.0}
    order = {"tau": 0.98, "tau_sampled": 0.97}
    monkeypatch.setattr(error_table, "measure_speed", lambda *_: {"speedup": {"table, 5 rounds": spread}})
    monkeypatch.setattr(error_table, "measure_order", lambda *_, **__: order)
    monkeypatch.setattr(error_table, "model_matrix", lambda *_: torch.ones(2, 2))
    cost = {"2.75 bits": 0.004}
    monkeypatch.setattr(
        error_table,
        "measure_allocation",
        lambda *_: {f"excess_cost_{kind}": cost for kind in ("table", "sampled", "settled")},
    )
    rows = Rows(tmp_path / "rows.json", {"benchmark": "error table"})
    benchmark(rows, quick=True)
    text = report(rows.rows)
    assert "speed, table, 5 rounds: 120x (100 to 130)" in text
    assert "order, embedded model: tau 0.9800, sampled 0.9700" in text
    assert "allocation, table, 2.75 bits: 0.40% above the best" in text
    assert text.endswith("goals: 100x, sampled 500x, tau 0.99, cost within 0.5%")
    monkeypatch.setattr(error_table, "measure_speed", lambda *_: pytest.fail("measured again"))
    benchmark(rows, quick=True)
