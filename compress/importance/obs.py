"""Optimal brain surgeon on groups: how much the loss rises when a group goes and the rest is refitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.engine import LocalEngine
from compress.errors import UsageError
from compress.importance import CRITERIA
from compress.importance.base import CriterionConfig, GroupScores, LayerRise, LayerScores, Loss
from compress.importance.gram_store import GramStore
from compress.importance.modules import decoder_linear, merged_rows, plain_model
from compress.importance.moments import OUTPUTS, MomentCriterion, OutputGradients, require_finite
from compress.importance.surgeon import (
    RemovalOrder,
    block_order,
    column_order,
    damage_along,
    damped_inverse,
    remove,
)
from compress.kept import NOTHING_KEPT, Kept
from compress.model.architecture import Architecture
from compress.model.layerwise import LayerWalk, gathered_grams
from compress.model.resident import resident
from compress.progress import Progress

WIDE = 4096
"""Inputs beyond which factorizations are divided among threads, though their last bits then depend on the number."""

# Shapes: N windows, S tokens, K rows of a root, C columns.


@dataclass(frozen=True, slots=True, kw_only=True)
class ObsConfig(CriterionConfig):
    """Settings of the criterion.

    Attributes:
        damping: Added to the second moment of the inputs, as a share of its mean diagonal.
        parts: Into how many parts the greedy order of the channels is taken; more is nearer to one by one.
        gradient_share: Share of the calibration windows that go through the backward pass.
    """

    damping: float = 0.01
    parts: int = 32
    gradient_share: float = 0.5

    def __post_init__(self) -> None:
        CriterionConfig.__post_init__(self)
        if not self.normalize or self.chunk_elements is not None:
            raise UsageError(
                "The criterion obs takes neither normalize nor chunk_elements.",
                "Leave them out: its scores have one unit, and one layer at a time is in memory.",
            )
        if not self.damping > 0:
            raise UsageError(f"The damping is {self.damping}.", "Give a number above zero, such as 0.01.")
        if self.parts < 1:
            raise UsageError(f"The order cannot be taken in {self.parts} parts.", "Give at least 1.")
        if not 0 < self.gradient_share <= 1:
            raise UsageError(f"The share {self.gradient_share} is not in (0, 1].", "Give 1 for all windows.")


@CRITERIA.register("obs")
class ObsCriterion(MomentCriterion):
    """Predicted rise of the loss, in nats per token, on one scale for heads, channels and all layers.

    From the full model on calibration text: the inputs of o and down, layer by layer, and the gradient of the
    loss at their outputs. No gradient of a weight is formed. See :mod:`compress.importance.surgeon`.
    """

    config_type: ClassVar[type[CriterionConfig]] = ObsConfig
    store: GramStore | None = None
    """Where to keep the second moments of the inputs, for the repair; None: nowhere."""
    kept: Kept = NOTHING_KEPT
    """Where an interrupted run finds the layers that it had scored."""

    def measure(
        self, model: nn.Module, ids_NS: Tensor, *, loss: Loss, batch: int, progress: Progress | None = None
    ) -> None:
        """Score the model's groups on calibration text; see :meth:`MomentCriterion.measure`."""
        found = rank_groups(
            model,
            self.arch,
            ids_NS,
            self.config,
            loss=loss,
            batch=batch,
            store=self.store,
            kept=self.kept,
            progress=progress,
        )
        if self._counted(found):
            self._scores = found


@torch.no_grad()
def rank_groups(
    model: nn.Module,
    arch: Architecture,
    ids_NS: Tensor,
    config: ObsConfig,
    *,
    loss: Loss,
    batch: int,
    ranked: GroupScores | None = None,
    store: GramStore | None = None,
    kept: Kept = NOTHING_KEPT,
    progress: Progress | None = None,
) -> GroupScores:
    """Rank the groups of every layer, and measure what every number of kept groups costs.

    Args:
        model: A causal language model, plain or PEFT, in evaluation mode.
        arch: Its architecture.
        ids_NS: Calibration tokens, int64 [N, S].
        config: Settings.
        loss: Summed next-token loss of a batch.
        batch: Windows per pass.
        ranked: Keep this ranking and only measure what it costs; None: the greedy order.
        store: Keep the second moments there; None: nowhere.
        kept: Has the layers that an interrupted run of the same call has ranked; the model still runs through them.
        progress: Called after every batch of the backward passes and after every layer.

    Raises:
        CompressError: There are fewer windows than one batch, or activations or gradients are not finite; names the
            linear.
    """
    device = next(model.parameters()).device
    gradients = OutputGradients(arch, seed=config.seed)
    count = max(1, round(config.gradient_share * len(ids_NS)))
    batches = ids_NS[:count].to(device).split(max(1, batch // 2))

    if kept.has("gradients"):
        gradients.load_state_dict(kept.get("gradients"), device)
    else:
        gradients.gather(model, batches, loss, progress)
        kept.put("gradients", gradients.state_dict())
    walk = LayerWalk(plain_model(model), arch, ids_NS, batch=batch)
    tokens = len(ids_NS) // batch * batch * ids_NS.shape[1]

    def rank(index: int) -> dict[str, Tensor]:
        outputs = [spec for spec in arch.linears_at(index) if spec.role in OUTPUTS]
        layer = walk.layers[index]
        scores, rise = _untouched(arch)
        if ranked is not None:
            scores = ranked.layers[index]
        with resident(layer):
            with gathered_grams(layer, dict.fromkeys(outputs)) as grams:
                walk.advance(index)
            weights = {
                spec: merged_rows(
                    decoder_linear(model, arch, index, spec), spec, arch.module_name(index, spec)
                ).rows(slice(None))
                for spec in outputs
                if (arch.prunable_heads if spec.role == "o" else arch.prunable_channels)
            }
        for spec, gram_CC in grams.items():
            require_finite(gram_CC, f"The inputs of {arch.module_name(index, spec)}")
        if store is not None:
            store.put(index, grams)
        found: dict[str, tuple[LayerScores, LayerRise]] = {}

        def branches() -> Iterator[_Branch]:
            for spec in sorted(weights, key=lambda spec: -len(grams[spec])):
                yield _Branch(
                    role="o" if spec.role == "o" else "down",
                    weight_KC=gradients.root(index, spec) @ weights[spec].double(),
                    gram_CC=grams.pop(spec).div_(tokens),
                    arch=arch,
                    config=config,
                    scores=scores,
                    rise=rise,
                    greedy=ranked is None,
                )

        def keep(branch: _Branch, result: tuple[LayerScores, LayerRise]) -> None:
            found[branch.role] = result

        if device.type == "cpu" and max(len(gram) for gram in grams.values()) <= WIDE:
            LocalEngine(2).run(_ranked, branches(), keep)
        else:
            for branch in branches():
                keep(branch, _ranked(branch))
        return _joined(found, scores, rise).to_tensors()

    layers: list[LayerScores] = []
    rises: list[LayerRise] = []
    for index in range(arch.layers):
        name = f"layer-{index:04d}"
        if kept.has(name):
            walk.advance(index)
        found = GroupScores.from_tensors(kept.tensors(name, partial(rank, index)))
        layers += found.layers if ranked is None else [ranked.layers[index]]
        rises += found.rises or ()
        if progress is not None:
            progress(index + 1, arch.layers, f"layer {index}")
    return GroupScores(layers=tuple(layers), rises=tuple(rises))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Branch:
    """Attention or MLP of a layer, to be ranked: what goes in, and what is known of the layer without it."""

    role: Literal["o", "down"]
    weight_KC: Tensor
    gram_CC: Tensor
    arch: Architecture
    config: ObsConfig
    scores: LayerScores
    rise: LayerRise
    greedy: bool


def _ranked(branch: _Branch) -> tuple[LayerScores, LayerRise]:
    inverse_CC = damped_inverse(branch.gram_CC, branch.config.damping)
    given = branch.weight_KC, inverse_CC
    if branch.role == "o":
        return _heads(*given, branch.arch, branch.scores, branch.rise, greedy=branch.greedy)
    return _channels(*given, branch.config, branch.scores, branch.rise, greedy=branch.greedy)


def _joined(
    found: Mapping[str, tuple[LayerScores, LayerRise]], scores: LayerScores, rise: LayerRise
) -> GroupScores:
    """Heads of the one branch, channels of the other; of one that was not ranked, what was known before."""
    heads, heads_rise = found.get("o", (scores, rise))
    channels, channels_rise = found.get("down", (scores, rise))
    both = LayerScores(kv_groups=heads.kv_groups, channels=channels.channels, query_heads=heads.query_heads)
    return GroupScores(
        layers=(both,),
        rises=(LayerRise(attention=heads_rise.attention, channels=channels_rise.channels),),
    )


def head_order(weight_KC: Tensor, inverse_CC: Tensor, arch: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the KV groups and query heads of one layer, and what every number of them kept costs.

    Groups are ranked by a greedy order of whole groups. Heads inside groups are ranked by one in which every
    group loses a head before any loses the next.

    Args:
        weight_KC: Root of the output curvature times the weight of o, float64.
        inverse_CC: Damped inverse of the second moment of its inputs.
        arch: The architecture.

    Returns:
        Scores [kv_heads], scores [heads], and the rise table of :class:`LayerRise`.
    """
    queries, width = arch.queries_per_group, arch.head_dim
    columns = torch.arange(arch.heads * width, device=weight_KC.device)
    groups = block_order(weight_KC, inverse_CC, list(columns.split(queries * width)))
    rise = torch.full((arch.kv_heads + 1, queries + 1), float(groups.damage[-1]), dtype=torch.float64)
    heads = torch.zeros(arch.heads, dtype=torch.float64)
    for gone in range(arch.kv_heads):
        kept = arch.kv_heads - gone
        rise[kept, queries] = groups.damage[gone]
        if queries > 1:
            sets = [list(range(group * queries, (group + 1) * queries)) for group in range(kept)]
            order = block_order(
                weight_KC, inverse_CC, list(columns[: kept * queries * width].split(width)), sets
            )
            rise[kept, 1:queries] = groups.damage[gone] + order.damage[kept : kept * queries : kept].flip(0)
            if gone == 0:
                heads[order.units] = _steps(order)
        if kept > 1:
            place = sorted(groups.units[gone:].tolist()).index(int(groups.units[gone]))
            first = place * queries * width
            _, weight_KC, inverse_CC = remove(weight_KC, inverse_CC, columns[first : first + queries * width])
    scores = unit_scores(groups)
    return scores, scores if queries == 1 else heads, rise


def unit_scores(order: RemovalOrder) -> Tensor:
    """Score of every unit, float64 [U]: the cost of its step, never below an earlier one's, so that ranks nest."""
    scores = torch.zeros(len(order.units), dtype=torch.float64)
    scores[order.units] = _steps(order)
    return scores


def _steps(order: RemovalOrder) -> Tensor:
    steps = order.damage.diff().cummax(dim=0).values
    return steps * (1 + 1e-9 * torch.arange(1, len(steps) + 1, dtype=torch.float64))


def _heads(
    weight_KC: Tensor,
    inverse_CC: Tensor,
    arch: Architecture,
    scores: LayerScores,
    rise: LayerRise,
    *,
    greedy: bool,
) -> tuple[LayerScores, LayerRise]:
    if greedy:
        kv_groups, query_heads, attention = head_order(weight_KC, inverse_CC, arch)
        scores = LayerScores(kv_groups=kv_groups, channels=scores.channels, query_heads=query_heads)
    else:
        attention = _ranked_heads(weight_KC, inverse_CC, arch, scores)
    return scores, LayerRise(attention=attention, channels=rise.channels)


def _ranked_heads(weight_KC: Tensor, inverse_CC: Tensor, arch: Architecture, scores: LayerScores) -> Tensor:
    """The rise table [K + 1, Q + 1] where groups, and heads inside them, go by ``scores``."""
    queries, width = arch.queries_per_group, arch.head_dim
    table = torch.zeros(arch.kv_heads + 1, queries + 1, dtype=torch.float64)
    groups = scores.kv_groups.sort(descending=True, stable=True).indices
    heads = scores.query_heads.view(arch.kv_heads, queries).sort(dim=1, descending=True, stable=True).indices
    every = torch.arange(arch.heads * width).view(arch.kv_heads, queries, width)
    for kept in range(arch.kv_heads + 1):
        for each in range(queries + 1):
            gone = torch.ones(arch.kv_heads, queries, dtype=torch.bool)
            for group in groups[:kept].tolist():
                gone[group, heads[group, :each]] = False
            columns = every[gone].flatten().to(weight_KC.device)
            table[kept, each] = damage_along(weight_KC, inverse_CC, columns)[-1]
    return table


def _channels(
    weight_KC: Tensor,
    inverse_CC: Tensor,
    config: ObsConfig,
    scores: LayerScores,
    rise: LayerRise,
    *,
    greedy: bool,
) -> tuple[LayerScores, LayerRise]:
    if greedy:
        order = column_order(weight_KC, inverse_CC, block=max(1, weight_KC.shape[1] // config.parts))
        damage = order.damage
        scores = LayerScores(
            kv_groups=scores.kv_groups, channels=unit_scores(order), query_heads=scores.query_heads
        )
    else:
        worst_first = scores.channels.sort(descending=True, stable=True).indices.flip(0)
        damage = damage_along(weight_KC, inverse_CC, worst_first.to(weight_KC.device))
    return scores, LayerRise(attention=rise.attention, channels=damage.flip(0))


def _untouched(arch: Architecture) -> tuple[LayerScores, LayerRise]:
    """Zeros, for branches that cannot be pruned."""
    return (
        LayerScores(
            kv_groups=torch.zeros(arch.kv_heads, dtype=torch.float64),
            channels=torch.zeros(arch.channels, dtype=torch.float64),
            query_heads=torch.zeros(arch.heads, dtype=torch.float64),
        ),
        LayerRise(
            attention=torch.zeros(arch.kv_heads + 1, arch.queries_per_group + 1, dtype=torch.float64),
            channels=torch.zeros(arch.channels + 1, dtype=torch.float64),
        ),
    )
