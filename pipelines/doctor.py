"""``compress doctor``: what is installed and at hand, what would be used and why, and what to do about what is wrong.

The checks of libraries come first and import torch only once it is known to import: this verb must say what is broken
where every other verb would fail. What the machine and the data are like is in :mod:`compress.pipelines.doctor_checks`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from compress.pipelines.reporter import Reporter

DISTRIBUTION = "compress-llm"
NEEDED = ("numpy", "torch", "safetensors", "transformers", "peft", "scipy")
"""Modules that every chain imports; one that does not import is found here."""
NO_EXTRA = ("dev", "docs")
"""Extras that are not for users."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: What it belongs to.
        name: What was looked at.
        value: How it is.
        why: Why it is so, or what it is for.
        state: ``ok``; ``problem``: something will be slower, missing or refused; ``broken``: nothing will run.
        remedy: What to do about a problem.
    """

    section: str
    name: str
    value: str
    why: str = ""
    state: Literal["ok", "problem", "broken"] = "ok"
    remedy: str = ""


def doctor(reporter: Reporter) -> dict[str, Any]:
    """Look at everything and print it; nothing is written, and no model is loaded.

    Returns:
        ``ok`` (false when something is broken that every run needs), ``findings`` and ``problems``.
    """
    findings = [*python(), *libraries(), *imports()]
    if not any(finding.state == "broken" for finding in findings):
        from compress.pipelines.doctor_checks import checks

        findings += checks()
    problems = [finding for finding in findings if finding.state != "ok"]
    show(reporter, findings, problems)
    return {
        "ok": all(finding.state != "broken" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "problems": [
            {"cause": _cause(p), "remedy": p.remedy, "broken": p.state == "broken"} for p in problems
        ],
    }


def python() -> Iterator[Finding]:
    """The interpreter against the range that is supported."""
    wanted = str(importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"])
    version = platform.python_version()
    fits = SpecifierSet(wanted).contains(Version(version), prereleases=True)
    yield Finding(
        section="python",
        name="python",
        value=version,
        why=f"supported: {wanted}",
        state="ok" if fits else "broken",
        remedy="" if fits else f"Use a Python {wanted}.",
    )
    yield Finding(section="python", name="compress", value=importlib.metadata.version(DISTRIBUTION))


def libraries(requirements: Sequence[str] | None = None) -> Iterator[Finding]:
    """Every declared dependency against its range; of the extras, those that are there.

    Args:
        requirements: As the package declares them (the default).
    """
    declared = importlib.metadata.requires(DISTRIBUTION) or [] if requirements is None else requirements
    for text in declared:
        requirement = Requirement(text)
        extra = _extra(requirement)
        if extra not in NO_EXTRA:
            yield _library(requirement, extra)


def _library(requirement: Requirement, extra: str | None) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier) or "any"
    section = "libraries" if extra is None else "optional libraries"
    install = f"pip install '{name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if extra is not None:
            return Finding(section=section, name=name, value="not installed", why=f"to have it: {install}")
        return Finding(
            section=section, name=name, value="missing", why=wanted, state="broken", remedy=f"Run: {install}."
        )
    fits = requirement.specifier.contains(Version(version), prereleases=True)
    return Finding(
        section=section,
        name=name,
        value=version,
        why=wanted,
        state="ok" if fits else "problem",
        remedy="" if fits else f"Run: {install}.",
    )


def _extra(requirement: Requirement) -> str | None:
    found = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", str(requirement.marker or ""))
    return found.group(1) if found else None


def imports(
    modules: Iterable[str] = NEEDED, load: Callable[[str], Any] = importlib.import_module
) -> Iterator[Finding]:
    """What every run imports, imported; only what fails is worth a line."""
    for module in modules:
        try:
            load(module)
        except Exception as error:  # a broken installation raises anything at all, and this is to say so
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            yield Finding(
                section="libraries",
                name=f"import {module}",
                value="fails",
                why=reason,
                state="broken",
                remedy=f"Install it again: pip install --force-reinstall {module}.",
            )


def show(reporter: Reporter, findings: Sequence[Finding], problems: Sequence[Finding]) -> None:
    """One table a section, then the problems with their remedies."""
    for section in dict.fromkeys(finding.section for finding in findings):
        rows = [(f.name, f.value, f.why) for f in findings if f.section == section]
        reporter.facts(section, rows)
    reporter.out.print()
    if not problems:
        reporter.out.print("No problems.")
    for problem in problems:
        reporter.out.print(f"{problem.state}: {_cause(problem)}", markup=False)
        reporter.out.print(f"  {problem.remedy}", markup=False)


def _cause(finding: Finding) -> str:
    why = f" ({finding.why})" if finding.why else ""
    return f"{finding.name}: {finding.value}{why}."
