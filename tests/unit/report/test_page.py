"""The page: whole, escaped, without anything from elsewhere, and patient with missing records."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.report.page import render, write_report
from tests.unit.report.samples import PROTOCOL, sample_run

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


def parse(page: str) -> ElementTree.Element:
    """The page as XML: fails on any tag or quote that came from data."""
    start, body = page.split("\n", 1)
    assert start == "<!DOCTYPE html>"
    return ElementTree.fromstring(body)


def words(page: str) -> str:
    body = parse(page).find("body")
    assert body is not None
    return " ".join("".join(body.itertext()).split()).replace("\u202f", " ")


def elements(page: str, name: str) -> list[ElementTree.Element]:
    return [e for e in parse(page).iter() if e.tag.rsplit("}", 1)[-1] == name]


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
    assert len(drawings) == 4  # kept map, two loss curves, heat map
    for drawing in drawings:
        alt = drawing.get("aria-label")
        assert alt
        assert len(alt) > 40
        assert drawing.get("role") == "img"
    assert len(elements(page, "figcaption")) == 4
    assert "Heat map of 30 layers by 7 matrices" in page


def test_kept_map_draws_what_was_kept() -> None:
    run = sample_run(layers=3)
    metrics = run["stages"][0]["metrics"]
    metrics["kept"] = {"kv_groups": [[0], [1, 2], []], "channels_kept_per_layer": [768, 1536, 0]}
    drawing = elements(render(run), "svg")[0]
    boxes = [e for e in drawing.iter() if e.tag.endswith("rect")]
    kept = [e for e in boxes if e.get("class") == "kept"]
    squares = [e for e in kept if float(e.get("height", 0)) == 14]
    bars = [float(e.get("width", 0)) for e in kept if float(e.get("height", 0)) == 10]
    assert len(squares) == 3
    assert bars == [60, 120, 0]


def test_heat_map_has_every_matrix_in_its_place() -> None:
    run = sample_run(layers=2)
    matrices = run["stages"][1]["metrics"]["matrices"]
    run["stages"][1]["metrics"]["matrices"] = [m for m in matrices if "1.mlp.up" not in m["name"]]
    page = render(run)
    heat = next(e for e in elements(page, "svg") if "Heat map" in e.get("aria-label", ""))
    notes = [e.text or "" for e in heat.iter() if e.tag.endswith("title")][1:]
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


VERBS = ("prune", "quantize", "train", "recover", "eval")


@pytest.mark.parametrize("bad", HOSTILE)
def test_hostile_strings_stay_text(bad: str) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield bad

    run = _replace_strings(sample_run(layers=2), endless(), keys=True)
    run["stages"].append({"verb": bad, "metrics": {bad: bad, "list": [bad, 1]}, "command": [bad]})
    for n, matrix in enumerate(run["stages"][1]["metrics"]["matrices"]):
        matrix["name"] = f"layers.{n}.{bad}"
    page = render(run)
    expected = {e.tag for e in parse(render(sample_run(layers=2))).iter()}
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
    told = words(render(run))
    assert "— of the decoder's linear parameters removed" in told
    assert not elements(render(run), "svg")


def test_a_missing_cell_of_the_table_is_a_dash() -> None:
    run = sample_run()
    rows = run["stages"][-1]["metrics"]["rows"]
    del rows[1]["perplexity"], rows[1]["bytes"]
    rows[2]["tokens_per_second"] = float("nan")
    table = elements(render(run), "table")[0]
    lines = [["".join(cell.itertext()) for cell in line] for line in table.iter("tr")]
    assert lines[2][2] == lines[2][4] == lines[3][6] == "—"


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

    run = damage(sample_run(layers=2, steps=5))
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
    drawing = next(e for e in elements(page, "svg") if "Training loss" in e.get("aria-label", ""))
    assert all("nan" not in (e.get("d") or "") for e in drawing.iter())


def test_write_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(sample_run(), path)
    assert path.read_text(encoding="utf-8") == render(sample_run())
    assert path.stat().st_size < 400_000


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_dark_and_print() -> None:
    style = files("compress.report").joinpath("style.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(themes) == 3
    pairs = [("ink", "card"), ("soft", "card"), ("soft", "page"), ("accent", "card"), ("accent", "page")]
    pairs += [("before", "card"), ("after", "card"), ("ink", "code")]
    pairs += [(f"h{n}", "on-light" if n < 4 else "on-dark") for n in range(7)]
    for theme in themes:
        for one, other in pairs:
            light, dark = sorted((_luminance(theme[one]), _luminance(theme[other])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (one, other, theme[one], theme[other])
