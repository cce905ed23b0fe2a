"""A streamed model computes what a loaded one does, bit by bit, and holds one layer at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.adapters.attach import attach_lora, load_adapter, save_adapter
from compress.errors import CompressError
from compress.importance.base import create_criterion
from compress.importance.collect import collect
from compress.importance.input_norms import input_norms
from compress.importance.obs import ObsConfig, rank_groups
from compress.model.architecture import LayerShape, architecture_of
from compress.model.checkpoint import Checkpoint
from compress.model.layerwise import LayerWalk, gathered_grams
from compress.model.load import load_model
from compress.model.resident import resident, unit_of
from compress.model.states import Room
from compress.model.streamed import stream_model
from compress.pipelines.measure import summed_loss
from compress.prune.compensate import compensate, swapped
from compress.prune.mask import GroupMasks
from compress.prune.mean_bias import added_biases, mean_inputs
from compress.prune.select import select
from compress.quantize.sensitivity import output_sensitivities
from compress.structure import structure_map
from tests.tiny import TINY, VOCAB, tiny_checkpoint

KINDS = tuple(kind for kind in TINY if kind != "mixtral")


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def here(model: nn.Module) -> set[str]:
    """Names of the modules whose weights are there now."""
    return {
        name
        for name, module in model.named_modules()
        if (unit := unit_of(module)) is not None
        and not any(bool(p.isnan().any()) for p in module.parameters())
        and unit.slots
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            made[kind] = tiny_checkpoint(kind, path, dtype=torch.bfloat16)
        return made[kind]

    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "ahead"), [*((kind, True) for kind in KINDS), ("llama_tied", False)], ids=str
)
def test_logits_are_those_of_the_loaded_model(
    kind: str, ahead: bool, dtype: torch.dtype, folders: Callable[[str], Path]
) -> None:
    whole = load_model(folders(kind), dtype=dtype)
    streamed = stream_model(folders(kind), dtype=dtype, ahead=ahead)
    ids = tokens(0, 3, 24)
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
        assert torch.equal(streamed(ids, use_cache=False).logits, expected)
        assert torch.equal(streamed(ids, use_cache=False).logits, expected)  # every layer is read again
    with torch.inference_mode():
        assert torch.equal(streamed(ids, use_cache=False).logits, expected)
    assert {n: p.dtype for n, p in whole.named_parameters()}.items() <= {
        n: p.dtype for n, p in streamed.named_parameters(remove_duplicate=False)
    }.items()
    assert not here(streamed)


def test_one_layer_at_a_time_is_there(folders: Callable[[str], Path]) -> None:
    model = stream_model(folders("llama_tied"), dtype=torch.float32)
    seen: list[set[str]] = []
    for name in ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_: seen.append(here(model)))
    with torch.no_grad():
        model(tokens(0, 1, 8), use_cache=False)
    assert seen == [{f"model.layers.{index}"} for index in range(3)]
    with resident(model.get_submodule("model.layers.1")):
        assert here(model) == {"model.layers.1"}
        with resident(model.get_submodule("model.layers.1"), model.get_submodule("lm_head")):
            assert here(model) == {"model.layers.1", "lm_head"}
        assert here(model) == {"model.layers.1"}
    assert here(model) == set()


def test_weights_that_are_not_there_are_nan_and_of_their_shape(folders: Callable[[str], Path]) -> None:
    whole = load_model(folders("llama_gqa"), dtype=torch.float32)
    model = stream_model(folders("llama_gqa"), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.shape == whole.get_parameter(name).shape
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert bool(weight.isnan().all())
    assert weight.untyped_storage().nbytes() == 4


def test_a_layer_that_fails_is_let_go(folders: Callable[[str], Path]) -> None:
    model = stream_model(folders("llama_gqa"), dtype=torch.float32)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(tokens(0, 1, 8), use_cache=False)
    assert here(model) == set()
    handle.remove()
    with torch.no_grad():
        assert bool(model(tokens(0, 1, 8), use_cache=False).logits.isfinite().all())


def test_what_was_read_ahead_goes_with_the_model(folders: Callable[[str], Path]) -> None:
    model = stream_model(folders("llama_gqa"), dtype=torch.float32)
    unit = unit_of(model.get_submodule("model.layers.0"))
    assert unit is not None
    with torch.no_grad():
        model.model(
            tokens(0, 1, 8), use_cache=False
        )  # the output matrix was read ahead, and nobody asks for it
    feeder = weakref.ref(unit.feeder)
    gc.collect()
    gc.disable()
    try:
        del model, unit
        assert feeder() is None
    finally:
        gc.enable()


def test_a_lost_shard_is_an_error_of_the_one_who_asks(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama_tied", tmp_path / "model")
    model = stream_model(folder, dtype=torch.float32)
    (folder / "model.safetensors").write_bytes(b"short")
    with torch.no_grad(), pytest.raises(CompressError, match="shorter than when it was opened"):
        model(tokens(0, 1, 8), use_cache=False)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint("llama_gqa", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"lacks the tensor 'model\.norm\.weight'"):
        stream_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen3", "gemma2", "phi3"])
def test_gradients_at_outputs_are_those_of_the_loaded_model(
    kind: str, folders: Callable[[str], Path]
) -> None:
    found = []
    for model in (
        load_model(folders(kind), dtype=torch.float32),
        stream_model(folders(kind), dtype=torch.float32),
    ):
        arch = architecture_of(model.config.to_dict())
        found.append(output_sensitivities(model, arch, tokens(1, 4, 16).split(2), summed_loss(model)))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name
        assert bool(expected.isfinite().all())
        assert float(expected.sum()) > 0


@pytest.mark.parametrize("name", ["magnitude", "random", "wanda", "flap", "obs"])
def test_scores_are_those_of_the_loaded_model(name: str, folders: Callable[[str], Path]) -> None:
    found = []
    for model in (
        load_model(folders("llama_gqa"), dtype=torch.float32),
        stream_model(folders("llama_gqa"), dtype=torch.float32),
    ):
        arch = architecture_of(model.config.to_dict())
        criterion = create_criterion(name, arch)
        collect(criterion, model, arch, tokens(2, 8, 16), loss=summed_loss(model), batch=4)
        found.append(criterion.scores().to_tensors())
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())
    assert found[0].keys() == found[1].keys()


def test_walks_repairs_and_masks_are_those_of_the_loaded_model(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = folders("llama_gqa")
    arch = architecture_of(Checkpoint(path).config)
    ids = tokens(3, 12, 16)
    found: list[dict[str, Tensor]] = []
    for model in (
        load_model(path, dtype=torch.float32),
        stream_model(path, dtype=torch.float32, room=Room(bytes=0, folder=tmp_path)),
    ):
        scores = rank_groups(model, arch, ids, ObsConfig(), loss=summed_loss(model), batch=4)
        layers = select(arch, scores, [LayerShape(kv_heads=2, queries=2, channels=64)] * 2)
        structure = structure_map(arch, layers, base_fingerprint="")
        weights = compensate(model, arch, structure, ids, batch=4)
        with torch.no_grad(), swapped(model, arch, weights), GroupMasks(model, arch, layers):
            masked = model(ids[:2], use_cache=False).logits
        with torch.no_grad():
            again = model(ids[:2], use_cache=False).logits
        assert not torch.equal(masked, again)
        means = mean_inputs(model, arch, ids, batch=4)
        slope = torch.linspace(-1, 1, arch.hidden)
        with torch.no_grad(), added_biases(model, arch, dict.fromkeys(means, slope)):
            shifted = model(ids[:2], use_cache=False).logits
        norms = input_norms(model, arch, ids, batch=4)
        found.append(
            {
                **scores.to_tensors(),
                **weights,
                **{f"mean {name}": mean for name, mean in means.items()},
                **{f"norm {name}": norm for name, norm in norms.items()},
                "masked": masked,
                "shifted": shifted,
                "again": again,
            }
        )
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


def test_a_walk_reads_each_layer_once_and_spills_what_has_no_room(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders("llama_tied")
    arch = architecture_of(Checkpoint(path).config)
    ids = tokens(4, 8, 16)
    room = Room(bytes=3 * 2 * 16 * 32 * 4, folder=tmp_path)  # three of four batches
    reads: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    model = stream_model(path, dtype=torch.float32, room=room)
    whole = load_model(path, dtype=torch.float32)
    reads.clear()
    with torch.no_grad():
        walk, plain = LayerWalk(model, arch, ids, batch=2), LayerWalk(whole, arch, ids, batch=2)
        assert walk._hidden.spilled == 1
        assert plain._hidden.spilled == 0
        for layer in range(1, arch.layers):
            walk.advance(layer)
            plain.advance(layer)
    ups = [name for name in reads if name.endswith("up_proj.weight")]
    assert sorted(ups) == [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(arch.layers)]
    assert all(torch.equal(a, b) for a, b in zip(walk._hidden, plain._hidden, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_grams_of_a_walk(folders: Callable[[str], Path]) -> None:
    path = folders("qwen3")
    arch = architecture_of(Checkpoint(path).config)
    grams = []
    for model in (load_model(path, dtype=torch.float32), stream_model(path, dtype=torch.float32)):
        with torch.no_grad():
            walk = LayerWalk(model, arch, tokens(5, 4, 16), batch=2)
            for layer in range(arch.layers):
                with gathered_grams(walk.layers[layer], dict.fromkeys(arch.linears)) as found:
                    walk.look(layer)
                    walk.advance(layer)
                grams.append(found)
    half = len(grams) // 2
    for expected, found in zip(grams[:half], grams[half:], strict=True):
        for spec in arch.linears:
            assert torch.equal(found[spec], expected[spec])
            assert torch.equal(found[spec], found[spec].T)


def test_an_adapter_on_top(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = folders("llama_gqa")
    arch = architecture_of(Checkpoint(path).config)
    peft = attach_lora(load_model(path, dtype=torch.float32), arch, rank=4, alpha=8, dropout=0.0, seed=0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(peft, tmp_path / "adapter", base_name="base")
    ids = tokens(6, 2, 12)
    with torch.no_grad():
        expected, streamed = (
            load_adapter(open_(path, dtype=torch.float32), tmp_path / "adapter")(ids, use_cache=False).logits
            for open_ in (load_model, stream_model)
        )
        plain = load_model(path, dtype=torch.float32)(ids, use_cache=False).logits
    assert torch.equal(streamed, expected)
    assert not torch.equal(streamed, plain)
