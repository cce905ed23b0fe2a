"""Proof that a written model opens: a fresh process loads it and must give the recorded logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.model.checkpoint import read_config
from compress.model.uneven import is_uneven
from compress.pipelines.way import WHOLE, Way

STOCK = "AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32, local_files_only=True).eval()"
OURS = "compress.load_model({base!r}, dtype=torch.float32)"
STREAMED = "stream_model({base!r}, dtype=torch.float32, ahead={ahead})"

RECORD = "logits.safetensors"
TOLERANCE = 1e-4

SCRIPT = """
import json, sys
import torch
{imports}
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
from safetensors.torch import load_file
model = {loader}
{adapter}
record = load_file({record!r})
with torch.inference_mode():
    logits = model(record["input_ids"], use_cache=False).logits[:, -1].float()
worst = (logits - record["logits"]).abs().max() / record["logits"].abs().max()
print(json.dumps({{"relative_error": float(worst)}}))
"""


def record_logits(model: PreTrainedModel, ids_BS: torch.Tensor, folder: Path) -> None:
    """Record the logits of the last position in fp32, with the tokens that made them.

    Args:
        model: In fp32, in eval mode.
        ids_BS: Token ids, int64 [batch, sequence].
        folder: Where ``logits.safetensors`` goes.
    """
    save_file(
        {"input_ids": ids_BS.contiguous(), "logits": logits_of(model, ids_BS).contiguous()}, folder / RECORD
    )


def logits_of(model: PreTrainedModel, ids_BS: torch.Tensor) -> torch.Tensor:
    """The logits of the last position, float32 [B, V], on the host."""
    with torch.inference_mode():
        logits_BV: torch.Tensor = model(ids_BS.to(model.device), use_cache=False).logits[:, -1]
    return logits_BV.float().cpu()


def logits_error(folder: Path, other: Path) -> float:
    """How far the recorded logits of ``folder`` are from those of ``other``, relative to the largest of these."""
    ours, theirs = (load_file(each / RECORD)["logits"] for each in (folder, other))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check_ids(vocab: int, seed: int) -> torch.Tensor:
    """Tokens for the check: two random sequences of 16, from an explicit seed."""
    return torch.randint(0, vocab, (2, 16), generator=torch.Generator().manual_seed(seed))


def check_reopens(
    folder: Path,
    *,
    base: Path | None = None,
    needs_compress: bool = False,
    tolerance: float = TOLERANCE,
    way: Way = WHOLE,
) -> float:
    """Load ``folder`` in a fresh Python process and compare with its recorded logits.

    Args:
        folder: A model, or an adapter when ``base`` is given.
        base: The model that the adapter is for.
        needs_compress: The model is an LQ checkpoint, which opens after ``import compress``; everything
            else must open with stock libraries alone, but for models whose layers differ in size: those open
            with `compress.load_model`.
        tolerance: Largest relative error that is taken.
        way: How to open it. Layer by layer it takes our own reader, in a process of its own, and every tensor's name
            and shape must be what stock libraries build from the config.

    Returns:
        Largest absolute difference over the largest absolute recorded logit.

    Raises:
        CompressError: It does not open, or gives other logits.
    """
    uneven = is_uneven(read_config(base or folder))
    imports, loader = "import compress" if needs_compress or uneven else "", OURS if uneven else STOCK
    if way.streamed:
        imports, loader = "import compress\nfrom compress.model.streamed import stream_model", STREAMED
    script = SCRIPT.format(
        imports=imports,
        loader=loader.format(base=str(base or folder), ahead=way.ahead),
        adapter=(
            f"from peft import PeftModel\nmodel = PeftModel.from_pretrained(model, {str(folder)!r}).eval()"
            if base is not None
            else ""
        ),
        record=str(folder / RECORD),
    )
    done = run_fresh(script)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].rstrip(".")
        raise CompressError(
            f"The written artifact does not open in a fresh process ({last}).",
            "Please report this with the command you ran.",
        )
    error = float(json.loads(done.stdout.strip().splitlines()[-1])["relative_error"])
    if not error <= tolerance:
        raise CompressError(
            f"The written artifact gives other logits in a fresh process (relative error {error:.1e}).",
            "Please report this with the command you ran.",
        )
    return error


def run_fresh(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new Python process, in which no file of the current folder can pose as a library.

    Ctrl-C reaches this process alone, which ends the other one if it stops.
    """
    own_group: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
    return subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        **own_group,
    )
