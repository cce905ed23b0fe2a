"""The resume file of a training run: one safetensors file, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.durable import replacing
from compress.errors import CompressError

STATE_FILE = "fit-state.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FitState:
    """Everything a run needs to go on as if it had never stopped.

    Random numbers are no part of it: each step seeds its own generator, and the window order follows from
    seed and step.

    Attributes:
        step: Optimizer steps done.
        seconds: Time spent so far.
        losses: Loss of every step done, float64 [step].
        tensors: ``parameter.{name}``, ``exp_avg.{name}``, ``exp_avg_sq.{name}``, with GaLore ``projection.{name}``,
            and ``hook.{index}.{name}``.
        run: What the run is (configuration, data, parameter names): a resumed run must have the same.
        notes: Small values carried along, such as the validation loss before the first step.
    """

    step: int
    seconds: float
    losses: Tensor
    tensors: Mapping[str, Tensor]
    run: Mapping[str, Any]
    notes: Mapping[str, Any]


def save_state(state_dir: Path, state: FitState) -> None:
    """Replace the state in ``state_dir`` (made if absent); a crash leaves the old or the new one whole."""
    state_dir.mkdir(parents=True, exist_ok=True)
    header = {
        "format": "compress-fit-state",
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "seconds": state.seconds,
        "run": dict(state.run),
        "notes": dict(state.notes),
    }
    tensors = {name: t.detach().contiguous() for name, t in state.tensors.items()}
    with replacing(state_dir / STATE_FILE) as temporary:
        save_file(
            {"losses": state.losses, **tensors},
            str(temporary),
            metadata={"state": json.dumps(header, sort_keys=True)},
        )


def load_state(state_dir: Path, run: Mapping[str, Any]) -> FitState | None:
    """The state of an interrupted run, or None when there is none.

    Raises:
        CompressError: The file is damaged, of another format version, or belongs to a different run; the
            message names what differs.
    """
    path = state_dir / STATE_FILE
    if not path.is_file():
        return None
    remedy = f"Delete {STATE_FILE} in {state_dir} to train from the beginning."
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CompressError(f"The training state {path} is damaged ({error}).", remedy) from error
    if header.get("format") != "compress-fit-state" or header.get("format_version") != FORMAT_VERSION:
        raise CompressError(f"The training state {path} has a format this program does not read.", remedy)
    # Through JSON, so that tuples and lists compare equal.
    expected = json.loads(json.dumps(dict(run)))
    differing = sorted(k for k in {*expected, *header["run"]} if expected.get(k) != header["run"].get(k))
    if differing:
        raise CompressError(
            f"The training state {path} belongs to a run with another {', '.join(differing)}.", remedy
        )
    losses = tensors.pop("losses", torch.zeros(0, dtype=torch.float64))
    return FitState(
        step=int(header["step"]),
        seconds=float(header["seconds"]),
        losses=losses,
        tensors=tensors,
        run=header["run"],
        notes=header["notes"],
    )
