"""The page in a real browser: laid out on a phone, light and dark, printed, with scripts forbidden."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.report.page import render
from tests.integration.browser import Browser, find_browser
from tests.unit.report.reading import themes
from tests.unit.report.samples import sample_curve, sample_others, sample_run

POLICY = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
PROBE = """<script>
for (const d of document.querySelectorAll("details")) d.open = true;
const boxes = [...document.querySelectorAll(".scroll, .plot, pre")], width = innerWidth, wide = [], cut = [];
for (const e of document.body.querySelectorAll("*")) {
  const r = e.getBoundingClientRect(), inside = boxes.some(b => b !== e && b.contains(e));
  if (r.right > width + 0.5 && r.width > 1 && !inside) wide.push(e.className || e.tagName);
}
for (const t of document.querySelectorAll("svg text")) {
  const b = t.getBBox(), v = t.ownerSVGElement.viewBox.baseVal;
  const right = b.x + b.width > v.width + 1, below = b.y + b.height > v.height + 3;
  if (b.x < -1 || b.y < -3 || right || below) cut.push(t.textContent);
}
const focusable = boxes.filter(b => { b.focus(); return document.activeElement === b; }).length;
const scroll = document.documentElement.scrollWidth;
parent.document.title = JSON.stringify({ width, scroll, wide, cut, boxes: boxes.length, focusable });
</script>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    """Skips where there is none, or none that starts."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome is installed")
    folder = tmp_path_factory.mktemp("browser")
    found, blank = Browser(program, folder), folder / "blank.html"
    blank.write_text("<!DOCTYPE html><title>t</title><p>it starts</p>")
    try:
        dom = found.dom(blank)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{program} does not start here: {error}")
    if "it starts" not in dom:
        pytest.skip(f"{program} prints no document here")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole page with long names: what overflows must do it in a box of its own."""
    run = sample_run() | {"pruning": sample_curve(), "name": "half", "others": sample_others()}
    run["title"] = "an-organisation-with-a-long-name/" + "a_model_name_without_a_break" * 3
    run["stages"][0]["command"] = ["compress", "prune", "--data", "/a/very/long/path" * 12]
    run["others"][0]["name"] = "a_run_of_a_very_long_name_without_any_break_in_it"
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(run), encoding="utf-8")
    return path


def probed(browser: Browser, page: Path, width: int) -> dict[str, Any]:
    """What the probe says of a copy of the page, in a frame of this width, whose policy lets it run.

    A window of the browser itself is never narrower than 500 pixels.
    """
    text = re.sub(POLICY, "", page.read_text(encoding="utf-8")).replace("</body>", f"{PROBE}</body>")
    frame = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(text)}"></iframe>'
    outer = page.with_name(f"framed-{width}.html")
    outer.write_text(f"<!DOCTYPE html><title>waiting</title>{frame}", encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browser.dom(outer), re.S)
    assert title is not None
    found: dict[str, Any] = json.loads(html.unescape(title.group(1)))
    return found


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_but_its_own_boxes_scrolls_sideways(browser: Browser, page: Path, width: int) -> None:
    found = probed(browser, page, width)
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["wide"] == []
    assert found["cut"] == []
    assert found["boxes"] == found["focusable"] >= 15


@pytest.mark.parametrize(("dark", "width"), [(False, 640), (True, 390)])
def test_a_screenshot_has_the_colours_of_its_scheme(
    browser: Browser, page: Path, dark: bool, width: int
) -> None:
    pixels = browser.pixels(page, width=width, height=800, dark=dark)[:, :, :3]
    assert pixels.shape == (800, width, 3)
    theme = {
        name: tuple(int(colour[n : n + 2], 16) for n in (1, 3, 5)) for name, colour in themes()[dark].items()
    }
    assert tuple(pixels[2, 2]) == theme["page"]
    flat = pixels.reshape(-1, 3)

    def share(name: str) -> float:
        return float((flat == np.array(theme[name], dtype=np.uint8)).all(axis=1).mean())

    assert share("page") > 0.05
    assert share("card") > 0.1
    assert 0.001 < share("ink") < 0.2
    assert share("accent") > 0.001
    assert len(np.unique(flat, axis=0)) > 100  # letters have smooth edges


def test_the_policy_of_the_page_forbids_scripts(browser: Browser, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    copy = page.with_name("hostile.html")
    copy.write_text(text.replace("</body>", "<script>document.title = 'it ran'</script></body>"))
    assert "it ran</title>" not in browser.dom(copy)
    free = re.sub(POLICY, "", copy.read_text(encoding="utf-8"))
    copy.write_text(free)
    assert "it ran</title>" in browser.dom(copy)  # without the policy it would


def test_it_prints(browser: Browser, page: Path) -> None:
    printed = browser.pdf(page)
    assert printed.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 25
