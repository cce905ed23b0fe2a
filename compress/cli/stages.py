"""The verbs that make a model or an adapter, as declarations of their options."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.options import ADAPTER, CLUSTER, EVERYWHERE, LOOP
from compress.cli.verb import verb


@verb("prune", LOOP, ADAPTER, CLUSTER, EVERYWHERE)
def prune(
    ratio: Annotated[
        float | None, typer.Option(help="Fraction of the decoder linear parameters to remove (default 0.5).")
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="Instead of a ratio: parameters of the result, such as 80M.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Instead of a ratio: weight bytes of the result, such as 150MB or 0.5GiB."),
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="Importance: obs, lora, taylor, wanda, flap, magnitude or random.")
    ] = None,
    criterion_options: Annotated[
        str | None, typer.Option(help="Options of the criterion, such as element=abs,momentum=0.8.")
    ] = None,
    targets: Annotated[str | None, typer.Option(help="What may go: heads, mlp, or heads,mlp.")] = None,
    head_unit: Annotated[
        str | None,
        typer.Option(
            help="group: whole KV groups; query: as many query heads from every group; auto: what hurts less."
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="uniform: all layers alike, loads everywhere; local, global or allocated: layers differ, "
            "loads with compress.load_model; semi or unstructured: single weights become zero, sizes stay."
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Shape semi: N:M, so many of M neighbouring weights stay.")
    ] = None,
    multiple: Annotated[
        int | None,
        typer.Option(help="Channel counts are multiples of this (default 64, less on tiny models)."),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Shape uniform: so many shapes of nearly the asked size are tried on text."),
    ] = None,
    skip_first: Annotated[
        int | None,
        typer.Option(help="Shapes local, semi and unstructured: first layers left whole (default: a tenth)."),
    ] = None,
    skip_last: Annotated[
        int | None, typer.Option(help="Shapes local, semi and unstructured: last layers left whole.")
    ] = None,
    ratio_of: Annotated[
        str | None,
        typer.Option(
            help="Shapes local and unstructured: model: the whole loses the ratio; layers: each pruned layer does; "
            "parts (local): its heads and its channels do, each rounded by itself, as plan --loram counts."
        ),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="Shape allocated: highs, cbc, dynamic or lagrangian.")
    ] = None,
    one_shot: Annotated[
        bool | None, typer.Option("--one-shot", help="Score during training, prune once at its end.")
    ] = None,
    int8: Annotated[
        bool | None, typer.Option("--int8", help="Hold the frozen weights in 8 bit while training scores.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens that scoring without training and the refit read.")
    ] = None,
    repair: Annotated[
        str | None,
        typer.Option(
            help="refit: o and down are refitted to the full model; bias: the mean of what is removed is added; "
            "lora: the scoring adapter is folded in; none."
        ),
    ] = None,
    repair_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of repair training after the cut.")
    ] = None,
    repair_lr: Annotated[float | None, typer.Option(help="Peak learning rate of repair training.")] = None,
    repair_rank: Annotated[int | None, typer.Option(help="Adapter rank of repair training.")] = None,
    repair_loss: Annotated[
        str | None,
        typer.Option(help="distill: towards the full model's predictions; text: towards the text; both."),
    ] = None,
    repair_features: Annotated[
        float | None, typer.Option(help="Weight of the hidden states in distillation; 0 leaves them out.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Prune and repair in so many rounds of equal shares.")
    ] = None,
) -> None:
    """Remove attention heads and MLP channels and repair the rest; writes a smaller checkpoint."""


@verb("align", LOOP, EVERYWHERE)
def align(
    loss: Annotated[
        str | None,
        typer.Option(
            help="text: the text's next token; distill: the full model's predictions; both: half of each."
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="adamw, or galore: moments in small subspaces (needs compress-llm\\[galore])."),
    ] = None,
) -> None:
    """Train the pruned model's own weights on text, the output matrix frozen, before adapters are trained."""


@verb("quantize", CLUSTER, EVERYWHERE)
def quantize(
    budget: Annotated[
        str | None,
        typer.Option(
            help="Stored bits per weight of the linears (2.75bit), or weight file size (90MB, 0.5GiB)."
        ),
    ] = None,
    budget_includes: Annotated[
        str | None,
        typer.Option(help="factors: the low-rank factors count; none: they do not (the paper's convention)."),
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Rank of the low-rank part: auto (per matrix) or a number.")
    ] = None,
    factors: Annotated[
        str | None, typer.Option(help="How the low-rank factors are stored: 8bit or 16bit.")
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="keep; 8bit: 8 bits for the embedding and the output matrix; menu: they are chosen for under the "
            "budget like every matrix."
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="any, or vllm: q, k and v share a format and a rank, and so do gate and up."),
    ] = None,
    solver: Annotated[str | None, typer.Option(help="highs, cbc, dynamic or lagrangian.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="hessian: least output error on calibration text; fisher: least weight error, weighed by the loss's "
            "gradients there; frobenius: least weight error."
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Calibration tokens (objectives hessian and fisher).")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Most alternations of rounding and low-rank fit (objectives fisher and frobenius)."
        ),
    ] = None,
    menu: Annotated[
        str | None, typer.Option(help="Formats to choose from: quick, standard or paper.")
    ] = None,
) -> None:
    """Store every decoder matrix as quantized + low-rank, bits and ranks chosen under one budget."""


@verb("train", LOOP, ADAPTER, EVERYWHERE)
def train(
    method: Annotated[
        str | None,
        typer.Option(
            help="lora: a fresh adapter; lq: start from the quantized model's own factors; pissa: start from the "
            "leading singular directions of the weights."
        ),
    ] = None,
    adapter_targets: Annotated[
        str | None,
        typer.Option(
            help="all (every decoder linear), lm_head, or roles such as q,v,down; separated by commas."
        ),
    ] = None,
    rslora: Annotated[
        bool | None, typer.Option("--rslora", help="Scale by alpha / sqrt(rank) instead of alpha / rank.")
    ] = None,
) -> None:
    """Train a low-rank adapter on the chain's current (small) model."""


@verb("recover", EVERYWHERE)
def recover(
    onto: Annotated[
        str | None, typer.Option(help="Full model to recover onto (default: the chain's original model).")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder of a LoRA trained elsewhere on the small model, instead of the chain's."),
    ] = None,
    merge: Annotated[
        bool | None, typer.Option("--merge", help="Also write the full model with the adapter merged in.")
    ] = None,
    compress_rank: Annotated[
        int | None, typer.Option(help="Re-compress the recovered adapter to this rank (default: exact).")
    ] = None,
) -> None:
    """Put the adapter trained on the small model back onto the full one (trains first when there is none)."""
