"""Optimal brain surgeon on groups: how much the loss rises when a group goes and the rest is refitted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress.engine import LOCAL, Engine, LocalEngine, single_thread
from compress.errors import UsageError
from compress.heap import give_back
from compress.importance import CRITERIA
from compress.importance.base import CriterionConfig, GroupScores, Loss
from compress.importance.branches import Branch, Results, ranked_branch, untouched
from compress.importance.gram_store import GramStore
from compress.importance.modules import decoder_linear, merged_rows, plain_model
from compress.importance.moments import OUTPUTS, MomentCriterion, OutputGradients, require_finite
from compress.kept import NOTHING_KEPT, Kept
from compress.model.architecture import Architecture, LinearSpec
from compress.model.layerwise import LayerWalk, gathered_grams
from compress.model.recompute import recomputing
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
    engine: Engine = LOCAL
    """Who ranks the groups of a branch."""

    def measure(
        self,
        model: nn.Module,
        ids_NS: Tensor,
        *,
        loss: Loss,
        batch: int,
        recompute: bool = False,
        progress: Progress | None = None,
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
            engine=self.engine,
            recompute=recompute,
            progress=progress,
        )
        if self._counted(found):
            self._scores = found


def is_ranked_apart(arch: Architecture) -> bool:
    """Whether each branch is a piece of work for one thread; wider ones need several."""
    return max(arch.linear_shape(spec)[1] for spec in arch.linears if spec.role in OUTPUTS) <= WIDE


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
    engine: Engine = LOCAL,
    recompute: bool = False,
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
        engine: Ranks branches, of several layers side by side where it is a cluster. One that is on a GPU, or so wide
            that threads share it, is ranked here by whoever runs the model.
        recompute: Run layers again in backward passes instead of keeping their activations.
        progress: Called after every batch of the backward passes and after every layer.

    Raises:
        UsageError: Layers are to be run again, and cannot.
        CompressError: There are fewer windows than one batch, or activations or gradients are not finite; names the
            linear.
    """
    device = next(model.parameters()).device
    gradients = OutputGradients(arch, seed=config.seed)
    count = max(1, round(config.gradient_share * len(ids_NS)))
    batches = ids_NS[:count].to(device).split(1)  # of all that scoring does this takes the most memory

    if kept.has("gradients"):
        gradients.load_state_dict(kept.get("gradients"), device)
    else:
        with recomputing(model) if recompute else nullcontext():
            gradients.gather(model, batches, loss, progress)
        give_back()  # the walk that follows needs little
        kept.put("gradients", gradients.state_dict())
    walk = LayerWalk(plain_model(model), arch, ids_NS, batch=batch)
    tokens = len(ids_NS) // batch * batch * ids_NS.shape[1]

    results = Results(kept)

    def look(index: int) -> dict[LinearSpec, tuple[Tensor, Tensor]]:
        """Run the model through a layer: weight and second moment of the inputs of what is to be ranked there."""
        if results.known(index):
            walk.advance(index)
            return {}
        outputs = [spec for spec in arch.linears_at(index) if spec.role in OUTPUTS]
        layer = walk.layers[index]
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
        return {spec: (weight, grams[spec]) for spec, weight in weights.items()}

    def branches(index: int, seen: dict[LinearSpec, tuple[Tensor, Tensor]]) -> Iterator[Branch]:
        """What there is to rank, the larger branch first."""
        if results.known(index):
            return
        scores, rise = untouched(arch)
        if ranked is not None:
            scores = ranked.layers[index]
        results.expect(index, len(seen), scores, rise)
        for spec in sorted(seen, key=lambda spec: -len(seen[spec][1])):
            weight_OC, gram_CC = seen.pop(spec)
            yield Branch(
                index=index,
                role="o" if spec.role == "o" else "down",
                weight_KC=gradients.root(index, spec) @ weight_OC.double(),
                gram_CC=gram_CC.div_(tokens),
                arch=arch,
                damping=config.damping,
                parts=config.parts,
                scores=scores,
                rise=rise,
                greedy=ranked is None,
            )

    def everywhere() -> Iterator[Branch]:
        """Branches of layer after layer, as far as somebody has time for them."""
        for index in range(arch.layers):
            seen = look(index)
            with single_thread():  # as here, where one ranks
                given = list(branches(index, seen))
            while given:
                yield given.pop(0)
            if progress is not None:
                progress(index + 1, arch.layers, f"layer {index}")

    apart = device.type == "cpu" and is_ranked_apart(arch)
    if apart and not isinstance(engine, LocalEngine):
        engine.run(ranked_branch, everywhere(), results.keep)
    else:
        for index in range(arch.layers):
            seen = look(index)
            if apart:
                engine.at_most(2).run(ranked_branch, branches(index, seen), results.keep)
            else:
                for branch in branches(index, seen):
                    results.keep(branch, ranked_branch(branch))
            if progress is not None:
                progress(index + 1, arch.layers, f"layer {index}")
    found = results.in_order()
    return GroupScores(
        layers=tuple(layer for each in found for layer in each.layers) if ranked is None else ranked.layers,
        rises=tuple(rise for each in found for rise in each.rises or ()),
    )
