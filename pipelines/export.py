"""``compress export``: one model of the chain as a folder to give away, with a card; perhaps uploaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compress.errors import UsageError
from compress.export.card import FILE_NAME as CARD
from compress.export.card import Subject, card, license_of
from compress.export.dense import DenseView, write_dense
from compress.export.packed import write_packed
from compress.export.push import check_push, push
from compress.model.checkpoint import Checkpoint
from compress.model.config import quantization_method
from compress.model.inside import require_inside
from compress.model.load import load_model
from compress.model.uneven import is_uneven
from compress.pipelines.chain_models import MADE, TITLES, ChainModel, chosen, located, names_in, verb_of
from compress.pipelines.identity import digest
from compress.pipelines.integrity import describe_files, files_below, require_unchanged
from compress.pipelines.model_input import base_name, device_and_dtype
from compress.pipelines.reopen import RECORD, TOLERANCE, check_ids, check_reopens, record_logits
from compress.pipelines.small_files import public_name
from compress.pipelines.stage import Context, versions
from compress.pipelines.tool_settings import ExportSettings
from compress.pipelines.workspace import FORMAT_VERSION, Stage, read_json, workspace_nearby, write_json
from compress.quantize.checkpoint import QUANT_METHOD
from compress.report.values import size

MARK = "export.json"
"""Beside the exported files: what they are and their hashes."""
NOT_SHIPPED = ("stage.json", RECORD, "merged")
"""Of a stage folder: the record, which names folders of this machine, the check, and a form of its own."""
ADAPTER = "adapter"


def export(context: Context, settings: ExportSettings) -> dict[str, Any]:
    """Write one model of the chain into a folder of its own, and upload it where that is asked for.

    Returns:
        ``path``, ``what``, ``format``, ``bytes``, whether it was there already (``fresh`` is false then), and
        ``address`` of the repository or None.

    Raises:
        UsageError: The chain has not made such a model, or the folder holds something else.
        CompressError: The files of the stage are damaged, the written model gives other logits, or the upload fails.
    """
    workspace = context.workspace
    what = _chosen(context, settings.what)
    if settings.push is not None:
        check_push(settings.push)
    lineage = _lineage(workspace.stages, what)
    identity = digest({"what": what, "format": settings.format, "stages": [stage.id for stage in lineage]})
    name = what if settings.format == "native" else f"{what}-{settings.format}"
    out = workspace.root / "export" / name if settings.out is None else Path(settings.out)
    fresh = not _is_there(out, identity)
    if fresh:
        _refuse_occupied(out, force=settings.force)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as place:
            folder = Path(place) / out.name
            folder.mkdir()
            _write(context, what, settings.format, lineage, folder, identity)
            if out.exists():
                shutil.rmtree(out)
            folder.rename(out)
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    done = "" if fresh else ", already there"
    context.reporter.say(f"export: {TITLES[what]}, {size(total)}, in {out}{done}.")
    address = None
    if settings.push is not None:
        address = push(out, settings.push, private=settings.private)
        context.reporter.say(f"export: uploaded to {address}")
    return {
        "path": str(out),
        "what": what,
        "format": settings.format,
        "bytes": total,
        "fresh": fresh,
        "address": address,
    }


def _chosen(context: Context, what: str | None) -> str:
    workspace = context.workspace
    made = names_in(workspace)[1:]
    if not made:
        near = workspace_nearby(workspace.root)
        remedy = "Run a stage first: compress prune." if near is None else f"Did you mean --run {near}?"
        raise UsageError(f"There is nothing to export in {workspace.root}.", remedy)
    if what is None:
        return made[-1]
    names = chosen(workspace, what)
    if len(names) > 1 or names == ["original"]:
        raise UsageError(
            f"{what} is not one model that the chain has made.", f"Choose among {', '.join(made)}."
        )
    return names[0]


def _lineage(stages: Sequence[Stage], what: str) -> list[Stage]:
    """The stages that led to a model, in order."""
    last = next(place for place, stage in enumerate(stages) if stage.verb == verb_of(what))
    return [stage for stage in stages[: last + 1] if stage.verb in MADE]


def _is_there(out: Path, identity: str) -> bool:
    """Whether this very export lies there, whole."""
    if not (out / MARK).is_file():
        return False
    mark = read_json(out / MARK)
    there = {name: entry for name, entry in describe_files(out).items() if name != MARK}
    return mark.get("id") == identity and mark.get("files") == there


def _refuse_occupied(out: Path, *, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MARK).is_file():
        raise UsageError(f"{out} exists and is no export of compress.", "Give another folder with --out.")
    if not force:
        raise UsageError(
            f"{out} holds another export, or this one with changed files.",
            "Give --force to replace it, or another folder with --out.",
        )


def _write(
    context: Context, what: str, form: str, lineage: Sequence[Stage], folder: Path, identity: str
) -> None:
    (model,) = located(context, [what])
    for stage in lineage:
        if stage.path in (model.model, model.adapter):
            require_unchanged(stage.path, stage.record)
    if form == "dense":
        _write_dense(context, model, folder)
    elif form == "packed":
        _write_packed(context, model, folder)
    else:
        _copy(what, model, lineage, folder)
    uneven = (folder / "config.json").is_file() and is_uneven(Checkpoint(folder).config)
    known = context.workspace.model
    subject = Subject(
        base=public_name(base_name(context)),
        what=what,
        folder=folder,
        stages=[stage.record for stage in lineage],
        rows=[] if form == "packed" else _rows(context, what),  # its factors are not those that were measured
        loads=_loads(what, form, folder, uneven=uneven),
        license=None if known is None else license_of(Path(known["path"])),
    )
    (folder / CARD).write_text(card(subject), encoding="utf-8")
    mark = {
        "format_version": FORMAT_VERSION,
        "id": identity,
        "what": what,
        "format": form,
        "base": subject.base,
        "stages": [{"verb": stage.verb, "id": stage.id} for stage in lineage],
        "versions": versions(),
        "files": describe_files(folder),
    }
    write_json(folder / MARK, mark)


def _write_dense(context: Context, model: ChainModel, folder: Path) -> None:
    checkpoint = Checkpoint(model.model)
    with context.reporter.bar("export") as progress:
        device, _ = device_and_dtype(context.common)
        write_dense(checkpoint, folder, adapter=model.adapter, device=device, progress=progress)
    view = DenseView(checkpoint)
    # Every weight is rounded once: what remains is of the order of the dtype's step.
    tolerance = max(TOLERANCE, 16 * torch.finfo(view.dtype()).eps)
    network = model.open("cpu", torch.float32)
    record_logits(network, check_ids(view.architecture.vocab, context.common.seed), folder)
    del network
    error = check_reopens(folder, tolerance=tolerance)
    (folder / RECORD).unlink()
    context.reporter.say(f"export: opened in a fresh process, relative difference of logits {error:.1e}.")


def _write_packed(context: Context, model: ChainModel, folder: Path) -> None:
    if model.adapter is None or quantization_method(Checkpoint(model.model).config) != QUANT_METHOD:
        raise UsageError(
            f"{model.name} is no adapter on a quantized model: there is nothing to pack.",
            "Export trained after quantize and train, or leave --format out.",
        )
    device, _ = device_and_dtype(context.common)
    with context.reporter.bar("export") as progress:
        write_packed(Checkpoint(model.model), folder, adapter=model.adapter, device=device, progress=progress)
    network = load_model(folder, dtype=torch.float32)
    ids = check_ids(network.config.vocab_size, context.common.seed)
    record_logits(network, ids, folder)
    with torch.inference_mode():
        packed = network(ids, use_cache=False).logits
        del network
        trained = model.open("cpu", torch.float32)(ids, use_cache=False).logits
    moved = float((packed - trained).norm() / trained.norm())
    error = check_reopens(folder, needs_compress=True)
    (folder / RECORD).unlink()
    context.reporter.say(
        f"export: opened in a fresh process, relative difference of logits {error:.1e}; "
        f"factors in 8 bits instead of as trained moved the logits by {moved:.1e}."
    )


def _copy(what: str, model: ChainModel, lineage: Sequence[Stage], folder: Path) -> None:
    """The files of the stage, and for an adapter on a small model that model."""
    last = lineage[-1]
    if what == "trained":
        small = next((stage for stage in lineage if stage.path == model.model), None)
        if small is None:
            raise UsageError(
                "The adapter was trained on the original model, which is not the chain's to export.",
                "Give --format dense for the two merged.",
            )
        _copy_stage(small, folder)
        _copy_stage(last, folder / ADAPTER)
    else:
        _copy_stage(last, folder)


def _copy_stage(stage: Stage, folder: Path) -> None:
    for name, path in files_below(stage.path).items():
        if name.partition("/")[0] not in NOT_SHIPPED:
            require_inside(stage.path, path)  # the workspace may be somebody else's
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _loads(what: str, form: str, folder: Path, *, uneven: bool) -> str:
    """How the exported folder is opened; see ``Subject.loads``."""
    if form == "native" and what in ("trained", "recovered"):
        return "small" if what == "trained" else "peft"
    if uneven:
        return "uneven"
    return "transformers" if quantization_method(Checkpoint(folder).config) is None else "compress"


def _rows(context: Context, what: str) -> list[dict[str, Any]]:
    """Of the last evaluation: the original, and the exported model where it was measured."""
    measured = context.workspace.find("eval")
    wanted = ("original", TITLES[what])
    rows = [] if measured is None else measured.record["metrics"].get("rows", [])
    found = [row for row in rows if row["name"] in wanted]
    return found if any(row["name"] == TITLES[what] for row in found) else []
