"""A chain with one thread and with two, compared: ``python -m tests.integration.threads_chain`` prints what differs.

The model has matrices that are large enough to be divided among threads. It takes minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from tests.faults.cases import text_file
from tests.faults.kill import contents
from tests.tiny import VOCAB, tiny_tokenizer

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


def run_chain(model: str, text: str, run: str, threads: int) -> None:
    """All stages in this process."""
    common = Common(run=Path(run), model=model, data=text, dtype="float32", threads=threads, effort="quick")
    for verb, given in CHAIN:
        run_verb(verb, common, given, quiet=True)


def write_model(folder: Path) -> Path:
    """Two layers, 256 wide."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def farthest(one: Path, two: Path) -> float:
    """Largest difference of a tensor, as a share of its largest value."""
    first, second = load_file(one), load_file(two)
    found = 0.0
    for name, tensor in first.items():
        if tensor.numel():
            wide, other = tensor.double(), second[name].double()
            found = max(found, float((wide - other).abs().max() / wide.abs().max().clamp(min=1e-30)))
    return found


def main() -> None:
    """Run both, each in a process of its own, and compare."""
    if len(sys.argv) == 5:
        run_chain(*sys.argv[1:4], int(sys.argv[4]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, text = write_model(folder / "model"), text_file(folder)
        for threads in (1, 2):
            command = [sys.executable, "-m", "tests.integration.threads_chain"]
            subprocess.run(
                [*command, str(model), str(text), str(folder / f"run-{threads}"), str(threads)], check=True
            )
        for stage in sorted(path.name for path in (folder / "run-1").iterdir() if path.is_dir()):
            one, two = folder / "run-1" / stage, folder / "run-2" / stage
            unlike = [file for file, data in contents(one).items() if contents(two).get(file) != data]
            print(f"{stage}: {len(unlike)} files differ")
            for file in unlike:
                if file.endswith(".safetensors"):
                    print(f"  {file}: by {farthest(one / file, two / file):.1e} of the largest value")


if __name__ == "__main__":
    main()
