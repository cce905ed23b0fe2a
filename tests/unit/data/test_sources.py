from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest

from compress.data.sources import default_source, load_text
from compress.data.text import SPLITS
from compress.errors import CompressError, UsageError

DATA = Path(os.environ.get("COMPRESS_DATA", ""))
needs_data = pytest.mark.skipif(
    not (DATA / "wikitext-2-raw" / "wiki.test.raw").is_file(), reason="COMPRESS_DATA has no WikiText-2"
)


def test_pydoc_splits_are_disjoint_fair_and_complete() -> None:
    texts = {split: load_text("pydoc", split) for split in SPLITS}
    total = sum(map(len, topics.values()))
    sizes = {split: len(text.joined) for split, text in texts.items()}
    assert sum(len(t.documents) for t in texts.values()) == len(topics)
    assert sizes["train"] > 0.7 * total
    assert sizes["validation"] > 0.05 * total
    assert sizes["test"] > 0.05 * total

    def passages(text: str) -> set[str]:
        found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
        return {part for part in found if len(part) >= 60}

    train, validation, test = (passages(texts[split].joined) for split in SPLITS)
    assert not train & test
    assert not train & validation
    assert not validation & test
    assert texts["train"] == load_text("pydoc", "train")


@needs_data
def test_wikitext2_test_has_the_published_hash() -> None:
    text = load_text("wikitext2", "test")
    assert text.sha256 == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
    assert hashlib.sha256(text.joined.encode()).hexdigest() == text.sha256


@needs_data
def test_wikitext2_is_the_default_and_its_splits_differ() -> None:
    assert default_source() == "wikitext2"
    texts = [load_text(None, split) for split in SPLITS]
    assert {t.source for t in texts} == {"wikitext2"}
    train, validation, test = ({d for d in t.documents if len(d) > 100} for t in texts)
    assert len(train) > 10_000
    assert min(len(validation), len(test)) > 1000
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_wikitext2_convention_on_a_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.test.raw").write_bytes(" \n = A = \n \n b\u2028c \n".encode())
    (tmp_path / "wikitext-2" / "train.txt").write_bytes(b" = T = \n")
    monkeypatch.setenv("COMPRESS_DATA", str(tmp_path))
    assert load_text("wikitext2", "test").joined == "\n\n".join(["", " = A = \n", "", " b\u2028c \n"])
    assert load_text("wikitext2", "train").joined == " = T = \n"
    assert default_source() == "pydoc"  # validation is missing


@pytest.mark.skipif(not (DATA / "c4").is_dir(), reason="COMPRESS_DATA has no c4")
def test_local_c4_splits_are_disjoint() -> None:
    train, validation, test = (set(load_text("c4", split).documents) for split in SPLITS)
    assert len(train) > len(validation) > 10
    assert len(test) > 10
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_hub_is_used_without_local_files(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str, str, bool]] = []

    def fake(repository: str, name: str, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        calls.append((repository, name, split, streaming))
        return [{"text": f"{split} {i % 3990}"} for i in range(4000)] * (8 if split == "train" else 1)

    monkeypatch.delenv("COMPRESS_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert default_source() == "pydoc"
    assert len(load_text("wikitext2", "validation").documents) == 4000
    train, validation, test = (set(load_text("c4", split).documents) for split in SPLITS)
    assert len(load_text("c4", "train").documents) == 25_000  # the head of the stream, not all of it
    assert len(train) == 3990
    assert len(validation) == len(test) == 1000
    assert not validation & test
    assert calls == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", False),
        ("allenai/c4", "en", "train", True),
        ("allenai/c4", "en", "validation", True),
        ("allenai/c4", "en", "validation", True),
        ("allenai/c4", "en", "train", True),
    ]


def test_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.delenv("COMPRESS_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(CompressError, match="cannot be fetched") as caught:
        load_text("c4", "train")
    assert "COMPRESS_DATA" in caught.value.remedy


def test_unknown_names_and_missing_files() -> None:
    with pytest.raises(UsageError, match="no text source 'wikitext3'"):
        load_text("wikitext3", "train")
    with pytest.raises(CompressError, match="no text file"):
        load_text("somewhere/else.txt", "train")
    with pytest.raises(UsageError, match="needs a model"):
        load_text("self", "train")
    with pytest.raises(UsageError, match="no split"):
        load_text("pydoc", "dev")  # type: ignore[arg-type]
