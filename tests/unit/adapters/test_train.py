from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from compress.adapters.attach import attach_lora
from compress.adapters.fit_config import FitConfig, learning_rate, window_order
from compress.adapters.state import STATE_FILE
from compress.adapters.train import fit
from compress.data.windows import Windows
from compress.errors import CompressError, UsageError
from compress.importance.base import create_criterion
from compress.model.architecture import architecture_of
from compress.prune.controller import PruneController
from compress.prune.schedule import PruningSchedule
from compress.prune.uniform import choose_shape
from tests.tiny import tiny_model

CONFIG = FitConfig(
    steps=6,
    micro_batch=2,
    accumulation=2,
    lr=3e-3,
    warmup_steps=2,
    weight_decay=0.01,
    seed=5,
    precision="float32",
    save_every=2,
)


def windows(count: int = 10, length: int = 12, seed: int = 0, ignored: bool = True) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 16, (count, length), generator=generator)  # a small alphabet can be learnt
    labels = ids.clone()
    if ignored:
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return Windows(ids=ids, labels=labels, protocol={})


def adapted(dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model("llama_gqa").to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"]
        )
        return get_peft_model(model, config)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Stop(KeyboardInterrupt):
    """What Ctrl-C raises, told apart from the user's own."""


def stopping_at(model: nn.Module, forward: int) -> Any:
    """Interrupt the model's ``forward``-th forward pass from now."""
    seen = iter(range(forward))

    def hook(*_: Any) -> None:
        if next(seen, None) is None:
            raise Stop

    return model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_pre_hook(hook)


def test_one_step_equals_a_plain_computation() -> None:
    """Loss and update against Hugging Face's loss over the whole batch and torch's own AdamW."""
    model, plain = adapted(dropout=0.0), adapted(dropout=0.0)
    start = trained(plain)
    data, config = windows(), replace(CONFIG, steps=1, warmup_steps=0, max_grad_norm=0.05)
    result = fit(model, data, config)
    rows = window_order(10, config.seed, 0, 4)
    loss = plain(input_ids=data.ids[rows], labels=data.labels[rows]).loss
    loss.backward()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
    assert norm > 0.05, "the test must clip"
    torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay).step()
    assert result.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert result.tokens == int((data.labels[rows][:, 1:] != -100).sum())
    for (name, ours), theirs in zip(trained(model).items(), trained(plain).values(), strict=True):
        # AdamW's first step divides a gradient by its own size: where that is near epsilon, rounding shows
        assert (ours - theirs).norm() <= 1e-3 * (theirs - start[name]).norm(), name


def test_hooks_see_the_mean_gradient_before_clipping() -> None:
    model, plain = adapted(dropout=0.0), adapted(dropout=0.0)
    data, seen = windows(), []

    class Hook:
        def before_step(self, step: int) -> None:
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            seen.append((step, grads))

    fit(model, data, replace(CONFIG, steps=2, max_grad_norm=1e-4, warmup_steps=0), hooks=[Hook()])
    rows = window_order(10, CONFIG.seed, 0, 4)
    plain(input_ids=data.ids[rows], labels=data.labels[rows]).loss.backward()
    assert [step for step, _ in seen] == [0, 1]
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert seen[0][1].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[0][1][name], gradient, rtol=1e-4, atol=1e-7)


def test_training_learns_and_leaves_the_base_alone() -> None:
    model = adapted()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    held_out, labels = windows(seed=1), []
    result = fit(
        model,
        windows(),
        replace(CONFIG, steps=30, lr=1e-2),
        validation=held_out,
        progress=lambda done, total, label: labels.append((done, total, label)),
    )
    assert result.validation_before is not None
    assert result.validation_after is not None
    assert result.validation_after < result.validation_before - 0.5
    assert result.steps == len(result.losses) == 30
    assert labels[-1] == (30, 30, f"loss {result.losses[-1]:.3f}")
    assert not model.training
    assert_same(frozen, {n: p for n, p in model.named_parameters() if not p.requires_grad})
    with torch.no_grad():
        expected = model(input_ids=held_out.ids, labels=held_out.labels).loss.item()
    assert result.validation_after == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("forward", [0, 1, 5, 6, 11])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(forward: int, tmp_path: Path) -> None:
    whole = adapted()
    expected = fit(whole, windows(), CONFIG, validation=windows(seed=1))
    broken = adapted()
    torch.manual_seed(forward)  # the global generator must not matter
    stop = stopping_at(broken, forward + 5 + 2)  # validation takes 5 forward passes, finding the head 2
    with pytest.raises(Stop):
        fit(broken, windows(), CONFIG, validation=windows(seed=1), state_dir=tmp_path)
    stop.remove()
    assert (tmp_path / STATE_FILE).is_file()
    assert not list(tmp_path.glob("*.tmp"))
    again = adapted()
    result = fit(again, windows(), CONFIG, validation=windows(seed=1), state_dir=tmp_path)
    assert_same(trained(whole), trained(again))
    assert result.losses == expected.losses
    assert (result.validation_before, result.validation_after, result.tokens) == (
        expected.validation_before,
        expected.validation_after,
        expected.tokens,
    )


def test_a_killed_run_goes_on_from_its_last_saved_state(tmp_path: Path) -> None:
    """A kill runs no handler: the state is the one of the last ``save_every``, some steps back."""
    whole, broken = adapted(), adapted()
    expected = fit(whole, windows(), CONFIG)

    class Kill(Exception):
        """Ends the process as far as the run can tell."""

    def kill(done: int, total: int, label: str) -> None:
        if done == 5:
            raise Kill

    with pytest.raises(Kill):
        fit(broken, windows(), CONFIG, state_dir=tmp_path, progress=kill)
    steps: list[int] = []
    result = fit(broken, windows(), CONFIG, state_dir=tmp_path, progress=lambda done, *_: steps.append(done))
    assert steps == [5, 6]
    assert_same(trained(whole), trained(broken))
    assert result.losses == expected.losses


def test_a_finished_state_is_not_trained_again(tmp_path: Path) -> None:
    first, second = adapted(), adapted()
    done = fit(first, windows(), CONFIG, state_dir=tmp_path)

    def forbidden(*_: Any) -> None:
        raise AssertionError("trained again")

    assert fit(second, windows(), CONFIG, state_dir=tmp_path, progress=forbidden).losses == done.losses
    assert_same(trained(first), trained(second))


def test_the_state_of_hooks_is_resumed(tmp_path: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.count = torch.zeros(3)

        def before_step(self, step: int) -> None:
            self.count += torch.tensor([1.0, step, step**2])

        def state_dict(self) -> dict[str, Tensor]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Tensor]) -> None:
            self.count = state["count"].clone()

    whole, broken, resumed = Counting(), Counting(), Counting()
    fit(adapted(), windows(), CONFIG, hooks=[whole])
    model = adapted()
    stop = stopping_at(model, 2 + 7)
    with pytest.raises(Stop):
        fit(model, windows(), CONFIG, hooks=[broken], state_dir=tmp_path)
    stop.remove()
    assert not torch.equal(broken.count, whole.count)
    fit(model, windows(), CONFIG, hooks=[resumed], state_dir=tmp_path)
    assert torch.equal(resumed.count, whole.count)


def test_a_pruning_run_is_resumed_with_its_scores_and_masks(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=8)

    def run(state_dir: Path | None, stop_at: int | None) -> tuple[Any, dict[str, Tensor], tuple[float, ...]]:
        plain = tiny_model("llama_gqa")
        arch = architecture_of(plain.config.to_dict())
        model = attach_lora(plain, arch, rank=2, seed=4)
        controller = PruneController(
            model,
            arch,
            create_criterion("lora", arch),
            PruningSchedule(total_steps=8, every=1),
            lambda scores: choose_shape(arch, 0.5, multiple=8, scores=scores),
        )
        with controller:
            if stop_at is not None:
                stopping_at(model, stop_at)
                with pytest.raises(Stop):
                    fit(model, windows(), config, hooks=[controller], state_dir=state_dir)
                return None, {}, ()
            result = fit(model, windows(), config, hooks=[controller], state_dir=state_dir)
            return controller.structure(base_fingerprint=""), trained(model), result.losses

    expected = run(None, None)
    run(tmp_path, 2 + 9)
    resumed = run(tmp_path, None)
    assert resumed[0] == expected[0]
    assert not expected[0].is_identity
    assert_same(resumed[1], expected[1])
    assert resumed[2] == expected[2]


def poisoned(model: nn.Module, steps: set[int], value: float = math.nan, layer: int = 1) -> Any:
    """The gradient of one factor is ``value`` in these steps of one backward pass each; the loss stays finite."""
    seen = iter(range(10**6))
    name = next(n for n, _ in model.named_parameters() if f"layers.{layer}." in n and "down_proj.lora_B" in n)
    return model.get_parameter(name).register_hook(
        lambda gradient: gradient * value if next(seen) in steps else gradient
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_whose_gradients_are_not_finite_is_not_taken(value: float) -> None:
    config = replace(CONFIG, steps=8, accumulation=1, warmup_steps=0)
    model, observed, after = adapted(), [], []
    poisoned(model, {2, 5}, value)

    class Hook:
        def before_step(self, step: int) -> None:
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
            observed.append(step)

    def progress(done: int, total: int, label: str) -> None:
        after.append((trained(model), label))

    result = fit(model, windows(), config, hooks=[Hook()], progress=progress)
    assert (result.steps, result.skipped, len(result.losses)) == (8, 2, 8)
    assert all(map(math.isfinite, result.losses))
    assert observed == [0, 1, 3, 4, 6, 7]
    for step in range(1, 8):
        (before, _), (now, label) = after[step - 1], after[step]
        if step in (2, 5):
            assert_same(before, now)
            assert "skipped" in label
        else:
            assert any(not torch.equal(before[name], now[name]) for name in now)
            assert "skipped" not in label
    assert all(bool(value.isfinite().all()) for value in trained(model).values())


def test_scores_leave_out_a_step_that_is_not_taken_and_masks_close_all_the_same(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=8, accumulation=1, save_every=1)

    def run(stop_at: int | None, state_dir: Path | None) -> tuple[int, int, Any, dict[str, Tensor]]:
        plain = tiny_model("llama_gqa")
        arch = architecture_of(plain.config.to_dict())
        model = attach_lora(plain, arch, rank=2, seed=4)
        done = 0 if stop_at is not None or state_dir is None else 4
        poisoned(model, {step - done for step in (3, 7)})  # the last step: its masks are the final ones
        criterion = create_criterion("lora", arch)
        controller = PruneController(
            model,
            arch,
            criterion,
            PruningSchedule(total_steps=8, every=1),
            choose_shape(arch, 0.5, multiple=8),
        )
        with controller:
            if stop_at is not None:
                stopping_at(model, stop_at)
                with pytest.raises(Stop):
                    fit(model, windows(), config, hooks=[controller], state_dir=state_dir)
                return 0, 0, None, {}
            result = fit(model, windows(), config, hooks=[controller], state_dir=state_dir)
            assert criterion.steps == 8
            assert all(
                bool(v.isfinite().all()) for v in criterion.scores().to_tensors().values()
            )  # of the moving average
            assert len(controller.layers[0].channels) < arch.channels
            return result.skipped, controller.skipped_steps, controller.layers, trained(model)

    expected = run(None, None)
    assert expected[:2] == (2, 2)
    run(2 + 4, tmp_path)  # two forward passes come before the first step
    resumed = run(None, tmp_path)
    assert resumed[:2] == (2, 2)
    assert all(torch.equal(a.channels, b.channels) for a, b in zip(resumed[2], expected[2], strict=True))
    assert_same(resumed[3], expected[3])


@pytest.mark.parametrize(("steps", "bad", "last"), [(9, range(3, 9), 8), (9, range(9), 5), (2, range(2), 2)])
def test_gradients_that_stay_not_finite_end_training(steps: int, bad: range, last: int) -> None:
    model = adapted()
    poisoned(model, set(bad))
    config = replace(CONFIG, steps=steps, accumulation=1, warmup_steps=0)
    with pytest.raises(CompressError, match=f"up to step {last}, are not finite") as error:
        fit(model, windows(), config)
    assert "learning rate" in str(error.value)
    assert all(bool(value.isfinite().all()) for value in trained(model).values())


@pytest.mark.parametrize("change", ["lr", "data", "parameters"])
def test_a_state_of_another_run_is_refused(change: str, tmp_path: Path) -> None:
    fit(adapted(), windows(), CONFIG, state_dir=tmp_path)
    before = (tmp_path / STATE_FILE).read_bytes()
    config = replace(CONFIG, lr=1.0) if change == "lr" else CONFIG
    data = windows(seed=9) if change == "data" else windows()
    model = adapted()
    if change == "parameters":
        model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    with pytest.raises(CompressError, match=change):
        fit(model, data, config, state_dir=tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_state_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(CompressError, match="training state"):
        fit(adapted(), windows(), CONFIG, state_dir=tmp_path)


def test_the_seed_decides_and_global_random_numbers_do_not() -> None:
    def run(seed: int, noise: int) -> dict[str, Tensor]:
        model = adapted()
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        fit(model, windows(), replace(CONFIG, seed=seed))
        assert torch.equal(before, torch.random.get_rng_state())
        return trained(model)

    first, second, other = run(1, 1), run(1, 2), run(2, 1)
    assert_same(first, second)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_keeps_activations_small_and_adapters_exact(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    seen: set[torch.dtype] = set()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default")
    layer.register_forward_hook(lambda module, args, out: seen.update({args[0].dtype, out.dtype}))
    reference_model = adapted()
    result = fit(model, windows(), replace(CONFIG, steps=20, precision="bfloat16"))
    reference = fit(reference_model, windows(), replace(CONFIG, steps=20))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(result.losses, reference.losses, strict=True))


def test_a_bfloat16_base_computes_in_bfloat16_by_itself() -> None:
    model = adapted(dtype=torch.bfloat16)
    seen: set[torch.dtype] = set()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default")
    layer.register_forward_hook(lambda module, args, out: seen.add(args[0].dtype))
    fit(model, windows(), replace(CONFIG, steps=1, precision="auto", warmup_steps=0))
    assert seen == {torch.bfloat16}


def test_window_order_is_a_permutation_per_epoch_and_can_start_anywhere() -> None:
    order = window_order(7, 3, 0, 35)
    for epoch in order.split(7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert not torch.equal(order[:7], order[7:14])
    for start in range(0, 30, 4):
        assert torch.equal(window_order(7, 3, start, 5), order[start : start + 5])
    assert not torch.equal(window_order(7, 4, 0, 35), order)


def test_windows_without_labels_are_never_drawn() -> None:
    data = windows(count=6, ignored=False)
    data.labels[::2] = -100
    model = adapted(dropout=0.0)
    result = fit(model, data, replace(CONFIG, steps=3))
    assert result.tokens == 3 * 4 * 11
    assert all(loss > 0 for loss in result.losses)


def test_learning_rate_schedules() -> None:
    config = replace(CONFIG, steps=10, warmup_steps=4, lr=1.0)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[-1] > 0
    constant = replace(config, schedule="constant")
    assert [learning_rate(constant, step) for step in range(4, 10)] == [1.0] * 6


def test_nothing_to_train_or_to_train_on() -> None:
    with pytest.raises(CompressError, match="no parameter to train"):
        fit(tiny_model("llama_gqa").requires_grad_(False), windows(), CONFIG)
    silent = Windows(ids=windows().ids, labels=torch.full((10, 12), -100), protocol={})
    with pytest.raises(CompressError, match="training text has no token"):
        fit(adapted(), silent, CONFIG)
    with pytest.raises(CompressError, match="validation text has no token"):
        fit(adapted(), windows(), CONFIG, validation=silent)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = adapted()
    with torch.no_grad():
        model.get_parameter("base_model.model.model.norm.weight").fill_(float("nan"))
    before = trained(model)
    with pytest.raises(CompressError, match=r"up to step 5, are not finite \(its loss is nan\)"):
        fit(model, windows(), CONFIG)
    assert_same(before, trained(model))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"micro_batch": 0},
        {"accumulation": 0},
        {"lr": 0.0},
        {"warmup_steps": 7},
        {"save_every": 0},
    ],
)
def test_impossible_settings_are_usage_errors(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(CONFIG, **change)
