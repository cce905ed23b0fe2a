from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.adapters.adapter_file import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterFile
from compress.adapters.factors import recompress, scatter_rows, squared_norm
from compress.adapters.recompressed import truncation_error
from compress.adapters.recover import RecoveryReport, recover_adapter
from compress.errors import CompressError, UsageError
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model
from compress.structure import full_layer, kept_columns, kept_rows, structure_map
from tests.tiny import DENSE
from tests.unit.adapters.common import Pair, add_initial_factors, make_pair, save_random_adapter

PRUNABLE = [*DENSE, "gpt2"]


def recover(pair: Pair, adapter: Path, out: Path, **options: Any) -> RecoveryReport:
    return recover_adapter(
        adapter, pair.structure, pair.arch, pair.full, out, full_name="org/full", **options
    )


def config_of(adapter: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter / CONFIG_FILE).read_text())
    return config


def deltas(adapter: Path) -> dict[str, Tensor]:
    """s B A of every module in float64, the scaling read by PEFT's own rules."""
    tensors = {n: t.double() for n, t in load_file(adapter / WEIGHTS_FILE).items()}
    with AdapterFile(adapter) as file:
        return {
            m: file.scaling(m).value
            * tensors[f"{PREFIX}{m}.lora_B.weight"]
            @ tensors[f"{PREFIX}{m}.lora_A.weight"]
            for m in file.modules
        }


def scattered(pair: Pair, small: dict[str, Tensor]) -> dict[str, Tensor]:
    """Small deltas [out, in] placed entry by entry into zeros."""
    found = dict(small)  # linears that pruning does not know stay as they are
    for name, index, spec in pair.linears():
        layer, shape = pair.structure.layers[index], pair.arch.linear_shape(spec)
        rows, columns = kept_rows(pair.arch, spec, layer), kept_columns(pair.arch, spec, layer)
        rows = torch.arange(shape[0]) if rows is None else rows
        columns = torch.arange(shape[1]) if columns is None else columns
        full = torch.zeros(shape, dtype=torch.float64)
        for i, row in enumerate(rows.tolist()):
            full[row, columns] = small[name][i]
        found[name] = full
    return found


def assert_deltas(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert ours.keys() == expected.keys()
    for name, delta in ours.items():
        torch.testing.assert_close(
            delta, expected[name], rtol=tolerance, atol=tolerance * float(delta.abs().max()), msg=name
        )


@pytest.mark.parametrize("kind", PRUNABLE)
def test_recovered_deltas_are_the_small_ones_scattered(kind: str, tmp_path: Path) -> None:
    pair = make_pair(kind, tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", fan_in_fan_out=kind == "gpt2")
    report = recover(pair, adapter, tmp_path / "out")
    small, full = deltas(adapter), deltas(tmp_path / "out")
    assert_deltas(full, scattered(pair, small), 1e-12)
    norm = math.sqrt(sum(float(d.square().sum()) for d in small.values()))
    assert report.delta_norm == pytest.approx(norm, rel=1e-9)
    assert norm > 0
    assert (report.modules, report.differences, report.max_rank) == (len(small), 0, 4)
    assert report.scattered > 0
    assert report.truncation == {}


@pytest.mark.parametrize("kind", PRUNABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slicing_gives_the_small_adapter_back_and_the_rest_is_zero(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pair = make_pair(kind, tmp_path, seed=2)
    adapter = save_random_adapter(
        pair.small, tmp_path / "adapter", dtype=dtype, fan_in_fan_out=kind == "gpt2"
    )
    recover(pair, adapter, tmp_path / "out")
    small, full = load_file(adapter / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert small.keys() == full.keys()
    for name, index, spec in pair.linears():
        layer = pair.structure.layers[index]
        rows, columns = kept_rows(pair.arch, spec, layer), kept_columns(pair.arch, spec, layer)
        key_a, key_b = f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"
        assert full[key_a].dtype == full[key_b].dtype == dtype
        out_size, in_size = pair.arch.linear_shape(spec)
        assert full[key_a].shape == (4, in_size)
        assert full[key_b].shape == (out_size, 4)
        rows = torch.arange(out_size) if rows is None else rows
        columns = torch.arange(in_size) if columns is None else columns
        assert torch.equal(full[key_a][:, columns], small[key_a])
        assert torch.equal(full[key_b][rows], small[key_b])
        gone_rows = torch.ones(out_size, dtype=torch.bool).index_fill(0, rows, False)
        gone_columns = torch.ones(in_size, dtype=torch.bool).index_fill(0, columns, False)
        assert not full[key_b][gone_rows].any()
        assert not full[key_a][:, gone_columns].any()


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "qwen2", "gemma2", "phi3", "gpt2"])
def test_stock_peft_adds_exactly_the_scattered_deltas(kind: str, tmp_path: Path) -> None:
    """W + recovered delta by stock PEFT on the stock full model, against weights changed by hand."""
    pair = make_pair(kind, tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", fan_in_fan_out=kind == "gpt2")
    recover(pair, adapter, tmp_path / "out")
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    by_hand = load_model(pair.full.path, dtype=torch.float32)
    with torch.no_grad():
        before = by_hand(input_ids=ids).logits
        for name, delta in scattered(pair, deltas(adapter)).items():
            by_hand.get_submodule(name).weight += (delta.T if kind == "gpt2" else delta).float()
        expected = by_hand(input_ids=ids).logits
        model = PeftModel.from_pretrained(
            load_model(pair.full.path, dtype=torch.float32), str(tmp_path / "out")
        )
        logits = model.eval()(input_ids=ids).logits
    assert (logits - before).abs().max() > 1e-2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_config_names_the_full_base_only(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter")
    assert str(pair.small) in (adapter / CONFIG_FILE).read_text(), (
        "the premise: PEFT wrote the small model's path"
    )
    recover(pair, adapter, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["base_model_name_or_path"] == "org/full"
    assert str(tmp_path) not in (tmp_path / "out" / CONFIG_FILE).read_text()
    changed = {"base_model_name_or_path", "revision"}
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in config_of(adapter).items() if k not in changed
    }


def test_nothing_pruned_means_identity(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    whole = structure_map(pair.arch, [full_layer(pair.arch)] * pair.arch.layers, base_fingerprint="")
    adapter = save_random_adapter(pair.full.path, tmp_path / "adapter")
    report = recover_adapter(adapter, whole, pair.arch, pair.full, tmp_path / "out", full_name="org/full")
    assert report.scattered == 0
    assert (adapter / WEIGHTS_FILE).read_bytes() == (tmp_path / "out" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("only", ["", "self_attn"])
def test_initial_factors_are_subtracted(rslora: bool, patterns: bool, only: str, tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    options: dict[str, Any] = {"use_rslora": rslora}
    if patterns:
        options |= {
            "rank_pattern": {"q_proj": 2, r"model.layers.1.mlp.down_proj": 8},
            "alpha_pattern": {"up_proj": 3},
        }
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", **options)
    initial = {n: t.double() for n, t in add_initial_factors(adapter, only=only).items()}
    trained = deltas(adapter)
    report = recover(pair, adapter, tmp_path / "out")
    with AdapterFile(adapter) as file:
        scales = {m: file.scaling(m).value for m in file.modules}
        ranks = {m: file.scaling(m).rank for m in file.modules}
    differing = 0
    for module in trained:
        key = f"{PREFIX}{module}.lora_A.weight"
        if key in initial:
            differing += 1
            trained[module] -= scales[module] * initial[key.replace("lora_A", "lora_B")] @ initial[key]
    assert differing == report.differences == len(initial) // 2 > 0
    assert_deltas(deltas(tmp_path / "out"), scattered(pair, trained), 1e-9)
    with AdapterFile(tmp_path / "out") as out:
        for module in out.modules:
            doubled = f"{PREFIX}{module}.lora_A.weight" in initial
            assert out.scaling(module).rank == ranks[module] * (2 if doubled else 1)
            assert out.scaling(module).value == pytest.approx(scales[module], rel=1e-12)
    model = PeftModel.from_pretrained(load_model(pair.full.path, dtype=torch.float32), str(tmp_path / "out"))
    for module, delta in scattered(pair, trained).items():
        layer = model.get_base_model().get_submodule(module)
        torch.testing.assert_close(layer.get_delta_weight("default").double(), delta, rtol=1e-4, atol=1e-5)


def test_adapters_on_other_linears_are_copied(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    targets = ["q_proj", "lm_head", "embed_tokens"]
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", target_modules=targets)
    recover(pair, adapter, tmp_path / "out")
    small, full = load_file(adapter / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    copied = [n for n in small if "lm_head" in n or "embed_tokens" in n]
    assert len(copied) == 4
    for name in copied:
        assert torch.equal(small[name], full[name])
    PeftModel.from_pretrained(load_model(pair.full.path), str(tmp_path / "out"))


@pytest.mark.filterwarnings("ignore:.*have invalid shape.*")  # peft mistakes the bias for a broken factor
def test_lora_biases_are_scattered_and_whole_modules_copied(tmp_path: Path) -> None:
    pair = make_pair("qwen2", tmp_path)
    adapter = save_random_adapter(
        pair.small,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        lora_bias=True,
        modules_to_save=["lm_head"],
    )
    recover(pair, adapter, tmp_path / "out")
    small, full = load_file(adapter / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.bias"
    spec = next(s for s in pair.arch.linears if s.role == "q")
    rows = kept_rows(pair.arch, spec, pair.structure.layers[0])
    assert rows is not None
    assert small[key].any()
    assert torch.equal(full[key], scatter_rows(small[key], rows, pair.arch.linear_shape(spec)[0]))
    assert torch.equal(full[f"{PREFIX}lm_head.weight"], small[f"{PREFIX}lm_head.weight"])


@pytest.mark.parametrize("aligned", [False, True])
def test_whole_trained_tensors_give_the_full_model_what_training_changed(
    aligned: bool, tmp_path: Path
) -> None:
    """The small model's own norms may have moved (alignment); that is not carried over."""
    pair = make_pair("llama_gqa", tmp_path)
    file = pair.small / "model.safetensors"
    name = "model.norm.weight"
    if aligned:
        stored = load_file(file)
        stored[name] = stored[name] + 0.5
        save_file(stored, file, metadata={"format": "pt"})
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", modules_to_save=["norm"])
    recover_adapter(
        adapter,
        pair.structure,
        pair.arch,
        pair.full,
        tmp_path / "out",
        full_name="org/full",
        small_base=Checkpoint(pair.small),
    )
    trained, small = load_file(adapter / WEIGHTS_FILE)[PREFIX + name], load_file(file)[name]
    found = load_file(tmp_path / "out" / WEIGHTS_FILE)[PREFIX + name]
    torch.testing.assert_close(found, pair.full.read(name) + trained - small)
    assert torch.allclose(found, trained) is not aligned
    save_file({"x": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"norm\.weight cannot be recovered"):
        recover_adapter(
            adapter,
            pair.structure,
            pair.arch,
            pair.full,
            tmp_path / "again",
            full_name="org/full",
            small_base=Checkpoint(pair.small),
        )


def test_dora_is_refused_on_a_weight_that_the_small_model_has_changed(tmp_path: Path) -> None:
    """Alignment or quantization moved the weight whose norms the magnitudes were trained for."""
    pair = make_pair("llama_gqa", tmp_path, heads=False)
    adapter = save_random_adapter(pair.small, tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    options: dict[str, Any] = {"full_name": "org/full", "small_base": Checkpoint(pair.small)}
    arguments = (adapter, pair.structure, pair.arch, pair.full)
    recover_adapter(*arguments, tmp_path / "out", **options)
    assert any(name.endswith("lora_magnitude_vector") for name in load_file(tmp_path / "out" / WEIGHTS_FILE))
    file = pair.small / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1
    save_file(stored, file, metadata={"format": "pt"})
    options["small_base"] = Checkpoint(pair.small)
    with pytest.raises(
        CompressError, match=r"magnitude of model\.layers\.1\.self_attn\.q_proj.* another weight"
    ):
        recover_adapter(*arguments, tmp_path / "again", **options)
    assert not (tmp_path / "again").exists()


def test_dora_is_copied_where_shapes_stay_and_refused_where_not(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path, heads=False)
    attention = save_random_adapter(pair.small, tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    recover(pair, attention, tmp_path / "out")
    assert (attention / WEIGHTS_FILE).read_bytes() == (tmp_path / "out" / WEIGHTS_FILE).read_bytes()
    mlp = save_random_adapter(pair.small, tmp_path / "b", target_modules=["up_proj"], use_dora=True)
    with pytest.raises(CompressError, match=r"DoRA magnitude of model\.layers\.\d\.mlp\.up_proj .* norms"):
        recover(pair, mlp, tmp_path / "refused")
    with pytest.raises(CompressError, match="DoRA"):
        recover(pair, attention, tmp_path / "refused", compress_rank=2)
    assert not (tmp_path / "refused").exists()


def test_trained_parts_of_the_base_are_refused(tmp_path: Path) -> None:
    pair = make_pair("qwen2", tmp_path)
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", **options)
    with pytest.raises(CompressError, match="trained base tensor"):
        recover(pair, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "started from pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "started from pissa"),
        ({"peft_type": "IA3"}, "is a IA3"),
        ({"layer_replication": [[0, 1]]}, "replicates layers"),
        ({"r": 3}, "rank 4"),
    ],
)
def test_adapters_that_cannot_be_recovered(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter")
    (adapter / CONFIG_FILE).write_text(json.dumps(config_of(adapter) | change))
    with pytest.raises(CompressError, match=message):
        recover(pair, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pissa_is_recovered_with_its_initial_factors(tmp_path: Path) -> None:
    """Base residue + B A trained on the small model; recovery must undo what PiSSA took from the base."""
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter")
    add_initial_factors(adapter)
    (adapter / CONFIG_FILE).write_text(json.dumps(config_of(adapter) | {"init_lora_weights": "pissa"}))
    recover(pair, adapter, tmp_path / "out")
    assert config_of(tmp_path / "out")["init_lora_weights"] is True


def test_an_adapter_of_other_shapes_is_refused(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.full.path, tmp_path / "adapter")
    with pytest.raises(CompressError, match="where the structure keeps"):
        recover(pair, adapter, tmp_path / "out")
    other = make_pair("llama_mha", tmp_path / "other")
    with pytest.raises(CompressError, match="structure was made for"):
        recover_adapter(adapter, other.structure, pair.arch, pair.full, tmp_path / "out", full_name="x")


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    with pytest.raises(CompressError, match="is not an adapter"):
        recover(pair, tmp_path, tmp_path / "out")
    adapter = save_random_adapter(pair.small, tmp_path / "adapter")
    (adapter / WEIGHTS_FILE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(CompressError, match="not a safetensors file"):
        recover(pair, adapter, tmp_path / "out")
    (adapter / CONFIG_FILE).write_text("{")
    with pytest.raises(CompressError, match="not JSON"):
        recover(pair, adapter, tmp_path / "out")


@pytest.mark.parametrize("rslora", [False, True])
def test_recompression_is_the_best_of_its_rank_and_reports_its_error(rslora: bool, tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", use_rslora=rslora)
    add_initial_factors(adapter)
    recover(pair, adapter, tmp_path / "exact")
    report = recover(pair, adapter, tmp_path / "cut", compress_rank=3)
    exact, cut = deltas(tmp_path / "exact"), deltas(tmp_path / "cut")
    lost = whole = 0.0
    for module, delta in exact.items():
        values = torch.linalg.svdvals(delta)
        error = float((delta - cut[module]).norm())
        assert error == pytest.approx(float(values[3:].norm()), rel=1e-4)
        assert report.truncation[module] == pytest.approx(error / float(delta.norm()), rel=1e-4)
        lost, whole = lost + error**2, whole + float(delta.square().sum())
    assert report.truncation_overall == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert 0 < report.truncation_overall < 1
    assert report.max_rank == 3
    assert report.delta_norm == pytest.approx(math.sqrt(whole - lost), rel=1e-6)
    assert config_of(tmp_path / "cut")["r"] == 3
    PeftModel.from_pretrained(load_model(pair.full.path), str(tmp_path / "cut"))


def test_what_a_rank_would_lose_is_known_before_the_cut(tmp_path: Path) -> None:
    """Of modules with ranks and scales of their own; the recovered deltas are the small ones between zeros."""
    pair = make_pair("llama_gqa", tmp_path)
    patterns = {"rank_pattern": {"q_proj": 2, "down_proj": 5}, "alpha_pattern": {"down_proj": 40}}
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", **patterns)
    add_initial_factors(adapter)
    report = recover(pair, adapter, tmp_path / "exact")
    assert report.uncut_rank == report.max_rank == 10
    tails = {rank: [0.0, 0.0] for rank in (1, 3, 4, 9, 10)}
    for delta in deltas(tmp_path / "exact").values():
        values = torch.linalg.svdvals(delta.double()).square()
        for rank, sums in tails.items():
            sums[0] += float(values[rank:].sum())
            sums[1] += float(values.sum())
    with AdapterFile(adapter) as small:
        for rank, (lost, whole) in tails.items():
            assert truncation_error(small, rank) == pytest.approx(math.sqrt(lost / whole), rel=1e-3, abs=1e-6)


def test_a_rank_that_is_enough_loses_nothing(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter")
    recover(pair, adapter, tmp_path / "plain")
    report = recover(pair, adapter, tmp_path / "same", compress_rank=4)
    assert report.truncation_overall == 0
    assert set(report.truncation.values()) == {0.0}
    assert (tmp_path / "plain" / WEIGHTS_FILE).read_bytes() == (tmp_path / "same" / WEIGHTS_FILE).read_bytes()
    with pytest.raises(UsageError):
        recover(pair, adapter, tmp_path / "none", compress_rank=0)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 7), st.integers(0, 2**20))
def test_recompression_of_any_factors(rank: int, out: int, into: int, keep: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor_a = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    factor_b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    keep = min(keep, rank)
    found = recompress(factor_a, factor_b, keep)
    cut_a, cut_b, lost = found.a, found.b, found.lost
    product = factor_b @ factor_a
    tail = torch.linalg.svdvals(product)[keep:].square().sum()
    scale = float(product.square().sum())
    assert squared_norm(factor_a, factor_b) == pytest.approx(scale, rel=1e-9)
    assert found.norm == squared_norm(factor_a, factor_b)  # bit by bit
    assert lost == pytest.approx(float(tail), abs=1e-9 * scale)
    assert float((product - cut_b @ cut_a).square().sum()) == pytest.approx(lost, abs=1e-9 * scale)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter")
    (adapter / WEIGHTS_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(CompressError, match=r"has no adapter_model\.safetensors"):
        recover(pair, adapter, tmp_path / "out")
    save_file({}, adapter / WEIGHTS_FILE)
    with pytest.raises(CompressError, match="no LoRA factors"):
        recover(pair, adapter, tmp_path / "out")


def test_the_small_reading_of_patterns_is_pefts(tmp_path: Path) -> None:
    """Rank and scaling of every module as AdapterFile reads them and as PEFT itself applies them."""
    pair = make_pair("llama_gqa", tmp_path)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        rank_pattern={"layers.1.self_attn.q_proj": 2, "^model.layers.0.mlp.up_proj": 5},
        alpha_pattern={r".*\.v_proj": 9, "k_proj": 1},
        use_rslora=True,
    )
    model = get_peft_model(load_model(pair.small), config)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with AdapterFile(tmp_path / "adapter") as file:
        for module in file.modules:
            layer = model.get_base_model().get_submodule(module)
            assert file.scaling(module).rank == layer.r["default"]
            assert file.scaling(module).value == layer.scaling["default"]
