"""A peer without a library: eight-bit rounding of rows. It runs as real peers do, so it imports nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class Rounded(torch.nn.Module):
    def __init__(self, codes_OI: torch.Tensor, scales_O: torch.Tensor, factor: float) -> None:
        super().__init__()
        self.codes_OI, self.scales_O, self.factor = codes_OI, scales_O, factor

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self.factor * (x_TI @ weight(self).T)


def load(model: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    if "child" in settings:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(settings["child"]).write_text(str(child.pid))
    if settings.get("fails"):
        raise OSError("the disk of this peer is full")
    return load_file(model / "model.safetensors")


def quantize(
    loaded: dict[str, torch.Tensor], ids_NS: torch.Tensor | None, linears: list[str], settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    stored = {} if ids_NS is None else {"calibration": ids_NS}
    for name in linears:
        weight_OI = loaded[f"{name}.weight"].float()
        scales_O = weight_OI.abs().amax(dim=1) / 127
        stored[f"{name}.codes"] = (weight_OI / scales_O[:, None]).round().to(torch.int8)
        stored[f"{name}.scales"] = scales_O
    return stored


def save(quantized: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(quantized, folder / "model.safetensors")
    facts = {"environment": dict(os.environ), "path": sys.path, "threads": torch.get_num_threads()}
    (folder / "facts.json").write_text(json.dumps(facts | {"cwd": os.getcwd()}))


def reopen(folder: Path, model: Path, linears: list[str], settings: dict[str, Any]) -> dict[str, Rounded]:
    state = load_file(folder / "model.safetensors")
    factor = settings.get("factor", 1.0)
    return {name: Rounded(state[f"{name}.codes"], state[f"{name}.scales"], factor) for name in linears}


def weight(module: Rounded) -> torch.Tensor:
    return module.codes_OI * module.scales_O[:, None]


def dtype(module: Rounded) -> torch.dtype:
    return torch.float32
