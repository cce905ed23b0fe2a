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
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models to compare, without a workspace: hub ids, folders (adapters too), GGUF files or "
            "smollm2-135m. Without any: everything the chain has made."
        ),
    ] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of the test text to score.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Model that KL divergence and agreement are measured against (default: the chain's original, "
            "or the first model)."
        ),
    ] = None,
    kl_windows: Annotated[
        int | None,
        typer.Option(help="Windows to compare with the reference, at most those scored; 0 for none."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A .jsonl file of questions (query, choices, gold) or of continuations (context, continuation); "
            "may be given several times."
        ),
    ] = None,
    task_rows: Annotated[
        int | None, typer.Option(help="Rows of every task to score, from its start (default: all).")
    ] = None,
    task_delimiter: Annotated[
        str | None,
        typer.Option(help="Between a context and what follows; \\n is a line end (default: a space)."),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, separated by commas (needs compress-llm\\[lm-eval])."),
    ] = None,
    lm_eval_tasks: Annotated[
        str | None, typer.Option(help="Folder with task files of your own for lm-eval.")
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(help="none; quick: prefill and decoding at batch 1; full: also decoding at saturation."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
) -> None:
    """Perplexity, distance from the original, tasks, size, memory and speed, of the chain or of any models."""


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
