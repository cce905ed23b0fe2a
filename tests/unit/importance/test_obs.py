"""Optimal brain surgeon on groups: gradients against autograd, damages against least squares in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.importance import moments
from compress.importance.base import GroupScores, create_criterion
from compress.importance.collect import collect
from compress.importance.gram_store import GramStore, fits
from compress.importance.modules import decoder_linear
from compress.importance.moments import OUTPUTS, OutputGradients
from compress.importance.obs import ObsConfig, ObsCriterion, rank_groups
from compress.model.architecture import Architecture, LinearSpec
from tests.tiny import VOCAB, tiny_model
from tests.unit.importance.common import linear_inputs
from tests.unit.importance.test_taylor import summed_loss
from tests.unit.prune.common import architecture, delta_of, model_architecture, with_lora

LENGTH = 12
DAMPING = 0.02
CONFIG = ObsConfig(damping=DAMPING, parts=1000, gradient_share=1.0)


def text(windows: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (windows, LENGTH), generator=torch.Generator().manual_seed(seed))


def setup(kind: str) -> tuple[Any, Architecture]:
    model = tiny_model(kind)
    return model, model_architecture(model)


def outputs(arch: Architecture) -> list[tuple[int, LinearSpec]]:
    return [(layer, spec) for layer in range(arch.layers) for spec in arch.linears if spec.role in OUTPUTS]


def output_gradients(model: Any, arch: Architecture, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    """Gradient of the summed loss at every output of o and down, [tokens, out] in float64, by autograd."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    kept: dict[tuple[int, str], Tensor] = {}
    for layer, spec in outputs(arch):

        def keep(_: Any, __: Any, output: Tensor, place: tuple[int, str] = (layer, spec.role)) -> None:
            output.retain_grad()
            kept[place] = output

        decoder_linear(model, arch, layer, spec).register_forward_hook(keep)
    summed_loss(model, ids).backward()
    found = {}
    for place, output in kept.items():
        assert output.grad is not None
        found[place] = output.grad.flatten(0, 1)
    return found


def gathered(
    model: Any, arch: Architecture, ids: Tensor, *, batch: int = 3, seed: int = 0
) -> OutputGradients:
    gradients = OutputGradients(arch, seed=seed)
    gradients.gather(model, ids.split(batch), summed_loss)
    return gradients


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2", "phi3", "gpt2"])
def test_roots_are_those_of_the_gradients_that_autograd_gives(kind: str) -> None:
    model, arch = setup(kind)
    ids = text(5)
    gradients, expected = gathered(model, arch, ids), output_gradients(model, arch, ids)
    for layer, spec in outputs(arch):
        root, g_TO = gradients.root(layer, spec), expected[layer, spec.role]
        assert root.dtype == torch.float64
        assert root.shape[0] <= root.shape[1] == arch.hidden
        moment = g_TO.T @ g_TO / ids.numel()
        assert moment.norm() > 0
        torch.testing.assert_close(root.T @ root, moment, rtol=1e-3, atol=1e-4 * float(moment.abs().max()))


def test_a_sketch_of_wide_outputs_has_the_right_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arch = setup("llama_mha")
    ids = text(4)
    (layer, spec) = outputs(arch)[1]
    g_TO = output_gradients(model, arch, ids)[layer, spec.role]
    moment, rows = g_TO.T @ g_TO / ids.numel(), 8
    monkeypatch.setattr(moments, "SKETCH_ROWS", rows)
    total, draws = torch.zeros_like(moment), 60
    for seed in range(draws):
        root = gathered(model, arch, ids, seed=seed).root(layer, spec)
        assert root.shape == (rows, arch.hidden)
        total += root.T @ root / draws
    # an entry of one sketch has variance (S_ii S_jj + S_ij^2) / rows at most
    deviation = ((torch.outer(moment.diagonal(), moment.diagonal()) + moment**2) / (rows * draws)).sqrt()
    error = (total - moment) / deviation
    assert float(error.abs().max()) < 5
    assert 0.5 < float(error.std()) < 1.5
    again = gathered(model, arch, ids, seed=3).root(layer, spec)
    assert torch.equal(again, gathered(model, arch, ids, seed=3).root(layer, spec))
    assert not torch.allclose(again, root)


class Reference:
    """Exact quadratic damage of removing columns of one layer's o and down, by least squares in float64."""

    def __init__(self, model: Any, arch: Architecture, ids: Tensor, damping: float = DAMPING) -> None:
        self.gradients = output_gradients(model, arch, ids)
        self.inputs = linear_inputs(copy.deepcopy(model).double(), arch, ids)
        self.model, self.arch, self.ids, self.damping = model, arch, ids, damping

    def damage(self, layer: int, role: str, gone: list[int]) -> float:
        (spec,) = (spec for spec in self.arch.linears if spec.role == role)
        module: Any = decoder_linear(self.model, self.arch, layer, spec)
        weight = module.weight.detach().double()
        weight = weight.T if spec.transposed else weight
        x_TC, g_TO = self.inputs[layer][role], self.gradients[layer, role]
        tokens, columns = x_TC.shape
        ridge = self.damping * float(x_TC.square().sum(dim=0).mean()) / tokens
        design = torch.cat([x_TC / tokens**0.5, ridge**0.5 * torch.eye(columns, dtype=torch.float64)])
        delta = torch.zeros_like(weight)
        delta[:, gone] = -weight[:, gone]
        rest = [c for c in range(columns) if c not in set(gone)]
        if rest:
            delta[:, rest] = torch.linalg.lstsq(design[:, rest], -(design @ delta.T)).solution.T
        return 0.5 * float((g_TO @ (delta @ design.T)).square().sum()) / self.ids.numel()

    def heads(self, layer: int, kept: dict[int, list[int]]) -> float:
        """Only these query heads (numbered inside their KV group) of these groups are kept."""
        width, queries = self.arch.head_dim, self.arch.queries_per_group
        gone = [
            (group * queries + head) * width + column
            for group in range(self.arch.kv_heads)
            for head in range(queries)
            if head not in kept.get(group, [])
            for column in range(width)
        ]
        return self.damage(layer, "o", gone)


def ranked(model: Any, arch: Architecture, ids: Tensor, scores: GroupScores | None = None) -> GroupScores:
    return rank_groups(model, arch, ids, CONFIG, loss=summed_loss, batch=4, ranked=scores)


def best(scores: Tensor, count: int) -> list[int]:
    return scores.sort(descending=True, stable=True).indices[:count].tolist()


KINDS = pytest.mark.parametrize("kind", ["llama_gqa", "llama_mha"])


@KINDS
def test_a_ranking_that_is_given_is_kept_and_its_table_is_exact(kind: str) -> None:
    model, arch = setup(kind)
    ids, queries = text(), arch.queries_per_group
    reference = Reference(model, arch, ids)
    random = create_criterion("random", arch)
    random.observe(model)
    given = random.scores()
    found = ranked(model, arch, ids, given)
    assert found.rises is not None
    for layer, (score, rise) in enumerate(zip(given.layers, found.rises, strict=True)):
        assert found.layers[layer] is score
        assert rise.attention.shape == (arch.kv_heads + 1, queries + 1)
        assert rise.attention.dtype == torch.float64
        expected = torch.zeros_like(rise.attention)
        for groups in range(arch.kv_heads + 1):
            for heads in range(queries + 1):
                inside = {
                    group: best(score.query_heads[group * queries : (group + 1) * queries], heads)
                    for group in best(score.kv_groups, groups)
                }
                expected[groups, heads] = reference.heads(layer, inside)
        torch.testing.assert_close(rise.attention, expected, rtol=2e-3, atol=2e-4 * float(expected[0, 0]))


def in_rounds(reference: Reference, layer: int, groups: list[int]) -> tuple[list[float], list[int]]:
    """Damage after every round in which each group loses its cheapest head, and the heads as they went."""
    arch = reference.arch
    queries = arch.queries_per_group
    kept = {group: list(range(queries)) for group in groups}
    damages, gone = [reference.heads(layer, kept)], []
    for _ in range(queries):
        waiting = set(groups)
        while waiting:
            costs = {
                (g, h): reference.heads(layer, {**kept, g: [k for k in kept[g] if k != h]})
                for g in waiting
                for h in kept[g]
            }
            group, head = min(costs, key=lambda place: costs[place])
            kept[group].remove(head)
            waiting.discard(group)
            gone.append(group * queries + head)
        damages.append(reference.heads(layer, kept))
    return damages, gone


@KINDS
def test_groups_go_greedily_heads_in_rounds_and_the_table_says_what_it_costs(kind: str) -> None:
    model, arch = setup(kind)
    ids, queries = text(), arch.queries_per_group
    reference = Reference(model, arch, ids)
    found = ranked(model, arch, ids)
    assert found.rises is not None
    for layer, (score, rise) in enumerate(zip(found.layers, found.rises, strict=True)):
        left = list(range(arch.kv_heads))
        expected = torch.full_like(rise.attention, reference.heads(layer, {}))
        order: list[int] = []
        while left:
            damages, gone = in_rounds(reference, layer, left)
            expected[len(left), 1:] = torch.tensor(damages[:-1], dtype=torch.float64).flip(0)
            if len(left) == arch.kv_heads:
                heads = gone
            every = list(range(queries))
            costs = [reference.heads(layer, {g: every for g in left if g != group}) for group in left]
            order.append(left.pop(min(range(len(costs)), key=lambda n: costs[n])))
        assert score.kv_groups.argsort().tolist() == order
        assert score.query_heads.argsort().tolist() == (heads if queries > 1 else order)
        torch.testing.assert_close(rise.attention, expected, rtol=2e-3, atol=2e-4 * float(expected[0, 0]))


@pytest.mark.parametrize("parts", [1000, 10, 1])
def test_the_curve_of_the_channels_is_what_its_order_costs(parts: int) -> None:
    model, arch = setup("llama_gqa")
    ids = text()
    reference = Reference(model, arch, ids)
    config = ObsConfig(damping=DAMPING, parts=parts, gradient_share=1.0)
    found = rank_groups(model, arch, ids, config, loss=summed_loss, batch=4)
    random = create_criterion("random", arch)
    random.observe(model)
    other = ranked(model, arch, ids, random.scores())
    for scores in (found, other):
        assert scores.rises is not None
        for layer, (score, rise) in enumerate(zip(scores.layers, scores.rises, strict=True)):
            assert rise.channels.shape == (arch.channels + 1,)
            assert float(rise.channels[-1]) == 0
            worst_first = score.channels.argsort().tolist()
            assert len(score.channels.unique()) == arch.channels
            for kept in (95, 90, 48, 7, 0):
                exact = reference.damage(layer, "down", worst_first[: arch.channels - kept])
                assert float(rise.channels[kept]) == pytest.approx(exact, rel=5e-3)
            assert bool((rise.channels.diff() <= 0).all())
    assert found.rises is not None
    assert other.rises is not None
    for mine, its in zip(found.rises, other.rises, strict=True):
        assert float(mine.channels[48]) < 0.8 * float(its.channels[48])


def test_first_channels_are_those_that_cost_least() -> None:
    model, arch = setup("llama_mha")
    ids = text()
    reference = Reference(model, arch, ids)
    for layer, score in enumerate(ranked(model, arch, ids).layers):
        gone: list[int] = []
        for channel in score.channels.argsort().tolist()[:4]:
            rest = [c for c in range(arch.channels) if c not in gone]
            costs = {c: reference.damage(layer, "down", [*gone, c]) for c in rest}
            assert costs[channel] <= min(costs.values()) * 1.01
            gone.append(channel)


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_adapters_count_like_the_weights_they_are_merged_into(kind: str) -> None:
    model, arch = setup(kind)
    ids = text(8)
    merged = copy.deepcopy(model)
    adapted = with_lora(model, arch)
    with torch.no_grad():
        for layer in range(arch.layers):
            for spec in arch.linears:
                delta = delta_of(adapted, arch, layer, spec)
                weight = merged.get_submodule(arch.module_name(layer, spec)).weight
                weight += delta.T if spec.transposed else delta
    one, other = (ranked(m, arch, ids).to_tensors() for m in (adapted, merged))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("peft", [False, True])
def test_the_model_is_left_as_it_was(peft: bool) -> None:
    model, arch = setup("llama_gqa")
    if peft:
        model = with_lora(model, arch)
        summed_loss(model, text(2)).backward()
    else:
        model.get_input_embeddings().requires_grad_(False)
    before = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    collect(create_criterion("obs", arch), model, arch, text(8), loss=summed_loss, batch=4)
    for parameter, (flag, grad) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == flag
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


def test_an_error_takes_the_hooks_off_too() -> None:
    model, arch = setup("llama_mha")

    def broken(given: Any, ids: Tensor) -> Tensor:
        assert not any(p.requires_grad for p in given.parameters())  # no weight gets a gradient
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rank_groups(model, arch, text(), CONFIG, loss=broken, batch=4)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_what_cannot_be_pruned_is_zero() -> None:
    model, arch = setup("gpt2")
    found = ranked(model, arch, text())
    assert found.rises is not None
    for score, rise in zip(found.layers, found.rises, strict=True):
        for zero in (score.kv_groups, score.query_heads, rise.attention):
            assert not zero.any()
        assert bool((score.channels > 0).all())


def test_half_of_the_windows_give_gradients_by_default() -> None:
    model, arch = setup("llama_mha")
    seen: list[int] = []

    def loss(given: Any, ids: Tensor) -> Tensor:
        seen.append(len(ids))
        return summed_loss(given, ids)

    calls: list[tuple[int, int, str]] = []
    rank_groups(
        model, arch, text(8), ObsConfig(), loss=loss, batch=4, progress=lambda *call: calls.append(call)
    )
    assert seen == [1, 1, 1, 1]
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2)]
    assert calls[-1][2] == "layer 1"


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"damping": 0.0}, "damping is 0.0"),
        ({"parts": 0}, "in 0 parts"),
        ({"gradient_share": 0.0}, "share 0.0"),
        ({"gradient_share": 1.5}, "share 1.5"),
        ({"normalize": False}, "takes neither"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        ObsConfig(**wrong)


def test_it_needs_text() -> None:
    model, arch = setup("llama_mha")
    with pytest.raises(UsageError, match="needs calibration text"):
        create_criterion("obs", arch).observe(model)
    with pytest.raises(CompressError, match="fewer than one batch of 4"):
        rank_groups(model, arch, text(3), CONFIG, loss=summed_loss, batch=4)


def test_moments_are_kept_for_the_repair(tmp_path: Any) -> None:
    model, arch = setup("llama_gqa")
    ids = text(8)
    criterion = ObsCriterion(arch)
    criterion.store = store = GramStore(tmp_path / "moments")
    assert not store.complete(arch)
    criterion.measure(model, ids, loss=summed_loss, batch=4)
    assert store.complete(arch)
    inputs = linear_inputs(copy.deepcopy(model).double(), arch, ids)
    for layer, spec in outputs(arch):
        gram, x_TC = store.get(layer, spec), inputs[layer][spec.role]
        assert gram.dtype == torch.float32
        torch.testing.assert_close(gram.double(), x_TC.T @ x_TC, rtol=1e-3, atol=1e-3)
    (tmp_path / "moments" / "layer-1.safetensors").unlink()
    assert not store.complete(arch)


def test_moments_of_wide_models_are_not_kept() -> None:
    # LLaMA-7B: 32 x (4096^2 + 11008^2) float32 is 17.7 GB
    wide = architecture(hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, channels=11008)
    assert not fits(wide, OUTPUTS)
    # SmolLM2-135M: 30 x (576^2 + 1536^2) float32 is 0.3 GB
    small = architecture(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, channels=1536)
    assert fits(small, OUTPUTS)
    assert fits(wide, ())
