"""Fresh processes: LQ checkpoints open with our import in any place, and fail clearly without it.

Where transformers is imported first, a fork of a process that has imported it (and nothing of ours) is as fresh.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fresh import ForkServer
from tests.unit.quantize.conftest import Pair, load

PROGRAM = """
{imports}
import torch
model = AutoModelForCausalLM.from_pretrained({path!r}, dtype=torch.float32)
ids = torch.arange(4, 20)[None]
print(type(model.model.layers[1].mlp.up_proj).__name__, model(ids).logits.double().sum().item())
"""


FIRST = "from transformers import AutoModelForCausalLM"


def program(imports: str, path: Path) -> str:
    return PROGRAM.format(imports=imports, path=str(path))


@pytest.mark.parametrize("first", ["compress", "transformers"])
def test_fresh_processes_load_whatever_is_imported_first(
    pair: Pair, first: str, tmp_path: Path, fork_server: ForkServer
) -> None:
    if first == "compress":
        text = program(f"import compress\n{FIRST}", pair.quantized)
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    else:
        done = fork_server.run(program(f"{FIRST}\nimport compress", pair.quantized))
    assert done.returncode == 0, done.stderr
    name, value = done.stdout.split()
    assert name == "LQLinear"
    with torch.no_grad():
        expected = load(pair.quantized)(torch.arange(4, 20)[None]).logits.double().sum().item()
    assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_without_our_import_loading_fails_instead_of_giving_random_weights(
    pair: Pair, fork_server: ForkServer
) -> None:
    done = fork_server.run(program(FIRST, pair.quantized))
    assert done.returncode != 0
    assert "Unknown quantization type, got lq" in done.stderr
    assert "mismatch" in done.stderr
    assert done.stdout == ""
