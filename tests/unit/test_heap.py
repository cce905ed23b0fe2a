from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from compress import heap
from compress.heap import give_back, keep_nothing

HOLES = """
import gc, psutil, torch
from compress.heap import give_back

gc.collect()
give_back()
before = psutil.Process().memory_info().rss
pieces = [torch.ones(4096) for _ in range(20_000)]  # 16 kB each: never mapped by itself
pins = pieces[::100]
full = psutil.Process().memory_info().rss
del pieces
kept = psutil.Process().memory_info().rss
give_back()
print(before, full, kept, psutil.Process().memory_info().rss, len(pins))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_a_heap_full_of_holes_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, env={**os.environ}
    )
    before, full, kept, after, _ = map(int, done.stdout.split())
    assert full - before > 300e6
    assert kept - before > 0.5 * (full - before)  # what glibc does by itself
    assert after - before < 0.1 * (full - before)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        """A C library without the functions of glibc."""

    asked: list[object] = []
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: asked.append(name) or Empty())
    give_back()
    keep_nothing()
    assert asked == [None, None]
