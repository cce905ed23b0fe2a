"""``compress recover``: the adapter trained on the small model, put back onto the full one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from compress.adapters.adapter_file import AdapterFile
from compress.adapters.merge import merge_adapter
from compress.adapters.recompressed import truncation_error
from compress.adapters.recover import recover_adapter
from compress.errors import CompressError, UsageError
from compress.model.base_record import FILE_NAME as BASE
from compress.model.base_record import BaseRecord
from compress.model.checkpoint import require_dense
from compress.pipelines.identity import digest
from compress.pipelines.integrity import describe_files
from compress.pipelines.model_input import (
    HUB_NAME,
    ModelInput,
    base_name,
    check_stage,
    device_and_dtype,
    open_model,
    original,
)
from compress.pipelines.recover_base import trained_on
from compress.pipelines.reopen import TOLERANCE, check_ids, check_reopens, logits_error, record_logits
from compress.pipelines.reporter import human_count
from compress.pipelines.settings import RecoverSettings, TrainSettings, resolve
from compress.pipelines.small_files import check_base, is_small, write_base_of
from compress.pipelines.stage import Context, Outcome, run_stage, settings_dict
from compress.pipelines.train import train
from compress.pipelines.way import Way
from compress.pipelines.ways import choose_way
from compress.pipelines.ways_of_stages import recover_count
from compress.structure import FILE_NAME, StructureMap, full_layer, structure_map


def recover(context: Context, settings: RecoverSettings) -> Outcome:
    """Recover the chain's adapter; see ``compress recover --help``. Trains one first when there is none.

    Raises:
        UsageError: The chain has no small model yet, its adapter was trained before there was one, or it starts from a
            small model and ``--onto`` is not given.
        CompressError: ``--onto`` names another model than the one the small model was cut from, or the adapter does
            not belong to the small model.
    """
    trained = context.workspace.find("train")
    start = original(context)
    full = _full_model(context, settings, start)
    structure = chain_structure(context, start, full)
    if settings.adapter is not None:
        adapter, identity = Path(settings.adapter), _identity(Path(settings.adapter))
    else:
        if trained is None:
            context.reporter.say("recover: the chain has no trained adapter yet; training one first.")
            training = train(context, resolve(TrainSettings, {}, context.common.effort or "quick"))
            trained = training.stage
            if trained is None:
                context.reporter.say("recover: would follow with the adapter that training makes.")
                return training
        check_stage(context, trained)
        adapter, identity = trained.path, trained.id
    name = base_name(context) if settings.onto is None else HUB_NAME.get(settings.onto, settings.onto)

    device, _ = device_and_dtype(context.common)
    way = choose_way(
        context,
        "recover",
        full,
        "cpu",  # models are opened on the host; the device computes products of factors alone
        torch.float32,
        recover_count(full, adapter, merged=settings.merge, device=device),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        small = trained_on(context, start, adapter, structure, ours=settings.adapter is None)
        with context.reporter.bar("recover") as progress:
            recovered = recover_adapter(
                adapter,
                structure,
                full.architecture,
                full.checkpoint,
                folder,
                full_name=name,
                small_base=small,
                compress_rank=settings.compress_rank,
                device=device,
                progress=progress,
            )
        write_base_of(full, name, folder)
        network = PeftModel.from_pretrained(way.open(full.path, dtype="float32"), folder).eval()
        record_logits(network, check_ids(full.architecture.vocab, context.common.seed), folder)
        del network
        metrics: dict[str, Any] = {"reopened_relative_error": check_reopens(folder, base=full.path, way=way)}
        if settings.merge:
            shutil.rmtree(folder / "merged", ignore_errors=True)
            with context.reporter.bar("merge") as progress:
                merge_adapter(full.checkpoint, folder, folder / "merged", device=device, progress=progress)
            metrics["merged"] = "merged"
            metrics |= _proved(folder / "merged", full, context.common.seed, way)
        metrics["shorter"] = None
        if settings.compress_rank is None and recovered.differences:
            metrics["shorter"] = _shorter(adapter, device)
        return metrics | {
            "onto": name,
            "adapter": adapter.name,
            "modules": recovered.modules,
            "rank": recovered.max_rank,
            "uncut_rank": recovered.uncut_rank,
            "differences": recovered.differences,
            "adapter_parameters": recovered.parameters,
            "delta_norm": recovered.delta_norm,
            "truncation_error": recovered.truncation_overall,
            "origin_known": recovered.origin_known,
        }

    def disk() -> float:
        from compress.pipelines.disk import recover_disk

        return recover_disk(full, adapter, merge=settings.merge)

    outcome = run_stage(
        context,
        "recover",
        config=settings_dict(settings),
        inputs={"adapter": identity, "full": full.id},
        work=work,
        disk=disk,
    )
    if outcome.fresh and outcome.stage is not None:
        metrics = outcome.stage.record["metrics"]
        if not metrics["origin_known"] and not structure.is_identity:
            context.reporter.say(
                "recover: nothing says which small model this adapter was trained on. Its shapes fit this one; that it "
                "belongs to it is taken on trust."
            )
        for line in _about_rank(metrics, settings.compress_rank):
            context.reporter.say(line)
        context.reporter.table(
            "recover",
            ("", "value"),
            [
                ("full model", name),
                ("adapter parameters", human_count(metrics["adapter_parameters"])),
                ("relative truncation error", f"{metrics['truncation_error']:.1e}"),
            ],
        )
    return outcome


def _shorter(adapter: Path, device: str) -> dict[str, Any]:
    """The rank an adapter was trained with, and what ``--compress-rank`` would lose of its difference to its start."""
    with AdapterFile(adapter) as small:
        rank = max(small.scaling(module).rank for module in small.modules)
        return {"rank": rank, "truncation_error": truncation_error(small, rank, device)}


def _about_rank(metrics: Mapping[str, Any], asked: int | None) -> Iterator[str]:
    """What is to be said of the rank of a recovered adapter."""
    if shorter := metrics["shorter"]:
        yield (
            f"recover: the adapter has ranks up to {metrics['rank']}, as its start was subtracted. --compress-rank "
            f"{shorter['rank']} brings it back to the rank it was trained with, at a relative truncation error of "
            f"{shorter['truncation_error']:.1e}."
        )
    if asked is not None and metrics["uncut_rank"] <= asked:
        yield (
            f"recover: nothing was cut: no module has a rank above {metrics['uncut_rank']}, and --compress-rank "
            f"is {asked}."
        )


def _proved(merged: Path, full: ModelInput, seed: int, way: Way) -> dict[str, float]:
    """How the merged model opens in a fresh process, and how far it is from the model with its adapter beside it.

    Raises:
        CompressError: It gives other logits there; or, stored in float32, where nothing is rounded, here.
    """
    network = way.open(merged, dtype="float32").eval()
    record_logits(network, check_ids(full.architecture.vocab, seed), merged)
    del network
    distance = logits_error(merged, merged.parent)
    exact = all(full.checkpoint.dtype(name) == torch.float32 for name in full.checkpoint.names)
    if exact and not distance <= TOLERANCE:
        raise CompressError(
            f"The merged model gives other logits than its adapter (relative error {distance:.1e}).",
            "Please report this with the command you ran.",
        )
    reopened = check_reopens(merged, way=way)
    return {"merged_relative_error": distance, "merged_reopened_relative_error": reopened}


def _full_model(context: Context, settings: RecoverSettings, start: ModelInput) -> ModelInput:
    """The model to recover onto.

    Raises:
        UsageError: There is no small model, an adapter was trained before there was one, or the chain starts from a
            small model and ``--onto`` does not name the full one.
        CompressError: ``--onto`` names a quantized model.
    """
    workspace = context.workspace
    published = is_small(start.path)
    pruned = workspace.find("prune")
    if pruned is None and workspace.find("quantize") is None and not published:
        raise UsageError(
            f"The chain in {workspace.root} has no small model to train on.",
            "Run compress prune, compress quantize or both first.",
        )
    trained = workspace.find("train")
    if trained is not None and workspace.model_before("train") is None and not published:
        raise UsageError(
            f"The adapter in {trained.path} was trained before there was a small model.",
            "Start another chain with --run DIR and train after prune or quantize.",
        )
    if pruned is None and published and settings.onto is None:
        name = BaseRecord.load(start.path / BASE).name if (start.path / BASE).is_file() else "a full model"
        raise UsageError(
            f"The chain starts from the small model {start.name}, which was cut from {name}.",
            "Give that full model with --onto.",
        )
    full = start if settings.onto is None else open_model(context, settings.onto)
    require_dense(full.checkpoint, allow_lq=False)
    return full


def chain_structure(context: Context, start: ModelInput, full: ModelInput) -> StructureMap:
    """Which indices of the full model the chain's small model kept; everything, when nothing was pruned.

    Args:
        context: Has the chain.
        start: The model the chain starts from, full or small.
        full: The model to recover onto.

    Raises:
        CompressError: The small model was made of another model than ``full``; names the first tensor that differs.
    """
    pruned = context.workspace.find("prune")
    folder = pruned.path if pruned is not None else start.path
    if pruned is not None:
        check_stage(context, pruned, only=(FILE_NAME, BASE))
    if is_small(folder):
        structure = StructureMap.load(folder / FILE_NAME)
        check_base(folder, structure, full)
        return structure
    if full.id != start.id:
        record = BaseRecord(name=start.name, tensors=start.checkpoint.digests())
        raise CompressError(
            f"The small model was not made of {full.name}: {record.difference(full.checkpoint.digests())}.",
            f"Give {start.name} with --onto, byte for byte, not one that was merged or trained.",
        )
    return structure_map(
        full.architecture,
        [full_layer(full.architecture)] * full.architecture.layers,
        base_fingerprint=full.id,
    )


def _identity(adapter: Path) -> str:
    """Hash of what an adapter folder holds.

    Raises:
        UsageError: There is no such folder.
    """
    if not adapter.is_dir():
        raise UsageError(f"There is no adapter folder {str(adapter)!r}.", "Give the folder that PEFT saved.")
    return digest(describe_files(adapter))
