"""Tasks of lm-eval (EleutherAI's harness, the extra ``lm-eval``) on a model that is already loaded."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.evaluate.harness_requests import harness_rows, task_names
from compress.evaluate.perplexity import computed_in
from compress.progress import Progress

BOOTSTRAP = 1000
"""Resamplings behind the standard error of a metric that has no formula for it."""


def check_harness(names: str, include: str | None) -> None:
    """Refuse what cannot work, before any model is read.

    Args:
        names: Tasks, separated by commas.
        include: Folder with further task files.

    Raises:
        UsageError: No task is named, lm-eval does not know one, or there is no such folder.
        CompressError: lm-eval is not installed.
    """
    if not task_names(names):
        raise UsageError("--lm-eval names no task.", "Give names separated by commas, such as arc_easy,piqa.")
    if include is not None and not Path(include).is_dir():
        raise UsageError(f"There is no folder {include!r}.", "Give --lm-eval-tasks the folder of task files.")
    if importlib.util.find_spec("lm_eval") is None:
        raise CompressError(
            "Tasks of lm-eval need the package lm-eval, which is not installed.",
            "Run: pip install 'compress-llm[lm-eval]', or score a local file with --task.",
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    unknown = [name for name in task_names(names) if not _manager(include).match_tasks([name])]
    if unknown:
        raise UsageError(
            f"lm-eval has no task {unknown[0]!r}.",
            "See: lm-eval ls tasks; files of your own are found with --lm-eval-tasks FOLDER.",
        )


def run_harness(
    model: Any,
    tokenizer: Any,
    names: str,
    *,
    include: str | None = None,
    rows: int | None = None,
    bos: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run tasks with their own settings and return one record for each task, metric and filter.

    Args:
        model: A causal language model with its adapter, on its device.
        tokenizer: Its tokenizer.
        names: Tasks or groups, separated by commas.
        include: Folder with task files of the user's own.
        rows: Only so many rows of each task; None: all.
        bos: Begin every context with BOS.
        progress: Called with requests done.

    Returns:
        ``task``, ``metric`` (with its filter), ``value``, ``standard_error`` (None where there is none) and the
        ``protocol_line``.

    Raises:
        UsageError: See `check_harness`.
        CompressError: See `check_harness`; a task's data is not to be had; a request that is not supported.
    """
    check_harness(names, include)
    from datasets.utils.logging import disable_progress_bar
    from lm_eval.evaluator import simple_evaluate

    from compress.evaluate.harness_model import HarnessModel

    disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for our result
            answer = simple_evaluate(
                model=HarnessModel(model, tokenizer, bos=bos, progress=progress),
                tasks=task_names(names),
                task_manager=_manager(include),
                limit=rows,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise CompressError(
            f"The data of lm-eval's tasks is not to be had: {' '.join(str(error).split()).rstrip('.')}.",
            "Try again with a network, or give local data in a task file with --lm-eval-tasks.",
        ) from error
    version = importlib.metadata.version("lm-eval")
    return harness_rows(answer, version=version, bos=bos, computed=computed_in(model))


@functools.cache
def _manager(include: str | None) -> Any:
    """lm-eval's index of tasks: it reads thousands of files, so every model of a command uses the same one."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)
