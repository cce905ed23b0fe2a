"""Pictures of records: files of their own, which say in words what they draw."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from compress.benchmarks.results_page import main
from compress.benchmarks.results_pictures import pictures

HOST = {"device": "cpu", "machine": "x86_64", "system": "Linux", "threads": 1}
SVG = "{http://www.w3.org/2000/svg}"
PROTOCOL = {"protocol_line": "some text"}
PRUNED: dict[str, Any] = {
    "dense": {"perplexity": 20.0, **PROTOCOL},
    "0.2 obs + refit 0": {"perplexity": 30.0, "achieved_ratio": 0.21, **PROTOCOL},
    "0.5 obs + refit 0": {"perplexity": 90.0, "achieved_ratio": 0.5, **PROTOCOL},
    "0.5 a < b & c 0": {"perplexity": 900.0, "achieved_ratio": 0.5, **PROTOCOL},
}
QUANTIZED: dict[str, Any] = {
    "dense": {"perplexity": 20.0, "bits_per_weight": 16.0},
    "ours 2.75": {"perplexity": 26.0, "bits_per_weight": 2.75},
    "ours 4.25": {"perplexity": 20.5, "bits_per_weight": 4.25},
    "gptqmodel 4, zero points": {"perplexity": 22.0, "bits_per_weight": 4.37},
    "bitsandbytes nf4": {"perplexity": 23.0, "bits_per_weight": 4.13},
    "hqq 3": {"not_run": "no environment"},
    "frobenius, uniform 3.25": {"perplexity": 60.0, "bits_per_weight": 3.25},
    "ours 2.75, trained": {"perplexity": 19.0, "bits_per_weight": 2.8},
}


def write(folder: Path, name: str, rows: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(
        json.dumps({"identity": {}, "host": HOST, "versions": {}, "rows": rows}), "utf-8"
    )


def drawn(folder: Path) -> dict[str, ElementTree.Element]:
    return {name: ElementTree.fromstring(text) for name, text in pictures(folder).items()}


def test_records_that_are_there_are_drawn(tmp_path: Path) -> None:
    write(tmp_path, "other.json", QUANTIZED)
    assert pictures(tmp_path) == {}
    write(tmp_path, "pruning-curve-cpu.json", PRUNED)
    (root,) = drawn(tmp_path).values()
    assert root.tag == f"{SVG}svg"
    assert (
        root.attrib["aria-label"]
        .replace("\N{NARROW NO-BREAK SPACE}", " ")
        .endswith(
            "obs + refit 30.00 at 21.0 % to 90.00 at 50.0 %; a < b & c 900.00 at 50.0 %; not pruned 20.00."
        )
    )


def test_the_style_travels_in_the_file(tmp_path: Path) -> None:
    write(tmp_path, "pruning-curve-cpu.json", PRUNED)
    (root,) = drawn(tmp_path).values()
    style = root.find(f"{SVG}style")
    assert style is not None
    assert style.text is not None
    for rule in ("svg .line path {", "prefers-color-scheme: dark", "svg { background: var(--card)"):
        assert rule in style.text
    assert all("http" not in value for element in root.iter() for value in element.attrib.values())


def test_tools_are_compared_by_stored_bits_without_training_and_ablations(tmp_path: Path) -> None:
    write(tmp_path, "quantization-table-cpu.json", QUANTIZED)
    (root,) = drawn(tmp_path).values()
    assert root.attrib["aria-label"].partition("by tool: ")[2] == (
        "ours 26 at 2.75 bits, 20.5 at 4.25 bits; gptqmodel, zero points 22 at 4.37 bits; "
        "bitsandbytes nf4 23 at 4.13 bits."
    )
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert "not quantized" in words
    assert "ours" in words


def test_the_page_s_command_writes_and_checks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "records", "pruning-curve-cpu.json", PRUNED)
    command = ["results_page", "--records", str(tmp_path / "records"), "--page", str(tmp_path / "page.md")]
    command += ["--images", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert main() == 0
    picture = tmp_path / "pruning-curve.svg"
    picture.write_text(picture.read_text("utf-8").replace("900.00", "90.00"), "utf-8")
    capsys.readouterr()
    assert main() == 1
    assert f"{picture} is out of date" in capsys.readouterr().out
