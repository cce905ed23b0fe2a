"""From a verb's name and the user's options to its pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from compress.errors import system_failure
from compress.pipelines.engines import opened_engine
from compress.pipelines.exhausted import memory_failure
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import (
    VERBS,
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
from compress.pipelines.tool_settings import ExportSettings, GenerateSettings, InitSettings
from compress.pipelines.workspace import Workspace
from compress.stopping import Stop

if TYPE_CHECKING:
    from compress.pipelines.team import Team


def run_verb(
    verb: str,
    common: Common,
    given: Mapping[str, Any],
    *,
    quiet: bool = False,
    stop: Stop | None = None,
    team: Team | None = None,
) -> dict[str, Any]:
    """Run one verb and return its result as JSON values.

    Args:
        verb: Any verb of the command line.
        common: Options that mean the same to every verb.
        given: The verb's own options; None means not given. ``init`` takes ``meanings`` too: what ``--help`` says.
        quiet: Print nothing.
        stop: Whether to end after the layer or step at work.
        team: The processes that were launched to train together.

    Returns:
        The stage's record with its ``path``; on a dry run the ``verb`` and the ``config`` it would have. Verbs that
        make no stage have results of their own; ``ok`` is false in one that means failure.

    Raises:
        Stopped: ``stop`` said so.
        CompressError: Whatever the verb or the operating system refuses, memory included, with cause and remedy.
    """
    try:
        if team is not None:
            team.require(verb, common)
        return _run(verb, common, given, Reporter(quiet=quiet, stop=stop), team)
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        told = _os_error(error) if isinstance(error, SafetensorError) else error
        refused = memory_failure(told, verb)
        if refused is None and isinstance(told, OSError):
            refused = system_failure(told)
        if refused is None:
            raise
        raise refused from error


def _os_error(error: SafetensorError) -> OSError:
    """What the operating system told safetensors, which keeps only the number, in words."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]) if number else 0, str(error))


def _run(
    verb: str, common: Common, given: Mapping[str, Any], reporter: Reporter, team: Team | None
) -> dict[str, Any]:
    if verb == "doctor":
        from compress.pipelines.doctor import doctor

        return doctor(reporter)
    if verb == "verify":
        from compress.pipelines.verify import verify

        quiet_libraries()
        return verify(
            reporter,
            common.run,
            given.get("path") or (),
            calibration=bool(given.get("calibration")),
        )
    if verb == "plan":
        from compress.pipelines.plan import plan

        quiet_libraries()
        return plan(reporter, common, resolve(PlanSettings, {"model": common.model, **given}, "quick"))
    if verb == "init":
        from compress.pipelines.init import init

        quiet_libraries()
        meanings, own = given["meanings"], {k: v for k, v in given.items() if k != "meanings"}
        common = dataclasses.replace(common, effort=common.effort or default_effort())
        return init(
            reporter, common, resolve(InitSettings, {"model": common.model, **own}, "quick"), meanings
        )
    if verb == "eval" and given.get("models"):
        return _evaluate_named(reporter, common, given)
    if verb == "bench":
        from compress.pipelines.bench import bench

        return bench(reporter, {"model": common.model, "data": common.data, **given})
    if verb == "report":
        from compress.pipelines.report import report_runs

        page = report_runs(reporter, common, given.get("path") or (), output=given.get("output"))
        return {"report": str(page)}
    workspace = Workspace(common.run)
    quiet_libraries()
    if verb == "generate":
        from compress.pipelines.generate import generate_texts

        settings = resolve(GenerateSettings, given, "quick")
        prepare_torch(common)
        return generate_texts(Context(common=common, workspace=workspace, reporter=reporter), settings)
    if verb == "export":
        from compress.pipelines.export import export

        wanted = resolve(ExportSettings, given, "quick")
        with workspace.locked():
            return export(Context(common=common, workspace=workspace, reporter=reporter), wanted)
    recipe = None
    if verb == "run":
        from compress.pipelines.recipe import apply_shared, read_recipe, run_recipe

        recipe = read_recipe(str(given["recipe"]))
        common = apply_shared(recipe, common)
    common = dataclasses.replace(common, effort=common.effort or default_effort())
    prepare_torch(common)
    if team is not None:
        steps = [(verb, given)] if recipe is None else recipe.steps
        effort = common.effort or "quick"
        settled: list[tuple[str, Any]] = [
            (name, resolve(VERBS[name], own, effort)) for name, own in steps if name in VERBS
        ]
        team.require_training(settled, effort)
    with (
        contextlib.nullcontext() if common.dry_run else workspace.locked(),
        opened_engine(common, reporter.say) as engine,
    ):
        context = Context(common=common, workspace=workspace, reporter=reporter, engine=engine, team=team)
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

    own = {name: value for name, value in given.items() if name not in ("models", "out")}
    return evaluate(context, resolve(EvalSettings, own, effort), out=given.get("out"))


def _evaluate_named(reporter: Reporter, common: Common, given: Mapping[str, Any]) -> dict[str, Any]:
    """``compress eval A B C``, which has no workspace."""
    from compress.pipelines.evaluate_named import evaluate_named

    quiet_libraries()
    effort = common.effort or default_effort()
    common = dataclasses.replace(common, effort=effort)
    prepare_torch(common)
    own = {name: value for name, value in given.items() if name not in ("models", "out")}
    settings = resolve(EvalSettings, own, effort)
    return evaluate_named(reporter, common, settings, given["models"], out=given.get("out"))


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
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # PEFT loads it where it is installed, for layers that are never made here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|transformers|accelerate|torch|huggingface_hub)(\.|$)")
