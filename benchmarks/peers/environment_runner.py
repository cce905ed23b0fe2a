"""Runs inside a peer's own environment: quantize with its functions, store, and hand the dequantized weights back.

``python -P environment_runner.py REQUEST``, where REQUEST is the JSON file that `environment` wrote. It imports nothing
of this project. ``-P`` keeps this folder off the import path, where files are named after the peers.

A peer's file (``NAME_runner.py``) defines what is called here, in this order:

- ``load(model, settings)``: the dense model, ready; not timed, like everything below but ``quantize``;
- ``quantize(loaded, ids_NS, linears, settings)``: the peer's quantization of the decoder linears;
- ``save(quantized, folder)``: the peer's own checkpoint, which is what bits are counted on;
- ``reopen(folder, model, linears, settings)``: its modules by the name of the linear, from that checkpoint alone;
- ``weight(module)``: codes times scales as the module stores them, float32 [out, in];
- ``dtype(module)``: what it computes in, for a check that those are the weights it computes with.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_PROBES = 8


def peak_resident_bytes(status: str) -> int:
    """Peak resident memory that the text of ``/proc/self/status`` tells; 0 where it tells none.

    Not ``getrusage``: its figure outlives the start of a program and can be that of the process that started it.
    """
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else 0


@torch.no_grad()
def forward_difference(
    module: Any, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, dtype: torch.dtype
) -> float:
    """How far the module's own output is from that of ``weight_OI``, relative, on random vectors.

    Its rounding to ``dtype`` is part of it: a few thousandths in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(_PROBES, weight_OI.shape[1], generator=generator).to(dtype)
    expected_TO = x_TI.float() @ weight_OI.T
    if bias_O is not None:
        expected_TO += bias_O.float()
    return float((module(x_TI).float() - expected_TO).norm() / expected_TO.norm())


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one request and return the facts about it."""
    torch.set_num_threads(request["threads"])
    peer = runpy.run_path(request["runner"])
    model, stored = Path(request["model"]), Path(request["stored"])
    linears, settings = request["linears"], request["settings"]
    ids_NS = load_file(request["windows"])["ids"] if request["windows"] else None

    loaded = peer["load"](model, settings)
    started = time.perf_counter()
    quantized = peer["quantize"](loaded, ids_NS, linears, settings)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status")
    peak = peak_resident_bytes(status.read_text(encoding="utf-8")) if status.is_file() else 0

    stored.mkdir()
    peer["save"](quantized, stored)
    del loaded, quantized
    weights, differences = {}, []
    for name, module in peer["reopen"](stored, model, linears, settings).items():
        weight_OI = peer["weight"](module).float().cpu().contiguous()
        bias_O = getattr(module, "bias", None)
        differences.append(forward_difference(module, weight_OI, bias_O, peer["dtype"](module)))
        weights[f"{name}.weight"] = weight_OI
    save_file(weights, request["weights"])
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "forward_difference": float(torch.tensor(differences).max()),  # not max(): it passes NaN over
        "versions": {name: version(name) for name in ("torch", "transformers", *request["distributions"])},
        "python": sys.version.split()[0],
    }


def main() -> None:
    """Read the request, and write the answer beside it, whole or not at all."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = Path(request["answer"])
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(run(request)), encoding="utf-8")
    os.replace(partial, answer)


if __name__ == "__main__":
    main()
