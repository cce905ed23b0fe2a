"""From a verb's name and the user's options to its pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import (
    AlignSettings,
    Common,
    EvalSettings,
    PlanSettings,
    PruneSettings,
    QuantizeSettings,
    RecoverSettings,
    TrainSettings,
    resolve,
)
from compress.pipelines.stage import Context, Outcome
from compress.pipelines.workspace import Workspace


def run_verb(verb: str, common: Common, given: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """Run one verb and return its result as JSON values.

    Args:
        verb: One of the stage verbs, ``plan``, ``report``, ``verify`` or ``run``.
        common: Options that mean the same to every verb.
        given: The verb's own options; None means not given.
        quiet: Print nothing.

    Returns:
        The stage's record with its ``path``; on a dry run the ``verb`` and the ``config`` it would have. ``plan``,
        ``report``, ``verify`` and ``run`` have results of their own; ``ok`` is false in one that means failure.

    Raises:
        CompressError: Whatever the verb refuses, with cause and remedy.
    """
    reporter = Reporter(quiet=quiet)
    if verb == "verify":
        from compress.pipelines.verify import verify

        quiet_libraries()
        return verify(reporter, common.run, given.get("path") or ())
    if verb == "plan":
        from compress.pipelines.plan import plan

        quiet_libraries()
        return plan(reporter, resolve(PlanSettings, {"model": common.model, **given}, "quick"))
    if verb == "report":
        from compress.pipelines.report import report_runs

        page = report_runs(reporter, common, given.get("path") or (), output=given.get("output"))
        return {"report": str(page)}
    workspace = Workspace(common.run)
    quiet_libraries()
    recipe = None
    if verb == "run":
        from compress.pipelines.recipe import apply_shared, read_recipe, run_recipe

        recipe = read_recipe(str(given["recipe"]))
        common = apply_shared(recipe, common)
    common = dataclasses.replace(common, effort=common.effort or default_effort())
    prepare_torch(common)
    context = Context(common=common, workspace=workspace, reporter=reporter)
    with contextlib.nullcontext() if common.dry_run else workspace.locked():
        if recipe is not None:
            return run_recipe(context, recipe)
        return dict(run_stage_verb(context, verb, given).summary())


def run_stage_verb(context: Context, verb: str, given: Mapping[str, Any]) -> Outcome:
    """Run one stage verb in an open, locked workspace."""
    effort = context.common.effort or "quick"
    if verb == "prune":
        from compress.pipelines.prune import prune

        return prune(context, resolve(PruneSettings, given, effort))
    if verb == "align":
        from compress.pipelines.align import align

        return align(context, resolve(AlignSettings, given, effort))
    if verb == "quantize":
        from compress.pipelines.quantize import quantize

        return quantize(context, resolve(QuantizeSettings, given, effort))
    if verb == "train":
        from compress.pipelines.train import train

        return train(context, resolve(TrainSettings, given, effort))
    if verb == "recover":
        from compress.pipelines.recover import recover

        return recover(context, resolve(RecoverSettings, given, effort))
    from compress.pipelines.evaluate import evaluate

    return evaluate(context, resolve(EvalSettings, given, effort))


def prepare_torch(common: Common) -> None:
    """Set the number of threads; refuse a device or dtype that is not there before anything is read.

    Raises:
        UsageError: See ``device_and_dtype``.
    """
    import torch

    from compress.pipelines.model_input import device_and_dtype

    if common.threads is not None:
        torch.set_num_threads(common.threads)
    device_and_dtype(common)


def default_effort() -> str:
    """``standard`` where there is a GPU, else ``quick``."""
    import torch

    return "standard" if torch.cuda.is_available() else "quick"


def quiet_libraries() -> None:
    """Keep other libraries' bars and notices out of our output; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|accelerate|torch|huggingface_hub)(\.|$)")
