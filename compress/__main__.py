"""The command line: ``compress VERB``; reads arguments, runs one pipeline, prints its result.

The verbs that make a model or an adapter are declared in :mod:`compress.cli.stages`, the others here.
"""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from compress.cli import stages as stages
from compress.cli.options import (
    CLUSTER,
    COMPUTE,
    EVERYWHERE,
    OUTPUT,
    PLACE,
    RECIPE,
    Data,
    Device,
    Dtype,
    Effort,
    MemoryLimit,
    Model,
)
from compress.cli.verb import app, meanings, verb


@verb("plan", PLACE)
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub id (only its config and index are read), folder, GGUF file or smollm2-135m (the default)."
        ),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Plan prune: fraction of the decoder linear parameters to remove.")
    ] = None,
    params: Annotated[str | None, typer.Option(help="Plan prune: parameters of the result.")] = None,
    size: Annotated[str | None, typer.Option(help="Plan prune: weight bytes of the result.")] = None,
    targets: Annotated[str | None, typer.Option(help="Plan prune: heads, mlp, or heads,mlp.")] = None,
    head_unit: Annotated[str | None, typer.Option(help="Plan prune: group, query or auto.")] = None,
    multiple: Annotated[
        int | None, typer.Option(help="Plan prune: channel counts are multiples of this.")
    ] = None,
    align: Annotated[bool | None, typer.Option("--align", help="Plan align too, after prune.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Plan quantize: stored bits per weight (2.75bit), or file size (90MB).")
    ] = None,
    budget_includes: Annotated[
        str | None, typer.Option(help="Plan quantize: factors count, or none of them.")
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Plan quantize: rank of the low-rank part, auto or a number.")
    ] = None,
    factors: Annotated[str | None, typer.Option(help="Plan quantize: 8bit or 16bit.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="Plan quantize: keep, 8bit or menu.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="Plan quantize: hessian, fisher or frobenius.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Calibration tokens of prune and quantize.")
    ] = None,
    train_rank: Annotated[int | None, typer.Option(help="Plan train: adapter rank.")] = None,
    merge: Annotated[
        bool | None,
        typer.Option("--merge", help="Plan recover with the merged full model beside the adapter."),
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Windows per forward pass, wherever is trained.")
    ] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens per window, wherever is trained.")] = None,
    recompute: Annotated[
        bool | None,
        typer.Option(
            "--recompute", help="Plan prune, align and train with --recompute (gradient checkpointing)."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of a device to plan for, such as 24GiB (default: that of the GPU here)."),
    ] = None,
    no_time: Annotated[
        bool | None,
        typer.Option("--no-time", help="Leave out the times, and the second that measures for them."),
    ] = None,
    loram: Annotated[
        bool | None, typer.Option("--loram", help="Also the small models that LoRAM would train on.")
    ] = None,
    ratios: Annotated[
        str | None, typer.Option(help="What pruned layers lose, separated by commas (with --loram).")
    ] = None,
    skip_first: Annotated[int | None, typer.Option(help="First layers left whole (with --loram).")] = None,
    skip_last: Annotated[int | None, typer.Option(help="Last layers left whole (with --loram).")] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check",
            help="Exit with 1 where a step has no room, in memory (--memory-limit, else what is free) or on the disk.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    effort: Effort = None,
    memory_limit: MemoryLimit = None,
) -> None:
    """Sizes, memory, disk and time of a whole chain, before anything is touched; no weight is read."""


@verb("eval", EVERYWHERE)
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
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin every window, and every context of a task, with the tokenizer's BOS, as models such as Gemma "
            "were trained (default: no BOS, as perplexities are published).",
        ),
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


@verb("init", RECIPE, supply=meanings)
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


@verb("generate", COMPUTE)
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


@verb("export", PLACE)
def export(
    what: Annotated[
        str | None,
        typer.Argument(
            help="Which model: pruned, aligned, quantized, trained (small + adapter) or recovered (full + adapter). "
            "Default: the last one the chain has made."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="native: the files as the stage wrote them; dense: plain weights that need no library of ours, "
            "quantized matrices multiplied out and the adapter merged in."
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder to write (default: export/NAME in the workspace).")
    ] = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="Replace another export in that folder.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Then upload it to this repository of the Hugging Face hub.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private", help="A repository that --push makes is private.")
    ] = None,
) -> None:
    """Write one model of the chain, with a model card, into a folder to give away or to upload."""


@verb("report", PLACE)
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


@verb("verify", PLACE)
def verify(
    path: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of stages, models or adapters (default: the whole chain)."),
    ] = None,
    calibration: Annotated[
        bool,
        typer.Option(
            "--calibration",
            help="Also repeat the calibration of quantize, for the errors that it measured on text; takes as long.",
        ),
    ] = False,
) -> None:
    """Check every recorded hash, size and error against what lies on disk."""


@verb("bench", OUTPUT)
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Benchmarks to run, or all (default: regression, the chain against its baseline)."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The short form of each.")] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="One line about each, with how long it takes, and stop.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the results, one JSON file each.")] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Write the baseline of regression instead of comparing with it.")
    ] = False,
    repeats: Annotated[int | None, typer.Option(help="Runs behind a baseline (default 3).")] = None,
    baselines: Annotated[
        Path | None, typer.Option(help="Folder of baselines (default: those that ship with compress).")
    ] = None,
    finished: Annotated[
        Path | None,
        typer.Option(
            help="Run nothing: compare the chain in this workspace with the baseline recipe.json, or write that."
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
) -> None:
    """Run benchmarks; without names compare the chain's perplexity, bytes and memory with a baseline."""


@verb("doctor", OUTPUT)
def doctor() -> None:
    """Say what is installed and at hand, what would be used and why, and what to do about what is wrong."""


@verb("run", CLUSTER, EVERYWHERE)
def run_recipe(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or the name of one that ships with compress.")
    ],
) -> None:
    """Run a whole chain from a recipe."""


def main() -> None:
    """Console entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except SystemExit as end:
        if isinstance(end.code, int):
            _leave(end.code)
        raise


def _leave(code: int) -> None:
    """End the process as Python does, but leave its memory to the system: taking torch apart takes a second.

    Returns only where what was printed does not come through; Python then ends the process and says so.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit(code)


if __name__ == "__main__":
    main()
