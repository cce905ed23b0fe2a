"""``python -m tests.integration.threads_chain MODEL TEXT RUN THREADS``: a whole chain in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common

LOOP = {"micro_batch": 4, "accumulation": 1, "sequence": 128, "lr": 1e-3}
CHAIN: tuple[tuple[str, dict[str, object]], ...] = (
    (
        "prune",
        {"ratio": 0.4, "multiple": 32, "calibration_tokens": 2048, "repair_steps": 2, "trials": 2, **LOOP},
    ),
    ("quantize", {"budget": "4bit", "rank": "8", "calibration_tokens": 2048}),
    ("train", {"steps": 3, **LOOP}),
    ("recover", {"merge": True}),
)


def main() -> None:
    """Run it."""
    model, text, run, threads = sys.argv[1:]
    common = Common(
        run=Path(run), model=model, data=text, dtype="float32", threads=int(threads), effort="quick"
    )
    for verb, given in CHAIN:
        run_verb(verb, common, given, quiet=True)
        assert torch.get_num_threads() == int(threads)


if __name__ == "__main__":
    main()
