"""The page: whole, escaped, without anything from elsewhere, and patient with missing records."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.report.page import render, write_report
from tests.unit.report.reading import drawing, elements, middles, parse, parts, words
from tests.unit.report.samples import PROTOCOL, evaluated_run, sample_curve, sample_others, sample_run

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script>",
    "</title><b>",
    "' onmouseover='x",
    "&lt;&amp;",
    "a\x00b\x1b\ud800c",
    "${7*7}{{7*7}}<%= 7 %>",
    "]]>",
]


def test_the_whole_chain_is_told() -> None:
    told = words(render(sample_run()))
    for expected in (
        "SmolLM2-135M-Instruct",
        "prune → quantize → train → recover → eval",
        "75.1 MB",
        "from 269.0 MB: 3.6 times smaller",
        "39.5 % fewer",
        "28.02 ± 0.34",
        "−4.0 %",
        "2.750",
        "0, proved optimal",
        "squared error 5,132 instead of 6,021 (−14.8 %)",
        "Nearest to 50.0%: 2 of 3 KV groups and 704 of 1536 channels stay.",
        "compress prune --ratio 0.5",
        "compress quantize --budget 2.75bit",
        PROTOCOL,
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "5.23.0",
        "6 min 51 s",
    ):
        assert expected in told, expected


def test_every_figure_says_what_it_shows() -> None:
    page = render(sample_run())
    drawings = elements(page, "svg")
    # Perplexity by size and by speed, kept map, two loss curves, heat map, spectrum, other budgets, memory.
    assert len(drawings) == 9
    for drawn in drawings:
        alt = drawn.get("aria-label")
        assert alt
        assert len(alt) > 40
        assert drawn.get("role") == "img"
    assert len(elements(page, "figcaption")) == 9
    assert "Heat map of 30 layers by 7 matrices" in page


def prune_facts(**metrics: Any) -> dict[str, str]:
    """The names and values of the prune stage."""
    run = sample_run(layers=3)
    run["stages"] = run["stages"][:1]
    run["stages"][0]["metrics"] |= metrics
    shown = elements(render(run), "dl")[0]
    return {"".join(pair[0].itertext()): "".join(pair[1].itertext()).replace("\u202f", " ") for pair in shown}


def test_what_pruning_kept_is_said_once_where_all_layers_are_alike() -> None:
    found = prune_facts()
    assert found["KV groups a layer"] == "2 of 3"
    assert found["query heads a KV group"] == "3 of 3"
    assert found["channels a layer"] == "704 of 1536"
    assert "solver" not in found


def test_what_pruning_kept_is_a_range_where_layers_differ() -> None:
    certificate = {
        "damage": 0.46789,
        "lower_bound": 0.4678,
        "gap": 9.3e-5,
        "solver": "highs",
        "seconds": 1.25,
    }
    kept = {
        "kv_groups": [[0, 2], [], [1]],
        "queries_per_layer": [2, 0, 1],
        "channels_kept_per_layer": [704, 1536, 0],
    }
    found = prune_facts(shape=None, kept=kept, certificate=certificate)
    assert found["KV groups a layer"] == "0 to 2 of 3"
    assert found["query heads a KV group"] == "0 to 2 of 3"
    assert found["channels a layer"] == "0 to 1536 of 1536"
    assert found["predicted rise of the loss"] == "0.468 nats per token"
    assert found["proved lower bound"] == "0.468 nats per token"
    assert (found["gap"], found["solver"]) == ("9.3e-05", "highs, 1.2 s")
    assert prune_facts(certificate=certificate | {"gap": 0.0})["gap"] == "0, proved optimal"


def test_curves_of_pruning_are_drawn_for_what_was_trained() -> None:
    run = sample_run(layers=2)
    run["stages"] = run["stages"][:1]
    metrics = run["stages"][0]["metrics"]

    def titles() -> list[str]:
        found = [str(drawn.get("aria-label")).split(":")[0] for drawn in elements(render(run), "svg")]
        return [title for title in found if title.startswith("Loss")]

    assert titles() == ["Loss while scoring and masking"]
    losses = metrics.pop("losses")
    assert titles() == []
    metrics["repair"] = {"losses": losses}
    assert titles() == ["Loss of repair training"]


def test_kept_map_draws_what_was_kept() -> None:
    run = sample_run(layers=3)
    metrics = run["stages"][0]["metrics"]
    metrics["kept"] = {
        "kv_groups": [[0], [1, 2], []],
        "queries_per_layer": [3, 2, 0],
        "channels_kept_per_layer": [768, 1536, 0],
    }
    found = drawing(render(run), "Map of 3 layers")
    layers = parts(found, "g")
    squares = [{e.get("class"): str(e.get("d")).count("M") for e in parts(layer, "path")} for layer in layers]
    assert squares == [{"kept": 1, "gone": 2}, {"kept": 2, "gone": 1}, {"gone": 3}]
    bars = [float(e.get("width", 0)) for e in parts(found, "rect") if e.get("class") == "kept"]
    assert bars == [60, 120]
    written = [str(e.text) for e in parts(found, "text")]
    assert [w for w in written if " of " in w] == ["3 of 9", "4 of 9", "0 of 9"]
    assert [w for w in written if "%" in w] == ["50 %", "100 %", "0 %"]


def test_heat_map_has_every_matrix_in_its_place() -> None:
    run = sample_run(layers=2)
    matrices = run["stages"][1]["metrics"]["matrices"]
    run["stages"][1]["metrics"]["matrices"] = [m for m in matrices if "1.mlp.up" not in m["name"]]
    page = render(run)
    heat = next(e for e in elements(page, "svg") if "Heat map" in e.get("aria-label", ""))
    notes = [e.text or "" for e in heat.iter() if e.tag.endswith("title")]
    assert len(notes) == 14
    assert "layer 1, up: not quantized" in notes
    for m in run["stages"][1]["metrics"]["matrices"]:
        layer, kind = m["name"].split(".")[2], m["name"].rsplit(".", 1)[1].removesuffix("_proj")
        start = f"layer {layer}, {kind}: {m['bits_per_weight']:.3f} bits per weight, {m['bits']} bit codes"
        assert sum(note.startswith(start) for note in notes) == 1


def test_nothing_comes_from_elsewhere() -> None:
    page = render(sample_run())
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert any("default-src 'none'" in (e.get("content") or "") for e in elements(page, "meta"))
    for name in ("script", "link", "img", "iframe", "object", "embed", "form", "base"):
        assert not elements(page, name)
    for element in parse(page).iter():
        assert not [a for a in element.attrib if a.lower().startswith("on") or a == "src"]
        assert element.get("href", "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page


def _replace_strings(value: Any, hostile: Iterator[str], *, keys: bool) -> Any:
    if isinstance(value, dict):
        return {
            (f"{k}{next(hostile)}" if keys and k in ("config", "q") else k): _replace_strings(
                v, hostile, keys=keys
            )
            for k, v in value.items()
        } | ({next(hostile): next(hostile)} if keys else {})
    if isinstance(value, list):
        return [_replace_strings(v, hostile, keys=keys) for v in value]
    return next(hostile) if isinstance(value, str) and value not in VERBS else value


def chart(rows: Any) -> ElementTree.Element:
    page = render(sample_run(layers=2) | {"pruning": rows})
    return next(e for e in elements(page, "svg") if "share of parameters removed" in e.get("aria-label", ""))


def test_the_curve_has_a_line_a_method_on_a_logarithmic_axis() -> None:
    rows = sample_curve()
    found = chart(rows)
    lines = [g for g in parts(found, "g") if "line" in (g.get("class") or "").split()]
    assert [g.get("class") for g in lines] == ["line c0", "line c1", "line c2"]
    names = ["".join(e.itertext()).replace("\u202f", " ") for e in parts(found, "text")]
    for name in ("magnitude", "obs + refit", "obs + refit, 100.4 K tokens", "not pruned", "20 %", "60 %"):
        assert names.count(name) == 1

    ticks = {
        float(str(e.text).replace(",", "")): float(e.get("y", 0)) - 4
        for e in parts(found, "text")
        if e.get("class") == "tick end"
    }
    assert set(ticks) >= {50, 100, 1000}
    assert ticks[100] - ticks[1000] == pytest.approx(2 * (ticks[50] - ticks[100]) / math.log10(4), rel=1e-3)

    def height(value: float) -> float:
        return ticks[100] + (ticks[1000] - ticks[100]) * math.log10(value / 100)

    for group, method in zip(lines[:2], ("magnitude", "obs + refit"), strict=True):
        dots = middles(group)
        expected = [rows[f"{ratio} {method} 0"]["perplexity"] for ratio in (0.1, 0.2, 0.4, 0.6)]
        assert [y for _, y in dots] == pytest.approx([height(v) for v in expected], abs=0.1)
        xs = [x for x, _ in dots]
        assert (xs[3] - xs[2]) == pytest.approx(2 * (xs[1] - xs[0]), rel=2e-3)
        notes = ["".join(e.itertext()).replace("\u202f", " ") for e in parts(group, "title")]
        assert notes[0] == f"{method}: 10.3 %, {expected[0]:,.4g}"
        curve, sample = [e for e in parts(group, "path") if e.get("class") != "mk"]
        assert str(curve.get("d")).count("L") == 3
        assert str(sample.get("d")).count("L") == 1
    assert len(middles(lines[2])) == 1
    unmarked = [e.get("class") for e in parts(lines[2], "path") if e.get("class") != "mk"]
    assert unmarked == ["sample"]  # the one under the chart: one point makes no line
    (mark,) = [e for e in parts(found, "line") if "mark" in (e.get("class") or "")]
    assert float(mark.get("y1", 0)) == pytest.approx(height(29.19), abs=0.1)
    alt = str(found.get("aria-label")).replace("\u202f", " ")
    assert "obs + refit 30.38 at 10.3 % to 123.20 at 60.3 %" in alt
    assert "not pruned 29.19" in alt


def test_seeds_are_averaged_and_other_rows_left_out() -> None:
    rows = {
        "0.5 ours 0 seed 0": {"perplexity": 60.0, "achieved_ratio": 0.5, "protocol_line": PROTOCOL},
        "0.5 ours 0 seed 1": {"perplexity": 64.0, "achieved_ratio": 0.5, "protocol_line": PROTOCOL},
        "0.5 lost 0": {"perplexity": None, "achieved_ratio": 0.5},
        "0.5 negative 0": {"perplexity": -1, "achieved_ratio": 0.5},
        "0.5 nowhere 0": {"perplexity": 3.0},
        "half ours 0": {"perplexity": 3.0, "achieved_ratio": 0.5},
        "speed": {"seconds": 3},
        "0.5 text 0": "text",
    }
    alt = str(chart(rows).get("aria-label"))
    assert alt.endswith("by method: ours 62.00 at 50.0\u202f%.")


def test_curves_on_different_protocols_are_kept_apart() -> None:
    rows = sample_curve()
    for name, row in rows.items():
        if name.startswith(("0.6", "dense")):
            row["protocol_line"] = "another text"
    page = render({"stages": [], "pruning": rows})
    charts = [str(e.get("aria-label")) for e in elements(page, "svg")]
    assert len(charts) == 2
    assert "40.6" not in charts[0].replace("\u202f", "")
    assert ["not pruned" in alt for alt in charts] == [False, True]
    captions = ["".join(e.itertext()) for e in elements(page, "figcaption")]
    assert [PROTOCOL in captions[0], "another text" in captions[1]] == [True, True]


@pytest.mark.parametrize("rows", [None, {}, [], "x", {"dense": {"perplexity": 3.0}}, {"0.5 ours 0": {}}])
def test_without_results_there_is_no_curve(rows: Any) -> None:
    assert "Pruning methods compared" not in render(sample_run(layers=2) | {"pruning": rows})


@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_many_methods_have_lines_of_their_own(count: int) -> None:
    rows = {
        f"{ratio} method {n} 0": {"perplexity": 10.0 + n, "achieved_ratio": ratio}
        for ratio in (0.2, 0.5)
        for n in range(count)
    }
    found = chart(rows)
    classes = [str(g.get("class")) for g in parts(found, "g")]
    assert len(set(classes[:16])) == len(classes[:16]) == min(count, 16)
    bottom = float(str(found.get("viewBox")).split()[3])
    assert all(float(e.get("y", 0)) < bottom for e in parts(found, "text"))


def test_names_under_the_curve_do_not_run_into_each_other() -> None:
    short = {
        f"{r} method {n} 0": {"perplexity": 9.0, "achieved_ratio": r} for n in (1, 2) for r in (0.2, 0.5)
    }
    for rows, columns in ((short, 2), (short | {f"0.5 {'long ' * 9}name 0": short["0.5 method 1 0"]}, 1)):
        found = [e for e in parts(chart(rows), "text") if "method" in (e.text or "")]
        places = {(e.get("x"), e.get("y")) for e in found}
        assert len(places) == 2
        assert len({x for x, _ in places}) == columns


@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from(
                ["dense", "0.5 ours 0", "0.2 ours 0", "0.5 a b 100", "0.2 <b> 1000 seed 3", "1 2 3"]
            ),
            st.text(max_size=8),
        ),
        st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {
                    "perplexity": st.one_of(st.floats(), st.floats(1e-3, 1e6), st.text(max_size=3)),
                    "achieved_ratio": st.one_of(st.floats(), st.floats(0, 1), st.none()),
                    "protocol_line": st.sampled_from(["one", "<two>", 3]),
                }
            ),
        ),
        max_size=8,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_rows_give_a_page(rows: dict[str, Any]) -> None:
    page = render({"stages": [], "pruning": rows})
    parse(page)
    assert "nan" not in re.sub(r"<style>.*</style>", "", page, flags=re.S)


VERBS = ("prune", "quantize", "train", "recover", "eval")


@pytest.mark.parametrize("bad", HOSTILE)
def test_hostile_strings_stay_text(bad: str) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield bad

    whole = sample_run(layers=2) | {"name": "half", "others": sample_others()}
    run = _replace_strings(whole, endless(), keys=True)
    run["stages"].append({"verb": bad, "metrics": {bad: bad, "list": [bad, 1]}, "command": [bad]})
    for n, matrix in enumerate(run["stages"][1]["metrics"]["matrices"]):
        matrix["name"] = f"layers.{n}.{bad}"
    page = render(run)
    expected = {e.tag for e in parse(render(whole)).iter()} | {
        e.tag for e in parse(render({"stages": [{}]})).iter()
    }
    found = parse(page)
    assert {e.tag for e in found.iter()} <= expected
    assert not [a for e in found.iter() for a in e.attrib if a.startswith("on")]
    page.encode("utf-8")
    HTMLParser().feed(page)
    if bad.isprintable():
        assert bad in "".join(found.itertext())


def test_a_run_without_anything() -> None:
    for run in ({}, {"title": None, "stages": None}, {"stages": [None, 3, "x"]}):
        assert "compress report" in words(render(run))
    told = words(render({"title": "t", "stages": [{}]}))
    assert "—" in told


def test_missing_keys_show_as_dashes() -> None:
    run = sample_run(layers=2)
    for stage in run["stages"]:
        stage["metrics"] = {}
        del stage["memory_timeline"]
    told = words(render(run))
    assert "— of the decoder's linear parameters removed" in told
    assert not elements(render(run), "svg")


def test_a_missing_cell_of_the_table_is_a_dash() -> None:
    run = sample_run()
    rows = run["stages"][-1]["metrics"]["rows"]
    del rows[1]["perplexity"], rows[1]["bytes"]
    rows[2]["tokens_per_second"] = float("nan")
    quality, speed = (
        [["".join(cell.itertext()) for cell in line] for line in table.iter("tr")]
        for table in elements(render(run), "table")[:2]
    )
    assert quality[2][2] == quality[2][4] == speed[3][1] == "—"
    assert quality[3][0] == speed[3][0]


def test_an_evaluation_with_everything() -> None:
    run = evaluated_run()
    page = render(run)
    told = words(page)
    for expected in (
        "29.19 (28.44 to 29.99)",
        "Word-level perplexity",
        "0.8765",
        "with its 95 % interval over windows",
        "The tokenizers differ (a; b).",
        "Distance from original",
        "Same most likely token",
        "76.5 % ± 1.2",
        "0.1000 to 0.1500",
        "Task quiz",
        "62.5 % ± 5.0",
        "cloze, sha256 ba9876543210, 50 of 50 rows",
        "33.21",
        "Tasks of lm-eval",
        "0.0211",
        "Decoded tokens/s, saturated",
        "210.4",
        "541.0 MB",
    ):
        assert expected in told, expected
    found = {"".join(next(t.iter("tr")).itertext()): t for t in elements(page, "table")}
    distance = next(table for head, table in found.items() if "KL divergence" in head)
    assert len(list(distance.iter("tr"))) == len(run["stages"][-1]["metrics"]["rows"])  # a head, no reference


def test_columns_that_nobody_measured_are_left_out() -> None:
    page = render(sample_run())
    told = words(page)
    for absent in ("Word-level", "Bits per byte", "Distance from", "Task ", "saturated"):
        assert absent not in told
    assert "Resident" not in {"".join(e.itertext()) for e in elements(page, "th")}
    assert "Resident" in {"".join(e.itertext()) for e in elements(render(evaluated_run()), "th")}
    for there in ("Held-out loss", "Decoded tokens/s", "± standard error"):
        assert there in told


def test_unknown_verbs_are_shown_by_name_and_value() -> None:
    metrics = {"kl": 0.125, "nested": {"deep": [1, 2]}, "many": list(range(99)), "none": None}
    told = words(render({"title": "t", "stages": [{"verb": "align", "metrics": metrics}]}))
    for expected in ("align", "kl", "0.125", "nested.deep", "1, 2", "99 values"):
        assert expected in told


def test_perplexities_on_different_protocols_are_kept_apart() -> None:
    run = sample_run()
    run["stages"][0]["metrics"]["before"]["protocol_line"] = "another text"
    told = words(render(run))
    assert "Perplexity (another text)30.20 ± 0.60—" in told.replace(") ", ")")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_damage_still_gives_a_page(seed: int) -> None:
    g = random.Random(seed)
    junk: list[Any] = [
        None,
        "x",
        -1,
        0,
        1e308,
        float("inf"),
        float("nan"),
        10**400,
        [],
        {},
        [[]],
        True,
        [None],
    ]

    def damage(value: Any) -> Any:
        if g.random() < 0.06:
            return copy.deepcopy(g.choice(junk))
        if isinstance(value, dict):
            return {k: damage(v) for k, v in value.items() if g.random() > 0.05}
        if isinstance(value, list):
            return [damage(v) for v in value]
        return value

    more = {"pruning": sample_curve(), "others": sample_others()}
    run = damage(g.choice([sample_run(layers=2, steps=5), evaluated_run()]) | more)
    parse(render(run if isinstance(run, dict) else {}))


@pytest.mark.parametrize("steps", [1, 2, 3, 5000])
def test_curves_of_any_length(steps: int) -> None:
    run = sample_run(layers=2, steps=steps)
    page = render(run)
    assert f"at step {steps}." in page
    assert len(page) < 200_000


def test_constant_and_broken_curves() -> None:
    run = sample_run(layers=2)
    run["stages"][2]["metrics"] = {"losses": [0.0, 0.0, float("nan"), float("inf"), None]}
    page = render(run)
    found = drawing(page, "Training loss")
    assert all("nan" not in (e.get("d") or "") for e in found.iter())


def test_write_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(sample_run(), path)
    assert path.read_text(encoding="utf-8") == render(sample_run())
    assert path.stat().st_size < 400_000
