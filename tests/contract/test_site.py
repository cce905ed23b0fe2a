"""The site of the documents: every page is in its navigation, every link leads somewhere, nothing in it is stale."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import compress
from compress.__main__ import app
from compress.benchmarks.model_shapes import CONFIGS
from compress.benchmarks.results_page import PAGE, RECORDS, build
from compress.benchmarks.results_pictures import IMAGES, pictures
from tests.sources import ROOT, modules, tree

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def listed(nav: Any) -> Iterator[str]:
    """Pages of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from listed(entry)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """The anchor that MkDocs gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", unescape(heading)).replace("`", "")
    text = re.sub(r"[^\w\s-]", "", text.encode("ascii", "ignore").decode()).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def anchors(page: Path) -> set[str]:
    return {anchor(title) for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def test_the_navigation_lists_every_page_once() -> None:
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES]
    assert sorted(listed(SITE["nav"])) == sorted(pages)


def test_what_the_site_is_made_with_is_there() -> None:
    assert [ROOT / hook for hook in SITE["hooks"] if not (ROOT / hook).is_file()] == []
    assert [DOCS / style for style in SITE["extra_css"] if not (DOCS / style).is_file()] == []
    paths = SITE["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"]
    assert [(ROOT / path).parent for path in paths] == [ROOT / "build"]
    assert SITE["theme"]["font"] is False  # else pages ask a network for fonts


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES], ids=lambda p: p.stem)
def test_links_lead_to_pages_headings_and_files(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, fragment = target.partition("#")
        place = page.parent / path if path else page
        inside = place.resolve().is_relative_to(ROOT)
        if not inside or not place.exists() or (page.is_relative_to(DOCS) and place.is_dir()):
            dead.append(target)
        elif fragment and place.suffix == ".md" and fragment not in anchors(place):
            dead.append(f"{target} (headings: {', '.join(sorted(anchors(place)))})")
    assert dead == []


def test_the_reference_shows_modules_that_exist_and_every_public_name() -> None:
    shown = {name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", prose(page), re.MULTILINE)}
    assert shown - set(modules()) == set()
    index = prose(DOCS / "reference" / "index.md")
    linked = dict(re.findall(r"\[`(\w+)`\]\[([\w.]+)\]", index))
    assert set(linked) == set(compress.__all__)
    for name, target in linked.items():
        module, _, attribute = target.rpartition(".")
        assert attribute == name
        assert module in shown, f"no page of docs/reference shows {module}"
        body = tree(modules()[module]).body
        assert name in {getattr(node, "name", None) for node in body}, f"{module} does not define {name}"


def test_every_part_of_the_library_has_a_page() -> None:
    parts = {name.split(".")[1] for name in modules() if name.count(".") > 1}
    parts -= {"benchmarks", "cli"}  # run, not called
    pages = {page.stem for page in (DOCS / "reference").glob("*.md")}
    assert parts - pages == set()


def test_the_results_are_those_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    remedy = "docs/results.md is out of date: python -m compress.benchmarks.results_page"
    assert PAGE.read_text(encoding="utf-8") == build(RECORDS, PAGE), remedy
    for name, drawn in pictures(RECORDS).items():
        assert (IMAGES / name).read_text(encoding="utf-8") == drawn, f"{name} is out of date; {remedy}"


def plans() -> list[tuple[str, str, str]]:
    """(page, command, what it prints) of every ``compress plan`` with its output below."""
    pattern = r"^```\n(compress plan [^\n]+)\n```\n+```text\n(.*?)^```$"
    return [
        (page.stem, command, output)
        for page in PAGES
        for command, output in re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.parametrize(("page", "command", "output"), plans())
def test_quoted_plans_are_what_plan_prints(
    page: str, command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, config in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, shlex.split(command)[1:], env={"COLUMNS": "150"})
    assert ran.exit_code == 0, ran.output
    printed = [line.rstrip() for line in ran.stdout.splitlines()]
    missing = [line for line in output.splitlines() if line.strip() and line.rstrip() not in printed]
    assert missing == [], f"{page}.md quotes lines that `{command}` does not print any more:\n{ran.stdout}"


def test_plans_are_quoted() -> None:
    assert len(plans()) > 1
