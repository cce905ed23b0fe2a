"""A plan as tables that fit into 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.pipelines.plan_loram import show_loram
from compress.pipelines.reporter import Reporter, human_bytes, human_count
from compress.pipelines.settings import PlanSettings


def show(reporter: Reporter, settings: PlanSettings, result: Mapping[str, Any]) -> None:
    """Print sizes, what became of the ratio, memory, disk and time, and what to change."""
    reporter.table(
        f"sizes of {result['model']}",
        ("model", "parameters", "paper", "bits/weight", "file", "smaller"),
        [
            (
                row["name"],
                human_count(row["parameters"]),
                f"{row['paper_reduction']:.2f}x",
                f"{row['bits_per_weight']:.3f}",
                human_bytes(row["bytes"]),
                f"{row['reduction']:.2f}x",
            )
            for row in result["sizes"]
        ],
    )
    say(
        reporter,
        "paper: parameters at 16 bits, or at the budget's, nothing else counted. bits/weight: of the decoder matrices, "
        "scales and factors included. file, smaller: everything. "
        f"Sizes are from {_SOURCES[result['source']]}.",
    )
    if (rounding := result["rounding"]) is not None:
        show_rounding(reporter, rounding)
    stages = result["stages"]
    reporter.table(
        f"peak memory, {result['dtype']}, effort {result['effort']}",
        ("stage", "device", "host", "fits"),
        [
            (
                stage["verb"],
                _needs(stage, "device memory"),
                _needs(stage, "host memory"),
                {True: "yes", False: "no", None: "?"}[stage["fits"]],
            )
            for stage in stages
        ],
    )
    reporter.table(
        "what takes the memory",
        ("stage", "its peak is in", "largest term"),
        [(stage["verb"], _tight(stage)["phase"], _largest(_tight(stage))) for stage in stages],
    )
    reporter.table(
        "disk and time",
        ("stage", "disk at its peak", "left there", "at least"),
        [
            (
                stage["verb"],
                human_bytes(_of(stage, "disk")["needs"]),
                human_bytes(stage["disk_kept"]),
                human_seconds(stage["at_least_seconds"]),
            )
            for stage in stages
        ],
    )
    if result["memory_limit"] is not None:
        show_limited(reporter, result["memory_limit"], stages)
    machine = result["machine"]
    has = [
        f"{label} {human_bytes(machine[key])}"
        for label, key in (("device", "device_free"), ("host", "host_free"), ("disk", "disk_free"))
        if machine[key] is not None
    ]
    say(
        reporter,
        f"Free: {', '.join(has)}. Memory is counted, not measured; host includes what proves results.",
    )
    if result["speed"] is not None:
        say(
            reporter,
            f"Times: products and transfers alone, at {result['speed']['products'] / 1e9:,.0f} GFLOP/s, "
            f"{human_bytes(result['speed']['write'])}/s to disk, measured here just now.",
        )
    for stage in stages:
        if stage["fits"] is False:
            limit = _of(stage, stage["limit"])
            say(
                reporter,
                f"{stage['verb']} does not fit: {human_bytes(limit['needs'])} of {limit['resource']}, and "
                f"{human_bytes(limit['has'])} are there. Change: {stage['change']}.",
            )
    if settings.check:
        refused = ", ".join(result["refused"])
        say(reporter, f"No room here for: {refused}." if refused else "Every step has room here.")
    if settings.loram:
        show_loram(reporter, settings, result["rows"])


def show_limited(reporter: Reporter, limit: int, stages: Sequence[Mapping[str, Any]]) -> None:
    """Print how each stage keeps to ``--memory-limit``, or that it will be refused."""
    reporter.table(
        f"under a memory limit of {human_bytes(limit)}",
        ("stage", "models are opened", "counted peak", "fits"),
        [
            (
                stage["verb"],
                stage["limited"]["way"],
                human_bytes(stage["limited"]["needs"]),
                "yes" if stage["limited"]["fits"] else "no",
            )
            for stage in stages
        ],
    )
    for stage in stages:
        found = stage["limited"]
        if not found["fits"]:
            say(
                reporter,
                f"{stage['verb']} will be refused: {human_bytes(found['needs'])} in the phase {found['phase']!r}. "
                f"Change: {found['change']}.",
            )


def show_rounding(reporter: Reporter, rounding: Mapping[str, Any]) -> None:
    """Print what whole heads and channel multiples make of the ratio."""
    near = rounding["near_shapes"]
    say(reporter, "")
    say(reporter, f"prune: {rounding['reason']}")
    say(
        reporter,
        f"That is {rounding['of_all_parameters']:.1%} of all parameters, {rounding['of_all_bytes']:.1%} of the file. "
        + (
            f"Scores choose among {near['count']} such shapes, which remove {near['least']:.1%} to {near['most']:.1%}."
            if near["count"] > 1
            else "No other shape is as near."
        ),
    )


def human_seconds(seconds: float | None) -> str:
    """``40 s``, ``12 min``, ``3.5 h``; ``?`` where it was not measured."""
    if seconds is None:
        return "?"
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (2 * 86400, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} d"


def say(reporter: Reporter, text: str) -> None:
    """A line of the result."""
    reporter.out.print(text, markup=False)


_SOURCES = {
    "headers": "the headers of its files",
    "index": "its config and index",
    "config": "its config alone",
}


def _of(stage: Mapping[str, Any], resource: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in stage["resources"] if each["resource"] == resource)
    return found


def _needs(stage: Mapping[str, Any], resource: str) -> str:
    found = [each for each in stage["resources"] if each["resource"] == resource]
    return human_bytes(found[0]["needs"]) if found else "-"


def _tight(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The memory that is nearest to its limit."""
    memory = [each for each in stage["resources"] if each["resource"] != "disk"]
    return max(memory, key=lambda each: each["needs"] / each["has"] if each["has"] else 0.0)


def _largest(resource: Mapping[str, Any]) -> str:
    terms = resource["terms"]
    if not terms:
        return ""
    name = max(terms, key=lambda key: float(terms[key]))
    return f"{name} {human_bytes(terms[name])}"
