"""The optimizers of training, and their state as plain tensors: AdamW, and AdamW in GaLore's subspaces."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from compress.adapters.fit_config import FitConfig
from compress.errors import CompressError

GALORE_RANK = 128
"""Dimensions of the subspace that a matrix's gradients are projected on (arXiv 2403.03507 §5)."""
GALORE_GAP = 200
"""Steps between two new subspaces."""
GALORE_SCALE = 0.25
"""What the projected update is multiplied by."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def require_galore() -> None:
    """Refuse GaLore where its package is not installed.

    Raises:
        CompressError: The package galore-torch is missing.
    """
    if importlib.util.find_spec("galore_torch") is None:
        raise CompressError(
            "GaLore needs the package galore-torch, which is not installed.",
            "Install compress-llm[galore], or use --optimizer adamw.",
        )


def is_projected(shape: tuple[int, ...]) -> bool:
    """Whether GaLore projects the gradient of a linear's weight of this shape."""
    return min(shape) > GALORE_RANK


def galore_numbers(shape: tuple[int, int]) -> int:
    """Numbers that GaLore holds for a projected weight: two moments of its longer side, one basis of its shorter."""
    shorter, longer = sorted(shape)
    return GALORE_RANK * (2 * longer + shorter)


def make_optimizer(model: nn.Module, trained: Mapping[str, nn.Parameter], config: FitConfig) -> Optimizer:
    """The optimizer of ``config`` over the ``trained`` parameters of ``model``.

    With GaLore, the weights of linears with both sides above `GALORE_RANK` are projected: two moments of
    [rank, the longer side] instead of [out, in]. Embeddings, norms, biases and smaller matrices are not.

    Raises:
        CompressError: The package that GaLore needs is missing.
    """
    if config.optimizer == "adamw":
        # foreach: hundreds of small factors in a few calls
        return torch.optim.AdamW(
            list(trained.values()), lr=config.lr, weight_decay=config.weight_decay, foreach=True
        )
    require_galore()
    from galore_torch import GaLoreAdamW

    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
    large = [p for p in trained.values() if id(p) in linears and is_projected(tuple(p.shape))]
    chosen = {id(p) for p in large}
    groups: list[dict[str, Any]] = [{"params": [p for p in trained.values() if id(p) not in chosen]}]
    projected = {
        "rank": GALORE_RANK,
        "update_proj_gap": GALORE_GAP,
        "scale": GALORE_SCALE,
        "proj_type": "std",
    }
    groups.append({"params": large, **projected})
    optimizer: Optimizer = GaLoreAdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        eps=1e-8,
        weight_decay=config.weight_decay,
        no_deprecation_warning=True,
    )
    for parameter in large:
        optimizer.state[parameter]["projector"] = _projector(groups[-1])
    return optimizer


def optimizer_tensors(
    optimizer: Optimizer,
    trained: Mapping[str, nn.Parameter],
    fetched: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> dict[str, Tensor]:
    """The state as CPU tensors: ``step``, ``exp_avg`` and ``exp_avg_sq`` of each name, with GaLore ``projection``.

    Args:
        optimizer: From ``make_optimizer``.
        trained: What it trains, by name.
        fetched: Brings a moment to the CPU.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        state = optimizer.state.get(parameter, {})
        if "step" not in state:
            continue
        found[f"step.{name}"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu()
        for moment in _MOMENTS:
            found[f"{moment}.{name}"] = fetched(state[moment])
        if "projector" in state:
            found[f"projection.{name}"] = state["projector"].ortho_matrix.cpu()
    return found


def restore_optimizer(
    optimizer: Optimizer, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Take up a state that ``optimizer_tensors`` returned."""
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trained.items():
        if f"step.{name}" not in tensors:
            continue
        step = tensors[f"step.{name}"]  # AdamW keeps it on the CPU
        state: dict[str, Any] = {"step": step if isinstance(optimizer, torch.optim.AdamW) else int(step)}
        for moment in _MOMENTS:
            state[moment] = tensors[f"{moment}.{name}"].to(parameter.device)
        if f"projection.{name}" in tensors:
            state["projector"] = _projector(group_of[parameter])
            state["projector"].ortho_matrix = tensors[f"projection.{name}"].to(parameter.device)
        optimizer.state[parameter] = state


def _projector(group: Mapping[str, Any]) -> Any:
    from galore_torch.galore_projector import GaLoreProjector

    class Compact(GaLoreProjector):  # type: ignore[misc, unused-ignore]  # types where there are any
        """Holds the basis alone; as it is, a part of all singular vectors keeps them all in memory."""

        def get_orthogonal_matrix(self, weights: Tensor, rank: int, type: str) -> Tensor:
            basis: Tensor = super().get_orthogonal_matrix(weights, rank, type)
            return basis.clone()

    return Compact(
        group["rank"],
        update_proj_gap=group["update_proj_gap"],
        scale=group["scale"],
        proj_type=group["proj_type"],
    )
