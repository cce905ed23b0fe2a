"""The command line: ``compress VERB``; reads arguments, runs one pipeline, prints its result.

The verbs that make a model or an adapter are declared in :mod:`compress.cli.stages`, the others here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from compress.cli import stages as stages
from compress.cli.options import COMPUTE, EVERYWHERE, OUTPUT, PLACE, RECIPE
from compress.cli.verb import app, meanings
from compress.cli.verb import verb as _verb


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


@_verb("eval", EVERYWHERE)
def evaluate(
    sequence: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of the test text to score.")] = None,
) -> None:
    """Perplexity, size, memory and speed of the original, of every stage, and of full + recovered."""


@_verb("init", RECIPE, supply=meanings)
def init(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub id (only its config is read), folder, GGUF file or smollm2-135m (the default)."
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Where to write it (default recipe.yaml); - prints it.")
    ] = None,
    force: Annotated[bool | None, typer.Option("--force", help="Replace a file that exists.")] = None,
) -> None:
    """Write a recipe for a model and this machine: the whole chain, every option in it with its meaning."""


@_verb("generate", COMPUTE)
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    models: Annotated[
        str | None,
        typer.Option(
            help="Which of the chain, separated by commas: original, pruned, aligned, quantized, trained (small + "
            "adapter), recovered (full + adapter), or all. Default: the original and the last.",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Most new tokens (default 64).")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 (the default) takes the likeliest token; above it, tokens are drawn."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask through the tokenizer's chat template, or let the prompt be continued. "
            "Default: the template where there is one.",
        ),
    ] = None,
) -> None:
    """Show what the original and the result write after the same prompt, side by side, with their speed."""


@_verb("report", PLACE)
def report(
    output: Annotated[
        Path | None, typer.Option(help="Where to write the page (default: report.html in the workspace).")
    ] = None,
) -> None:
    """Write one self-contained HTML page about the chain."""


@_verb("verify", PLACE)
def verify(
    path: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of stages, models or adapters (default: the whole chain)."),
    ] = None,
) -> None:
    """Check every recorded hash, size and error against what lies on disk."""


@_verb("doctor", OUTPUT)
def doctor() -> None:
    """Say what is installed and at hand, what would be used and why, and what to do about what is wrong."""


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
