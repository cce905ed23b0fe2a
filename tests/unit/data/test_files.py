from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.data.files import load_path, read_file
from compress.data.text import SPLITS, Message, Text
from compress.errors import CompressError


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def _parquet(path: Path, rows: list[Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _all(path: Path) -> list[Text]:
    return [load_path(path, split) for split in SPLITS]


def test_txt_paragraphs_are_split_disjointly_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i}\nits second line" for i in range(50)]
    path = tmp_path / "a.txt"
    path.write_bytes("\r\n \r\n".join(paragraphs).replace("\n", "\r\n").encode())
    texts = _all(path)
    assert sorted(sum((t.documents for t in texts), ())) == sorted(paragraphs)
    assert len({t.sha256 for t in texts}) == 3
    assert {t.join for t in texts} == {"\n\n"}
    assert texts[0] == load_path(path, "train")


def test_txt_without_blank_lines_is_split_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(30)), encoding="utf-8")
    texts = _all(path)
    assert sum(len(t.documents) for t in texts) == 30
    assert texts[0].joined == "\n".join(texts[0].documents)


ROWS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({"instruction": "Add", "input": "1 and 2", "output": "3", "category": "x"}, ("Add\n\n1 and 2", "3")),
    ({"instruction": "Say hi", "input": "", "output": "hi"}, ("Say hi", "hi")),
    ({"question": "2+2?", "answer": "#### 4"}, ("2+2?", "#### 4")),
]


@pytest.mark.parametrize(("row", "expected"), ROWS)
@pytest.mark.parametrize("write", [_write, _parquet])
def test_instruction_rows(tmp_path: Path, write: Any, row: dict[str, Any], expected: tuple[str, str]) -> None:
    suffix = ".jsonl" if write is _write else ".parquet"
    content = read_file(write(tmp_path / f"rows{suffix}", [row]))
    user, assistant = expected
    assert content.conversations == (
        (Message(role="user", content=user), Message(role="assistant", content=assistant)),
    )


def test_messages_rows_keep_all_turns(tmp_path: Path) -> None:
    turns = [
        {"role": r, "content": f"{r} says"} for r in ("system", "user", "assistant", "user", "assistant")
    ]
    for write, name in ((_write, "m.jsonl"), (_parquet, "m.parquet")):
        content = read_file(write(tmp_path / name, [{"messages": turns}]))
        assert [[m.role, m.content] for m in content.conversations[0]] == [
            [t["role"], t["content"]] for t in turns
        ]


def test_parquet_and_jsonl_give_the_same_text(tmp_path: Path) -> None:
    rows = [{"text": f"document {i}", "id": i} for i in range(20)]
    (tmp_path / "p").mkdir()
    first = _all(_write(tmp_path / "a.jsonl", rows))
    second = _all(_parquet(tmp_path / "p" / "a.parquet", rows))
    assert [t.sha256 for t in first] == [t.sha256 for t in second]


def test_one_question_with_two_answers_stays_in_one_split(tmp_path: Path) -> None:
    rows = [{"question": f"q{i % 10}", "answer": str(i)} for i in range(40)]
    texts = _all(_write(tmp_path / "a.jsonl", rows))
    questions = [{c[0].content for c in t.conversations} for t in texts]
    assert sum(map(len, questions)) == 10
    assert sum(len(t.conversations) for t in texts) == 40


def test_rows_without_an_answer_are_dropped(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": " "}, {"question": "b", "answer": "c"}]
    assert len(read_file(_write(tmp_path / "a.jsonl", rows)).conversations) == 1


def test_folder_keeps_its_own_splits_and_cuts_validation_from_train(tmp_path: Path) -> None:
    train = [{"text": f"train {i}"} for i in range(30)]
    _write(tmp_path / "train.jsonl", train)
    _write(tmp_path / "test.jsonl", [{"text": "train  3"}, {"text": "test 1"}])
    texts = dict(zip(SPLITS, _all(tmp_path), strict=True))
    assert texts["test"].documents == ("test 1",)  # what train holds as well is dropped
    held = texts["train"].documents + texts["validation"].documents
    assert sorted(held) == sorted(row["text"] for row in train)
    assert texts["validation"].documents

    _write(tmp_path / "valid.jsonl", [{"text": "train 4"}, {"text": "test 1"}, {"text": "valid 1"}])
    assert load_path(tmp_path, "validation").documents == ("valid 1",)
    assert len(load_path(tmp_path, "train").documents) == 30


def test_hash_is_of_the_joined_text(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "a.txt"
    path.write_text("eins\n\nzwei\n\ndrei ü", encoding="utf-8")
    for text in _all(path):
        joined = "\n\n".join(text.documents)
        assert text.sha256 == hashlib.sha256(joined.encode("utf-8")).hexdigest()


BAD: list[tuple[str, bytes, str]] = [
    ("empty.txt", b" \n\n", "is empty"),
    ("empty.jsonl", b"\n", "is empty"),
    ("latin.txt", "grün".encode("latin-1"), "not UTF-8"),
    ("a.csv", b"a,b", "unknown kind"),
    ("noise.jsonl", b'{"text": "a"}\n{oops', "Line 2 .* not JSON"),
    ("list.jsonl", b"[1]", "Row 1 .* is list"),
    ("keys.jsonl", b'{"text": "a"}\n{"query": "b", "gold": 1}', r"Row 2 .*it has: gold, query"),
    ("number.jsonl", b'{"text": 3}', '"text" as int'),
    ("mixed.jsonl", b'{"text": "a"}\n{"question": "b", "answer": "c"}', "Row 2 .* mixes"),
    ("turns.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "without an answer"),
    ("broken.parquet", b"PAR1 no", "as parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_are_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CompressError, match=message) as caught:
        load_path(path, "train")
    assert caught.value.remedy
    assert name in str(caught.value)


def test_missing_file_and_half_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no text file at"):
        load_path(tmp_path / "gone.txt", "train")
    (tmp_path / "train.txt").write_text("a", encoding="utf-8")
    with pytest.raises(CompressError, match="lacks a train or a test"):
        load_path(tmp_path, "train")
    (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(CompressError, match="two train files"):
        load_path(tmp_path, "train")


def test_unpaired_surrogate_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(f'{{"text": "\\ud800 {i}"}}' for i in range(5)), encoding="utf-8")
    with pytest.raises(CompressError, match="surrogate"):
        load_path(path, "train")
