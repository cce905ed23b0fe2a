"""Memory and speed of the LoRA-guided scores against true gradients and the dense formula.

``python -m compress.benchmarks.importance [--quick] [--out FILE] [--model NAME] [--threads N]``

Memory: what a scoring pass needs beyond the loaded model (forward, backward and scores of one micro batch), with
adapters of rank 8 on every decoder linear, and with gradients of the decoder linears themselves (Taylor). Each pass
runs in a fresh process and is counted twice: bytes of live tensors, and peak resident memory less what was resident
after loading. Both need the same activations; "recomputed" keeps only the layers' inputs of them, on both sides.
Speed: one matrix of 4096 x 11008, against the dense formula in float32, measured in turns on an idle machine.
Goals: at most 48 % of Taylor's memory, temporaries of the reduction at most 1 % of the weights, 5 times the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.adapters.attach import attach_lora
from compress.adapters.loss import TokenLoss
from compress.benchmarks.protocol import Rows, calibration
from compress.data.sources import default_source
from compress.evaluate.memory import PeakMemory
from compress.importance.base import create_criterion
from compress.importance.lora import lora_group_sums
from compress.importance.modules import WeightRows
from compress.kernels.library import status
from compress.model.architecture import architecture_of
from compress.model.load import EMBEDDED, load_model, load_tokenizer, preferred_dtype, resolve

TAKES = ("minutes", "minutes")
NEEDS = ()

RANK, ALPHA = 8, 16
CASES = ((4, 512, False), (1, 128, False), (1, 32, False), (4, 512, True), (1, 128, True))
"""Windows, their length, and whether activations are recomputed in the backward pass."""
QUICK_CASES = ((1, 128, False), (1, 128, True))
PASSES = {"taylor": 0.0, "lora": 0.0, "lora, dropout 0.05": 0.05}
"""Measured pass -> dropout of its adapters."""
MATRIX = (4096, 11008)
GOALS = {"memory": 0.48, "reduction": 0.01, "speedup": 5.0}


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that were made in the block and are still alive, and their peak.

    Memory that a kernel takes and gives back within one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._known: set[int] = set()

    def ignore(self, model: nn.Module) -> None:
        """Do not count the tensors that ``model`` has by now."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages it brought."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def measure_pass(
    model_path: Path, kind: str, windows: int, length: int, *, recompute: bool = False
) -> dict[str, int]:
    """Extra memory of one scoring pass, in bytes; run it in a fresh process.

    Args:
        model_path: Folder of the model.
        kind: A key of `PASSES`.
        windows: Windows of the micro batch.
        length: Their tokens.
        recompute: Keep only the inputs of the layers for the backward pass.

    Returns:
        ``tensors``: peak of live tensors; ``resident``: peak resident memory over that after loading;
        ``gradients`` of the trained parameters; ``reduction``: what scoring adds to the live tensors at its peak;
        ``weights`` of the decoder linears.
    """
    dtype = preferred_dtype("cpu")
    model = load_model(model_path, dtype=dtype)
    arch = architecture_of(model.config.to_dict(), list(model.state_dict()))
    weights = [
        model.get_parameter(arch.tensor_name(layer, spec))
        for layer in range(arch.layers)
        for spec in arch.linears_at(layer)
    ]
    ids = calibration(
        load_tokenizer(model_path), default_source(), windows * length, seed=0, length=length
    ).ids
    with torch.no_grad():
        model(input_ids=ids[:1, :8])  # touches every mapped page, and lets libraries set themselves up
    account = LiveTensors()
    account.ignore(model)
    with PeakMemory() as loaded:
        model.requires_grad_(False)
    with account:
        with PeakMemory() as training:
            network: nn.Module = model
            if kind == "taylor":
                for weight in weights:
                    weight.requires_grad_(True)
            else:
                network = attach_lora(model, arch, rank=RANK, alpha=ALPHA, dropout=PASSES[kind])
            if recompute:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # some versions have another name for it
                    model.gradient_checkpointing_enable({"use_reentrant": False})
            network.train()  # without it, transformers recomputes nothing
            casting = nullcontext() if kind == "taylor" else disable_input_dtype_casting(network)
            loss = TokenLoss(network)
            with casting:  # also in the backward pass, which may run the layers again
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    total = loss(ids, ids) / (windows * (length - 1))
                total.backward()
            del total
        trained = [p for p in network.parameters() if p.grad is not None]
        before, passed = account.bytes, account.peak
        account.peak = before
        criterion = create_criterion("taylor" if kind == "taylor" else "lora", arch)
        with PeakMemory() as scoring:
            criterion.observe(network)
    return {
        "tensors": max(passed, account.peak),
        "resident": max(training.host_bytes, scoring.host_bytes) - loaded.host_bytes,
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "reduction": account.peak - before,
        "weights": sum(weight.nbytes for weight in weights),
    }


def measure_speed(shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Seconds of one importance step on one float32 matrix: ours, and the dense formula, in turns.

    ``dense`` takes three products for ``G = gB A + B gA - gB gA`` and W as given; ``dense, merged`` also forms
    ``W = W0 + s B A`` first, as ours does. Ratios are taken within a round.
    """
    out, into = shape
    generator = torch.Generator().manual_seed(0)

    def noise(rows: int, columns: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(rows, columns, generator=generator)

    weight, scaling = noise(out, into, 0.02), ALPHA / RANK
    a, b = noise(RANK, into, 0.1), noise(out, RANK, 0.01)
    grad_a, grad_b = noise(RANK, into, 1e-3), noise(out, RANK, 1e-3)

    def dense(base: torch.Tensor) -> torch.Tensor:
        estimate = grad_b @ a + b @ grad_a - grad_b @ grad_a
        return (estimate * base).square().sum(dim=1)

    def ours() -> torch.Tensor:
        rows = WeightRows.of(weight)
        return lora_group_sums(rows, a, b, grad_a, grad_b, scaling=scaling, over="rows")

    steps: dict[str, Callable[[], torch.Tensor]] = {
        "ours": ours,
        "dense": lambda: dense(weight),
        "dense, merged": lambda: dense(weight + scaling * (b @ a)),
    }
    merged = steps["dense, merged"]()
    error = float((ours() - merged).norm() / merged.norm())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    speedups = {
        name: [slow / fast for slow, fast in zip(seconds[name], seconds["ours"], strict=True)]
        for name in steps
        if name != "ours"
    }
    return {
        "shape": list(shape),
        "rank": RANK,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "relative_difference": error,
        "seconds": {name: _spread(values) for name, values in seconds.items()},
        "speedup": {name: _spread(values) for name, values in speedups.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {
        "median": statistics.median(values),
        "quartile_low": low,
        "quartile_high": high,
        "least": min(values),
    }


def in_fresh_process(request: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run one measurement in a process of its own; for memory, one that returns what it frees to the system.

    Timings keep the allocator as it is: giving small blocks back costs more than the work on them.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if request["measure"] == "memory":  # settings of glibc
        environment |= {
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
    command = [sys.executable, "-m", "compress.benchmarks.importance", "--worker", json.dumps(request)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if request["measure"] == "speed":
        return measure_speed((request["rows"], request["columns"]), request["rounds"])
    return dict(
        measure_pass(
            Path(request["model"]),
            request["kind"],
            request["windows"],
            request["length"],
            recompute=request["recompute"],
        )
    )


def benchmark(rows: Rows, path: Path, *, quick: bool, threads: int) -> None:
    """Take the measurements that ``rows`` lacks, one process after the other; memory on one thread."""
    for windows, length, recompute in QUICK_CASES if quick else CASES:
        for kind in PASSES:
            key = f"memory, {windows} x {length}{', recomputed' if recompute else ''}: {kind}"
            if not rows.has(key):
                request = {"measure": "memory", "model": str(path), "windows": windows, "length": length}
                found = in_fresh_process({**request, "recompute": recompute, "kind": kind}, 1)
                taylor = rows.get(key.rpartition(": ")[0] + ": taylor") if kind != "taylor" else found
                found["tensors_of_taylor"] = found["tensors"] / taylor["tensors"]
                found["resident_of_taylor"] = found["resident"] / taylor["resident"]
                found["reduction_of_weights"] = found["reduction"] / found["weights"]
                rows.put(key, found)
    request = {"measure": "speed", "rows": MATRIX[0], "columns": MATRIX[1], "rounds": 5 if quick else 15}
    for count in sorted({1, threads}):
        key = f"speed, {count} threads"
        if not rows.has(key):
            load = os.getloadavg()[0]  # other work on the machine hurts the many short steps of ours most
            rows.put(key, {**in_fresh_process(request, count), "load_before": load})


def report(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as lines of text, the goals under them."""
    lines = []
    for key, row in rows.items():
        if key.startswith("memory"):
            lines.append(
                f"{key}: {row['tensors'] / 1e6:.1f} MB of tensors ({row['tensors_of_taylor']:.1%} of Taylor's), "
                f"{row['resident'] / 1e6:.1f} MB resident ({row['resident_of_taylor']:.1%}); "
                f"reduction {row['reduction_of_weights']:.2%} of the weights"
            )
        else:
            lines += [
                f"{key}, against {name}: {ratio['median']:.1f}x "
                f"(quartiles {ratio['quartile_low']:.1f} to {ratio['quartile_high']:.1f})"
                for name, ratio in row["speedup"].items()
            ]
    goals = f"memory {GOALS['memory']:.0%}, reduction {GOALS['reduction']:.0%}, {GOALS['speedup']:.0f}x"
    return "\n".join([*lines, f"goals: {goals}"])


def main() -> int:
    """Command line; the figures are printed last, the goals under them."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.importance", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="the small batch only, fewer rounds")
    parser.add_argument(
        "--out", type=Path, help="JSON file of the figures; one that is there is gone on with"
    )
    parser.add_argument("--model", help="folder, hub id or GGUF file; the embedded model when not given")
    parser.add_argument("--threads", type=int, default=2, help="threads of the second speed test")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(_answer(json.loads(arguments.worker))))
        return 0
    path = resolve(arguments.model)
    identity = {
        "benchmark": "importance",
        "model": arguments.model or EMBEDDED,
        "dtype": str(preferred_dtype("cpu")).removeprefix("torch."),
        "rank": RANK,
        "kernels": status().level,
        "quick": arguments.quick,
        "goals": GOALS,
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(arguments.out or Path(folder) / "importance.json", identity)
        benchmark(rows, path, quick=arguments.quick, threads=arguments.threads)
    print(report(rows.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
