"""What someone needs who does not see the page, has a keyboard only, or sees few contrasts and colours."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from compress.report.page import render
from compress.report.svg import COLOURS, SHAPES, line_class, marker
from tests.unit.report.reading import contrast, elements, name, parse, text, themes
from tests.unit.report.samples import sample_curve, sample_others, sample_run

PAGES = {
    "whole": render(sample_run() | {"pruning": sample_curve(), "name": "half", "others": sample_others()}),
    "small": render({"title": "t", "stages": [{"verb": "align", "metrics": {"kl": 1}}]}),
    "empty": render({}),
}


@pytest.fixture(params=sorted(PAGES))
def page(request: pytest.FixtureRequest) -> str:
    return PAGES[request.param]


def test_headings_are_in_order(page: str) -> None:
    levels = [int(name(e)[1]) for e in parse(page).iter() if re.fullmatch(r"h[1-6]", name(e))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    for section in elements(page, "section"):
        assert name(section[0]) == "h2"
        assert text(section[0])


def test_links_lead_to_places_that_are_there_once(page: str) -> None:
    places = [e.get("id") for e in parse(page).iter() if e.get("id")]
    assert len(places) == len(set(places))
    links = elements(page, "a")
    assert (links[0].get("href"), links[0].get("class")) == ("#content", "skip")
    assert all(str(link.get("href")).removeprefix("#") in places for link in links)
    sections = {e.get("id") for e in elements(page, "section")}
    listed = [link for nav in elements(page, "nav") for link in nav.iter() if name(link) == "a"]
    assert {str(link.get("href"))[1:] for link in listed} == sections
    (body,) = elements(page, "body")
    assert name(body[0]) == "a"  # the skip link is the first thing a keyboard reaches


def test_every_table_has_a_caption_and_scopes() -> None:
    tables = elements(PAGES["whole"], "table")
    assert len(tables) >= 8
    for table in tables:
        assert name(table[0]) == "caption"
        assert text(table[0])
        head, *body = [row for row in table.iter() if name(row) == "tr"]
        assert {(name(cell), cell.get("scope")) for cell in head} == {("th", "col")}
        assert all(text(cell) for cell in head)
        for row in body:
            assert [(name(cell), cell.get("scope")) for cell in row] == [
                ("th", "row"),
                *[("td", None)] * (len(head) - 1),
            ]


def test_every_box_that_scrolls_is_reached_and_named() -> None:
    boxes = [
        e for e in parse(PAGES["whole"]).iter() if name(e) == "pre" or e.get("class") in ("scroll", "plot")
    ]
    assert {e.get("class") for e in boxes} == {"scroll", "plot", None}
    for box in boxes:
        assert (box.get("tabindex"), box.get("role")) == ("0", "group")
        assert len(str(box.get("aria-label"))) > 5
    scrolling = re.findall(
        r"^ *([^{}]+?) \{[^}]*overflow-x: auto",
        files("compress.report").joinpath("style.css").read_text(encoding="utf-8"),
        re.M,
    )
    assert sorted(scrolling) == [".plot", ".scroll", "pre"]


def test_drawings_are_images_with_a_description() -> None:
    drawings = elements(PAGES["whole"], "svg")
    described = [str(e.get("aria-label")) for e in drawings]
    assert len(set(described)) == len(drawings) >= 12
    assert all(e.get("role") == "img" for e in drawings)
    assert all(len(words) > 40 for words in described)


def test_colour_is_never_alone() -> None:
    looks = set()
    for n in range(COLOURS * SHAPES):
        shape = ElementTree.fromstring(marker(n, 0.0, 0.0))
        looks.add((line_class(n).split()[1], name(shape), shape.get("d")))
    assert len(looks) == COLOURS * SHAPES
    shapes = {(kind, d) for _, kind, d in looks}
    assert len(shapes) == SHAPES  # any seven neighbours are told apart without their colour
    heat = next(e for e in elements(PAGES["whole"], "svg") if "Heat map" in str(e.get("aria-label")))
    cells = [g for g in heat.iter() if name(g) == "g" and any(name(e) == "title" for e in g)]
    assert len(cells) == 210
    assert all(re.fullmatch(r"[2-4]( r[48])?", text(e)) for g in cells for e in g if name(e) == "text")
    for bar in parse(PAGES["whole"]).iter():
        if bar.get("class") == "bar":
            assert bar.get("aria-hidden") == "true"


def test_contrast_in_light_dark_and_print() -> None:
    found = themes()
    assert len(found) == 3
    words = [("ink", "card"), ("ink", "page"), ("soft", "card"), ("soft", "page"), ("ink", "code")]
    words += [("accent", "card"), ("accent", "page"), ("before", "card"), ("after", "card")]
    words += [(f"c{n}", "card") for n in range(COLOURS)]
    words += [(f"h{n}", "on-light" if n < 4 else "on-dark") for n in range(7)]
    for theme in found:
        for one, other in words:
            assert contrast(theme[one], theme[other]) >= 4.5, (one, other, theme[one], theme[other])
        assert contrast(theme["edge"], theme["card"]) >= 3  # outlines of empty boxes, borders of spans
    assert found[2]["page"] == found[2]["card"] == "#ffffff"  # no ink for backgrounds


def test_contrast_is_the_known_one() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_every_colour_of_the_style_sheet_is_declared_and_every_class_styled() -> None:
    style = files("compress.report").joinpath("style.css").read_text(encoding="utf-8")
    used = set(re.findall(r"var\(--([\w-]+)\)", style)) - {"line-colour"}
    for theme in themes():
        assert used <= set(theme)
    classes = {word for e in parse(PAGES["whole"]).iter() for word in (e.get("class") or "").split() if word}
    unstyled = {word for word in classes if f".{word}" not in style}
    assert unstyled == {"sample"}
    assert "animation" not in style
    assert "transition" not in style
