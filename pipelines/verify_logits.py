"""What a model computes, against the logits that its stage recorded: it is opened again as whoever uses it would."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors.torch import load_file

from compress.machine import capacity
from compress.model.checkpoint import Checkpoint
from compress.pipelines.reopen import RECORD, TOLERANCE, logits_of
from compress.pipelines.verify_model import weights_of
from compress.pipelines.verify_target import Finding, Target, Value
from compress.pipelines.way import WHOLE, Way
from compress.pipelines.workspace import MODEL_VERBS


def check_logits(target: Target) -> Iterator[Finding]:
    """The largest error of the logits, relative to the largest of them, within what a stage allows when it is made.

    The recorded error and the one found are rounding of float32, so they are compared within the same bar.
    """
    path = target.path / RECORD
    if not path.is_file():
        if target.stage is not None and target.stage.verb in MODEL_VERBS:
            yield target.not_recorded("logits", f"there is no {RECORD}")
        return
    record = load_file(path)
    network = _way(target).open(target.path, dtype=torch.float32)
    logits_BV = logits_of(network, record["input_ids"])
    error = float((logits_BV - record["logits"]).abs().max() / record["logits"].abs().max())
    if not error <= TOLERANCE:
        yield target.differs(
            "logits", f"they are {error:.1e} from the recorded ones, more than {TOLERANCE:.0e}"
        )
        return
    value = Value(
        what="reopened_relative_error",
        recorded=target.metrics.get("reopened_relative_error", error),
        found=error,
        tolerance=TOLERANCE,
        floor=TOLERANCE,
    )
    yield from target.compare("logits", [value], f"as recorded, largest relative error {error:.0e}")


def _way(target: Target) -> Way:
    """Whole where the host has room for all weights in float32, else layer by layer."""
    bytes_ = torch.float32.itemsize * weights_of(Checkpoint(target.path))
    return WHOLE if bytes_ < capacity(target.path, "cpu").host_free else Way(streamed=True)
