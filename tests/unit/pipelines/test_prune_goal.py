"""How much to prune, and where: options read, sizes reached, allocations exact, refusals before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.importance.base import GroupScores, LayerRise
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines import prune_place, way
from compress.pipelines.dispatch import run_verb
from compress.pipelines.model_input import ModelInput
from compress.pipelines.prune_goal import (
    Goal,
    channel_multiple,
    default_multiple,
    goal_of,
    parse_options,
    parse_targets,
)
from compress.pipelines.settings import Common, PruneSettings, resolve
from compress.prune.select import select
from compress.prune.shape import unit_parameters
from compress.prune.slice import slice_checkpoint
from compress.structure import LayerShape, full_shape, structure_map
from tests.tiny import tiny_checkpoint
from tests.unit.prune.layouts import random_scores
from tests.unit.uneven import make_uneven

MULTIPLE = 8


def opened(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> ModelInput:
    path = tiny_checkpoint(kind, folder / kind, dtype=dtype)
    checkpoint = Checkpoint(path)
    return ModelInput(
        name=kind,
        path=path,
        id="0",
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelInput]:
    folder = tmp_path_factory.mktemp("models")
    dtypes = {"llama_gqa": torch.float32, "llama_tied": torch.bfloat16, "phi3": torch.float32}
    return {kind: opened(kind, folder, dtype) for kind, dtype in dtypes.items()}


def goal(model: ModelInput, targets: str = "heads,mlp", **given: Any) -> Goal:
    settings = resolve(PruneSettings, given, "quick")
    return goal_of(model, settings, parse_targets(targets), settings.multiple or MULTIPLE)


def never(scores: GroupScores) -> GroupScores:
    raise AssertionError("nothing is to be measured")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (" , ", {}),
        ("element=abs", {"element": "abs"}),
        (
            "element=abs, first-order=true ,momentum=0.8",
            {"element": "abs", "first_order": True, "momentum": 0.8},
        ),
        ("parts=32,damping=1e-3", {"parts": 32, "damping": 1e-3}),
        ("standardize=False,x=-2", {"standardize": False, "x": -2}),
        ("name=a=b", {"name": "a=b"}),
        ("a=1,a=2", {"a": 2}),
    ],
)
def test_options_are_read_in_their_types(text: str, expected: dict[str, Any]) -> None:
    found = parse_options(text)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("text", ["abs", "=abs", "element=", "element=abs,momentum", " = "])
def test_what_are_no_options(text: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        parse_options(text)


def test_targets() -> None:
    assert parse_targets("heads,mlp") == ("heads", "mlp")
    assert parse_targets(" mlp ,") == ("mlp",)
    for text in ("", ",", "heads,norms", "head", "heads mlp"):
        with pytest.raises(UsageError, match="is not understood"):
            parse_targets(text)


@pytest.mark.parametrize(
    ("channels", "multiple"),
    [
        (14336, 128),
        (8192, 128),
        (8191, 64),
        (1536, 64),
        (512, 64),
        (511, 32),
        (96, 8),
        (63, 4),
        (8, 1),
        (1, 1),
    ],
)
def test_the_multiple_grows_with_the_width(channels: int, multiple: int) -> None:
    assert default_multiple(channels) == multiple


def test_the_multiple_of_a_ratio_of_the_parts_is_one_where_none_is_asked_for() -> None:
    for given, expected in (
        ({}, 128),
        ({"ratio_of": "parts"}, 1),
        ({"ratio_of": "parts", "multiple": 32}, 32),
    ):
        assert (
            channel_multiple(resolve(PruneSettings, {"shape": "local", **given}, "quick"), 8192) == expected
        )


def test_half_of_the_linears_without_any_size(models: dict[str, ModelInput]) -> None:
    assert goal(models["llama_gqa"]).ratio == 0.5
    assert goal(models["llama_gqa"], ratio=0.3).ratio == 0.3


def sizes(model: ModelInput, targets: str) -> list[int]:
    """Parameters of every uniform pruned model."""
    arch = model.architecture
    units, full = unit_parameters(arch), full_shape(arch)
    heads = [(full.kv_heads, full.queries)]
    widths = [arch.channels]
    if "heads" in targets:
        heads = list(product(range(1, full.kv_heads + 1), range(1, full.queries + 1)))
    if "mlp" in targets:
        widths += range(MULTIPLE, arch.channels, MULTIPLE)
    whole = units.of(full)
    return [
        model.checkpoint.parameters
        - arch.layers * (whole - units.of(LayerShape(kv_heads=kv, queries=q, channels=c)))
        for (kv, q), c in product(heads, widths)
    ]


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "phi3"])
@pytest.mark.parametrize(("targets", "share"), [("heads,mlp", 0.35), ("heads,mlp", 0.8), ("mlp", 0.5)])
@pytest.mark.parametrize("unit", ["params", "size"])
def test_the_written_model_has_the_size_that_was_asked_for(
    unit: str, targets: str, share: float, kind: str, models: dict[str, ModelInput], tmp_path: Path
) -> None:
    model = models[kind]
    arch, before = model.architecture, model.checkpoint
    reachable = sizes(model, targets)
    wanted = round(min(reachable) + share * (before.parameters - min(reachable)))
    width = before.bytes // before.parameters
    text = f"{wanted}" if unit == "params" else f"{wanted * width / 1000}kB"
    aim = goal(model, targets, **{unit: text})
    scores = random_scores(arch, 1)
    plan = aim.choose(scores, never)
    structure = structure_map(arch, select(arch, scores, plan.shapes), base_fingerprint="0")
    slice_checkpoint(before, arch, structure, tmp_path / "small")
    small = Checkpoint(tmp_path / "small")
    nearest = min(abs(size - wanted) for size in reachable)
    slack = 0.01 * arch.decoder_linear_parameters()  # near-ties go by estimated damage
    assert small.parameters in reachable
    assert abs(small.parameters - wanted) <= nearest + slack
    assert abs(small.bytes - wanted * width) <= (nearest + slack) * width
    assert plan.requested == aim.ratio


def test_sizes_that_cannot_be_had(models: dict[str, ModelInput]) -> None:
    model = models["llama_gqa"]
    smallest = min(sizes(model, "heads,mlp"))
    with pytest.raises(
        CompressError, match=f"{model.checkpoint.parameters:,} parameters down to {smallest:,}"
    ):
        goal(model, params="1K")
    with pytest.raises(CompressError, match="down to"):
        goal(model, params="1M")
    with pytest.raises(CompressError, match=r"kB, not to 1\.0 kB"):
        goal(model, size="1kB")
    with pytest.raises(UsageError, match="--size 4bit is no file size"):
        goal(model, size="4bit")
    with pytest.raises(UsageError, match="'80 MB' is not understood"):
        goal(model, params="80 MB")


def rises(model: ModelInput, seed: int = 0) -> tuple[LayerRise, ...]:
    """Random costs that rise with what is removed; two layers of very different weight."""
    arch, generator = model.architecture, torch.Generator().manual_seed(seed)
    kv, queries = arch.kv_heads, arch.queries_per_group

    def falling(*shape: int) -> torch.Tensor:
        steps = torch.rand(*shape, generator=generator, dtype=torch.float64)
        for axis in range(len(shape)):
            steps = steps.flip(axis).cumsum(axis).flip(axis)
        return steps - steps.flatten()[-1]

    found = []
    for layer in range(arch.layers):
        weight = 1.0 + 4 * (layer % 2)
        attention = falling(kv + 1, queries + 1)
        attention[0] = attention[:, 0] = attention[0, 0]
        found.append(
            LayerRise(attention=weight * attention, channels=weight * falling(arch.channels + 1) / 12)
        )
    return tuple(found)


def brute_force(model: ModelInput, costs: tuple[LayerRise, ...], budget: int) -> float:
    """Least damage within the budget: every shape of both layers."""
    arch = model.architecture
    units = unit_parameters(arch)
    pairs = [*product(range(1, arch.kv_heads + 1), range(1, arch.queries_per_group + 1))]
    pairs.append((0, arch.queries_per_group))
    options = [
        [
            (
                float(rise.attention[pair] + rise.channels[width]),
                units.of(LayerShape(kv_heads=pair[0], queries=pair[1], channels=width)),
            )
            for pair in pairs
            for width in range(0, arch.channels + 1, MULTIPLE)
        ]
        for rise in costs
    ]
    return min(sum(c for c, _ in both) for both in product(*options) if sum(s for _, s in both) <= budget)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.85])
def test_an_allocation_is_the_least_predicted_rise_of_all(
    ratio: float, models: dict[str, ModelInput]
) -> None:
    model = models["llama_gqa"]
    arch = model.architecture
    costs = rises(model)
    plain = random_scores(arch, 2)
    asked: list[GroupScores] = []

    def measure(scores: GroupScores) -> GroupScores:
        asked.append(scores)
        return GroupScores(layers=scores.layers, rises=costs)

    aim = goal(model, shape="allocated", ratio=ratio)
    plan = aim.choose(plain, measure)
    assert asked == [plain]
    total = arch.decoder_linear_parameters()
    kept = sum(unit_parameters(arch).of(shape) for shape in plan.shapes)
    assert kept <= round((1 - ratio) * total)
    assert (plan.requested, plan.achieved) == (ratio, 1 - kept / total)
    damage = sum(
        float(rise.attention[shape.kv_heads, shape.queries] + rise.channels[shape.channels])
        for rise, shape in zip(costs, plan.shapes, strict=True)
    )
    least = brute_force(model, costs, round((1 - ratio) * total))
    assert damage == pytest.approx(least, rel=1e-4)
    assert plan.certificate is not None
    assert plan.certificate["damage"] == pytest.approx(damage)
    assert plan.certificate["lower_bound"] <= least + 1e-9
    assert plan.certificate["solver"] == "highs"
    gone = [sum(not s.kv_heads for s in plan.shapes), sum(not s.channels for s in plan.shapes)]
    assert f"{gone[0]} layers lose their attention and {gone[1]} their MLP" in plan.reason
    assert f"{damage:.3f} nats per token" in plan.reason
    # scores that come with their costs are not measured again
    known = goal(model, shape="allocated", ratio=ratio, solver="dynamic")
    again = known.choose(GroupScores(layers=plain.layers, rises=costs), never)
    assert again.achieved >= ratio - 1e-9
    assert again.certificate is not None
    assert again.certificate["solver"] == "dynamic"


@pytest.mark.parametrize("unit", ["params", "size"])
@pytest.mark.parametrize("seed", range(3))
def test_an_allocation_counts_the_biases_that_repair_adds(
    unit: str, seed: int, models: dict[str, ModelInput], tmp_path: Path
) -> None:
    model = models["llama_gqa"]
    arch, before = model.architecture, model.checkpoint
    wanted = round(0.6 * before.parameters)
    text = f"{wanted}" if unit == "params" else f"{4 * wanted / 1000}kB"
    aim = goal(model, shape="allocated", criterion="flap", repair="bias", **{unit: text})
    scores = random_scores(arch, seed)
    plan = aim.choose(GroupScores(layers=scores.layers, rises=rises(model, seed)), never)
    structure = structure_map(arch, select(arch, scores, plan.shapes), base_fingerprint="0")
    biases = {
        arch.module_name(layer, spec): torch.ones(arch.hidden)
        for layer in range(arch.layers)
        for spec in arch.linears
        if spec.role in ("o", "down")
    }
    slice_checkpoint(before, arch, structure, tmp_path / "small", biases=biases)
    slice_checkpoint(before, arch, structure, tmp_path / "bare")
    small, bare = Checkpoint(tmp_path / "small"), Checkpoint(tmp_path / "bare")
    assert bare.parameters < small.parameters <= wanted
    assert small.bytes <= 4 * wanted


@pytest.mark.parametrize("targets", ["heads", "mlp"])
def test_an_allocation_leaves_alone_what_was_not_asked_for(
    targets: str, models: dict[str, ModelInput]
) -> None:
    model = models["llama_gqa"]
    full = full_shape(model.architecture)
    aim = goal(model, targets, shape="allocated", ratio=0.2)
    scores = random_scores(model.architecture, 2)
    for shape in aim.choose(GroupScores(layers=scores.layers, rises=rises(model)), never).shapes:
        if targets == "heads":
            assert shape.channels == full.channels
        else:
            assert (shape.kv_heads, shape.queries) == (full.kv_heads, full.queries)


@pytest.mark.parametrize("kind", ["uniform", "local", "global"])
def test_other_shapes_need_no_costs(kind: str, models: dict[str, ModelInput]) -> None:
    model = models["llama_tied"]
    aim = goal(model, shape=kind, ratio=0.3, skip_last=1)
    plan = aim.choose(random_scores(model.architecture, 0), never)
    assert plan.achieved == pytest.approx(0.3, abs=0.03)
    assert plan.certificate is None
    assert (plan.uniform is not None) == (kind == "uniform")
    if kind == "local":
        assert plan.shapes[-1] == full_shape(model.architecture)


def test_shapes_are_those_of_the_config_class_that_has_the_biases(models: dict[str, ModelInput]) -> None:
    """LlamaConfig refuses 6 heads at this width; a bias-free Llama is written as Mistral, one with biases cannot be."""
    model = models["llama_gqa"]
    assert model.architecture.hidden % 6
    scores = random_scores(model.architecture, 4)
    given = {"ratio": 0.4, "head_unit": "group", "criterion": "flap"}
    free = goal(model, **given).choose(scores, never)
    assert 3 in {shape.kv_heads for shape in free.candidates}
    bound = goal(model, repair="bias", **given).choose(scores, never)
    assert bound.candidates
    assert all(model.architecture.hidden % (2 * shape.kv_heads) == 0 for shape in bound.candidates)


def uneven(folder: Path) -> Path:
    make_uneven("llama_gqa", folder)
    return folder / "small"


def quantized(folder: Path) -> Path:
    path = tiny_checkpoint("llama_gqa", folder / "quantized")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    return path


def plain(folder: Path) -> Path:
    return tiny_checkpoint("llama_gqa", folder / "plain")


def without_biases(folder: Path) -> Path:
    return tiny_checkpoint("qwen3", folder / "qwen3")


LONG = "\n\n".join(f"Line {i} of a text that has no other purpose. " * 20 for i in range(60))


@pytest.mark.parametrize(
    ("build", "given", "text", "cause"),
    [
        (plain, {"multiple": 96, "targets": "mlp"}, LONG, "Nothing of mlp can be pruned"),
        (plain, {"multiple": 64, "targets": "mlp", "ratio": 0.05}, LONG, "can remove 20.0% to 20.0%"),
        (plain, {"ratio": 0.99}, LONG, "not 99.0%"),
        (plain, {"shape": "local", "ratio": 0.7, "skip_last": 1}, LONG, "not 70.0%"),
        (
            plain,
            {"shape": "allocated", "ratio": 0.59, "targets": "mlp"},
            LONG,
            "leaves nothing of mlp in any",
        ),
        (plain, {"shape": "allocated", "ratio": 0.999}, LONG, "leaves nothing of heads and mlp in any"),
        (plain, {"ratio": 0.1, "rounds": 3}, LONG, "Each of 3 rounds"),
        (uneven, {}, LONG, "differ in size already"),
        (uneven, {"params": "40K"}, LONG, "differ in size already"),
        (quantized, {}, LONG, "gptq"),
        (without_biases, {"repair": "bias"}, LONG, "transformers gives a qwen3 model none"),
        (without_biases, {"repair": "bias", "targets": "mlp"}, LONG, "none at mlp.down_proj"),
        (plain, {}, "One short line.\n\nAnother one.\n\nAnd a third.\n", "fewer than one window of 256"),
    ],
)
def test_what_cannot_be_had_is_said_before_a_weight_is_read(
    build: Callable[[Path], Path],
    given: dict[str, Any],
    text: str,
    cause: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(tmp_path)
    (tmp_path / "text.txt").write_text(text)

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(prune_place, "load_model", read)
    monkeypatch.setattr(way, "load_model", read)
    monkeypatch.setattr(Checkpoint, "read", read)
    common = Common(run=tmp_path / "run", model=str(model), data=str(tmp_path / "text.txt"), threads=1)
    with pytest.raises(CompressError) as refused:
        run_verb("prune", common, {"sequence": 32, **given}, quiet=True)
    assert cause in refused.value.cause
    assert refused.value.remedy
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_allowed_does_read_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(LONG)

    def read(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(way, "load_model", read)
    common = Common(
        run=tmp_path / "run", model=str(plain(tmp_path)), data=str(tmp_path / "text.txt"), threads=1
    )
    with pytest.raises(ZeroDivisionError):
        run_verb("prune", common, {"sequence": 32}, quiet=True)
