"""``compress verify``: every hash, size and error that a chain records, checked against what lies on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from compress.adapters.adapter_file import CONFIG_FILE, AdapterFile
from compress.errors import CompressError, UsageError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.config import quantization_method
from compress.pipelines.reporter import Reporter
from compress.pipelines.verify_adapter import check_base, check_factors, check_slices
from compress.pipelines.verify_calibration import check_calibrated
from compress.pipelines.verify_chain import check_evaluation, check_inputs, check_original
from compress.pipelines.verify_errors import check_errors
from compress.pipelines.verify_files import HEADERS, check_files, check_record, check_tensors
from compress.pipelines.verify_logits import check_logits
from compress.pipelines.verify_model import check_masks, check_shapes, check_sizes, check_structure
from compress.pipelines.verify_quantized import check_allocation, check_stored_bits
from compress.pipelines.verify_target import Chain, Finding, Target, read_chain, read_stage
from compress.pipelines.workspace import MODEL_VERBS
from compress.progress import Progress
from compress.prune.weight_masks import FILE_NAME as MASKS
from compress.quantize.checkpoint import QUANT_METHOD, MatrixRecord, read_lq_config
from compress.structure import FILE_NAME

SHOWN = 5
"""Failures of one check that the table shows; ``--json`` has all."""


def verify(
    reporter: Reporter, root: Path, paths: Sequence[Path] = (), *, calibration: bool = False
) -> dict[str, Any]:
    """Check the chain in ``root``, or the folders given; writes nothing. See ``compress verify --help``.

    Args:
        reporter: Shows bars, the table and what to do.
        root: The workspace.
        paths: Folders of stages, models or adapters, or workspaces; none: the whole chain in ``root``.
        calibration: Repeat the calibration of quantized stages, for the errors that were measured on its text.

    Returns:
        ``ok`` (nothing differs), ``checks`` (``stage``, ``check``, ``result``, ``detail`` and ``remedy`` each) and
        ``counts`` by result.

    Raises:
        UsageError: There is no chain, or a path is no stage, model, adapter or workspace.
    """
    findings: list[Finding] = []
    for path in paths or (root,):
        if (path / "run.json").is_file():
            findings += verify_chain(reporter, read_chain(path), calibration=calibration)
        elif not paths:
            raise UsageError(
                f"There is nothing to verify in {root}.",
                "Give the folder of a stage, a model or an adapter, or --run.",
            )
        else:
            findings += verify_folder(reporter, locate(path), calibration=calibration)
    counts = {
        name: sum(f.result == name for f in findings) for name in dict.fromkeys(f.result for f in findings)
    }
    show(reporter, findings)
    return {
        "ok": "differs" not in counts,
        "counts": counts,
        "checks": [asdict(finding) for finding in findings],
    }


def verify_chain(reporter: Reporter, chain: Chain, *, calibration: bool = False) -> list[Finding]:
    """The original model and every stage of a chain.

    Raises:
        UsageError: It has no stage.
    """
    if not chain.names:
        raise UsageError(f"There is nothing to verify in {chain.root}.", "Run a stage first: compress prune.")
    start = _Findings(Target(name="original", path=chain.original or chain.root))
    start.take("fingerprint", lambda: check_original(chain, start.target))
    findings = start.all
    for name in chain.names:
        fault = chain.faults.get(name)
        if fault is not None:
            broken = Target(name=name, path=chain.root / name, chain=chain)
            findings.append(broken.differs("record", fault.cause, fault.remedy))
        else:
            stage = chain.stages[name]
            target = Target(name=name, path=stage.path, stage=stage, chain=chain)
            findings += verify_folder(reporter, target, calibration=calibration)
    return findings


def locate(path: Path) -> Target:
    """What lies in a folder: a stage with its record and the workspace around it, or a bare model or adapter.

    Raises:
        UsageError: None of these.
    """
    known = ("stage.json", "config.json", CONFIG_FILE)
    if (path / "partial.json").is_file():
        raise UsageError(
            f"{path} is the unfinished work of a stage.", "Repeat its command to finish it first."
        )
    if not any((path / name).is_file() for name in known):
        raise UsageError(
            f"{path} is no stage, model or adapter.", f"Give a folder that has one of {', '.join(known)}."
        )
    if not (path / "stage.json").is_file():
        return Target(name=str(path), path=path)
    folder = path.resolve()
    chain = read_chain(folder.parent) if (folder.parent / "run.json").is_file() else None
    if chain is not None and folder.name in chain.names:
        stage = chain.stages.get(folder.name)
        if stage is None:
            raise chain.faults[folder.name]
        return Target(name=folder.name, path=folder, stage=stage, chain=chain)
    return Target(name=str(path), path=path, stage=read_stage(path))


def verify_folder(reporter: Reporter, target: Target, *, calibration: bool = False) -> list[Finding]:
    """Every check of one folder; what a damaged file makes impossible is a finding too."""
    stage, found = target.stage, _Findings(target)
    with reporter.bar(f"verify {target.name}") as progress:
        if stage is not None:
            found.take("record", lambda: check_record(target, stage))
            found.take("files", lambda: check_files(target, stage, progress))
            found.take("inputs", lambda: check_inputs(target, stage))
        found.take("tensors", lambda: check_tensors(target, progress))
        verb = "" if stage is None else stage.verb
        if any(finding.check == HEADERS for finding in found.all):
            found.all.append(target.not_checked("content", "a weight file cannot be read"))
        elif verb in MODEL_VERBS or (target.path / "config.json").is_file():
            found.take("model", lambda: _check_model(target, progress))
            if not found.broken:
                found.take("logits", lambda: check_logits(target))
        elif verb in ("train", "recover") or (target.path / CONFIG_FILE).is_file():
            found.take("adapter", lambda: _check_adapter(target, progress))
        elif verb == "eval":
            found.take("sizes", lambda: check_evaluation(target))
    if verb == "quantize" and not found.broken:  # bars of its own
        found.take("calibration", lambda: check_calibrated(reporter, target, asked=calibration))
    return found.all


class _Findings:
    """The findings of one folder."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.all: list[Finding] = []

    @property
    def broken(self) -> bool:
        """Whether the model cannot be opened for what is wrong with its files."""
        return any(f.result == "differs" and f.check in (HEADERS, "model", "shapes") for f in self.all)

    def take(self, check: str, run: Callable[[], Iterator[Finding]]) -> None:
        """Run a check to its end; a damaged file can break its reader in any way, and the other checks go on."""
        try:
            self.all.extend(run())
        except CompressError as error:
            self.all.append(self.target.differs(check, error.cause))
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".")
            self.all.append(
                self.target.differs(check, f"it cannot be read ({type(error).__name__}: {reason})")
            )


def _check_model(target: Target, progress: Progress) -> Iterator[Finding]:
    checkpoint = Checkpoint(target.path)
    arch = checkpoint_architecture(checkpoint)
    matrices: dict[str, MatrixRecord] = {}
    if quantization_method(checkpoint.config) == QUANT_METHOD:
        matrices = read_lq_config(checkpoint.config["quantization_config"])
    shapes = list(check_shapes(target, checkpoint, arch, matrices))
    yield from shapes
    if target.stage is not None:
        yield from check_sizes(target, checkpoint, arch, matrices)
    if (target.stage is not None and target.stage.verb == "prune") or (target.path / FILE_NAME).is_file():
        yield from check_structure(target, arch)
    if (target.path / MASKS).is_file():
        yield from check_masks(target, checkpoint, arch)
    if any(finding.result == "differs" for finding in shapes):
        yield target.not_checked("values", "the stored tensors are not those of config.json")
    elif matrices:
        yield from check_stored_bits(target, checkpoint, matrices)
        yield from check_allocation(target, matrices)
        yield from check_errors(target, checkpoint, matrices, progress)


def _check_adapter(target: Target, progress: Progress) -> Iterator[Finding]:
    with AdapterFile(target.path) as adapter:
        yield from check_factors(target, adapter)
        yield from check_base(target, adapter)
        if target.stage is not None and target.stage.verb == "recover":
            yield from check_slices(target, adapter, progress)
    merged = Target(name=f"{target.name}/merged", path=target.path / "merged", stage=target.stage)
    if merged.path.is_dir():
        checkpoint = Checkpoint(merged.path)
        yield from check_shapes(merged, checkpoint, checkpoint_architecture(checkpoint), {})


def show(reporter: Reporter, findings: Sequence[Finding]) -> None:
    """Print the table, what to do about failures, and the count."""
    rows: list[tuple[str, str, str, str]] = []
    for (stage, check, result), group in groupby(findings, key=lambda f: (f.stage, f.check, f.result)):
        members = list(group)
        rows += [(stage, check, result, finding.detail) for finding in members[:SHOWN]]
        if len(members) > SHOWN:
            rows.append((stage, check, result, f"and {len(members) - SHOWN} more"))
    reporter.table("verify", ("stage", "check", "result", "detail"), rows)
    failed = [finding for finding in findings if finding.result == "differs"]
    for stage, check, remedy in dict.fromkeys((f.stage, f.check, f.remedy) for f in failed):
        reporter.out.print(f"{stage}, {check}: {remedy}", markup=False)
    reporter.say(f"verify: {len(findings)} checks, {len(failed)} differ.")
