"""Merged tensors: bit by bit the plain formula on the host, the same values from batches on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.adapters import merge as merge_module
from compress.adapters.adapter_file import PREFIX, AdapterFile, write_adapter
from compress.adapters.batched import Spec, device_bytes, windows_of
from compress.adapters.factors import SLAB, add_rounded, factor_product
from compress.adapters.lanes import Lanes, device_lanes
from compress.adapters.merge import adapter_changes, merge_adapter
from compress.adapters.merged import Request, merged_tensors, product_job
from compress.adapters.stacked import AddProduct
from compress.errors import CompressError
from compress.export.dense import write_dense
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.prune.weight_masks import FILE_NAME as MASKS
from compress.prune.weight_masks import WeightMasks, pack_bits
from tests.tiny import tiny_checkpoint
from tests.unit.adapters.common import add_initial_factors, save_random_adapter
from tests.unit.adapters.simulated import SimulatedLanes, every_lanes

LANES = every_lanes()
FEW = {name: make for name, make in LANES.items() if name in ("late", "seed 0", "cuda")}
SHAPES = ((24, 40), (24, 40), (40, 24), (24, 40), (64, 40), (40, 24))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain(weight: Tensor, change: Tensor, stored: torch.dtype) -> Tensor:
    """What merging is: summed in float32, rounded once."""
    return (weight.float() + change).to(stored)


def scaled(factor_a: Tensor, factor_b: Tensor, scaling: float) -> Tensor:
    return torch.mul(factor_b.float() @ factor_a.float(), scaling)


class Scene:
    """Weights of several shapes, an adapter file with factors for each, and the requests to merge them."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        factors: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        masked: bool = False,
        started: bool = False,
        transposed: bool = False,
        into: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(11)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.weights = [normal(*shape).to(dtype) for shape in SHAPES]
        self.masks = [normal(*shape) > 0 for shape in SHAPES]
        tensors, initial = {}, {}
        for index, (rows, columns) in enumerate(SHAPES):
            out, inside = (columns, rows) if transposed else (rows, columns)
            rank = 3 if index == 5 else 4
            for kept in (tensors, initial):
                kept[f"{PREFIX}m.{index}.lora_A.weight"] = normal(rank, inside).to(factors)
                kept[f"{PREFIX}m.{index}.lora_B.weight"] = normal(out, rank).to(factors)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": {"5": 3}}
        write_adapter(folder, config, tensors, initial if started else None)
        self.file = AdapterFile(folder)
        self.stored = dtype if stored is None else stored
        self.masked, self.transposed = masked, transposed
        self.requests = [
            Request(
                change=f"{PREFIX}m.{index}.lora_B.weight",
                shape=shape,
                dtype=dtype,
                read=self.weights[index].clone,
                read_into=self.into(index) if into else None,
                transposed=transposed,
                mask=self.mask(index) if masked and index % 2 == 0 else None,
                stored=stored,
            )
            for index, shape in enumerate(SHAPES)
        ]

    def into(self, index: int) -> Callable[[Tensor], None]:
        return lambda target: target.copy_(self.weights[index])

    def mask(self, index: int) -> Callable[[], Tensor]:
        return lambda: self.masks[index].T if self.transposed else self.masks[index]

    def change(self, index: int) -> Tensor:
        """The float32 summand as the formula gives it, in the orientation of the weight."""
        scaling = self.file.scaling(f"m.{index}").value
        change = scaled(*self.file.factors(f"m.{index}"), scaling)
        start = self.file.initial_factors(f"m.{index}")
        if start is not None:
            change = change - scaled(*start, scaling)
        mask = self.requests[index].mask
        if mask is not None:
            change = change * mask()
        return change.T if self.transposed else change

    def exact(self, index: int) -> tuple[Tensor, Tensor]:
        """In float64: the result, and the size of what is summed."""
        scaling = self.file.scaling(f"m.{index}").value
        pairs = [(1.0, self.file.factors(f"m.{index}"))]
        start = self.file.initial_factors(f"m.{index}")
        if start is not None:
            pairs.append((-1.0, start))
        total = torch.zeros(SHAPES[index][::-1] if self.transposed else SHAPES[index], dtype=torch.float64)
        size = total.clone()
        for sign, (a, b) in pairs:
            total += sign * scaling * (b.double() @ a.double())
            size += scaling * (b.double().abs() @ a.double().abs())
        mask = self.requests[index].mask
        if mask is not None:
            total, size = total * mask(), size * mask()
        total, size = (total.T, size.T) if self.transposed else (total, size)
        weight = self.weights[index].double()
        return weight + total, weight.abs() + size


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "straight into the buffer": {"into": True},
    "masked": {"masked": True},
    "from a start": {"started": True},
    "from a start, masked": {"started": True, "masked": True},
    "transposed": {"transposed": True},
    "transposed, masked": {"transposed": True, "masked": True},
    "factors in bfloat16": {"factors": torch.bfloat16},
    "multiplied out": {"dtype": torch.float32, "stored": torch.bfloat16},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_host_it_is_the_plain_formula_bit_by_bit(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    scene = Scene(tmp_path, **({"dtype": dtype} | KINDS[kind]))
    for index, result in enumerate(merged_tensors(scene.requests, scene.file)):
        assert result.dtype == scene.stored
        assert torch.equal(result, plain(scene.weights[index], scene.change(index), scene.stored))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, dtype) for kind in KINDS for dtype in (torch.float32, torch.bfloat16)),
        ("plain", torch.float16),
        ("plain", torch.float64),
        ("masked", torch.float64),
    ],
)
@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_batches_give_the_same_values(
    make: Callable[[], Lanes], kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    scene = Scene(tmp_path, **({"dtype": dtype} | KINDS[kind]))
    for limit in (0, 1 << 14, 1 << 20):
        found = [one.clone() for one in merged_tensors(scene.requests, scene.file, make(), limit=limit)]
        assert len(found) == len(SHAPES)
        for index, result in enumerate(found):
            exact, size = scene.exact(index)
            assert result.dtype == scene.stored
            step = torch.finfo(scene.stored).eps if scene.stored.itemsize < 4 else 0.0
            room = 16 * torch.finfo(torch.float32).eps * size + step * exact.abs()
            assert ((result.double() - exact).abs() <= room).all(), index


def test_equal_shapes_are_computed_by_one_call(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    jobs = [product_job(request, scene.file) for request in scene.requests]
    (window,) = windows_of([job for job in jobs if job is not None], 1 << 20)
    assert [batch.jobs for batch in window.batches] == [
        (0, 1, 3),
        (2,),
        (4,),
        (5,),
    ]  # the last has another rank
    lanes = SimulatedLanes()
    list(merged_tensors(scene.requests, scene.file, lanes))
    assert lanes.events.count(("queued", "compute")) == 4


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2 * SLAB + 3,), (5, SLAB), (SLAB + 7, 3), (0, 4), ()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_by_slabs_are_the_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, delta = torch.randn(2, *shape, generator=generator)
    expected = (weight.to(dtype).float() + delta).to(dtype)
    given = weight.to(dtype).clone()
    result = add_rounded(given, delta)
    assert torch.equal(result, expected)
    assert result.data_ptr() == given.data_ptr()


def test_a_product_is_scaled_where_it_lies() -> None:
    a, b = torch.randn(3, 50), torch.randn(40, 3)
    assert torch.equal(factor_product(a, b, 0.3), torch.mul(b @ a, 0.3))
    assert torch.equal(
        factor_product(a.bfloat16(), b.bfloat16(), 0.3),
        torch.mul(b.bfloat16().float() @ a.bfloat16().float(), 0.3),
    )


def reference_merge(full: Checkpoint, adapter: Path) -> dict[str, Tensor]:
    """Every tensor of the merged model, one after the other by the formula."""
    arch = checkpoint_architecture(full)
    found = {}
    with AdapterFile(adapter) as file:
        changes = adapter_changes(full.names, arch, file)
        for name in (*full.names, *(n for n in changes if n not in full.names)):
            weight = full.read(name if name in full.names else arch.embedding)
            if name in changes:
                module = name.rpartition(".")[0]
                scaling = file.scaling(module).value
                if changes[name].endswith("lora_B.bias"):
                    change = file.read(changes[name]).float() * scaling
                elif changes[name].endswith("lora_embedding_B"):
                    sides = [file.read(f"{PREFIX}{module}.lora_embedding_{side}") for side in "AB"]
                    change = scaled(sides[0], sides[1], scaling).T
                elif "lora" in changes[name]:
                    change = scaled(*file.factors(module), scaling)
                    change = change.T if file.transposed and module != "lm_head" else change
                else:
                    found[name] = file.read(changes[name]).to(weight.dtype)
                    continue
                weight = plain(weight, change, weight.dtype)
            found[name] = weight
    return found


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": (
        "llama_gqa",
        {"target_modules": ["embed_tokens", "lm_head", "v_proj", "k_proj", "up_proj"]},
    ),
    "tied": ("llama_tied", {"target_modules": ["lm_head", "q_proj", "o_proj"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "Conv1D": ("gpt2", {"fan_in_fan_out": True}),
}


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.filterwarnings("ignore:.*have invalid shape.*", "ignore:Model has .tie_word_embeddings=True.*")
def test_a_merged_model_is_the_plain_formula_and_batched_the_same(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = MODELS[which]
    full = Checkpoint(tiny_checkpoint(kind, tmp_path / "full", dtype=torch.bfloat16))
    adapter = save_random_adapter(full.path, tmp_path / "adapter", dtype=torch.bfloat16, **options)
    merge_adapter(full, adapter, tmp_path / "host")
    expected = reference_merge(full, adapter)
    ours = Checkpoint(tmp_path / "host")
    assert set(ours.names) == set(expected)
    assert any(not torch.equal(t, full.read(n)) for n, t in expected.items() if n in full.names)
    for name, tensor in expected.items():
        assert torch.equal(ours.read(name), tensor), name
    for number, make in enumerate(LANES.values()):
        monkeypatch.setattr(merge_module, "device_lanes", lambda device, make=make: make())
        done: list[str] = []
        out = tmp_path / f"batched {number}"
        merge_adapter(full, adapter, out, progress=lambda step, total, name: done.append(name))  # noqa: B023
        batched = Checkpoint(out)
        assert batched.names == ours.names  # in the same order, in the same files
        assert len(done) == len(ours.names)
        assert batched.config == ours.config
        for name, tensor in expected.items():
            torch.testing.assert_close(batched.read(name), tensor, rtol=2**-7, atol=1e-6)
        same = [torch.equal(batched.read(name), tensor) for name, tensor in expected.items()]
        assert sum(same) > len(same) / 2


@pytest.mark.parametrize("started", [False, True])
def test_the_dense_form_of_a_thinned_model_is_the_plain_formula(
    started: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.export import dense as dense_module

    base = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "base", dtype=torch.bfloat16))
    adapter = save_random_adapter(base.path, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    if started:
        add_initial_factors(adapter)
    arch = checkpoint_architecture(base)
    module = arch.module_name(0, arch.linears[0])
    mask = torch.randn(base.shape(f"{module}.weight"), generator=torch.Generator().manual_seed(2)) > 0
    WeightMasks(
        pattern="unstructured", packed={module: pack_bits(mask)}, columns={module: mask.shape[1]}
    ).save(base.path / MASKS)
    write_dense(base, tmp_path / "host", adapter=adapter)
    ours = Checkpoint(tmp_path / "host")
    with AdapterFile(adapter) as file:
        for changed in file.modules:
            scaling = file.scaling(changed).value
            change = scaled(*file.factors(changed), scaling)
            start = file.initial_factors(changed)
            change = change if start is None else change - scaled(*start, scaling)
            change = change * mask if changed == module else change
            weight = base.read(f"{changed}.weight")
            assert torch.equal(ours.read(f"{changed}.weight"), plain(weight, change, weight.dtype)), changed
    monkeypatch.setattr(dense_module, "device_lanes", lambda device: SimulatedLanes(3))
    write_dense(base, tmp_path / "batched", adapter=adapter)
    batched, found = (load_file(tmp_path / n / "model.safetensors") for n in ("batched", "host"))
    assert list(batched) == list(found)
    for name, tensor in found.items():
        torch.testing.assert_close(batched[name], tensor, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: None, SimulatedLanes], ids=["host", "lanes"])
def test_factors_of_another_shape_are_refused(make: Callable[[], Lanes | None], tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    request = Request(
        change=scene.requests[0].change, shape=(40, 24), dtype=torch.float32, read=lambda: torch.zeros(40, 24)
    )
    with pytest.raises(CompressError, match=r"m\.0 is made for \(24, 40\), not for \(40, 24\)"):
        list(merged_tensors([request], scene.file, make()))


def test_a_device_without_room_for_one_matrix_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "full"))
    adapter = save_random_adapter(full.path, tmp_path / "adapter")
    monkeypatch.setattr(merge_module, "device_lanes", lambda device: SimulatedLanes(free=10_000))
    with pytest.raises(CompressError, match="largest adapted matrix needs"):
        merge_adapter(full, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_work_counts_float32_sums_and_factors() -> None:
    shapes = {"weight": (8, 16), "left": (8, 2), "right": (2, 16)}
    specs = {name: Spec(shape, torch.bfloat16) for name, shape in shapes.items()}
    operation = AddProduct(scaling=1.0, stored=torch.bfloat16, in_place=True)
    assert operation.workspace(tuple(specs.values())) == 4 * (8 * 16 + 8 * 2 + 2 * 16)
    wide = tuple(Spec(shape, torch.float32) for shape in shapes.values())
    assert AddProduct(scaling=1.0, stored=torch.float32, in_place=True).workspace(wide) == 0
    assert operation.workspace((*wide, Spec((8, 16), torch.bool))) == 4 * 8 * 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_results_do_not_change_and_memory_is_what_was_counted(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    jobs = [job for request in scene.requests if (job := product_job(request, scene.file)) is not None]

    def run() -> list[torch.Tensor]:
        found = merged_tensors(scene.requests, scene.file, device_lanes("cuda:0"), limit=1 << 13)
        return [one.clone() for one in found]

    runs = [run()]  # from now on cuBLAS has its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    runs += [run(), run()]
    peak = torch.cuda.max_memory_allocated(0) - before
    rounding = 8 * 512  # torch's allocator gives every tensor whole 512 bytes
    assert peak <= device_bytes(jobs, windows_of(jobs, 1 << 13)) + rounding
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(again, runs[0], strict=True))
