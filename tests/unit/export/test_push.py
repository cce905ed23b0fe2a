"""Uploads, against a hub on this machine: every byte arrives, refusals have a cause and a remedy, no token shows."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from compress.errors import CompressError, UsageError
from compress.export.push import check_push, push
from tests.hub import Hub

TOKEN = "hf_not_a_real_token"


@pytest.fixture(autouse=True)
def _logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    (place / "adapter").mkdir(parents=True)
    (place / "README.md").write_text("---\ntags:\n- compress\n---\n\n# A model\n", encoding="utf-8")
    (place / "config.json").write_text("{}", encoding="utf-8")
    (place / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    (place / "adapter" / "adapter_model.safetensors").write_bytes(b"\x00\xff" * 31)
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("private", [False, True])
def test_every_byte_arrives_in_one_commit(
    folder: Path, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        address = push(folder, "someone/model", private=private)
    assert hub.files == contents(folder)
    assert hub.commits == 1
    (made,) = hub.created
    assert (made["organization"], made["name"]) == ("someone", "model")
    assert (made.get("visibility") == "private" or made.get("private") is True) == private
    assert address == f"{hub.address}/someone/model"
    assert f"Bearer {TOKEN}" in hub.tokens


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (401, "does not accept the token"),
        (403, "does not let this token write"),
        (404, "does not know"),
        (418, "answered with status 418"),
    ],
)
def test_what_the_hub_refuses(folder: Path, status: int, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    with Hub(refuses=status) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        with pytest.raises(CompressError, match=cause) as caught:
            push(folder, "someone/model", private=False)
    assert TOKEN not in str(caught.value)
    assert caught.value.remedy
    assert contents(folder) == before


def test_a_hub_that_cannot_be_reached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # a port that nobody listens at
        closed.bind(("localhost", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{closed.getsockname()[1]}")
        with pytest.raises(CompressError, match="cannot be reached") as caught:
            push(folder, "someone/model", private=False)
    assert "the same command tries again" in caught.value.remedy


@pytest.mark.parametrize("name", ["a/b/c", "two words", "..", "-x", "x" * 200])
def test_names_that_no_repository_has(name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a repository"):
        check_push(name)


def test_the_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(CompressError, match="HF_HUB_OFFLINE is set"):
        check_push("someone/model")


def test_nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(CompressError, match="no token") as caught:
        check_push("someone/model")
    assert "hf auth login" in caught.value.remedy
