"""Figures of a suite against a baseline: what may differ, by how much, and what counts as a regression.

Bytes are compared exactly. Perplexity and peak memory may rise by their tolerance: four standard deviations of the
runs behind the baseline, relative to their mean, but at least a floor, because runs on one machine say nothing of
other processors and libraries. What falls is no regression; below the tolerance it is named, so that the baseline can
be written anew.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compress.errors import CompressError

Kind = Literal["perplexity", "bytes", "peak_memory"]
Figures = Mapping[str, tuple[Kind, float]]
"""Name -> kind and value."""

FLOORS: Mapping[Kind, float] = {"perplexity": 0.01, "bytes": 0.0, "peak_memory": 0.05}
"""Least tolerance, relative."""
DEVIATIONS = 4.0
"""Standard deviations of repeated runs that are noise."""
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure against its baseline.

    Attributes:
        name: "quantize: perplexity".
        kind: What it is.
        value: Now; None: it is not there any more.
        baseline: Mean of the runs behind the baseline; None: it is not in it.
        bar: The largest value that passes.
        verdict: "ok", "better" (below all noise), "regressed", "missing" or "new".
    """

    name: str
    kind: Kind
    value: float | None
    baseline: float | None
    bar: float | None
    verdict: Literal["ok", "better", "regressed", "missing", "new"]

    @property
    def passed(self) -> bool:
        """Whether it is no regression."""
        return self.verdict in ("ok", "better")

    def sentence(self) -> str:
        """What regressed, by how much, and the bar."""
        if self.value is None:
            return f"{self.name} is in the baseline and was not measured"
        if self.baseline is None or self.bar is None:
            return f"{self.name} is {self.value:,.6g} and not in the baseline"
        change = self.value / self.baseline - 1 if self.baseline else 0.0
        text = f"{self.name} is {_written(self.kind, self.value)}, the baseline {_written(self.kind, self.baseline)}"
        return f"{text} ({change:+.2%}), the bar {_written(self.kind, self.bar)}"


def make_baseline(suite: str, protocol: Mapping[str, Any], runs: Sequence[Figures]) -> dict[str, Any]:
    """The JSON values of a baseline: every figure with its values and the tolerance that follows from them.

    Raises:
        CompressError: Bytes differ from run to run.
    """
    figures: dict[str, Any] = {}
    for name, (kind, _) in runs[0].items():
        values = [run[name][1] for run in runs]
        if kind == "bytes" and len(set(values)) > 1:
            raise CompressError(
                f"The figure {name!r} differs from run to run: {sorted(set(values))}.",
                "Find out why: bytes are to be the same under one seed.",
            )
        figures[name] = {"kind": kind, "values": values, "tolerance": tolerance(kind, values)}
    return {
        "format_version": FORMAT_VERSION,
        "suite": suite,
        "protocol": dict(protocol),
        "runs": len(runs),
        "figures": figures,
    }


def tolerance(kind: Kind, values: Sequence[float]) -> float:
    """How much more than the mean of ``values`` is noise, as a share of it."""
    if kind == "bytes":
        return 0.0
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) / mean if len(values) > 1 and mean else 0.0
    return max(FLOORS[kind], DEVIATIONS * spread)


def check_protocol(baseline: Mapping[str, Any], protocol: Mapping[str, Any]) -> None:
    """Refuse to compare figures of different protocols.

    Raises:
        CompressError: Another format, model, text, seed, dtype, device or setting; names what differs.
    """
    if baseline.get("format_version") != FORMAT_VERSION:
        raise CompressError(
            f"The baseline has format version {baseline.get('format_version')!r}, not {FORMAT_VERSION}.",
            "Write it anew with --update.",
        )
    known = baseline["protocol"]
    names = sorted(name for name in known.keys() | protocol.keys() if known.get(name) != protocol.get(name))
    if names:
        listed = "; ".join(f"{name}: {known.get(name)} there, {protocol.get(name)} here" for name in names)
        raise CompressError(
            f"The baseline was measured under another protocol ({listed}).",
            "Measure under the same one, or write a baseline of your own: --baselines DIR --update.",
        )


def compare(baseline: Mapping[str, Any], figures: Figures) -> list[Comparison]:
    """Every figure of either side."""
    known: Mapping[str, Any] = baseline["figures"]
    found = []
    for name, entry in known.items():
        kind, mean = entry["kind"], statistics.fmean(entry["values"])
        slack = mean * entry["tolerance"]
        if name not in figures:
            verdict = Comparison(
                name=name, kind=kind, value=None, baseline=mean, bar=mean + slack, verdict="missing"
            )
        else:
            value = figures[name][1]
            worse = value != mean if kind == "bytes" else not value <= mean + slack  # NaN is worse
            verdict = Comparison(
                name=name,
                kind=kind,
                value=value,
                baseline=mean,
                bar=mean + slack,
                verdict="regressed" if worse else "better" if value < mean - slack else "ok",
            )
        found.append(verdict)
    for name, (kind, value) in figures.items():
        if name not in known:
            found.append(
                Comparison(name=name, kind=kind, value=value, baseline=None, bar=None, verdict="new")
            )
    return found


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The comparisons as JSON values."""
    return [asdict(each) | {"passed": each.passed} for each in comparisons]


def _written(kind: Kind, value: float) -> str:
    if kind == "perplexity":
        return f"{value:.4f}"
    return f"{value:,.0f} bytes" if kind == "bytes" else f"{value / 1e6:,.1f} MB"
