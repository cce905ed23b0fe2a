"""What every stage but ``prune`` holds at its peak, in memory and on disk, counted from what the stages do.

`compress.pipelines.prune_footprint` has that one.

Symbols: P parameters of the model a stage works on, W its decoder weights, L layers, H hidden size, V vocabulary,
Q width of all query heads, C MLP channels, e bytes of a number in the computation (2 for bfloat16, 4 for float32),
s of a stored one, T tokens of a pass, N calibration tokens. A stage is a sequence of phases; its peak is the largest
sum of a phase's terms. ``packed`` stands for the bytes of codes, scales and factors of a quantized model.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from compress.adapters.batched import LIMIT as WINDOW_BYTES
from compress.adapters.optimizer import galore_numbers, is_projected
from compress.evaluate.perplexity import CHUNK_ELEMENTS
from compress.evaluate.training_memory import (
    activation_bytes,
    adapter_parameters,
    layers_kept,
)
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint
from compress.model.recompute import can_recompute
from compress.pipelines.fisher_files import LIMIT as FISHER_LIMIT
from compress.pipelines.hessian_walk import GRADIENT_BATCH, TABLE_TOKENS
from compress.pipelines.matrices import SHARED_INPUT
from compress.pipelines.phase import (
    AGAIN,
    SHARD_BYTES,
    Footprint,
    Ground,
    Phase,
    gradients,
    held,
    hidden_states,
    largest,
    loading,
    loss_bytes,
    one_layer,
    reopening,
    scoring,
    spilled,
    training,
    unpacked,
)
from compress.pipelines.plan_models import PlannedModel
from compress.pipelines.settings import AlignSettings, QuantizeSettings, TrainSettings
from compress.pipelines.training import parse_adapter_targets
from compress.quantize.fisher_collect import layer_rounds

FACTORS_BESIDE = 1.02
"""A large matrix with its factors, in matrices."""


def align_footprint(
    small: PlannedModel, full: PlannedModel, settings: AlignSettings, ground: Ground
) -> Footprint:
    """``align``: ``4 P`` float32 weights, ``4 P'`` gradients and ``8 P'`` moments of all P' but the output matrix.

    Backward: activations as with adapters of rank 0, and ``e W`` rounded weights where e is 2. Update: ``4 P'`` roots
    of all second moments at once. With a teacher ``e`` times the full model. GaLore: of every projected matrix of sides
    m >= n moments ``8 r m`` and a basis ``4 r n`` instead (r 128), and one matrix after the other is decomposed,
    ``4 (2 m n + 5 n^2)``, or one tensor that is not projected updated, 8 bytes a number. With ``recompute`` layers
    keep their inputs, which are float32, and one of them has its activations.
    Disk: the state, ``4 P'`` and what the optimizer holds, twice while it is replaced, and the result.
    """
    arch, e, tokens = small.arch, ground.itemsize, settings.micro_batch * settings.sequence
    trained = small.parameters - arch.vocab * arch.hidden
    optimizer, update = 8.0 * trained, Phase(name="update", device={"update": 4.0 * trained})
    if settings.optimizer == "galore":
        optimizer, update = _galore(arch, trained)
    held = {"weights": 4.0 * small.parameters, "gradients": 4.0 * trained, "optimizer": optimizer}
    if settings.loss != "text":
        held["teacher"] = full.loaded(e)
    layers = [activation_bytes(arch.at(i), 0, dropout=False, itemsize=e) for i in range(arch.layers)]
    kept = layers_kept(arch, layers, 4, recompute=settings.recompute)
    backward = {**held, "activations": float(tokens * kept), "loss": loss_bytes(arch, tokens)}
    if e < 4:
        backward["rounded weights"] = float(e * small.linears)
    phases = (
        loading(small, ground, 4),
        Phase(name="backward" + AGAIN if settings.recompute else "backward", device=backward),
        Phase(name=update.name, device={**held, **update.device}),
        scoring(small, ground, length=ground.length, windows=ground.windows),
        *reopening(small, ground),
    )
    size = small.file_bytes
    state = 2.0 * (4.0 * trained + optimizer)
    return Footprint(verb="align", phases=phases, disk_peak=state + size, disk_kept=size)


def _galore(arch: Architecture, trained: int) -> tuple[float, Phase]:
    """What GaLore holds for ``trained`` numbers, and the step that takes the most beside it."""
    shapes = [arch.at(i).linear_shape(spec) for i in range(arch.layers) for spec in arch.linears_at(i)]
    projected = [shape for shape in shapes if is_projected(shape)]
    whole = trained - sum(map(prod, projected))
    numbers = 2 * whole + sum(map(galore_numbers, projected))
    decomposed = max((4 * (2 * prod(shape) + 5 * min(shape) ** 2) for shape in projected), default=0)
    embedding = 0 if arch.tied else arch.vocab * arch.hidden
    rest = max([embedding, *(prod(shape) for shape in shapes if not is_projected(shape))])
    return 4.0 * numbers, Phase(name="project", device={"update": float(max(decomposed, 8 * rest))})


def quantize_footprint(
    model: PlannedModel, small: PlannedModel, settings: QuantizeSettings, ground: Ground, *, known: bool
) -> Footprint:
    """``quantize``: the model once for sensitivities, once for error tables, once to be rounded layer by layer.

    Objective ``hessian``: for the sensitivities the inputs of layers and what one of them keeps, of one window. Then
    hidden states of at most 8,192 calibration tokens for the tables and of all for the rounding, ``N H e``; of a
    layer's distinct inputs of widths w ``16 sum(w^2) + 40 max(w^2)`` second moments and their factors, and
    ``24 max(out in)`` of a matrix at work; while rounding ``12 max(w^2) + 32 max(out in)`` and the layer unpacked,
    ``4 W / L``.
    ``fisher``: the model, one window's activations, ``4`` bytes for every weight of as many layers as 4 GiB take.
    ``frobenius``: one matrix, ``24 max(out in)``; no model.
    Each ``max`` is the sum over as many of the largest as are worked on at once.
    The end: the input where its perplexity is not known, then the quantized model in float32.
    Disk: packed layers, the result and its last shard; ``fisher`` 4 W.

    Args:
        model: The input.
        small: The same, quantized.
        settings: Objective and calibration tokens.
        ground: Of all stages.
        known: Whether the stage before has measured the input's perplexity.
    """
    arch = model.arch
    widths = _input_widths(arch)
    sizes = [[prod(arch.at(i).linear_shape(s)) for s in arch.linears_at(i)] for i in range(arch.layers)]
    at_once = max(largest(layer, ground.workers) for layer in sizes)
    matrices = {"matrices at work": 24.0 * at_once}
    phases: list[Phase] = []
    beside = 0.0
    if settings.objective == "hessian":
        count = max(1, settings.calibration_tokens // ground.length)
        short = max(1, min(settings.calibration_tokens, TABLE_TOKENS) // ground.length)
        squares = [width * width for width in widths]
        factored = largest(squares, ground.workers)
        statistics = {"input statistics": 16.0 * sum(squares) + 40.0 * factored}
        weights, again = held(model, ground), can_recompute(model.input.checkpoint.config)
        phases += [
            loading(model, ground),
            Phase(
                name="sensitivities",
                device={
                    **weights,
                    **gradients(arch, GRADIENT_BATCH * ground.length, ground, recompute=again),
                },
            ),
            Phase(
                name="error tables",
                device={**weights, "hidden states": hidden_states(arch, short, ground), **statistics},
                host=matrices,
            ),
            Phase(
                name="round",
                device={**weights, "hidden states": hidden_states(arch, count, ground), **statistics},
                host={
                    "matrices at work": 12.0 * min(ground.workers, len(sizes[0])) * max(squares)
                    + 32.0 * at_once,
                    "one layer unpacked": 4.0 * model.linears / arch.layers,
                },
            ),
        ]
    elif settings.objective == "fisher":
        beside = 4.0 * model.linears
        rounds = [
            sum(4 * prod(arch.at(i).linear_shape(s)) for i in part for s in arch.linears_at(i))
            for part in layer_rounds(arch, FISHER_LIMIT)
        ]
        whole = replace(ground, streamed=False)
        terms = {**held(model, whole), **gradients(arch, ground.length, whole)}
        phases += [
            loading(model, whole),
            Phase(name="Fisher information", device={**terms, "Fisher information": float(max(rounds))}),
            Phase(name="round", host={**matrices, "Fisher information": 8.0 * model.linears / arch.layers}),
        ]
    else:
        phases.append(Phase(name="round", host=matrices))
    if not known:
        before = scoring(model, ground, length=ground.length, windows=ground.windows)
        phases.append(Phase(name="perplexity of its input", device=before.device))
    phases.append(scoring(small, ground, length=ground.length, windows=ground.windows))
    phases += reopening(small, ground)
    size = small.file_bytes
    if settings.objective == "hessian":
        beside = spilled(arch, max(1, settings.calibration_tokens // ground.length), ground)
    peak = small.packed_bytes + size + min(SHARD_BYTES, size) + beside
    return Footprint(verb="quantize", phases=tuple(phases), disk_peak=peak, disk_kept=size)


def train_footprint(model: PlannedModel, settings: TrainSettings, ground: Ground) -> Footprint:
    """``train``: the model, ``16`` bytes for each adapter parameter, what the forward pass keeps, a chunk of logits.

    See `compress.evaluate.training_memory`. The end: the model in float32 with the adapter.
    Disk: the state, 12 bytes a parameter, twice while it is replaced, and the adapter, 4.
    """
    head = "lm_head" in parse_adapter_targets(settings.adapter_targets)
    adapter = adapter_parameters(model.arch, settings.rank, head=head)
    whole, last = replace(ground, streamed=False), loading(model, ground, 4)
    phases = (
        loading(model, whole),
        training("train", model, settings, ground.itemsize, head=head),
        Phase(
            name="record logits",
            device={**last.device, "adapters": 4.0 * adapter},
            staging=last.staging,
            pages=last.pages,
        ),
    )
    return Footprint(verb="train", phases=phases, disk_peak=28.0 * adapter, disk_kept=4.0 * adapter)


def recover_footprint(
    full: PlannedModel, adapter: int, ground: Ground, *, merged: bool = False, batched: bool = False
) -> Footprint:
    """``recover``: factors of one module at a time; then the full model in float32 with its adapter, ``4 (P + A)``.

    Once here and once in a fresh process. Models are opened on the host whatever device there is. Disk: 4 A; ``merged``
    the model too. Of that one matrix is in memory, in its own type (s) and its change in float32; ``batched`` on a
    device instead two windows of matrices on their way there and two on their way back, each a power of two bytes and
    of the size of the largest matrix at least, beside a tensor that is only copied.
    """
    here = loading(full, ground, 4, name="record logits")
    terms = {**here.device, "adapters": 4.0 * adapter}
    phases = [Phase(name=here.name, host=terms, pages=here.pages), reopening(full, ground, adapter)[1]]
    size = peak = 4.0 * adapter
    if merged:
        phases.append(Phase(name="merge", host=_merging(full.input.checkpoint, batched=batched)))
        size += full.file_bytes
        peak = size + min(SHARD_BYTES, full.file_bytes)
    return Footprint(verb="recover", phases=tuple(phases), disk_peak=peak, disk_kept=size)


def eval_footprint(
    entries: list[tuple[PlannedModel, int]],
    ground: Ground,
    *,
    length: int,
    windows: int,
    reference: tuple[PlannedModel, int] | None = None,
) -> Footprint:
    """``eval``: one model after the other, whole, each as `scoring` with its adapter; then each beside the reference.

    Compared are the two models' logits of one window, ``2 T V e``, in chunks of five float32 numbers for each logit.
    Disk: nothing to speak of.

    Args:
        entries: Models with the parameters of their adapters.
        ground: Of all stages; nothing is streamed.
        length: Tokens of a window.
        windows: Test windows.
        reference: What the others are compared with; None where nothing is compared.
    """
    phases = []
    ground = replace(ground, streamed=False)
    for model, adapter in entries:
        found = scoring(model, ground, length=length, windows=windows, adapter=adapter)
        name = _with_adapter(model, adapter)
        phases += [loading(model, ground, name=f"load {name}"), Phase(name=name, device=found.device)]
    if reference is not None:
        for entry in entries:
            if entry != reference:
                phases += _beside(entry, reference, ground, length)
    return Footprint(verb="eval", phases=tuple(phases), disk_peak=0.0, disk_kept=0.0)


def _with_adapter(model: PlannedModel, adapter: int) -> str:
    return f"{model.name} + adapter" if adapter else model.name


def _beside(
    entry: tuple[PlannedModel, int], reference: tuple[PlannedModel, int], ground: Ground, length: int
) -> list[Phase]:
    """A model loaded while the reference is in memory, then both at work on one window."""
    (model, adapter), (other, others) = entry, reference
    arch, e = model.arch, ground.itemsize
    name = f"{_with_adapter(model, adapter)} beside {_with_adapter(other, others)}"
    there = {"reference": other.loaded(e) + 4.0 * others}
    alone = loading(model, ground, name=f"load {name}")
    logits = length * arch.vocab
    work = max(one_layer(each.arch, length, e) + unpacked(each) for each in (model, other))
    terms = {
        **held(model, ground),
        **there,
        "adapters": 4.0 * adapter,
        "logits": 2.0 * e * logits + 20.0 * min(CHUNK_ELEMENTS, logits),
        "one layer": work,
    }
    return [replace(alone, device={**alone.device, **there}), Phase(name=name, device=terms)]


def _merging(checkpoint: Checkpoint, *, batched: bool) -> dict[str, float]:
    widest = max(checkpoint.nbytes(name) for name in checkpoint.names)
    if not batched:
        sums = max(checkpoint.nbytes(name) + 4.0 * prod(checkpoint.shape(name)) for name in checkpoint.names)
        return {"one matrix": sums}
    # factors lie beside the matrix on its way there, a hundredth of its size or two
    there, back = (
        max(WINDOW_BYTES, 1 << (size - 1).bit_length()) for size in (int(FACTORS_BESIDE * widest), widest)
    )
    return {"windows of matrices": 2.0 * (there + back), "one matrix": float(widest)}


def _input_widths(arch: Architecture) -> list[int]:
    """Widths of the distinct inputs of a layer's linears."""
    found: dict[str, int] = {}
    for spec in arch.linears_at(0):
        found.setdefault(SHARED_INPUT.get(spec.role, spec.name), arch.at(0).linear_shape(spec)[1])
    return list(found.values())
