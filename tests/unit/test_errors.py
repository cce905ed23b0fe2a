"""What the operating system refuses, in a sentence of cause and one of remedy."""

from __future__ import annotations

import errno
import os

import pytest
from safetensors import SafetensorError

from compress.errors import CompressError, system_failure
from compress.pipelines import dispatch
from compress.pipelines.settings import Common

KNOWN = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "EMFILE", "ENOTDIR", "ENAMETOOLONG")


@pytest.mark.parametrize("name", KNOWN)
def test_a_refusal_names_the_file(name: str) -> None:
    number = getattr(errno, name)
    found = system_failure(OSError(number, os.strerror(number), "/data/run/model.safetensors"))
    assert found is not None
    assert found.cause.endswith(": '/data/run/model.safetensors'.")
    assert found.remedy.endswith(".")
    assert found.exit_code == 1
    nameless = system_failure(OSError(number, os.strerror(number)))
    assert nameless is not None
    assert nameless.cause == found.cause.partition(":")[0] + "."
    as_bytes = system_failure(OSError(number, os.strerror(number), b"/data/run/model.safetensors"))
    assert as_bytes is not None
    assert as_bytes.cause == found.cause


def test_what_no_user_can_act_on_stays_what_it_is() -> None:
    assert system_failure(OSError(errno.ENOTCONN, "not connected")) is None
    assert system_failure(OSError("no number")) is None


@pytest.mark.parametrize(
    "raised",
    [OSError(errno.ENOSPC, "No space left on device", "a"), SafetensorError("I/O error: full (os error 28)")],
)
def test_every_verb_hears_of_it(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    def failing(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(dispatch, "_run", failing)
    with pytest.raises(CompressError, match="The disk is full") as caught:
        dispatch.run_verb("prune", Common(), {})
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [SafetensorError("invalid header"), OSError(errno.ENOTCONN, "x")])
def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    def failing(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(dispatch, "_run", failing)
    with pytest.raises(type(raised)):
        dispatch.run_verb("prune", Common(), {})
