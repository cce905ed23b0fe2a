"""Which of a chain's small models an adapter was trained on: what training changed in a whole tensor depends on it."""

from __future__ import annotations

from itertools import pairwise, takewhile
from pathlib import Path

import torch

from compress.adapters.adapter_file import CONFIG_FILE, AdapterFile
from compress.adapters.carried import whole_tensors
from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
from compress.pipelines.model_input import ModelInput
from compress.pipelines.small_files import is_small
from compress.pipelines.stage import Context
from compress.pipelines.workspace import MODEL_VERBS
from compress.structure import FILE_NAME, StructureMap


def trained_on(
    context: Context, start: ModelInput, adapter: Path, structure: StructureMap, *, ours: bool
) -> Checkpoint:
    """The small model whose tensors an adapter's whole trained ones started from.

    Args:
        context: Has the chain.
        start: The model the chain starts from.
        adapter: Folder of the adapter.
        structure: What the chain's pruning kept.
        ours: Whether it is the chain's own, which was trained on the last model before ``train``. Any other names a
            folder, or was trained on one of the small models of the chain.

    Raises:
        CompressError: It carries a whole tensor that these have in different values, and does not say which it was
            trained on.
    """
    if ours:
        stage = context.workspace.model_before("train")
        return start.checkpoint if stage is None else Checkpoint(stage.path)
    before = takewhile(lambda stage: stage.verb != "recover", context.workspace.stages)
    stages = [stage.path for stage in before if stage.verb in MODEL_VERBS]
    models = [start.checkpoint] if is_small(start.path) or not stages else []
    models += [Checkpoint(path) for path in stages]
    with AdapterFile(adapter) as small:
        named, whole = small.config.get("base_model_name_or_path"), whole_tensors(small)
    if isinstance(named, str) and named and Path(named).is_dir():
        for model in models:
            if model.path.samefile(named):
                return model
        kept = Path(named) / FILE_NAME
        if kept.is_file() and StructureMap.load(kept).digest() == structure.digest():
            return Checkpoint(Path(named))
    for name in whole:
        for one, other in pairwise(models):
            if not _agree(one, other, name):
                raise CompressError(
                    f"The adapter {adapter} carries the trained {name}, which {other.path.name} has in other "
                    f"values than {one.path.name}, and does not say on which of them it was trained.",
                    f"Write the folder of that model into {CONFIG_FILE} as base_model_name_or_path.",
                )
    return models[-1]


def _agree(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    if name not in one or name not in other:
        return name not in one and name not in other
    return one.shape(name) == other.shape(name) and torch.equal(one.read(name), other.read(name))
