from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.adapters.adapter_file import AdapterFile
from compress.benchmarks import quantization_models, quantization_rows
from compress.benchmarks.peers.environment_storage import linear_shapes
from compress.benchmarks.quantization_models import (
    best_for_all,
    moved_model,
    quantize_uniformly,
)
from compress.benchmarks.quantization_rows import (
    RECIPES,
    Bench,
    Recipe,
    chain_name,
    row_of,
)
from compress.export.packed import write_packed
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model
from compress.pipelines.matrices import Matrix
from compress.pipelines.measure import calibration_windows
from compress.pipelines.settings import TrainSettings
from compress.pipelines.settings import resolve as resolve_settings
from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import factor_bits
from compress.quantize.error_table import error_table, menu
from compress.quantize.linear import LQLinear
from tests.unit.benchmarks.test_protocol import needs_wikitext
from tests.unit.benchmarks.test_quantization import SMALL, tiny_bench, weights_of

pytestmark = pytest.mark.usefixtures("forked_reopen")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return tiny_bench(tmp_path_factory.mktemp("quantization"))


def dense_weights(model: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(model)
    return {name: checkpoint.read(f"{name}.weight").float() for name in linear_shapes(model)}


@needs_wikitext
def test_a_trained_row_counts_and_scores_its_factors_in_eight_bits(bench: Bench) -> None:
    recipe = replace(
        RECIPES["nf4 + lora, trained"], quantize={"budget": "5bit", "rank": "0", "objective": "frobenius"}
    )
    row = row_of(bench, recipe)
    shapes = linear_shapes(bench.model).values()
    weights = sum(math.prod(shape) for shape in shapes)
    plain = sum(QuantConfig(bits=4).storage_bits(shape) for shape in shapes)
    factors = sum(factor_bits(shape, 8, FACTOR_8BIT) for shape in shapes)
    assert row["training"]["bits_per_weight_before"] == pytest.approx(plain / weights)
    assert row["bits_per_weight"] == pytest.approx((plain + factors) / weights)
    chain = bench.work / chain_name(bench, recipe) / "chain"
    out = bench.work / "folded"
    write_packed(Checkpoint(chain / "01-quantize"), out, adapter=chain / "02-train")
    rounded = weights_of(chain / "01-quantize")
    with AdapterFile(chain / "02-train") as file:
        assert set(file.modules) == set(rounded)
        for name, weight in weights_of(out).items():
            scale = file.scaling(name).value
            assert scale == 2.0
            factor_a, factor_b = (factor.float() * math.sqrt(scale) for factor in file.factors(name))
            left, right = (quantize_dequantize(f, FACTOR_8BIT) for f in (factor_b.T.contiguous(), factor_a))
            torch.testing.assert_close(weight, rounded[name] + left.T @ right, rtol=1e-5, atol=1e-6)
            exact = rounded[name] + scale * file.factors(name)[1].float() @ file.factors(name)[0].float()
            assert (weight - exact).norm() < 0.05 * (exact - rounded[name]).norm()


def test_factors_in_place_of_those_that_were_there(bench: Bench, tmp_path: Path) -> None:
    recipe = Recipe(quantize={"budget": "4.5bit", "rank": "4"}, train="lq")
    context = bench.context(tmp_path / "chain")
    with context.workspace.locked():
        quantized = quantization_rows.quantize(context, bench.settings(recipe)).stage
        settings = resolve_settings(TrainSettings, {**SMALL, "method": "lq"}, "quick")
        adapter = quantization_rows.train(context, settings).stage
    assert quantized is not None
    assert adapter is not None
    write_packed(Checkpoint(quantized.path), tmp_path / "out", adapter=adapter.path)
    before = load_model(quantized.path, dtype=torch.float32)
    with AdapterFile(adapter.path) as file:
        for name, weight in weights_of(tmp_path / "out").items():
            layer = before.get_submodule(name)
            assert isinstance(layer, LQLinear)
            assert layer.record.rank == 4
            factor_a, factor_b = file.factors(name)
            expected = layer.quantized().dequantize() + file.scaling(name).value * (
                factor_b.float() @ factor_a.float()
            )
            assert (weight - expected).norm() < 0.02 * expected.norm()
    assert bench.stored(tmp_path / "out") == bench.stored(quantized.path)


def fisher_weights(bench: Bench) -> dict[str, torch.Tensor]:
    """Mean of squared gradients over the calibration windows, by autograd."""
    context = bench.context(bench.work / "none")
    windows = calibration_windows(context, bench.model, bench.source, tokens=bench.calibration_tokens)
    model = load_model(bench.model, dtype=torch.float32).eval()
    parameters = {name: model.get_parameter(f"{name}.weight") for name in linear_shapes(bench.model)}
    found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for ids in windows.ids:
        loss = model(input_ids=ids[None], labels=ids[None]).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            found[name] += gradient.square() / len(windows.ids)
    return found


@pytest.mark.parametrize("objective", ["frobenius", "hessian", "fisher"])
def test_uniform_rows_give_every_matrix_the_same(objective: str, bench: Bench, tmp_path: Path) -> None:
    settings = bench.settings(Recipe(quantize={"budget": "3.5bit", "rank": "0", "objective": objective}))
    context = bench.context(tmp_path / "chain")
    with context.workspace.locked():
        stage = quantize_uniformly(context, settings, None).stage
        again = quantize_uniformly(context, settings, None)
    assert stage is not None
    assert not again.fresh
    config = QuantConfig.from_dict(stage.record["metrics"]["configuration"])
    found, dense = weights_of(stage.path), dense_weights(bench.model)
    assert set(found) == set(dense)
    shapes = linear_shapes(bench.model).values()
    bits = sum(config.storage_bits(shape) for shape in shapes) / sum(math.prod(shape) for shape in shapes)
    assert bench.stored(stage.path)["bits_per_weight"] == pytest.approx(bits)
    assert bits <= 3.5
    assert not (stage.path / "fisher").exists()
    if objective != "hessian":
        weights = (
            fisher_weights(bench)
            if objective == "fisher"
            else {n: torch.ones_like(w) for n, w in dense.items()}
        )
        fitting = [
            other
            for other in menu("quick")
            if sum(other.storage_bits(shape) for shape in shapes) <= 3.5 * sum(map(math.prod, shapes))
        ]
        errors = {
            other: sum(
                float((weights[n] * (w - quantize_dequantize(w, other)).double().square()).sum())
                for n, w in dense.items()
            )
            for other in fitting
        }
        assert config == min(errors, key=lambda other: errors[other])
        if objective == "fisher":
            return
        for name, weight in found.items():
            torch.testing.assert_close(weight, quantize_dequantize(dense[name], config))
    else:
        assert config.codebook == "learned"


def test_the_best_configuration_for_all_has_the_least_summed_cost() -> None:
    generator = torch.Generator().manual_seed(4)
    matrices, tables = [], []
    for at, shape in enumerate([(64, 96), (96, 64), (32, 128)]):
        weight = torch.randn(shape, generator=generator) * (1 + at)
        matrices.append(Matrix(layer=0, module=str(at), tensor=str(at), shape=shape))
        tables.append(error_table(weight, menu("quick"), (0,)))
    configs, sums = menu("quick"), np.sum([t.errors[:, 0] for t in tables], axis=0)
    sizes = [sum(config.storage_bits(matrix.shape) for matrix in matrices) for config in configs]
    for limit in sorted(set(sizes)):
        expected = min((cost, at) for at, cost in enumerate(sums) if sizes[at] <= limit)
        assert best_for_all(matrices, tables, limit) == configs[expected[1]]


def test_a_moved_model_is_made_once_and_is_the_same_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"length": 64, "steps": 3, "warmup_steps": 1}
    (tmp_path / "again").mkdir()
    moved = moved_model(bench.model, "pydoc", tmp_path, **given)
    same = moved_model(bench.model, "pydoc", tmp_path / "again", **given)
    assert Checkpoint(moved).fingerprint() == Checkpoint(same).fingerprint()
    before, after = Checkpoint(bench.model), Checkpoint(moved)
    assert set(before.names) == set(after.names)
    difference = total = 0.0
    for name in before.names:
        assert after.dtype(name) == torch.bfloat16
        old, new = before.read(name).double(), after.read(name).double()
        assert old.dim() == 1 or not torch.equal(old, new)  # norms near 1 move by less than bfloat16 shows
        difference, total = difference + float((new - old).square().sum()), total + float(old.square().sum())
    about = quantization_models.read_json(moved / "moved.json")
    assert about["relative_change"] == pytest.approx(math.sqrt(difference / total), rel=1e-9)
    assert len(about["losses"]) == 3

    def refuse(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(quantization_models, "fit", refuse)
    assert moved_model(bench.model, "pydoc", tmp_path, **given) == moved
    with pytest.raises(AssertionError, match="trained again"):
        moved_model(bench.model, "pydoc", tmp_path, **{**given, "steps": 4})
