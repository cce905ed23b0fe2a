"""What goes along with a small model from stage to stage: what was kept, what was masked, and of which model."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.adapters.adapter_file import STRUCTURE_KEY, AdapterFile
from compress.errors import CompressError
from compress.model.base_record import FILE_NAME as BASE
from compress.model.base_record import BaseRecord
from compress.model.checkpoint import Checkpoint
from compress.model.config import quantization_method
from compress.model.planned import PlannedCheckpoint
from compress.pipelines.model_input import ModelInput, base_name
from compress.pipelines.stage import Context
from compress.prune.weight_masks import FILE_NAME as MASKS
from compress.prune.weight_masks import require_masks
from compress.structure import FILE_NAME as STRUCTURE
from compress.structure import StructureMap


def carry(source: Path, target: Path) -> None:
    """Copy what belongs to the small model in ``source`` to the one that was made of it in ``target``.

    The folder may be somebody else's. Records are read and written anew, so that nothing goes along that they have no
    place for; masks, which are large, are copied once their header is known to be one.

    Raises:
        CompressError: A file is not what its name says, or a link that leads out of the folder.
    """
    if (source / STRUCTURE).is_file():
        StructureMap.load(source / STRUCTURE).save(target / STRUCTURE)
    if (source / BASE).is_file():
        BaseRecord.load(source / BASE).save(target / BASE)
    if (source / MASKS).is_file():
        require_masks(source / MASKS)
        shutil.copyfile(source / MASKS, target / MASKS)


def is_small(folder: Path) -> bool:
    """Whether the model in a folder was made from a full one by pruning."""
    return (folder / STRUCTURE).is_file()


def write_base(context: Context, full: ModelInput, folder: Path) -> None:
    """Record beside a small model which model it was cut from: the chain's original, or the stage that was cut."""
    known = context.workspace.model
    original = known is None or full.id == known["fingerprint"]
    write_base_of(full, base_name(context) if original else full.name, folder)


def write_base_of(full: ModelInput, name: str, folder: Path) -> None:
    """Record in a folder which full model its content belongs to, under the name that is given."""
    BaseRecord(name=public_name(name), tensors=full.checkpoint.digests()).save(folder / BASE)


def write_base_beside(context: Context, start: ModelInput, source: Path, folder: Path) -> None:
    """Record beside an adapter which full model stands behind the model in ``source`` that it was trained on."""
    if (source / BASE).is_file():
        shutil.copyfile(source / BASE, folder / BASE)
    elif not is_small(source):
        write_base(context, start, folder)


def require_base(adapter: Path, model: Path, checkpoint: Checkpoint) -> None:
    """Refuse an adapter on another model than the one that ``base.json`` beside it records.

    The record is of a full model: that of ``recover``, or the one behind the small model that ``train`` worked on.
    Nothing is said of an adapter without a record, and of a quantized model that has none.

    Args:
        adapter: Its folder.
        model: Folder of the model that it is to go on.
        checkpoint: What lies there; one that is planned is not compared.

    Raises:
        CompressError: The model is another, or the record is broken; names the first tensor that differs.
    """
    if not (adapter / BASE).is_file() or isinstance(checkpoint, PlannedCheckpoint):
        return
    record = BaseRecord.load(adapter / BASE)
    difference: str | None
    if is_small(model):
        difference = _other_small(adapter, record, StructureMap.load(model / STRUCTURE))
    elif (model / BASE).is_file():
        difference = record.difference(BaseRecord.load(model / BASE).tensors)
    elif quantization_method(checkpoint.config) is not None:
        difference = None
    else:
        difference = record.difference(checkpoint.digests())
    if difference is not None:
        raise CompressError(
            f"The adapter {adapter} belongs to {record.name}, and the model in {model} is another: {difference}.",
            f"Give the model it was made for, byte for byte. Without {BASE} beside the adapter nothing is compared.",
        )


def _other_small(adapter: Path, record: BaseRecord, structure: StructureMap) -> str | None:
    """What a small model is that the one behind an adapter is not."""
    if structure.base_fingerprint != record.fingerprint:
        return "it was cut from another full model"
    with AdapterFile(adapter) as file:
        kept = file.origin.get(STRUCTURE_KEY, structure.digest())
    return None if kept == structure.digest() else "it keeps other groups or channels"


def public_name(name: str) -> str:
    """A model's name without the folders of this machine; a hub id stays as it is."""
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def check_base(folder: Path, structure: StructureMap, full: ModelInput) -> None:
    """Refuse a full model that the small one in ``folder`` was not cut from.

    Raises:
        CompressError: Its fingerprint is another; names the first tensor that differs, where ``base.json`` is there.
    """
    if structure.base_fingerprint == full.id:
        return
    name, difference = "another model", "its weights have another fingerprint"
    if (folder / BASE).is_file():
        record = BaseRecord.load(folder / BASE)
        if record.fingerprint == structure.base_fingerprint:
            name = record.name
            difference = record.difference(full.checkpoint.digests()) or difference
    raise CompressError(
        f"The small model was not cut from {full.name}: {difference}.",
        f"Give with --onto the model that was pruned ({name}), byte for byte, not one that was merged or trained.",
    )
