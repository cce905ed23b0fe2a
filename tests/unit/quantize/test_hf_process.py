"""Fresh processes: LQ checkpoints open with our import in any place, and fail clearly without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.quantize.conftest import Pair, load

PROGRAM = """
{imports}
import torch
model = AutoModelForCausalLM.from_pretrained({path!r}, dtype=torch.float32)
ids = torch.arange(4, 20)[None]
print(type(model.model.layers[1].mlp.up_proj).__name__, model(ids).logits.double().sum().item())
"""


def run(imports: str, path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(imports=imports, path=str(path))
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "imports",
    [
        "import compress\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport compress",
    ],
)
def test_fresh_processes_load_whatever_is_imported_first(pair: Pair, imports: str, tmp_path: Path) -> None:
    done = run(imports, pair.quantized, tmp_path)
    assert done.returncode == 0, done.stderr
    name, value = done.stdout.split()
    assert name == "LQLinear"
    with torch.no_grad():
        expected = load(pair.quantized)(torch.arange(4, 20)[None]).logits.double().sum().item()
    assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_without_our_import_loading_fails_instead_of_giving_random_weights(
    pair: Pair, tmp_path: Path
) -> None:
    done = run("from transformers import AutoModelForCausalLM", pair.quantized, tmp_path)
    assert done.returncode != 0
    assert "Unknown quantization type, got lq" in done.stderr
    assert "mismatch" in done.stderr
    assert done.stdout == ""
