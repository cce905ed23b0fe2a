"""``compress plan --loram``: all published rows of LoRAM (arXiv 2502.13533), in both conventions; counted memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from compress.__main__ import app
from compress.adapters.attach import attach_lora
from compress.adapters.loss import TokenLoss
from compress.benchmarks.importance import LiveTensors
from compress.benchmarks.model_shapes import CONFIGS
from compress.errors import UsageError
from compress.evaluate.training_memory import (
    activation_bytes,
    adapter_parameters,
    frozen_activation_bytes,
    training_memory,
)
from compress.machine import capacity
from compress.model.checkpoint import checkpoint_architecture
from compress.model.planned import cut, headers_of
from compress.model.recompute import recomputing
from compress.pipelines import plan as plan_module
from compress.pipelines.dispatch import run_verb
from compress.pipelines.model_input import ModelInput
from compress.pipelines.prune_goal import channel_multiple, goal_of, parse_targets
from compress.pipelines.recipe import read_recipe
from compress.pipelines.settings import Common, PruneSettings, resolve
from compress.prune.loram_size import small_size
from tests.tiny import TINY, tiny_model
from tests.unit.prune.common import model_architecture

ROWS = [
    ("LLaMA-2-13B", 13_015_864_320, 0.65, 6_005_662_720, 2.17, None, None),
    ("LLaMA-2-70B", 68_976_648_192, 0.65, 28_099_436_544, 2.45, 9.82, None),
    ("LLaMA-2-70B", 68_976_648_192, 0.75, 21_488_738_304, 3.21, 12.84, None),
    ("LLaMA-2-70B", 68_976_648_192, 0.85, 16_272_924_672, 4.24, 16.95, 15.0),
    ("LLaMA-2-70B", 68_976_648_192, 0.95, 9_662_226_432, 7.14, 28.56, None),
    ("LLaMA-3.1-70B", 70_553_706_496, 0.85, 17_849_982_976, 3.95, 15.81, 11.4),
]


def folder_of(name: str, place: Path) -> Path:
    """A folder with nothing but a config."""
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    return place


def planned(model: Path, **given: Any) -> dict[str, Any]:
    return run_verb("plan", Common(), {"model": str(model), "no_time": True, **given}, quiet=True)


def test_every_published_row(tmp_path: Path) -> None:
    plans = {name: planned(folder_of(name, tmp_path / name), loram=True) for name in {row[0] for row in ROWS}}
    for name, full, ratio, pruned, reduction, quantized, fair in ROWS:
        plan = plans[name]
        assert plan["parameters"] == full
        (row,) = (r for r in plan["rows"] if r["ratio"] == ratio)
        assert row["parameters"] == pruned
        assert row["whole_layers"] == 6
        assert round(row["reduction"], 2) == reduction
        if quantized is not None:
            assert round(row["paper_reduction"], 2) == quantized
        if fair is not None:
            assert round(row["stored_reduction"], 1) == fair
        assert row["bytes"]["16bit"] == 2 * pruned


@pytest.mark.parametrize("recipe", ["loram", "qloram"])
def test_pruning_by_the_recipe_leaves_what_is_planned(recipe: str, tmp_path: Path) -> None:
    """The model that ``prune`` goes for, with the recipe's settings, tensor by tensor."""
    chosen = dict(read_recipe(recipe).steps)["prune"]
    for name, full, ratio, pruned, *_ in ROWS:
        checkpoint = headers_of(str(folder_of(name, tmp_path / name)))[0]
        model = ModelInput(
            name=name,
            path=tmp_path / name,
            id="0",
            checkpoint=checkpoint,
            architecture=checkpoint_architecture(checkpoint),
        )
        assert checkpoint.parameters == full
        settings = resolve(PruneSettings, {**chosen, "ratio": ratio}, "paper")
        multiple = channel_multiple(settings, model.architecture.channels)
        goal = goal_of(model, settings, parse_targets(settings.targets), multiple)
        small = replace(model.architecture, layer_shapes=goal.foreseen().shapes)
        assert cut(checkpoint, small).parameters == pruned


def test_what_fits_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    model = folder_of("LLaMA-2-13B", tmp_path / "model")
    rows = planned(model, loram=True, ratios="0.65", memory="24GiB")["rows"]
    verdicts = [row["fits"] for row in rows]
    assert verdicts == [{"16bit": False, "nf4": True}, {"16bit": True, "nf4": True}]
    for row in rows:
        for part in row["training"].values():
            pieces = {k: v for k, v in part.items() if k != "total"}
            assert part["total"] == pytest.approx(sum(pieces.values()))
    ran = CliRunner().invoke(
        app, ["plan", str(model), "--loram", "--ratios", "0.65", "--memory", "24GiB"], env={"COLUMNS": "80"}
    )
    assert ran.exit_code == 0, ran.output
    assert "6,005,662,720" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


def test_training_is_counted_in_its_dtype_and_asked_of_the_memory_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a device the host computes; with one, what others hold of it is not there."""
    model = folder_of("LLaMA-2-13B", tmp_path / "model")
    here = capacity(tmp_path, "cpu")
    host = replace(here, host_free=30 * 10**9, device_free=None, device_total=None)
    device = replace(here, host_free=10**12, device_free=30 * 10**9, device_total=80 * 10**9)
    for machine, dtype, label, size in ((device, "bfloat16", "16bit", 2), (host, "float32", "32bit", 4)):
        monkeypatch.setattr(plan_module, "capacity", lambda run, device, machine=machine: machine)
        given = {"model": str(model), "no_time": True, "loram": True, "ratios": "0.65"}
        rows = run_verb("plan", Common(device="cpu", dtype=dtype), given, quiet=True)["rows"]
        for row, parameters in zip(rows, (13_015_864_320, 6_005_662_720), strict=True):
            assert row["training"][label]["weights"] == size * parameters
            arch = checkpoint_architecture(headers_of(str(model))[0])
            small = small_size(arch, 13_015_864_320, row["ratio"])
            others = parameters - small.linears
            assert row["training"]["nf4"]["weights"] == pytest.approx(
                4.126953125 / 8 * small.linears + size * others, rel=1e-4
            )
            wanted = training_memory(
                small.arch,
                size * parameters,
                quantized=False,
                rank=8,
                batch=2,
                sequence=512,
                itemsize=size,
            )
            assert row["training"][label]["total"] == wanted.total
            assert row["fits"] == {k: row["training"][k]["total"] <= 30e9 for k in (label, "nf4")}
        assert {verdict for row in rows for verdict in row["fits"].values()} == {True, False}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loram": True, "ratios": "half"}, "is not understood"),
        ({"loram": True, "ratios": "1.0"}, r"not in \[0, 1\)"),
        ({"loram": True, "ratios": "0.99999"}, "leaves 0 KV heads and 0 channels"),
        ({"loram": True, "skip_first": 40}, "no layer can be pruned"),
        ({"memory": "3bit"}, "no memory size"),
        ({"train_rank": 0}, "too small"),
    ],
)
def test_what_cannot_be_planned(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        planned(folder_of("LLaMA-2-13B", tmp_path / "m"), **given)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "phi3", "gemma2"])
def test_counts_are_those_of_the_model(kind: str) -> None:
    """Nothing pruned is the model itself; what a ratio removes is what a model of that config has less."""
    model = tiny_model(kind)
    arch = model_architecture(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert small_size(arch, parameters, 0.0).parameters == parameters
    size = small_size(arch, parameters, 0.5, skip_first=0, skip_last=0)
    config = TINY[kind]()
    halves = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config.update({**halves, "head_dim": arch.head_dim})
    small = AutoModelForCausalLM.from_config(config)
    assert size.parameters == sum(p.numel() for p in small.parameters())
    attached = attach_lora(small, model_architecture(small), rank=3)
    trainable = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    assert adapter_parameters(size.arch, 3, head=False) == trainable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, dropout: float) -> None:
    """Storages saved for backward, counted as they are saved; of one more layer, and of the whole model."""
    kept = {layers: _saved(layers, dtype, dropout) for layers in (7, 8)}
    arch = model_architecture(_llama(8, torch.float32))
    tokens, itemsize = 2 * 64, dtype.itemsize
    layer = tokens * activation_bytes(arch.at(0), 4, dropout=dropout > 0, itemsize=itemsize)
    assert kept[8] - kept[7] == pytest.approx(layer, rel=0 if dtype == torch.float32 else 0.02)
    counted = training_memory(
        arch,
        0,
        quantized=False,
        rank=4,
        batch=2,
        sequence=64,
        head_adapter=False,
        dropout=dropout > 0,
        itemsize=itemsize,
    )
    assert counted.activations == pytest.approx(kept[8], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_frozen_model_are_what_autograd_keeps(dtype: torch.dtype) -> None:
    """One more layer, no weight trained: only the embedding's output asks for a gradient."""
    kept = [_saved_frozen(layers, dtype) for layers in (7, 8)]
    arch = model_architecture(_llama(8, torch.float32))
    layer = 2 * 64 * frozen_activation_bytes(arch.at(0), itemsize=dtype.itemsize)
    assert kept[1] - kept[0] == pytest.approx(layer, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_layers_that_run_again_hold_what_is_counted(dtype: torch.dtype, dropout: float) -> None:
    """Live tensors at the peak of both passes: one more layer adds its input, and nothing is held beyond the count."""
    peaks = {layers: _peak(layers, dtype, dropout) for layers in (7, 8)}
    tokens, itemsize = 2 * 64, dtype.itemsize
    assert peaks[8] - peaks[7] == pytest.approx(tokens * itemsize * 96, rel=0.1)
    counted = {
        recompute: training_memory(
            model_architecture(_llama(8, torch.float32)),
            0,
            quantized=False,
            rank=4,
            batch=2,
            sequence=64,
            head_adapter=False,
            dropout=dropout > 0,
            itemsize=itemsize,
            recompute=recompute,
        )
        for recompute in (False, True)
    }
    again = counted[True]
    assert again.activations < 0.25 * counted[False].activations
    # logits and a layer are counted together, and are there one after the other
    assert 0.7 < peaks[8] / (again.activations + again.workspace) < 1


def _peak(layers: int, dtype: torch.dtype, dropout: float) -> int:
    model = _llama(layers, dtype)
    adapted = attach_lora(model, model_architecture(model), rank=4, dropout=dropout).train()
    ids = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(0))
    loss, narrow = TokenLoss(adapted), dtype == torch.bfloat16
    loss.separable(ids[:1, :8])
    account = LiveTensors()
    account.ignore(adapted)
    with account, recomputing(adapted), disable_input_dtype_casting(adapted, active=narrow):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            total = loss(ids, ids)
        total.backward()
    return account.peak


def _saved_frozen(layers: int, dtype: torch.dtype) -> int:
    model = _llama(layers, dtype).requires_grad_(False).eval()
    handle = model.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_(True))
    loss = TokenLoss(model)
    ids = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(0))
    loss.separable(ids[:1, :8])
    found = _bytes_kept(model, lambda: loss(ids, ids))
    handle.remove()
    return found


def _llama(layers: int, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _saved(layers: int, dtype: torch.dtype, dropout: float) -> int:
    model = _llama(layers, dtype)
    adapted = attach_lora(model, model_architecture(model), rank=4, dropout=dropout).train()
    ids = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(0))
    loss, narrow = TokenLoss(adapted), dtype == torch.bfloat16
    loss.separable(ids[:1, :8])

    def run() -> torch.Tensor:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow),
            disable_input_dtype_casting(adapted, active=narrow),
        ):
            result: torch.Tensor = loss(ids, ids)
        return result

    return _bytes_kept(adapted, run)


def _bytes_kept(model: Any, run: Callable[[], torch.Tensor]) -> int:
    """Bytes of the storages that ``run`` keeps for its backward pass, the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # its memory must not be given to another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(seen.values())
