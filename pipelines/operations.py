"""How much every stage computes, reads and writes: floating-point operations and bytes, counted from its passes.

A token's forward pass takes ``2 W`` operations, ``2 S Q L`` more in causal attention over S tokens, and ``2 V H`` in
the output matrix; backward to the activations takes as many again, gradients of weights as many once more. With
``recompute`` the layers' part of the forward pass is counted twice. What is no product (rounding, unpacking codes,
norms, the optimizer) is not counted: times made from this are lower bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.evaluate.speed import Speed
from compress.evaluate.training_memory import adapter_parameters
from compress.importance import CRITERIA
from compress.importance.moments import OUTPUTS, SKETCH_ROWS
from compress.importance.obs import ObsConfig
from compress.model.architecture import Architecture
from compress.model.recompute import can_recompute
from compress.pipelines.hessian_walk import GRADIENT_SHARE, GRADIENT_TOKENS, TABLE_TOKENS
from compress.pipelines.phase import Ground
from compress.pipelines.plan_models import PlannedModel
from compress.pipelines.prune_trial import TRIAL_SHARE, TRIAL_TOKENS
from compress.pipelines.settings import (
    AlignSettings,
    LoopSettings,
    PruneSettings,
    QuantizeSettings,
    TrainSettings,
)
from compress.pipelines.training import parse_adapter_targets

OBS_SHARE = ObsConfig().gradient_share
"""Share of the calibration tokens that ``obs`` sends through the backward pass."""
DECODED = 8 * 3
"""Tokens that ``eval`` decodes for each model, warm-up included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a stage computes and moves.

    Attributes:
        verb: The stage.
        products: Operations in the compute dtype.
        singles: Operations in float32, on the host.
        doubles: Operations in float64.
        read: Bytes of weights read.
        written: Bytes written.
    """

    verb: str
    products: float = 0.0
    singles: float = 0.0
    doubles: float = 0.0
    read: float = 0.0
    written: float = 0.0

    def seconds(self, speed: Speed) -> float:
        """At the rates that were measured; at least so long."""
        return (
            self.products / speed.products
            + self.singles / speed.singles
            + self.doubles / speed.doubles
            + self.read / speed.read
            + self.written / speed.write
        )


def forward(arch: Architecture, tokens: float, length: int, *, head: bool = True) -> float:
    """Operations of a forward pass over ``tokens`` tokens in windows of ``length``."""
    queries = sum(arch.at(i).heads * arch.head_dim for i in range(arch.layers))
    each = 2 * arch.decoder_linear_parameters() + 2 * length * queries
    return tokens * float(each + (2 * arch.vocab * arch.hidden if head else 0))


def prune_work(full: PlannedModel, small: PlannedModel, settings: PruneSettings, ground: Ground) -> Work:
    """Scoring, trials, refit, repair training and two perplexities.

    ``obs``, each layer: ``2 C^3 + (1 + 2/3 KV) Q^3`` in float64 for inverses and removal orders, ``2 K C (H + C)`` for
    the roots K of the output curvature; a refit ``K^3 / 3 + 2 H K (C + K)`` for K kept columns of C.
    """
    arch, length = full.arch, ground.length
    tokens = max(1, settings.calibration_tokens // length) * length
    needs = CRITERIA.get(settings.criterion).needs
    products = singles = doubles = 0.0
    loads = 1
    queries = arch.heads * arch.head_dim
    trains = needs == "adapters" or settings.repair == "lora"
    if trains:
        products += _trained(arch, settings, settings.rank)
    elif needs == "moments":
        rows = min(arch.hidden, SKETCH_ROWS)
        products += 2 * forward(arch, OBS_SHARE * tokens, length) + forward(arch, tokens, length, head=False)
        products += _again(arch, settings, OBS_SHARE * tokens, length)
        singles += arch.layers * tokens * (queries**2 + arch.channels**2 + OBS_SHARE * 4 * rows * arch.hidden)
        orders = 2.0 * arch.channels**3 + (1 + 2 / 3 * arch.kv_heads) * queries**3
        roots = 2.0 * rows * (queries + arch.channels) * (arch.hidden + arch.channels)
        doubles += arch.layers * (orders + roots)
    elif needs == "gradients":
        products += 3 * forward(arch, tokens, length) + _again(arch, settings, tokens, length)
    elif needs == "activations":
        products += forward(arch, tokens, length, head=False)
    if settings.repair == "refit" and not trains:
        rounds = 1
        if settings.trials > 1:
            rounds += settings.trials
            trial = max(TRIAL_TOKENS, TRIAL_SHARE * settings.calibration_tokens)
            products += rounds * forward(arch, trial, length)
        doubles += rounds * _refit(arch, small.arch)
    if settings.repair_steps:
        products += _trained(small.arch, settings, settings.repair_rank, steps=settings.repair_steps)
        if settings.repair_loss != "text":
            products += forward(arch, _tokens(settings, settings.repair_steps), settings.sequence)
            loads += 1
    scored = ground.windows * length
    products += forward(arch, scored, length) + forward(small.arch, scored, length)
    copies = 2 if settings.repair_steps else 1
    return Work(
        verb="prune",
        products=products,
        singles=singles,
        doubles=doubles,
        read=(loads + 2) * full.weight_bytes + (2 + copies) * small.weight_bytes,
        written=(copies + 1) * small.file_bytes,
    )


def align_work(small: PlannedModel, full: PlannedModel, settings: AlignSettings, ground: Ground) -> Work:
    """Three passes' worth a token, the teacher's one more; one perplexity."""
    tokens = _tokens(settings, settings.steps)
    products = 3 * forward(small.arch, tokens, settings.sequence)
    products += _again(small.arch, settings, tokens, settings.sequence)
    if settings.loss != "text":
        products += forward(full.arch, tokens, settings.sequence)
    products += forward(small.arch, ground.windows * ground.length, ground.length)
    saves = settings.steps / max(1, min(50, settings.steps // 4))
    return Work(
        verb="align",
        products=products,
        read=3 * small.weight_bytes,
        written=small.file_bytes + saves * 12 * small.parameters,
    )


def quantize_work(
    model: PlannedModel, small: PlannedModel, settings: QuantizeSettings, ground: Ground, *, known: bool
) -> Work:
    """Sensitivities, two walks, and for each matrix [O, I] rounding with feedback and descent.

    ``6 O I^2`` in float32 with the objective ``hessian`` (twice a rounding and a pass of descent, an I-wide product
    each, half of it zero), ``I^3 / 3`` in float64 for every factor of second moments.
    """
    arch, length = model.arch, ground.length
    tokens = max(1, settings.calibration_tokens // length) * length
    products = singles = doubles = 0.0
    loads = 0
    if settings.objective == "hessian":
        loads = 3
        some = min(GRADIENT_SHARE * tokens, GRADIENT_TOKENS)
        short = min(tokens, TABLE_TOKENS)
        passes = 3 if can_recompute(model.input.checkpoint.config) else 2
        products += passes * forward(arch, some, length) + forward(
            arch, short + 2 * tokens, length, head=False
        )
        for layer in range(arch.layers):
            here = arch.at(layer)
            for spec in arch.linears_at(layer):
                out, into = here.linear_shape(spec)
                singles += 6.0 * out * into**2 + (short + tokens) * into**2 / 2
                doubles += 2 * into**3 / 3
    elif settings.objective == "fisher":
        loads = 1
        products += 2 * forward(arch, tokens, length) + tokens * 2.0 * model.linears
    scored = ground.windows * length
    products += forward(arch, scored, length) * (1 if known else 2)
    return Work(
        verb="quantize",
        products=products,
        singles=singles,
        doubles=doubles,
        read=(loads + 2 + (not known)) * model.weight_bytes + 2 * small.weight_bytes,
        written=2 * small.weight_bytes,
    )


def train_work(model: PlannedModel, settings: TrainSettings, ground: Ground) -> Work:
    """Two passes' worth a token, six operations for each adapter parameter; the held-out loss twice."""
    head = "lm_head" in parse_adapter_targets(settings.adapter_targets)
    scored = 2 * ground.windows * settings.sequence
    adapter = adapter_parameters(model.arch, settings.rank, head=head)
    saves = settings.steps / max(1, min(50, settings.steps // 4))
    return Work(
        verb="train",
        products=_trained(model.arch, settings, settings.rank, head=head)
        + forward(model.arch, scored, settings.sequence),
        read=2 * model.weight_bytes,
        written=(12 * saves + 4) * adapter,
    )


def recover_work(full: PlannedModel, adapter: int) -> Work:
    """The full model is read twice, the adapter written once."""
    return Work(verb="recover", read=2 * full.weight_bytes, written=4.0 * adapter)


def eval_work(
    entries: list[tuple[PlannedModel, int]],
    ground: Ground,
    *,
    length: int,
    windows: int,
    reference: tuple[PlannedModel, int] | None = None,
    kl_windows: int = 0,
) -> Work:
    """For each model the test windows, the held-out windows, three prompts and the tokens after them.

    With a reference, ``kl_windows`` more for each other model and as many for the reference beside it.
    """
    tokens = (windows + ground.windows + 3) * length + DECODED
    products = sum(forward(m.arch, tokens, length) + 2.0 * adapter * tokens for m, adapter in entries)
    read = sum(m.weight_bytes + 4.0 * adapter for m, adapter in entries)
    others = [] if reference is None or not kl_windows else [each for each in entries if each != reference]
    if reference is not None and others:
        again = [*others, *(reference for _ in others)]
        compared = min(kl_windows, windows) * length
        products += sum(forward(m.arch, compared, length) + 2.0 * a * compared for m, a in again)
        read += sum(m.weight_bytes + 4.0 * a for m, a in (*others, reference))
    return Work(verb="eval", products=products, read=read)


def _tokens(settings: LoopSettings, steps: int) -> float:
    return float(steps * settings.micro_batch * settings.accumulation * settings.sequence)


def _trained(
    arch: Architecture,
    settings: PruneSettings | TrainSettings,
    rank: int,
    *,
    steps: int | None = None,
    head: bool = False,
) -> float:
    tokens = _tokens(settings, settings.steps if steps is None else steps)
    adapter = adapter_parameters(arch, rank, head=head)
    again = _again(arch, settings, tokens, settings.sequence)
    return 2 * forward(arch, tokens, settings.sequence) + again + 6.0 * adapter * tokens


def _again(arch: Architecture, settings: LoopSettings, tokens: float, length: int) -> float:
    """Operations of the layers when the backward pass runs them once more."""
    return forward(arch, tokens, length, head=False) if settings.recompute else 0.0


def _refit(arch: Architecture, small: Architecture) -> float:
    total = 0.0
    for layer in range(arch.layers):
        for spec in arch.linears_at(layer):
            (rows, columns), kept = arch.linear_shape(spec), small.at(layer).linear_shape(spec)[1]
            if spec.role in OUTPUTS and kept < columns:
                total += kept**3 / 3 + 2.0 * rows * kept * (columns + kept)
    return total
