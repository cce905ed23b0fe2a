"""What several processes check together; each function is called in every one of them and prints nothing."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from compress.adapters.align import release_weights
from compress.adapters.fit_config import window_order
from compress.adapters.ranks import Broken, Ranks
from compress.adapters.sharded import part_of, shard, whole
from compress.adapters.train import fit
from compress.errors import CompressError
from compress.pipelines.launch import NEEDED
from tests.tiny import tiny_model
from tests.unit.adapters.test_train import CONFIG, adapted, windows


def gradients(ranks: Ranks) -> None:
    """Hooks see, on every rank, float64's gradient of the mean loss over all trained tokens of the step."""
    model, plain = adapted(dropout=0.0), adapted(dropout=0.0).double()
    data, seen = windows(), []

    class Hook:
        def before_step(self, step: int) -> None:
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    config = replace(CONFIG, steps=1, warmup_steps=0, max_grad_norm=1e-4)
    result = fit(model, data, config, hooks=[Hook()], ranks=ranks)
    rows = window_order(10, config.seed, 0, 4)
    loss = plain(input_ids=data.ids[rows], labels=data.labels[rows]).loss
    loss.backward()
    assert result.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {n: p.grad.float() for n, p in plain.named_parameters() if p.grad is not None}
    assert seen[0].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[0][name], gradient, rtol=1e-4, atol=1e-7)
    same_everywhere(ranks, {n: p for n, p in model.named_parameters() if p.requires_grad})


def skipped(ranks: Ranks) -> None:
    """What is not finite on one rank keeps all of them from the step."""
    model, now, taken, left = adapted(dropout=0.0), [0], [], []

    class Hook:
        def before_step(self, step: int) -> None:
            now[0] = step + 1
            taken.append(step)

        def skip_step(self, step: int) -> None:
            now[0] = step + 1
            left.append(step)

    factor = next(p for p in model.parameters() if p.requires_grad)
    factor.register_hook(lambda g: g * float("nan") if ranks.rank == 1 and now[0] == 1 else g)
    result = fit(model, windows(), replace(CONFIG, steps=3), hooks=[Hook()], ranks=ranks)
    assert (result.skipped, taken, left) == (1, [0, 2], [1])
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(bool(value.isfinite().all()) for value in found.values())
    same_everywhere(ranks, found)


def recomputed(ranks: Ranks) -> None:
    """Layers run again in every rank's backward passes, of whole weights and of cut ones; nothing else differs."""
    for sharded in (False, True):
        found = []
        for recompute in (False, True):
            model = tiny_model("llama_gqa") if sharded else adapted(dropout=0.2)
            seen: list[bool] = []
            name = "model.layers.0.mlp" if sharded else "base_model.model.model.layers.0.mlp"
            model.get_submodule(name).register_forward_pre_hook(lambda *_, seen=seen: seen.append(True))
            if sharded:
                release_weights(model)
                shard(model, ranks)
            config = replace(CONFIG, steps=3, recompute=recompute)
            result = fit(model, windows(), config, ranks=ranks, sharded=sharded)
            values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            here = {n: v.to_local() if isinstance(v, DTensor) else v for n, v in values.items()}
            found.append((result.losses, here, len(seen)))
        (losses, parameters, once), (others, again, twice) = found
        assert losses == others
        assert all(torch.equal(parameters[name], again[name]) for name in parameters)
        passes = once - 2  # both of what looks for the head
        assert twice == once + passes > once


def same_everywhere(ranks: Ranks, tensors: dict[str, Tensor]) -> None:
    """Down to the last bit."""
    for name, first in ranks.tensors({n: t.detach() for n, t in tensors.items()}).items():
        assert torch.equal(first, tensors[name]), name


def other_starts(ranks: Ranks) -> None:
    """Adapters that differ in rounding begin as the first rank's; others are refused where they are."""
    for size, refused in ((1e-7, False), (0.5, True)):
        model = adapted(dropout=0.0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and ranks.rank == 1:
                    parameter += size
        if not refused:
            fit(model, windows(), replace(CONFIG, steps=1, warmup_steps=0), ranks=ranks)
            same_everywhere(ranks, {n: p for n, p in model.named_parameters() if p.requires_grad})
        elif ranks.rank == 1:
            with pytest.raises(CompressError, match="starts from another"):
                fit(model, windows(), CONFIG, ranks=ranks)
        else:  # what a run says first
            ranks.value(None)
            ranks.tensors({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})


def parts(ranks: Ranks) -> None:
    """Weights of any number of rows are put together as they were, and cut again alike."""
    for rows in (1, 2, 5, 6, 7):
        weight = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
        layer = nn.Linear(3, rows, bias=False)
        with torch.no_grad():
            layer.weight.copy_(weight)
        fully_shard(layer, mesh=init_device_mesh("cpu", (ranks.size,)))
        assert isinstance(layer.weight, DTensor)
        together = whole(layer.weight, ranks)
        assert torch.equal(together, weight) if ranks.first else together.numel() == 0
        again = part_of(weight, layer.weight, ranks)
        assert isinstance(again, DTensor)
        assert torch.equal(again.to_local(), layer.weight.to_local())
    assert torch.equal(whole(weight, ranks), weight)


def talk(ranks: Ranks) -> None:
    """Values and tensors are the first one's; a failure is its own rank's, and the others know of it."""
    value: Any = {"a": [1, "ä", None]} if ranks.first else "ignored"
    assert ranks.value(value) == {"a": [1, "ä", None]}
    given = {"x": torch.arange(6).reshape(2, 3), "y": torch.rand(0, 4), "z": torch.tensor(2.5).bfloat16()}
    found = ranks.tensors(given if ranks.first else None)
    assert found.keys() == given.keys()
    assert all(found[n].dtype == t.dtype and found[n].shape == t.shape for n, t in given.items())
    assert torch.equal(found["x"], given["x"])
    assert ranks.sums(2, lambda: [1.0, float(ranks.rank)]) == [ranks.size, sum(range(ranks.size))]

    def fail() -> list[float]:
        if ranks.rank == 1:
            raise KeyError("mine")
        return [1.0]

    with pytest.raises(KeyError if ranks.rank == 1 else Broken):
        ranks.sums(1, fail)
    assert not any(name in os.environ for name in (*NEEDED, "LOCAL_RANK"))  # a child is none of the launched
