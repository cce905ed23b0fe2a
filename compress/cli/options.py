"""Options that several verbs take, in groups: their types, help texts and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import complete
from compress.pipelines.engines import ENGINES
from compress.pipelines.setting_values import EFFORTS
from compress.pipelines.settings import DEFAULT_RUN

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
        autocompletion=complete.model,
        rich_help_panel=COMMON,
    ),
]
NamedModel = Annotated[
    str | None,
    typer.Option(
        "--model", help="The same as the argument.", autocompletion=complete.model, rich_help_panel=COMMON
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Text: wikitext2, c4, pydoc, self, or a .txt, .jsonl or .parquet file. "
        "Default: wikitext2 when it is at hand, else pydoc.",
        autocompletion=complete.data,
        rich_help_panel=COMMON,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda or cuda:N.",
        autocompletion=complete.among(complete.DEVICES),
        rich_help_panel=COMMON,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Compute dtype: auto, float32, bfloat16 or float16.",
        autocompletion=complete.among(complete.DTYPES),
        rich_help_panel=COMMON,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", rich_help_panel=COMMON)]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: torch's).", rich_help_panel=COMMON)]
Effort = Annotated[
    str | None,
    typer.Option(
        help="quick, standard or paper: fills calibration sizes and steps that are not given. "
        "Default: standard on a GPU, else quick.",
        autocompletion=complete.among(EFFORTS),
        rich_help_panel=COMMON,
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        help="Most memory of the host that a stage may take, such as 4GiB: models are read layer by layer where they "
        "do not fit, and what does not fit even so is refused. Default: what is free, nothing refused.",
        rich_help_panel=COMMON,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        help="Who computes matrices: local (the threads of this machine) or ray (the workers of a Ray cluster).",
        autocompletion=complete.among(ENGINES),
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
Recompute = Annotated[
    bool | None,
    typer.Option(
        "--recompute",
        help="Gradient checkpointing: run decoder layers again in the backward pass instead of keeping their "
        "activations. Far less memory, a third to a half more time, the same result.",
        rich_help_panel=TRAINING,
    ),
]
Rank = Annotated[int | None, typer.Option(help="Adapter rank.", rich_help_panel=TRAINING)]
Alpha = Annotated[
    int | None, typer.Option(help="Adapter alpha (scale = alpha / rank).", rich_help_panel=TRAINING)
]
Dropout = Annotated[float | None, typer.Option(help="Adapter dropout.", rich_help_panel=TRAINING)]


@dataclass(frozen=True, slots=True)
class Shared:
    """A group of options that several verbs take, as name -> (annotation, default)."""

    options: Mapping[str, tuple[Any, Any]]


OUTPUT = Shared({"json_": (Json, False), "debug": (Debug, False)})
PLACE = Shared({"run": (Run, DEFAULT_RUN), **OUTPUT.options})
EVERYWHERE = Shared(
    {
        "run": (Run, DEFAULT_RUN),
        "model": (Model, None),
        "data": (Data, None),
        "device": (Device, "auto"),
        "dtype": (Dtype, "auto"),
        "seed": (Seed, 0),
        "threads": (Threads, None),
        "effort": (Effort, None),
        "memory_limit": (MemoryLimit, None),
        "redo": (Redo, False),
        "dry_run": (DryRun, False),
        "json_": (Json, False),
        "debug": (Debug, False),
    }
)
COMPUTE = Shared(
    {
        **{name: EVERYWHERE.options[name] for name in ("run", "model", "device", "dtype", "seed", "threads")},
        **OUTPUT.options,
    }
)
"""For a verb that opens models and makes no stage."""
CLUSTER = Shared({"engine": (Engine, "local")})
"""For a verb with work that many machines can share."""
RECIPE = Shared(
    {
        **{name: EVERYWHERE.options[name] for name in ("data", "device", "dtype", "seed", "effort")},
        **OUTPUT.options,
    }
)
"""For a verb that writes a recipe: what all its steps share."""
LOOP = Shared(
    {
        "steps": (Steps, None),
        "micro_batch": (MicroBatch, None),
        "accumulation": (Accumulation, None),
        "sequence": (Sequence, None),
        "lr": (LearningRate, None),
        "recompute": (Recompute, None),
    }
)
ADAPTER = Shared({"rank": (Rank, None), "alpha": (Alpha, None), "dropout": (Dropout, None)})
