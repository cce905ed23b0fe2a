"""Quantizing matrices with more threads and more workers: seconds, and whether the bytes are the same.

``python -m compress.benchmarks.engines [--quick] [--rounds N] [--out FILE]``

Random matrices of the shapes of three decoder layers of a 1B model (``--quick``: of a small one), each with an error
table for the objective frobenius and one decomposition at rank 16. "divided": one matrix after the other, torch's
operations divided among the threads. "1 thread", "2 threads": one thread for each matrix, so many at once, as
``quantize`` does it. "ray, 1 worker", "ray, 2 workers" (where Ray is installed): clusters of one-thread workers on this
machine, without the time they take to start. Rounds are run in turns, and ratios taken within a round. Run it on an
idle machine: the load average stands in the file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compress.benchmarks.protocol import host, versions, write_json
from compress.engine import Engine, LocalEngine, largest_first
from compress.pipelines.allocate import Choice
from compress.pipelines.engine_ray import RayEngine
from compress.pipelines.error_tables import TableJob, table_of
from compress.pipelines.knowledge import MatrixKnowledge
from compress.pipelines.lq_writer import Decomposed, MatrixJob, decomposed
from compress.pipelines.matrices import Matrix
from compress.pipelines.settings import QuantizeSettings, resolve
from compress.pipelines.workspace import FORMAT_VERSION
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.error_table import ErrorTable

TAKES = ("minutes", "minutes")
NEEDS = ()

LAYERS, HIDDEN, CHANNELS, KEYS = 3, 2048, 5632, 256
QUICK = (1, 256, 704, 64)
RANK = 16
CONFIG = QuantConfig(bits=3, scale_bits=4, scale_dtype="float16", block_size=32, group_size=64)
DIVIDED = "divided"


def jobs_of(layers: int, hidden: int, channels: int, keys: int) -> list[MatrixJob]:
    """A decomposition of every matrix of so many layers, larger ones first."""
    settings = resolve(QuantizeSettings, {"objective": "frobenius"}, "quick")
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    shapes += [(channels, hidden), (channels, hidden), (hidden, channels)]
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, shape in enumerate(shapes * layers):
        matrix = Matrix(layer=number // 7, module=f"m{number}", tensor=f"m{number}.weight", shape=shape)
        found.append(
            MatrixJob(
                choice=Choice(matrix=matrix, config=CONFIG, rank=RANK, factor_config=FACTOR_8BIT, bits=0),
                weight=0.02 * torch.randn(shape, generator=generator),
                settings=settings,
                seed=number,
                known=MatrixKnowledge(),
                counted=True,
            )
        )
    return largest_first(found, lambda job: job.choice.matrix.numel)


def compute(engine: Engine | None, jobs: list[MatrixJob]) -> tuple[float, str]:
    """Seconds for all tables and decompositions, and a digest of what came out; None: divided operations."""
    tables: dict[str, ErrorTable] = {}
    parts: dict[str, Decomposed] = {}

    def keep_table(job: TableJob, table: ErrorTable) -> None:
        tables[job.matrix.module] = table

    def keep(job: MatrixJob, result: Decomposed) -> None:
        parts[job.choice.matrix.module] = result

    asked = [
        TableJob(
            matrix=job.choice.matrix,
            weight=job.weight,
            settings=job.settings,
            ranks=(0, RANK),
            seed=job.seed,
            known=job.known,
        )
        for job in jobs
    ]
    begun = time.perf_counter()
    if engine is None:
        for table_job in asked:
            keep_table(table_job, table_of(table_job))
        for job in jobs:
            keep(job, decomposed(job))
    else:
        engine.run(table_of, asked, keep_table)
        engine.run(decomposed, jobs, keep)
    seconds = time.perf_counter() - begun
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(tables[name].errors.tobytes())
        for key, tensor in sorted(parts[name].tensors.items()):
            digest.update(key.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return seconds, digest.hexdigest()[:16]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ray_workers(count: int) -> Iterator[Engine]:
    """A cluster of so many workers on this machine."""
    import ray

    ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        engine = RayEngine(count)
        engine.run(_begun, range(2 * count), lambda job, result: None)
        yield engine
    finally:
        ray.shutdown()


def _begun(job: int) -> int:
    return job


def ways(most: int) -> dict[str, Callable[[list[MatrixJob]], tuple[float, str]]]:
    """What is compared, by name."""

    def local(count: int, engine: Engine | None) -> Callable[[list[MatrixJob]], tuple[float, str]]:
        def run(jobs: list[MatrixJob]) -> tuple[float, str]:
            with threads(count):
                return compute(engine, jobs)

        return run

    def clustered(count: int) -> Callable[[list[MatrixJob]], tuple[float, str]]:
        def run(jobs: list[MatrixJob]) -> tuple[float, str]:
            with ray_workers(count) as engine:
                return compute(engine, jobs)

        return run

    found = {DIVIDED: local(most, None)}
    found |= {_named(count, "thread"): local(count, LocalEngine()) for count in sorted({1, most})}
    if importlib.util.find_spec("ray") is not None:
        found |= {f"ray, {_named(count, 'worker')}": clustered(count) for count in sorted({1, most})}
    return found


def _named(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def main() -> int:
    """Command line; one line a way."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.engines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small matrices, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the widest run")
    parser.add_argument("--out", type=Path, default=Path("engines.json"))
    arguments = parser.parse_args()
    jobs = jobs_of(*(QUICK if arguments.quick else (LAYERS, HIDDEN, CHANNELS, KEYS)))
    compared = ways(arguments.threads)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    digests: dict[str, set[str]] = {name: set() for name in compared}
    load = os.getloadavg()[0]
    for _ in range(arguments.rounds):
        for name, run in compared.items():
            took, digest = run(jobs)
            seconds[name].append(took)
            digests[name].add(digest)
    first = "1 thread"
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "benchmark": "engines",
        "quick": arguments.quick,
        "load_before": load,
        "matrices": len(jobs),
        "weights": sum(job.choice.matrix.numel for job in jobs),
        "rows": {
            name: {
                "seconds": seconds[name],
                "speedup": statistics.median(
                    a / b for a, b in zip(seconds[first], seconds[name], strict=True)
                ),
                "same_bytes": digests[name] == digests[first],
            }
            for name in compared
        },
        "versions": versions(),
        "host": host(),
    }
    write_json(arguments.out, result)
    for name, row in result["rows"].items():
        print(
            f"{name:16} {statistics.median(row['seconds']):8.1f} s, {row['speedup']:.2f}x of one thread, "
            f"{'same' if row['same_bytes'] else 'other'} bytes"
        )
    own = [name for name in compared if name != DIVIDED]
    return 0 if all(digests[name] == digests[first] and len(digests[name]) == 1 for name in own) else 1


if __name__ == "__main__":
    sys.exit(main())
