"""New tensors in large pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from compress.kernels.pages import empty
from tests.fresh import ForkServer

SCRIPT = """
import re, torch
from compress.kernels.pages import empty
for megabytes in (1, 64):
    made = empty(megabytes << 20, dtype=torch.uint8)
    middle = made.data_ptr() + made.nbytes // 2
    for line in open("/proc/self/smaps"):
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            print("hg" in line.split()[1:])
"""
"""Whether Linux notes a wish for large pages (hg) where a tensor lies; in a process whose heap nobody has advised."""


def test_shapes_and_types_are_those_asked_for() -> None:
    for shape, dtype in (((3, 5), torch.float32), ((0, 7), torch.bfloat16), ((1500, 1400), torch.float16)):
        made = empty(*shape, dtype=dtype)
        assert (tuple(made.shape), made.dtype, made.is_contiguous()) == (shape, dtype, True)
        made.fill_(1)
        assert int(made.count_nonzero()) == made.numel()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason=f"{sys.platform} has no large pages that one could ask for",
)
def test_linux_is_asked_for_large_pages_of_large_tensors_only(fork_server: ForkServer) -> None:
    done = fork_server.run(SCRIPT)
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True"]), done.stderr
