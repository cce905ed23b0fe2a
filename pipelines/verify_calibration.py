"""The errors that ``quantize`` measured on calibration text, measured again: its own pass, another way to add up.

The pass is that of the stage: the same windows, and for the objective ``hessian`` layer by layer, each fed by the
quantized ones before it, now those of the checkpoint. Errors are then taken in float64 from the moments and from what
is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
from compress.pipelines.fisher_files import LIMIT, fisher_layers
from compress.pipelines.hessian_walk import HessianWalk, sensitivities
from compress.pipelines.identity import TEXT
from compress.pipelines.matrices import layer_name, read_matrix
from compress.pipelines.measure import full_calibration, windows_record
from compress.pipelines.model_input import ModelInput, device_and_dtype
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, QuantizeSettings, resolve
from compress.pipelines.stage import Context
from compress.pipelines.text import kept_text, text_inputs
from compress.pipelines.verify_errors import stored_layer
from compress.pipelines.verify_quantized import ALLOCATION, by_name, places_of, read_allocation, source_model
from compress.pipelines.verify_target import Finding, Target, Value
from compress.pipelines.ways import choose_way
from compress.pipelines.ways_of_stages import quantize_count
from compress.pipelines.workspace import Workspace
from compress.quantize.checkpoint import MatrixRecord, read_lq_config
from compress.quantize.fisher_collect import layer_rounds
from compress.quantize.linear import LQLinear
from compress.quantize.stored_errors import least_damping, output_error, stored_error, weighted_error
from compress.quantize.vocabulary import MatrixMoments

CHECKS = {
    "hessian": ("output errors", "relative_output_error"),
    "fisher": ("weighted errors", "relative_weighted_error"),
}
"""By objective, the check and what is recorded of each matrix."""
HALF = (torch.bfloat16, torch.float16)
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4} | dict.fromkeys(HALF, 1e-2)
"""Relative, by what the model computed in. Float32 sums in another order stay a tenth of it away; in 16 bits another
device rounds other activations up, and not to round them at all makes less of a difference than this."""
SUMS: Mapping[torch.dtype, float] = {torch.float32: 1e-4} | dict.fromkeys(HALF, 5e-2)
"""The same for weighed sums that are not relative to another: nothing cancels in them."""
FLOOR = 1e-6
"""What float32 leaves of an error of zero, relative to the matrix."""
OPTION = "compress verify --calibration"


def check_calibrated(reporter: Reporter, target: Target, *, asked: bool) -> Iterator[Finding]:
    """The output errors (``hessian``) or Fisher-weighted errors (``fisher``) of every matrix of a quantized stage.

    Args:
        reporter: Shows bars.
        target: The stage.
        asked: Whether to measure; else one finding says that it was not, and how to ask for it.
    """
    config = {} if target.stage is None else target.stage.record["config"]
    if config.get("objective") not in CHECKS:
        return
    check, key = CHECKS[config["objective"]]
    if not asked:
        yield target.not_checked(check, f"they take the calibration text, as long as quantize did: {OPTION}")
        return
    if target.chain is None or target.source is None:
        yield target.not_checked(check, "the model before quantization is not here")
        return
    try:
        require_text(target, str(config["data"]))
        repeat = _Repeat.of(reporter, target)
        values = list((repeat.outputs if check == "output errors" else repeat.weighted)())
    except CompressError as error:
        yield target.differs(check, error.cause, error.remedy)
        return
    found = [value for value in values if value.what.startswith(f"{key} of ")]
    shares = [abs(v.found / v.recorded - 1) for v in found if isinstance(v.recorded, float) and v.recorded]
    summary = f"{len(found)} measured again, largest relative difference {max(shares, default=0.0):.0e}"
    yield from target.compare(check, values, summary)


def require_text(target: Target, source: str) -> None:
    """Refuse a text that is not the one the stage read.

    Raises:
        CompressError: It is not here, or its content is another.
    """
    recorded = {} if target.stage is None else target.stage.record["inputs"]
    if source == "self":
        seed = 0 if target.stage is None else int(target.stage.record["seed"])
        if target.chain is not None and not kept_text(target.chain.root, "train", seed).is_file():
            raise _other("The text that the model wrote for calibration is not in the workspace any more.")
        return
    found, known = text_inputs(source).get(TEXT), recorded.get(TEXT)
    if known in (
        found,
        None,
    ):  # None: of the hub, or recorded by a version that did not look; its tokens may tell
        return
    if found is None:
        raise _other(f"The text {source} that quantize read is not here.")
    raise _other(f"The content of the text {source} changed since quantize read it.")


def _other(cause: str) -> CompressError:
    return CompressError(
        cause, "Put the text back as it was (a relative path counts from here), or leave --calibration out."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repeat:
    """What the calibration of a stage is repeated with."""

    target: Target
    context: Context
    settings: QuantizeSettings
    text: str
    model: ModelInput
    checkpoint: Checkpoint
    records: Mapping[str, MatrixRecord]
    device: str
    dtype: torch.dtype

    @classmethod
    def of(cls, reporter: Reporter, target: Target) -> _Repeat:
        """From the record of a stage in a chain.

        Raises:
            CompressError: The record has settings that this version does not know.
        """
        assert target.stage is not None
        assert target.chain is not None
        record = target.stage.record
        config, effort = record["config"], record.get("effort") or "quick"
        own = {name: config[name] for name in QuantizeSettings.__dataclass_fields__ if name in config}
        common = Common(
            run=target.chain.root,
            data=str(config["data"]),
            seed=int(config["seed"]),
            dtype=str(config["dtype"]),
            effort=effort,
        )
        device, dtype = device_and_dtype(common)
        checkpoint = Checkpoint(target.path)
        return cls(
            target=target,
            context=Context(common=common, workspace=Workspace(target.chain.root), reporter=reporter),
            settings=resolve(QuantizeSettings, own, effort),
            text=str(config["data"]),
            model=source_model(target),
            checkpoint=checkpoint,
            records=read_lq_config(checkpoint.config["quantization_config"]),
            device=device,
            dtype=dtype,
        )

    def outputs(self) -> Iterator[Value]:
        """Output errors, damping and dead inputs of every matrix whose inputs quantize looked at."""
        context, model, settings = self.context, self.model, self.settings
        places = places_of(model, self.records)
        way = choose_way(
            context,
            "verify",
            model,
            self.device,
            self.dtype,
            quantize_count(context, model, settings),
            source=self.text,
        )
        given = (context, model, settings, self.text, self.device, self.dtype)
        moments: Mapping[str, MatrixMoments] = {}
        if settings.embeddings == "menu":
            _, moments = sensitivities(*given, way)
        walk = HessianWalk(*given, moments=moments, way=way)
        self._require_windows(walk.calibration)
        layers: dict[int, list[str]] = {}
        for module in self.records:
            layers.setdefault(places[module].layer, []).append(module)
        met: set[str] = set()
        with context.reporter.bar(f"calibration of {self.target.name}") as progress:
            for done, layer in enumerate(sorted(layers)):
                progress(done, len(layers), layer_name(layer))
                stored = {m: stored_layer(self.checkpoint, m, self.records[m]) for m in layers[layer]}
                for readers, gram_II in walk.moments(layer):
                    damping, dead = least_damping(gram_II), int((gram_II.diagonal() == 0).sum())
                    for module in [name for name in readers if name in stored]:
                        met.add(module)
                        cost = partial(output_error, gram_II=gram_II, damping=damping)
                        weight_OI = read_matrix(model, places[module]).float()
                        yield self._relative("relative_output_error", module, weight_OI, stored[module], cost)
                        yield self._value("damping", module, damping, tolerance=1e-9)
                        yield self._value("dead_inputs", module, dead)
                if layer != max(layers):
                    walk.advance(
                        layer, {module: each.dequantized_weight() for module, each in stored.items()}
                    )
            progress(len(layers), len(layers), "")
        yield from self._strangers("relative_output_error", met)

    def weighted(self) -> Iterator[Value]:
        """Fisher-weighted errors of every decoder matrix, and what the allocation counted of them exactly."""
        model, key = self.model, "relative_weighted_error"
        tokens = self.settings.calibration_tokens
        windows = full_calibration(self.context, model.path, self.text, tokens=tokens)
        self._require_windows(windows_record(windows))
        places = places_of(model, self.records)
        allocated = by_name(read_allocation(self.target))
        met: set[str] = set()
        rounds = layer_rounds(model.architecture, LIMIT)
        layers = fisher_layers(self.context, model, windows, self.device, self.dtype, rounds)
        for _, found in layers:
            for module in [name for name in found if name in self.records]:
                met.add(module)
                full_OI = found.pop(module).full
                assert full_OI is not None
                weight_OI = read_matrix(model, places[module]).float()
                layer = stored_layer(self.checkpoint, module, self.records[module])
                cost = partial(weighted_error, fisher_OI=full_OI.cpu())
                yield self._relative(key, module, weight_OI, layer, cost)
                exact = {"squared_norm": weight_OI}
                if self.records[module].rank == 0:  # of higher ranks the cost is an estimate
                    exact["expected_cost"] = stored_error(weight_OI, layer)
                for name, matrix_OI in exact.items():
                    yield Value(
                        what=f"{name} of {module} in {ALLOCATION}",
                        recorded=allocated.get(module, {}).get(name),
                        found=cost(matrix_OI),
                        tolerance=SUMS[self.dtype],
                        floor=1e-300,
                    )
        yield from self._strangers(key, met)

    def _require_windows(self, found: Mapping[str, Any]) -> None:
        """Refuse windows other than the recorded ones, where there is a record of them.

        Raises:
            CompressError: The text or the tokenizer gives others.
        """
        known = self.target.metrics.get("calibration")
        if known and known["ids_sha256"] != found["ids_sha256"]:
            raise _other(f"The text {self.text} gives other tokens than quantize read.")

    def _relative(
        self, key: str, module: str, weight_OI: Tensor, layer: LQLinear, cost: Callable[[Tensor], float]
    ) -> Value:
        """The root of the cost of what is stored over that of the matrix itself."""
        norm = cost(weight_OI.double())
        found = math.sqrt(cost(stored_error(weight_OI, layer)) / norm) if norm else 0.0
        return self._value(key, module, found, tolerance=TOLERANCE[self.dtype], floor=FLOOR)

    def _value(self, key: str, module: str, found: float, *, tolerance: float = 0, floor: float = 0) -> Value:
        entries = by_name(self.target.metrics)
        recorded = entries.get(module, {}).get(key)
        if recorded is None and any(key in entry for entry in entries.values()):  # none: of an older version
            recorded = "nothing"
        return Value(
            what=f"{key} of {module}", recorded=recorded, found=found, tolerance=tolerance, floor=floor
        )

    def _strangers(self, key: str, met: set[str]) -> Iterator[Value]:
        """Matrices with a recorded error that nothing measures."""
        for module, known in by_name(self.target.metrics).items():
            if key in known and module not in met:
                yield Value(what=f"{key} of {module}", recorded=known[key], found="nothing")
