"""Memory that ran out, of the host or of a device, as an error that says what there is and what takes less."""

from __future__ import annotations

import re
from contextlib import suppress

from compress.errors import CompressError, out_of_memory
from compress.pipelines.reporter import human_bytes

_ASKED = re.compile(r"ried to allocate ([\d.]+) ?(bytes|[KMGT]i?B)")
_GPU = re.compile(r"GPU (\d+) has a total capacity of ([\d.]+) ?([KMGT]i?B)")
_UNITS = {"bytes": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40, "KB": 10, "MB": 20, "GB": 30, "TB": 40}
"""Powers of two behind torch's units, whatever it calls them."""

_LESS = {
    "prune": ("--recompute", "--criterion wanda with --repair none", "--micro-batch 1"),
    "score": ("--recompute", "--micro-batch 1"),
    "repair": ("--recompute", "--micro-batch 1", "--repair-loss text, which needs no teacher"),
    "align": ("--recompute", "--micro-batch 1", "a shorter --sequence"),
    "quantize": ("--objective frobenius, which loads no model", "fewer --calibration-tokens"),
    "train": (
        "--recompute",
        "--micro-batch 1",
        "a shorter --sequence",
        "a smaller base (compress quantize first)",
    ),
    "recover": (),
    "generate": ("fewer --models", "the quantized model (compress quantize first)"),
    "eval": ("a shorter --sequence", "--kl-windows 0, which never holds the reference beside another model"),
    "run": ("recompute: true, a smaller micro_batch or sequence in the recipe",),
}
"""By verb, or by what several processes train together: what takes less memory, besides what all share."""
_LIMITED = ("prune", "quantize", "recover", "run")
"""Verbs that read models layer by layer under ``--memory-limit``, or name the phase that has no room."""


def memory_failure(error: BaseException, verb: str) -> CompressError | None:
    """What ran out and what to do; None where ``error`` is about something else.

    Args:
        error: As it was raised.
        verb: What was running: a verb, or a job of `compress.pipelines.serve`.
    """
    if not out_of_memory(error):
        return None
    text = str(error)
    asked = _ASKED.search(text)
    more = (
        "" if asked is None else f", and {human_bytes(_bytes(*asked.groups()))} more were asked for at once"
    )
    on_device = _on_device(error)
    where, there = _device(text) if on_device else ("the host", _host())
    has = "" if there is None else f", which has {human_bytes(there)} in all"
    ways = list(_LESS.get(verb, ()))
    if verb in _LIMITED:
        ways.insert(0, "--memory-limit SIZE, under which models are read layer by layer")
    if on_device and verb not in ("plan", "bench", "doctor"):
        ways.append("--device cpu")
    elif not ways:
        ways.append("a machine with more memory")
    return CompressError(
        f"{verb} ran out of memory on {where}{has}{more}.",
        f"Try {' or '.join(ways)}; compress plan counts beforehand what every stage needs.",
    )


def _host() -> float:
    from compress.machine import host_memory  # brings torch, which the commands do without until they work

    return float(host_memory()[0])


def _on_device(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and ("CUDA" in str(error) or "CUDNN" in str(error))


def _device(text: str) -> tuple[str, float | None]:
    found = _GPU.search(text)
    if found is not None:
        return f"cuda:{found[1]}", _bytes(found[2], found[3])
    with suppress(Exception):  # a device that has failed tells nothing any more
        import torch

        return "the GPU", float(torch.cuda.mem_get_info()[1])
    return "the GPU", None


def _bytes(number: str, unit: str) -> float:
    return float(number) * float(1 << _UNITS[unit])
