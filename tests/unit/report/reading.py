"""Reading a page back: as XML, which fails on any tag or quote that came from data."""

from __future__ import annotations

import re
from importlib.resources import files
from xml.etree import ElementTree


def parse(page: str) -> ElementTree.Element:
    start, body = page.split("\n", 1)
    assert start == "<!DOCTYPE html>"
    return ElementTree.fromstring(body)


def name(element: ElementTree.Element) -> str:
    return element.tag.rsplit("}", 1)[-1]


def text(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split()).replace("\u202f", " ")


def spaced(element: ElementTree.Element) -> str:
    """The texts of all elements with a space between any two."""
    return " ".join(word for piece in element.itertext() for word in piece.split())


def words(page: str) -> str:
    body = parse(page).find("body")
    assert body is not None
    return text(body)


def parts(element: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return [e for e in element.iter() if name(e) == tag]


def elements(page: str, tag: str) -> list[ElementTree.Element]:
    return parts(parse(page), tag)


def drawing(page: str, start: str) -> ElementTree.Element:
    """The one drawing whose description begins so."""
    (found,) = [e for e in elements(page, "svg") if (e.get("aria-label") or "").startswith(start)]
    return found


def section(page: str, place: str) -> ElementTree.Element:
    """The section with this id."""
    (found,) = [e for e in elements(page, "section") if e.get("id") == place]
    return found


def table_rows(table: ElementTree.Element) -> list[list[str]]:
    """Head and body of a table, cell by cell."""
    return [[text(cell) for cell in line] for line in parts(table, "tr")]


def middles(group: ElementTree.Element) -> list[tuple[float, float]]:
    """Centres of the markers of a chart's line, without that of the legend."""
    found = []
    for element in group.iter():
        if element.get("class") != "mk" or element.find("{*}title") is None:
            continue
        if name(element) == "circle":
            found.append((float(element.get("cx", "")), float(element.get("cy", ""))))
        else:
            corners = re.findall(r"([-0-9.]+),([-0-9.]+)", element.get("d", ""))
            found.append(
                (
                    sum(float(x) for x, _ in corners) / len(corners),
                    sum(float(y) for _, y in corners) / len(corners),
                )
            )
    return found


def themes() -> list[dict[str, str]]:
    """The colours of the style sheet by name: light, dark, print."""
    style = files("compress.report").joinpath("style.css").read_text(encoding="utf-8")
    return [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours #rrggbb, as the Web Content Accessibility Guidelines define it."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
