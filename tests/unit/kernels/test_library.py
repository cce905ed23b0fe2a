"""Which library and level are in force, and threads that survive a fork."""

from __future__ import annotations

import ctypes
import json

import pytest

from compress.errors import UsageError
from compress.kernels.ceilings import multiplications
from compress.kernels.library import LEVELS, library, status, using
from compress.kernels.native_product import TYPES, multiplies_narrow
from compress.kernels.packed import needed
from tests.fresh import ForkServer

needs_library = pytest.mark.skipif(library() is None, reason="the C library was not built")

PROGRAM = """
import json, os
os.environ["COMPRESS_KERNELS"] = {wanted!r}
from compress.kernels.library import status
s = status()
print(json.dumps([s.level, None if s.path is None else s.path.name, s.reason]))
"""


def in_process(wanted: str, server: ForkServer) -> tuple[str, str | None, str]:
    """What a process with this environment chooses."""
    done = server.run(PROGRAM.format(wanted=wanted))
    assert done.returncode == 0, done.stderr
    level, path, reason = json.loads(done.stdout)
    return level, path, reason


@needs_library
def test_every_level_up_to_the_best_can_be_asked_for() -> None:
    before = status().level
    for level in status().available[1:]:
        with using(level):
            assert status().level == level
    assert status().level == before
    with pytest.raises(UsageError, match="no level 'torch'"), using("torch"):
        raise AssertionError


@needs_library
@pytest.mark.parametrize("wanted", ["torch", *LEVELS])
def test_the_environment_chooses_the_level(wanted: str, fork_server: ForkServer) -> None:
    level, path, reason = in_process(wanted, fork_server)
    assert level == (wanted if wanted in status().available else status().available[-1])
    assert "COMPRESS_KERNELS asks for" in reason
    assert (path is None) == (wanted == "torch")


def test_a_level_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_KERNELS", "sse9")
    with pytest.raises(UsageError, match=r"'sse9'.*torch, scalar, avx2, avx512"):
        status()


@needs_library
def test_the_peak_is_measured_on_real_sums() -> None:
    run = needed().ck_peak
    run.restype = ctypes.c_float
    for level in status().available[1:]:
        with using(level):
            for dtype, number in TYPES.items():
                assert run(ctypes.c_int64(0), ctypes.c_int64(number)) == 16 * sum(range(12))
                narrow = multiplies_narrow(dtype)  # there the word of 0.5 is a pair of 0 and 0.5
                last = [i + 0.25 if narrow else 0.5 * i + 0.5 for i in range(12)]
                assert run(ctypes.c_int64(1), ctypes.c_int64(number)) == pytest.approx(16 * sum(last))
                assert multiplications(dtype, rounds=1000, repeats=1) > 0


@needs_library
def test_threads_work_before_and_after_a_fork(fork_server: ForkServer) -> None:
    script = """
import os, torch
from compress.kernels.packed import Geometry, tile, untile
torch.set_num_threads(2)
g = Geometry(rows=64, columns=64, bits=4, scale_bits=8, block_size=64, group_size=16)
plain = torch.arange(2048).to(torch.uint8)
def trip():
    made = tile(g, codes=plain, scale_codes=plain[:64], scale_max=torch.ones(4), offset=torch.zeros(1),
                table=torch.zeros(16))
    return torch.equal(untile(g, made.codes, made.scale_codes)[0], plain)
assert trip()
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if trip() and trip() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert trip()
"""
    done = fork_server.run(script)
    assert done.returncode == 0, done.stderr


@needs_library
def test_work_goes_to_the_threads_that_torch_has(fork_server: ForkServer) -> None:
    """A second set of threads would wait for torch's, which spin for a while after their work."""
    script = """
import os, torch
from compress.kernels.packed import Geometry, needed, tile, untile
from compress.kernels.team import join, loaded_openmp
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)  # makes torch's threads
before = len(os.listdir("/proc/self/task"))
g = Geometry(rows=512, columns=1024, bits=4, scale_bits=8, block_size=64, group_size=16)
plain = torch.arange(512 * 512).to(torch.uint8)
made = tile(g, codes=plain, scale_codes=plain[:8192], scale_max=torch.ones(512), offset=torch.zeros(1),
            table=torch.zeros(16))
assert torch.equal(untile(g, made.codes, made.scale_codes)[0], plain)
print(loaded_openmp() is not None, join(needed()), len(os.listdir("/proc/self/task")) - before)
"""
    done = fork_server.run(script)
    assert done.returncode == 0, done.stderr
    openmp, joined, more = done.stdout.split()
    assert openmp == joined
    assert int(more) == (0 if joined == "True" else 1)
