"""Compile Triton kernels for a GPU that is not there: launches are recorded, then built down to machine code.

Run in a process of its own, without the interpreter: ``python -m tests.unit.kernels.triton.compiler CASE [ARCH]``
prints one JSON line a kernel with its registers and the bytes that it spills.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

Launch = tuple[JITFunction, dict[str, Any]]


def recorded(launches: list[Launch], function: JITFunction, *args: Any, grid: Any, **given: Any) -> None:
    """Stands in for ``JITFunction.run``."""
    names = dict(zip(function.arg_names, args, strict=False))
    launches.append((function, {**names, **{k: v for k, v in given.items() if k != "warmup"}}))


def built(function: JITFunction, given: dict[str, Any], arch: int) -> dict[str, Any]:
    """Machine code of one launch: registers of a thread, bytes that it spills, bytes of shared memory."""
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(function.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(at,)] = value
        else:
            signature[parameter.name] = mangle_type(value)
            aligned = value.data_ptr() % 16 == 0 if isinstance(value, torch.Tensor) else value % 16 == 0
            if aligned and not parameter.do_not_specialize:
                attributes[(at,)] = [["tt.divisibility", 16]]
            if isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
                signature[parameter.name] = "constexpr"  # as a launch would take it
                constants[(at,)] = 1
    options = {k: v for k, v in given.items() if k in ("num_warps", "num_stages", "enable_fp_fusion")}
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        )
    loop = longest_loop(compiled.asm["cubin"])
    numbers = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", usage.stdout)}
    return {
        "kernel": function.__name__,
        "registers": numbers["REG"],
        "local_bytes": max(numbers["STACK"], numbers["LOCAL"]),
        "shared": compiled.metadata.shared,
        "mma": "mma" in compiled.asm["ptx"],
        "loop_instructions": loop,
    }


def longest_loop(cubin: bytes) -> int:
    """Instructions of the longest loop: from a label to the last branch back to it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        listing = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    labels: dict[str, int] = {}
    count = longest = 0
    for line in listing.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+.*;", line):
            count += 1
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels:
                longest = max(longest, count - labels[back[1]])
    return longest


def main() -> None:
    """Record what a case launches, and build it."""
    from compress.kernels.triton import launch
    from tests.unit.kernels.triton import launches as cases

    found: list[Launch] = []
    JITFunction.run = lambda self, *args, grid, warmup, **given: recorded(
        found, self, *args, grid=grid, **given
    )
    launch.runs_on = lambda device: True
    getattr(cases, sys.argv[1])()
    arch = int(sys.argv[2]) if len(sys.argv) > 2 else 90
    done = set()
    for function, given in found:
        key = (function.__name__, *(str(getattr(v, "dtype", v)) for v in given.values()))
        if key not in done:
            done.add(key)
            print(json.dumps(built(function, given, arch)), flush=True)


if __name__ == "__main__":
    main()
