"""What goes along with a small model from stage to stage: what was kept, what was masked, and of which model."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.errors import CompressError
from compress.model.base_record import FILE_NAME as BASE
from compress.model.base_record import BaseRecord
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
    name = base_name(context) if original else full.name
    BaseRecord(name=public_name(name), tensors=full.checkpoint.digests()).save(folder / BASE)


def write_base_beside(context: Context, start: ModelInput, source: Path, folder: Path) -> None:
    """Record beside an adapter which full model stands behind the model in ``source`` that it was trained on."""
    if (source / BASE).is_file():
        shutil.copyfile(source / BASE, folder / BASE)
    elif not is_small(source):
        write_base(context, start, folder)


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
