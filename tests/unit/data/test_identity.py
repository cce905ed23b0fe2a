from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress.data.files import SPLIT_FILES, files_of, load_path
from compress.data.identity import text_digest
from compress.data.text import SPLITS, Split
from compress.errors import CompressError

ALL: tuple[Split, ...] = ("train", "validation", "test")


def documents(word: str) -> str:
    return "\n\n".join(f"{word} {number}" for number in range(40)) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    for split in SPLITS:
        (path / f"{split}.txt").write_text(documents(split))
    return path


def test_a_file_is_known_by_its_content_alone(tmp_path: Path) -> None:
    file, elsewhere = tmp_path / "a.txt", tmp_path / "other" / "a.txt"
    elsewhere.parent.mkdir()
    file.write_text(documents("one"))
    before = text_digest(str(file), ALL)
    assert before is not None
    shutil.copyfile(file, elsewhere)
    assert text_digest(str(elsewhere), ["train"]) == before
    with file.open("a") as stream:
        stream.write("more")
    assert text_digest(str(file), ALL) != before


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_a_split_changes_its_digest_whenever_its_text_changes(
    split: Split, whole: bool, folder: Path
) -> None:
    """Every file of a folder in turn: what is read from it decides, and nothing else."""
    if not whole:
        (folder / "validation.txt").unlink()
    known, text = text_digest(str(folder), [split]), load_path(folder, split).sha256
    first = load_path(folder, split).documents[0]
    for file in sorted(folder.iterdir()):
        content = file.read_text()
        file.write_text(f"{content}\n{first}\n\nmore\n")  # a document of the split: it may be dropped from it
        changed = load_path(folder, split).sha256 != text
        assert not changed or text_digest(str(folder), [split]) != known
        assert (file in files_of(folder, split)) == (text_digest(str(folder), [split]) != known)
        file.write_text(content)
    assert text_digest(str(folder), [split]) == known


def test_local_data_sets_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "wikitext-2-raw"
    raw.mkdir()
    names = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}
    for split, name in names.items():
        (raw / name).write_text(documents(split))
    monkeypatch.setenv("COMPRESS_DATA", str(tmp_path))
    known = {split: text_digest("wikitext2", [split]) for split in SPLITS}
    assert None not in known.values()
    assert len(set(known.values())) == 3
    (raw / names["test"]).write_text("other")
    assert text_digest("wikitext2", ["test"]) != known["test"]
    assert text_digest("wikitext2", ["train"]) == known["train"]
    monkeypatch.delenv("COMPRESS_DATA")
    assert text_digest("wikitext2", ["train"]) is None
    assert text_digest("c4", ["train"]) is None


def test_what_no_file_decides(tmp_path: Path) -> None:
    assert text_digest("self", ALL) is None
    assert text_digest(str(tmp_path / "gone.txt"), ALL) is None
    assert text_digest("pydoc", ALL) == text_digest("pydoc", ["test"])


def test_a_folder_that_cannot_be_read_is_told(folder: Path) -> None:
    assert SPLIT_FILES["test"] == ("test",)
    (folder / "test.txt").unlink()
    with pytest.raises(CompressError, match="lacks a train or a test file"):
        text_digest(str(folder), ALL)
