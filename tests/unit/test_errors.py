"""What the operating system refuses, in a sentence of cause and one of remedy."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from compress.errors import CompressError, out_of_memory, system_failure
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


CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.25 GiB of which 1.00 GiB is "
    "free. Process 1 has 78 GiB memory in use."
)


def refused(monkeypatch: pytest.MonkeyPatch, verb: str, raised: Exception) -> CompressError:
    def failing(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(dispatch, "_run", failing)
    with pytest.raises(CompressError) as caught:
        dispatch.run_verb(verb, Common(), {})
    assert caught.value.__cause__ is raised
    return caught.value


def test_memory_of_the_host_that_runs_out_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 55)  # what torch itself says of it
    assert out_of_memory(full.value)
    monkeypatch.setattr("compress.machine.host_memory", lambda: (16_000_000_000, 1))
    found = refused(monkeypatch, "prune", full.value)
    assert found.cause == (
        f"prune ran out of memory on the host, which has 16.0 GB in all, and {(1 << 57) / 1e12:.1f} TB more were "
        "asked for at once."
    )
    assert "--memory-limit SIZE" in found.remedy
    assert "--device cpu" not in found.remedy
    assert found.remedy.endswith("compress plan counts beforehand what every stage needs.")


@pytest.mark.parametrize(
    "raised",
    [MemoryError(), OSError(errno.ENOMEM, "no"), SafetensorError("I/O error: no memory (os error 12)")],
)
def test_so_is_what_others_than_torch_say(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    assert refused(monkeypatch, "eval", raised).cause.startswith(
        "eval ran out of memory on the host, which has "
    )


def test_memory_of_a_device_that_runs_out_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    found = refused(monkeypatch, "train", torch.OutOfMemoryError(CUDA))
    assert found.cause == (
        "train ran out of memory on cuda:1, which has 85.1 GB in all, and 2.7 GB more were asked for at once."
    )
    for way in ("--recompute", "--micro-batch 1", "compress quantize first", "--device cpu", "compress plan"):
        assert way in found.remedy
    late = refused(monkeypatch, "eval", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"))
    assert late.cause.startswith("eval ran out of memory on the GPU")
    assert "--kl-windows 0" in late.remedy


def test_other_failures_of_torch_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError) as wrong:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not out_of_memory(wrong.value)

    def failing(*_: object, **__: object) -> None:
        raise wrong.value

    monkeypatch.setattr(dispatch, "_run", failing)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dispatch.run_verb("prune", Common(), {})
