"""Imports run one way: an earlier stage never imports a later one, solvers know nothing of models."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sources import modules, place, tree

STAGES = (
    ("errors", "registry", "progress", "durable", "stopping", "engine", "heap"),
    ("model",),
    ("kept", "machine"),
    ("data",),
    ("structure",),
    ("importance",),
    ("prune",),
    ("quantize",),
    ("adapters",),
    ("evaluate",),
    ("report",),
    ("export",),
)
RANK = {part: rank for rank, parts in enumerate(STAGES) for part in parts}
OUTER = ("pipelines", "solvers", "benchmarks", "cli", "__main__")


def imports(module: str, file: Path) -> Iterator[tuple[str, ast.AST]]:
    """Absolute dotted names that ``file`` imports, at any depth of the code."""
    names = modules()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in names else base), node


def stage(module: str) -> str:
    """``compress.prune.slice`` -> ``prune``; the package itself -> ``compress``."""
    return module.split(".")[1] if "." in module else module


def allowed(source: str, target: str) -> bool:
    """Whether code of stage ``source`` may import from stage ``target``."""
    if source in ("benchmarks", target):
        return True
    if source in ("pipelines", "cli", "__main__"):
        later = {"pipelines": ("cli", "__main__"), "cli": ("__main__",), "__main__": ()}
        return target not in ("benchmarks", *later[source])
    if source == "solvers":
        return target == "errors"
    if source == "compress":
        return target not in OUTER
    if target in (*OUTER, "compress"):
        return False
    if source == "kernels":
        return target == "errors"
    if target == "kernels":
        return RANK[source] >= RANK["importance"]
    return RANK[target] <= RANK[source]


def test_every_part_of_the_library_has_its_place_in_the_order() -> None:
    parts = {stage(module) for module in modules()}
    assert parts - set(RANK) - set(OUTER) - {"compress", "kernels"} == set()


def test_an_earlier_stage_never_imports_a_later_one() -> None:
    wrong = [
        f"{place(file, node)} imports {target}"
        for module, file in modules().items()
        for target, node in imports(module, file)
        if target.split(".")[0] == "compress" and not allowed(stage(module), stage(target))
    ]
    assert wrong == []


def test_mapped_folders_are_imported_under_their_installed_name() -> None:
    wrong = [
        f"{place(file, node)} imports {target}"
        for module, file in modules().items()
        for target, node in imports(module, file)
        if target.split(".")[0] in ("pipelines", "solvers", "benchmarks", "cli", "tests")
    ]
    assert wrong == []


def test_solvers_import_only_numerics() -> None:
    permitted = {"compress", "numpy", "scipy", "pulp", "__future__", *sys.stdlib_module_names}
    wrong = [
        f"{place(file, node)} imports {target}"
        for module, file in modules().items()
        if stage(module) == "solvers"
        for target, node in imports(module, file)
        if target.split(".")[0] not in permitted
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("prune", "importance", True),
        ("importance", "prune", False),
        ("quantize", "kernels", True),
        ("importance", "kernels", True),
        ("structure", "kernels", False),
        ("kernels", "model", False),
        ("solvers", "errors", True),
        ("solvers", "registry", False),
        ("report", "pipelines", False),
        ("pipelines", "report", True),
        ("pipelines", "benchmarks", False),
        ("pipelines", "cli", False),
        ("cli", "pipelines", True),
        ("cli", "__main__", False),
        ("__main__", "cli", True),
        ("report", "cli", False),
        ("model", "compress", False),
    ],
)
def test_the_rule_itself(source: str, target: str, expected: bool) -> None:
    assert allowed(source, target) is expected


@pytest.mark.parametrize("module", ["compress", "compress.errors", "compress.registry", "compress.solvers"])
def test_light_modules_import_no_torch(module: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'datasets'}"
    program = f"import {module}, sys; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "[]", "")
