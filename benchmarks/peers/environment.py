"""Quantization peers in environments of their own: hand over, run, count what they stored, and make it scorable.

Peers need other versions of libraries than ours, so each lives in its own virtual environment (``make peers``) and is
run as a subprocess. It gets the dense model and the calibration windows, writes its own checkpoint, and returns the
weights that this checkpoint stands for. Bits are counted here, for every peer in the same way, on the files that it
wrote; perplexity is measured by whoever calls, on the dense folder, with the protocol that everybody shares.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compress.benchmarks.peers.environment_storage import linear_shapes, stored_bytes, write_dense
from compress.errors import CompressError, UsageError
from compress.pipelines.workspace import read_json, write_json

__all__ = ["ENVIRONMENTS", "PeerResult", "peer_command", "peer_variables", "run_peer"]

ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".venv-peers"
"""Where ``make peers`` puts the environments, one folder a peer."""

TIMEOUT = 7200.0
"""Seconds after which a peer is given up."""

FORWARD_TOLERANCE = 0.01
"""Relative difference that a peer's own output may have from that of the weights it returned (bfloat16: 0.003)."""

_ENTRY = Path(__file__).with_name("environment_runner.py")
_LOG_LINES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerResult:
    """What a peer made of a model.

    Attributes:
        peer: Its name.
        settings: What it was asked for; calibration windows and their length with it.
        model: Dense folder in float32 with the weights that the peer's checkpoint stands for; all else is as it was.
        stored: The peer's own checkpoint.
        stored_bytes: Bytes of every tensor that belongs to a quantized linear, but its bias, by the tensors' ending
            ("qweight", "scales", ...), as they lie in ``stored``.
        weights: Weights of those linears.
        weight_error: Frobenius norm of the error of all those weights, relative to that of the weights.
        forward_difference: Largest relative difference of a peer's module from the weights it returned.
        seconds: Of its quantization alone: nothing imported, read, compiled or written.
        peak_bytes: Peak resident memory of its process until quantization ended; 0 where the system does not tell.
        versions: Of the peer, torch and transformers in its environment.
    """

    peer: str
    settings: dict[str, Any]
    model: Path
    stored: Path
    stored_bytes: dict[str, int]
    weights: int
    weight_error: float
    forward_difference: float
    seconds: float
    peak_bytes: int
    versions: dict[str, str]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, with all that `stored_bytes` counts."""
        return 8 * sum(self.stored_bytes.values()) / self.weights

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values, without the folders."""
        facts = {**asdict(self), "bits_per_weight": self.bits_per_weight}
        return {key: value for key, value in facts.items() if key not in ("model", "stored")}


def peer_command(environment: Path, request: Path) -> list[str]:
    """The command that carries ``request`` out in ``environment``.

    Raises:
        UsageError: There is no such environment.
    """
    python = environment / "bin" / "python"
    if not python.is_file():
        raise UsageError(
            f"There is no environment {str(environment)!r} for this peer.", "Make it: make peers."
        )
    # Not resolved: a virtual environment's interpreter is known by its own path.
    return [str(python.absolute()), "-P", str(_ENTRY), str(request.absolute())]


def run_peer(
    runner: Path,
    model: Path,
    ids_NS: torch.Tensor | None,
    out: Path,
    *,
    settings: Mapping[str, Any],
    distributions: Sequence[str],
    environment: Path,
    threads: int,
    variables: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> PeerResult:
    """Quantize the decoder linears of ``model`` with a peer, on the CPU.

    Args:
        runner: The peer's ``NAME_runner.py``; see `environment_runner`.
        model: Dense checkpoint.
        ids_NS: Calibration windows, int64 token ids [windows, length]; None for a method without.
        out: New folder for ``model`` and ``stored`` (see `PeerResult`) and ``log.txt``, all that the peer printed;
            also its working directory.
        settings: For the runner.
        distributions: Installed packages whose versions are recorded.
        environment: Folder of its virtual environment.
        threads: Threads of its tensor library.
        variables: More environment variables.
        timeout: Seconds until it is ended, with all it started.

    Raises:
        UsageError: There is no such environment, or ``out`` is not empty.
        CompressError: The model is no dense decoder; the peer failed, took too long, or does not compute with the
            weights it returned.
    """
    peer = runner.stem.removesuffix("_runner")
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"The folder {out} is not empty.", "Name a new folder.")
    shapes = linear_shapes(model)
    request = out / "request.json"
    command = peer_command(environment, request)
    out.mkdir(parents=True, exist_ok=True)
    paths = {"windows": out / "windows.safetensors", "weights": out / "weights.safetensors"}
    if ids_NS is not None:
        save_file({"ids": ids_NS.to(torch.int64).contiguous()}, paths["windows"])
    content = {
        "runner": runner.absolute(),
        "model": model.absolute(),
        "stored": (out / "stored").absolute(),
        "windows": paths["windows"].absolute() if ids_NS is not None else "",
        "weights": paths["weights"].absolute(),
        "answer": (out / "answer.json").absolute(),
    }
    write_json(
        request,
        {
            **{key: str(value) for key, value in content.items()},
            "linears": list(shapes),
            "settings": dict(settings),
            "distributions": list(distributions),
            "threads": threads,
        },
    )
    _run(peer, command, peer_variables(os.environ, threads, variables or {}), out / "log.txt", timeout)
    answer = read_json(out / "answer.json")
    difference = answer["forward_difference"]
    if not difference <= FORWARD_TOLERANCE:  # NaN is refused too
        raise CompressError(
            f"{peer} computes with other weights than it returned: relative difference {difference}.",
            "Use the versions of its requirements file.",
        )
    error = write_dense(model, paths["weights"], out / "model", list(shapes))
    for path in paths.values():
        path.unlink(missing_ok=True)
    windows, length = (0, 0) if ids_NS is None else ids_NS.shape
    return PeerResult(
        peer=peer,
        settings={**settings, "windows": windows, "length": length, "threads": threads},
        model=out / "model",
        stored=out / "stored",
        stored_bytes=stored_bytes(out / "stored", list(shapes)),
        weights=sum(rows * columns for rows, columns in shapes.values()),
        weight_error=error,
        forward_difference=difference,
        seconds=answer["seconds"],
        peak_bytes=answer["peak_bytes"],
        versions={**answer["versions"], "python": answer["python"]},
    )


def peer_variables(base: Mapping[str, str], threads: int, more: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a peer: ``base`` without what belongs to our interpreter, on the CPU, offline."""
    own = {
        key: value for key, value in base.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    return {
        **own,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def _run(peer: str, command: Sequence[str], variables: Mapping[str, str], log: Path, timeout: float) -> None:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=variables,
            cwd=log.parent,  # peers leave logs and caches where they are started
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise CompressError(
                f"{peer} did not finish in {timeout:.0f} seconds; it printed to {log}.",
                "Give it more time, fewer windows or fewer iterations.",
            ) from error
        finally:
            _end(process)
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise CompressError(
            f"{peer} failed (exit code {code}): {' / '.join(lines[-_LOG_LINES:])}", f"Read {log}."
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a peer: its process, and the compilers and workers of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
