"""``compress bench``: the benchmarks as their own modules run them, listed, chosen, skipped and counted."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.pipelines.reporter import Reporter

PACKAGE = "compress.benchmarks"
DEFAULT = "regression"
"""What runs when no name is given."""
ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark, as its source says.

    Attributes:
        name: ``python -m compress.benchmarks.NAME`` runs it.
        summary: First line of its docstring.
        takes: Duration classes on two CPU cores: in full, and with ``--quick``.
        needs: What it cannot run without: "gpu", "wikitext2", "peer:NAME".
    """

    name: str
    summary: str
    takes: tuple[str, str]
    needs: tuple[str, ...]


def bench(reporter: Reporter, given: Mapping[str, Any]) -> dict[str, Any]:
    """Run benchmarks, or list them; see ``compress bench --help``.

    Returns:
        JSON values; ``ok`` is false when one failed.

    Raises:
        UsageError: An unknown name, or an option that the chosen benchmarks have no use for.
        CompressError: The benchmarks are not installed.
    """
    folder = benchmarks_folder()
    known = find_benchmarks(folder)
    if given.get("list_"):
        show_list(reporter, known, folder)
        listed = [
            {
                "name": each.name,
                "summary": each.summary,
                "takes": {"full": each.takes[0], "quick": each.takes[1]},
                "missing": missing(each, folder),
            }
            for each in known.values()
        ]
        return {"benchmarks": listed}
    chosen = choose(given.get("names") or (), known)
    extra = regression_options(given, [each.name for each in chosen])
    out: Path | None = given.get("out")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    results = []
    for each in chosen:
        reasons = missing(each, folder)
        if reasons:
            reporter.say(f"{each.name}: skipped, {' and '.join(reasons)}.")
            results.append({"name": each.name, "status": "skipped", "reason": "; ".join(reasons)})
            continue
        arguments = ["--quick"] if given.get("quick") else []
        arguments += extra if each.name == DEFAULT else []
        arguments += ["--out", str(out / f"{each.name}.json")] if out is not None else []
        results.append(run_benchmark(reporter, each.name, arguments))
    counts = {
        status: sum(each["status"] == status for each in results)
        for status in ("passed", "failed", "skipped")
    }
    reporter.out.print(", ".join(f"{number} {status}" for status, number in counts.items()), markup=False)
    failed = [each["name"] for each in results if each["status"] == "failed"]
    if failed:
        reporter.out.print(f"failed: {', '.join(failed)}", markup=False)
    return {"benchmarks": results, "counts": counts, "ok": not failed}


def benchmarks_folder() -> Path:
    """Where the benchmarks are.

    Raises:
        CompressError: They were left out of this installation.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CompressError(
            "The benchmarks are not part of this installation.",
            "Install compress-llm from its wheel or a checkout.",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def find_benchmarks(folder: Path) -> dict[str, Benchmark]:
    """Every module there that runs by itself and says what it ``TAKES``, by name; nothing is imported."""
    found = {}
    for file in sorted(folder.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' not in source:
            continue
        tree = ast.parse(source)
        constants = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
        }
        if "TAKES" not in constants:
            continue
        takes = ast.literal_eval(constants["TAKES"])
        needs = ast.literal_eval(constants["NEEDS"]) if "NEEDS" in constants else ()
        summary = (ast.get_docstring(tree) or file.stem).splitlines()[0]
        found[file.stem] = Benchmark(name=file.stem, summary=summary, takes=takes, needs=needs)
    return found


def choose(names: Sequence[str], known: Mapping[str, Benchmark]) -> list[Benchmark]:
    """The benchmarks that are named: `DEFAULT` without a name, every one for `ALL`.

    Raises:
        UsageError: There is no such benchmark.
    """
    wanted = list(names) or [DEFAULT]
    if ALL in wanted:
        return list(known.values())
    for name in wanted:
        if name not in known:
            raise UsageError(f"There is no benchmark {name!r}.", f"Choose from: {ALL}, {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(wanted)]


def missing(benchmark: Benchmark, folder: Path) -> list[str]:
    """What a benchmark needs and is not here, in words."""
    reasons = []
    for need in benchmark.needs:
        kind, _, name = need.partition(":")
        if kind == "gpu" and not _has_gpu():
            reasons.append("it needs a GPU")
        elif kind == "wikitext2" and not _has_wikitext():
            reasons.append("it needs WikiText-2 in COMPRESS_DATA")
        elif kind == "peer" and not (folder.parent / ".venv-peers" / name / "bin" / "python").is_file():
            reasons.append(f"it needs the peer {name} (make peers PEERS={name})")
    return reasons


def regression_options(given: Mapping[str, Any], chosen: Sequence[str]) -> list[str]:
    """The options that only the regression suite takes, for its command line.

    Raises:
        UsageError: One is given and the suite does not run, or it would do nothing.
    """
    found: list[str] = []
    if given.get("repeats") is not None and not given.get("update"):
        raise UsageError(
            "--repeats counts the runs behind a baseline, and none is written.", "Give --update too."
        )
    if given.get("finished") is not None:
        _refuse_beside_finished(given)
    for name in ("update", "repeats", "baselines", "finished", "model", "data"):
        value = given.get(name)
        if value is None or value is False:
            continue
        if DEFAULT not in chosen:
            raise UsageError(
                f"--{name} is about the benchmark {DEFAULT}, which does not run.", f"Name {DEFAULT} too."
            )
        found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


def _refuse_beside_finished(given: Mapping[str, Any]) -> None:
    idle = [name for name in ("quick", "repeats", "model", "data") if given.get(name)]
    if idle:
        raise UsageError(
            f"--finished takes a chain that was run, and --{idle[0]} says how to run one.",
            f"Leave --{idle[0]} out.",
        )


def run_benchmark(reporter: Reporter, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run one in a process of its own; what it prints is passed on, to standard error where results are JSON."""
    reporter.say(f"{name}: python -m {PACKAGE}.{name} {' '.join(arguments)}")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"{PACKAGE}.{name}", *arguments],
        stdout=sys.stderr if reporter.quiet else None,
        check=False,
    )
    status = "passed" if done.returncode == 0 else "failed"
    seconds = time.monotonic() - started
    reporter.say(f"{name}: {status} in {seconds:.0f} s.")
    return {"name": name, "status": status, "exit_code": done.returncode, "seconds": round(seconds, 2)}


def show_list(reporter: Reporter, known: Mapping[str, Benchmark], folder: Path) -> None:
    """One line each: how long it takes, in full and quick, and what it is; then what cannot run here."""
    reporter.table(
        "benchmarks, with their duration on two CPU cores",
        ("name", "in full", "--quick", "what it measures"),
        [(each.name, *each.takes, each.summary) for each in known.values()],
        left=("what it measures",),
    )
    for each in known.values():
        if reasons := missing(each, folder):
            reporter.out.print(f"{each.name} would be skipped: {' and '.join(reasons)}.", markup=False)


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _has_wikitext() -> bool:
    from compress.data.sources import default_source

    return default_source() == "wikitext2"
