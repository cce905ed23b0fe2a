"""How the stages of a chain hang together: inputs against the stages they name, the original, an evaluation's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.evaluate.memory import file_bytes
from compress.model.checkpoint import Checkpoint
from compress.pipelines.verify_target import Chain, Finding, Target, Value
from compress.pipelines.workspace import MODEL_VERBS, Stage

EVALUATED = {
    "pruned": "prune",
    "aligned": "align",
    "quantized": "quantize",
    "small + adapter": "train",
    "full + recovered": "recover",
}
"""Rows of an evaluation, by the verb whose artifact they measure; the first row is the original."""


def check_original(chain: Chain, target: Target) -> Iterator[Finding]:
    """The original model: the weights that the chain began with."""
    recorded = chain.model.get("fingerprint")
    if chain.original is None:
        yield target.not_checked("fingerprint", f"the model is not in {chain.model.get('path')} any more")
        return
    if Checkpoint(chain.original).fingerprint() == recorded:
        yield target.ok("fingerprint", f"{chain.model.get('name')}: the weights that the chain began with")
    else:
        yield target.differs(
            "fingerprint",
            f"{chain.original} has other weights than when the chain began",
            "Put the original weights back there, or start another chain with --run DIR.",
        )


def check_inputs(target: Target, stage: Stage) -> Iterator[Finding]:
    """Each input's id or fingerprint: that of the stage, or of the original, that it stands for now."""
    chain = target.chain
    if chain is None:
        yield target.not_checked("inputs", "the folder lies in no workspace that lists it")
        return
    expected, recorded, failed = _expected(chain, target, stage), stage.record["inputs"], False
    for name in sorted(set(recorded) & set(expected)):
        if recorded[name] != expected[name]:
            failed = True
            yield target.differs(
                "inputs",
                f"it was made of another {name} ({str(recorded[name])[:12]}) than the chain has "
                f"({expected[name][:12]})",
                f"Put the folder back that it was made of, or make it again with compress {stage.verb} --redo.",
            )
    if not failed:
        unnamed = sorted(set(recorded) - set(expected))
        more = f"; not in the chain: {', '.join(unnamed)}" if unnamed else ""
        yield target.ok("inputs", f"{', '.join(sorted(set(recorded) & set(expected)))} as named{more}")


def _expected(chain: Chain, target: Target, stage: Stage) -> dict[str, str]:
    """The identity that each input of the stage should have."""
    original = str(chain.model.get("fingerprint"))
    if stage.verb == "eval":
        stages = {row: chain.find(verb) for row, verb in EVALUATED.items()}
        return {"original": original} | {row: found.id for row, found in stages.items() if found is not None}
    if stage.verb == "recover":
        trained = None if stage.record["config"].get("adapter") else chain.find("train")
        # what --onto names must have been the original's weights, unless nothing was pruned
        full = (
            {} if stage.record["config"].get("onto") and chain.find("prune") is None else {"full": original}
        )
        return full | ({"adapter": trained.id} if trained is not None else {})
    before = chain.model_before(target.path.name)
    return {"model": original if before is None else before.id, "teacher": original}


def check_evaluation(target: Target) -> Iterator[Finding]:
    """The sizes in an evaluation's rows, against the files of today."""
    chain = target.chain
    if chain is None:
        yield target.not_checked("sizes", "the folder lies in no workspace that lists it")
        return
    values = []
    for row in target.metrics.get("rows", []):
        folders = _folders(chain, str(row["name"]))
        if folders is not None:
            size = sum(file_bytes(folder) for folder in folders)
            values.append(Value(what=f"bytes of {row['name']}", recorded=row["bytes"], found=size))
            values.append(
                Value(
                    what=f"bits per weight of {row['name']}",
                    recorded=row["bits_per_weight"],
                    found=8 * size / row["parameters"],
                    tolerance=1e-9,
                )
            )
    yield from target.compare("sizes", values, f"bytes of {len(values) // 2} models as recorded")


def _folders(chain: Chain, row: str) -> list[Path] | None:
    """The folders whose weight files a row of an evaluation counts; None when one is not here."""
    if row == "original":
        return None if chain.original is None else [chain.original]
    stage = chain.find(EVALUATED.get(row, ""))
    if stage is None or stage.verb in MODEL_VERBS:
        return None if stage is None else [stage.path]
    small = chain.model_before(stage.path.name) if stage.verb == "train" else None
    base = chain.original if small is None else small.path
    onto = stage.record["config"].get("onto")
    if onto is not None:
        base = Path(str(onto)) if Path(str(onto)).is_dir() else None
    return None if base is None else [base, stage.path]
