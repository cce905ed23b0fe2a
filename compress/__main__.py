"""The command line: ``compress VERB``; reads arguments, runs one pipeline, prints its result."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from compress.errors import CompressError
from compress.pipelines.settings import DEFAULT_RUN, Common

app = typer.Typer(
    name="compress",
    help="Make language models small and keep them good: prune, quantize, train small, recover onto the full model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: compress prune --ratio 0.5, compress quantize --budget 2.75bit, compress recover, "
    "compress eval",
)

COMMON = "Common options"
TRAINING = "Training"
Run = Annotated[
    Path,
    typer.Option(
        help="Workspace folder; holds the chain of stages.", envvar="COMPRESS_RUN", rich_help_panel=COMMON
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Model to start from: hub id, folder, GGUF file or smollm2-135m (the default).",
        rich_help_panel=COMMON,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Text: wikitext2, c4, pydoc, self, or a .txt, .jsonl or .parquet file. "
        "Default: wikitext2 when it is at hand, else pydoc.",
        rich_help_panel=COMMON,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=COMMON)]
Dtype = Annotated[
    str, typer.Option(help="Compute dtype: auto, float32, bfloat16 or float16.", rich_help_panel=COMMON)
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", rich_help_panel=COMMON)]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: torch's).", rich_help_panel=COMMON)]
Effort = Annotated[
    str | None,
    typer.Option(
        help="quick, standard or paper: fills calibration sizes and steps that are not given. "
        "Default: standard on a GPU, else quick.",
        rich_help_panel=COMMON,
    ),
]
Redo = Annotated[
    bool,
    typer.Option("--redo", help="Replace this stage and drop the stages after it.", rich_help_panel=COMMON),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show the settings that would be used and stop.", rich_help_panel=COMMON),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the result as JSON on standard output, nothing else.", rich_help_panel=COMMON
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=COMMON)
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=TRAINING)]
MicroBatch = Annotated[int | None, typer.Option(help="Windows per forward pass.", rich_help_panel=TRAINING)]
Accumulation = Annotated[int | None, typer.Option(help="Forward passes per step.", rich_help_panel=TRAINING)]
Sequence = Annotated[int | None, typer.Option(help="Tokens per window.", rich_help_panel=TRAINING)]
LearningRate = Annotated[
    float | None, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=TRAINING)
]
Rank = Annotated[int | None, typer.Option(help="Adapter rank.", rich_help_panel=TRAINING)]
Alpha = Annotated[
    int | None, typer.Option(help="Adapter alpha (scale = alpha / rank).", rich_help_panel=TRAINING)
]
Dropout = Annotated[float | None, typer.Option(help="Adapter dropout.", rich_help_panel=TRAINING)]


@dataclass(frozen=True, slots=True)
class _Shared:
    """A group of options that several verbs take, as name -> (annotation, default)."""

    options: Mapping[str, tuple[Any, Any]]


OUTPUT = _Shared({"json_": (Json, False), "debug": (Debug, False)})
PLACE = _Shared({"run": (Run, DEFAULT_RUN), **OUTPUT.options})
EVERYWHERE = _Shared(
    {
        "run": (Run, DEFAULT_RUN),
        "model": (Model, None),
        "data": (Data, None),
        "device": (Device, "auto"),
        "dtype": (Dtype, "auto"),
        "seed": (Seed, 0),
        "threads": (Threads, None),
        "effort": (Effort, None),
        "redo": (Redo, False),
        "dry_run": (DryRun, False),
        "json_": (Json, False),
        "debug": (Debug, False),
    }
)
LOOP = _Shared(
    {
        "steps": (Steps, None),
        "micro_batch": (MicroBatch, None),
        "accumulation": (Accumulation, None),
        "sequence": (Sequence, None),
        "lr": (LearningRate, None),
    }
)
ADAPTER = _Shared({"rank": (Rank, None), "alpha": (Alpha, None), "dropout": (Dropout, None)})


def _verb(name: str, *shared: _Shared) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a declaration: its own options, then the shared ones, all handed to ``_execute``."""

    def register(declaration: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
            for (parameter, annotation) in zip(
                inspect.signature(declaration).parameters.values(),
                get_type_hints(declaration, include_extras=True).values(),
                strict=False,
            )
        ]
        more = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for group in shared
            for option, (annotation, default) in group.options.items()
        ]

        def command(**values: Any) -> None:
            _execute(name, values)

        signature = inspect.Signature([*own, *more])
        command.__doc__ = declaration.__doc__
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        app.command(name)(command)
        return declaration

    return register


def _common(values: Mapping[str, Any]) -> Common:
    return Common(**{name: values[name] for name in Common.__dataclass_fields__ if name in values})


def _execute(verb: str, values: dict[str, Any]) -> None:
    """Run one verb; map every failure to one sentence of cause, one of remedy and an exit code."""
    as_json, debug = values.pop("json_"), values.pop("debug")
    given = {name: value for name, value in values.items() if name not in Common.__dataclass_fields__}
    try:
        from compress.pipelines.dispatch import run_verb

        result = run_verb(verb, _common(values), given, quiet=as_json)
    except CompressError as error:
        if debug:
            raise
        _complain(error.cause, error.remedy)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if debug:
            raise
        _complain("Interrupted.", "Finished work is kept: the same command goes on from here.")
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            raise
        _complain(
            f"Unexpected {type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}.",
            "Run it again with --debug and report what that shows.",
        )
        raise typer.Exit(1) from None
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, sort_keys=True, default=str) + "\n")
    if not result.get("ok", True):
        raise typer.Exit(1)


def _complain(cause: str, remedy: str) -> None:
    sys.stderr.write(f"error: {cause}\n{remedy}\n")


@_verb("plan", OUTPUT)
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub id (only its config is read), folder, GGUF file or smollm2-135m (the default)."
        ),
    ] = None,
    loram: Annotated[
        bool | None, typer.Option("--loram", help="Also the small models that LoRAM would train on.")
    ] = None,
    ratios: Annotated[
        str | None, typer.Option(help="What pruned layers lose, separated by commas (with --loram).")
    ] = None,
    skip_first: Annotated[int | None, typer.Option(help="First layers left whole (with --loram).")] = None,
    skip_last: Annotated[int | None, typer.Option(help="Last layers left whole (with --loram).")] = None,
    rank: Annotated[int | None, typer.Option(help="Adapter rank.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Windows per forward pass.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of the device, such as 24GiB (default: that of the GPU here).")
    ] = None,
) -> None:
    """Sizes and training memory, from the model's config alone; nothing is downloaded but that, nothing is written."""


@_verb("prune", LOOP, ADAPTER, EVERYWHERE)
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
            help="Shapes local and unstructured: model: the whole loses the ratio; layers: each pruned layer does."
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


@_verb("align", LOOP, EVERYWHERE)
def align(
    loss: Annotated[
        str | None,
        typer.Option(
            help="text: the text's next token; distill: the full model's predictions; both: half of each."
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="adamw, or galore: moments in small subspaces (needs compress-llm[galore])."),
    ] = None,
) -> None:
    """Train the pruned model's own weights on text, the output matrix frozen, before adapters are trained."""


@_verb("quantize", EVERYWHERE)
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


@_verb("train", LOOP, ADAPTER, EVERYWHERE)
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


@_verb("recover", EVERYWHERE)
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


@_verb("eval", EVERYWHERE)
def evaluate(
    sequence: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of the test text to score.")] = None,
) -> None:
    """Perplexity, size, memory and speed of the original, of every stage, and of full + recovered."""


@_verb("report", PLACE)
def report(
    path: Annotated[
        list[Path] | None,
        typer.Argument(help="Workspaces of other runs to compare with (default: --run alone)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the page (default: report.html in the workspace).")
    ] = None,
) -> None:
    """Write one self-contained HTML page about the chain, perhaps compared with those of other runs."""


@_verb("verify", PLACE)
def verify(
    path: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of stages, models or adapters (default: the whole chain)."),
    ] = None,
) -> None:
    """Check every recorded hash, size and error against what lies on disk."""


@_verb("run", EVERYWHERE)
def run_recipe(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or the name of one that ships with compress.")
    ],
) -> None:
    """Run a whole chain from a recipe."""


def main() -> None:
    """Console entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
