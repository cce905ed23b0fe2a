"""Files that are whole or absent, results that are kept, and signals that wait for the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from compress.durable import replacing, settle
from compress.kept import NOTHING_KEPT, Kept
from compress.pipelines.reporter import Reporter
from compress.stopping import Stop, Stopped


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError), replacing(path) as temporary:  # noqa: PT012 (it fails in the middle)
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("name"), replace(a, b))[1])
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert events == ["sync", "name", "sync"], "the file, its name, the folder that holds the name"
    settle(tmp_path)
    assert events[-1] == "sync"


def test_what_was_kept_is_not_made_again(tmp_path: Path) -> None:
    made = 0

    def make() -> dict[str, torch.Tensor]:
        nonlocal made
        made += 1
        return {"a": torch.rand(3, 4, dtype=torch.float64), "b": torch.tensor(7)}

    first = Kept(tmp_path / "kept").tensors("x", make)
    again = Kept(tmp_path / "kept").tensors("x", make)
    assert made == 1
    assert all(torch.equal(first[name], again[name]) for name in ("a", "b"))
    value = 0.1 + 0.2
    assert Kept(tmp_path / "kept").number("n", lambda: value) == value
    assert Kept(tmp_path / "kept").number("n", lambda: 0.0) == value
    assert not Kept(tmp_path / "kept").has("y")
    with pytest.raises(KeyError):
        Kept(tmp_path / "kept").get("y")


def test_nothing_is_kept_without_a_folder() -> None:
    NOTHING_KEPT.put("x", {"a": torch.zeros(1)})
    assert not NOTHING_KEPT.has("x")
    assert NOTHING_KEPT.number("x", lambda: 1.0) == 1.0
    assert NOTHING_KEPT.number("x", lambda: 2.0) == 2.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_step_and_a_second_one_does_not(
    number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    said: list[str] = []
    stop = Stop(said.append)
    # as where a person started the tests: behind an & of a script SIGINT is ignored
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    found = signal.signal(number, handler)
    request.addfinalizer(lambda: signal.signal(number, found))
    before = signal.getsignal(number)
    done = 0
    with (  # noqa: PT012 (where it stops is what is tested)
        pytest.raises(Stopped) as stopped,
        stop.listening(),
        Reporter(quiet=True, stop=stop).bar("x") as progress,
    ):
        for step in range(3):
            if step == 1:
                os.kill(os.getpid(), number)
            done += 1
            progress(done, 3, "")
    assert done == 2
    assert stopped.value.number == number
    assert len(said) == 1
    with pytest.raises(Stopped), stop.listening():  # noqa: PT012
        os.kill(os.getpid(), number)
        done += 100
    assert done == 2
    assert signal.getsignal(number) == before


def test_only_the_main_thread_takes_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with Stop().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop().listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
