"""Adapters that started from a part of their base, without the factors they started from, or with others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.adapters.adapter_file import CONFIG_FILE, INITIAL_FILE, PREFIX, WEIGHTS_FILE, AdapterFile
from compress.adapters.attach import attach_factors, attach_pissa, load_adapter, save_adapter
from compress.adapters.recover import recover_adapter
from compress.errors import CompressError
from compress.model.architecture import architecture_of
from compress.model.load import load_model
from tests.tiny import tiny_model
from tests.unit.adapters.common import (
    Pair,
    add_initial_factors,
    make_pair,
    randomise,
    save_random_adapter,
)
from tests.unit.adapters.test_attach_factors import logits, quantised, tiny_lq

Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{{}}.weight"


def lq_adapter(pair: Pair, folder: Path) -> Path:
    """A trained adapter that started from the factors of a quantized small model."""
    small = load_model(pair.small, dtype=torch.float32)
    arch = architecture_of(small.config.to_dict())
    adapted, initial = attach_factors(quantised(small, arch), arch, rank=4)
    randomise(adapted)
    return save_adapter(adapted, folder, base_name="lq", initial=initial)


def files_of_peft(adapter: Path, folder: Path) -> Path:
    """What somebody who knows PEFT takes along."""
    folder.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(adapter / name, folder / name)
    return folder


def recover(pair: Pair, adapter: Path, out: Path) -> None:
    recover_adapter(adapter, pair.structure, pair.arch, pair.full, out, full_name="org/full")


def test_the_two_files_of_peft_are_not_enough(tmp_path: Path) -> None:
    """Without the start the base's low-rank part would count twice, in the full model and in the small one."""
    pair = make_pair("llama_gqa", tmp_path)
    whole = lq_adapter(pair, tmp_path / "adapter")
    alone = files_of_peft(whole, tmp_path / "alone")
    with pytest.raises(CompressError, match=r"in 8 modules, and no initial factors were kept for 8 of them"):
        recover(pair, alone, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CompressError, match=r"Copy initial_factors\.safetensors too"):
        load_adapter(tiny_lq()[0], alone)
    with pytest.raises(CompressError, match="no initial factors"):
        AdapterFile(alone)
    shutil.copyfile(whole / INITIAL_FILE, alone / INITIAL_FILE)
    recover(pair, alone, tmp_path / "out")
    with AdapterFile(tmp_path / "out") as recovered:  # no longer of a part of a base
        assert not recovered.has_initial_factors


@pytest.mark.filterwarnings("error", "ignore:.is_gradient_checkpointing. is deprecated")
def test_peft_opens_a_marked_adapter_and_keeps_the_mark(tmp_path: Path) -> None:
    model, arch = tiny_lq()
    adapted, initial = attach_factors(model, arch, rank=4)
    save_adapter(adapted, tmp_path / "adapter", base_name="lq", initial=initial)
    assert LoraConfig.from_pretrained(str(tmp_path / "adapter")).auto_mapping == {"initial_factors": 8}
    PeftModel.from_pretrained(tiny_lq()[0], str(tmp_path / "adapter")).save_pretrained(
        str(tmp_path / "again"), save_embedding_layers=False
    )
    with pytest.raises(CompressError, match="kept for 8 of them"):
        AdapterFile(tmp_path / "again")
    shutil.copyfile(tmp_path / "adapter" / INITIAL_FILE, tmp_path / "again" / INITIAL_FILE)
    assert torch.equal(logits(load_adapter(tiny_lq()[0], tmp_path / "again")), logits(adapted))


@pytest.mark.parametrize("method", ["lq", "pissa"])
def test_a_start_that_lacks_a_module(method: str, tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    if method == "lq":
        adapter = lq_adapter(pair, tmp_path / "adapter")
    else:
        small = load_model(pair.small, dtype=torch.float32)
        adapted, initial = attach_pissa(small, architecture_of(small.config.to_dict()), rank=3)
        adapter = save_adapter(adapted, tmp_path / "adapter", base_name="small", initial=initial)
    kept = load_file(adapter / INITIAL_FILE)
    save_file({n: t for n, t in kept.items() if "layers.0.self_attn.q_proj" not in n}, adapter / INITIAL_FILE)
    with pytest.raises(CompressError, match="kept for 1 of them"):
        recover(pair, adapter, tmp_path / "out")
    with pytest.raises(CompressError, match="kept for 1 of them"):
        load_adapter(tiny_model("llama_gqa"), adapter)


def test_pissa_of_peft_whose_start_lacks_a_module(tmp_path: Path) -> None:
    """PEFT's own PiSSA has no mark; its start is known from the config."""
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter")
    add_initial_factors(adapter, only="self_attn")
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(CompressError, match=r"those of model\.layers\.0\.mlp\.down_proj were not kept"):
        recover(pair, adapter, tmp_path / "out")


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def other(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(Q_PROJ.format("B")), r"it has no .*q_proj\.lora_B\.weight"),
        (without(Q_PROJ.format("A")), r"it has no .*q_proj\.lora_A\.weight"),
        (other(Q_PROJ.format("A"), (4, 31)), r"q_proj are \[\d+, 4\] x \[4, 31\], the trained ones"),
        (other(Q_PROJ.format("B"), (31, 4)), r"q_proj are \[31, 4\] x \[4, \d+\], the trained ones"),
        (other(Q_PROJ.format("A"), (5, 32)), r"q_proj are .*, which differ in rank"),
        (other(Q_PROJ.format("A"), (4,)), r"q_proj are .*, which differ in rank"),
        (
            other(Q_PROJ.format("A").replace("layers.0", "layers.9"), (4, 32)),
            r"it has no .*layers\.9\..*q_proj\.lora_B\.weight",
        ),
        (other("something", (1,)), "something is no factor of a linear"),
    ],
)
def test_a_start_of_another_adapter(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter")
    add_initial_factors(adapter)
    kept = load_file(adapter / INITIAL_FILE)
    change(kept)
    save_file(kept, adapter / INITIAL_FILE)
    with pytest.raises(CompressError, match=f"does not belong to the adapter beside it: .*{message}"):
        recover(pair, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_start_of_a_module_that_is_not_adapted(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", target_modules=["q_proj"])
    initial = load_file(adapter / WEIGHTS_FILE)
    save_file({n.replace("q_proj", "o_proj"): t for n, t in initial.items()}, adapter / INITIAL_FILE)
    with pytest.raises(
        CompressError, match=r"the adapter has no factors of model\.layers\.0\.self_attn\.o_proj"
    ):
        recover(pair, adapter, tmp_path / "out")
