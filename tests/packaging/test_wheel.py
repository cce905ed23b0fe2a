"""The wheel as a user gets it: built from a clean copy, installed apart, used far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.sources import FOLDERS, ROOT

pytestmark = pytest.mark.packaging

HAS_COMPILER = shutil.which(sysconfig.get_config_var("CC").split()[0]) is not None
QUICK = "CFLAGS=-DSPECIALIZED=0"
"""The library's same loads and stores compiled sooner; its speed is not what is looked at here."""
STATUS = "from compress.kernels.library import status; s = status(); print(s.level, s.path)"


def run(command: list[str | Path], folder: Path, *, timeout: float = 300) -> str:
    """Run ``command`` in ``folder``, free of the caller's import path; return what it printed.

    Raises:
        AssertionError: It failed; the message holds its output.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MYPY"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the sources alone: no stale build folder."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in FOLDERS.values():
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built through the source distribution."""
    copy = shutil.copytree(source, tmp_path_factory.mktemp("wheel") / "source")
    run(
        ["env", QUICK, sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", copy], copy
    )
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, which sees the dependencies that are already installed."""
    folder = tmp_path_factory.mktemp("clean")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "-q", "-q"]
    run([*pip, "install", "--no-deps", "--no-index", wheel], folder)
    # A .pth line puts a folder on the path without running the .pth files inside it: the editable install of
    # the checkout, which lives there, stays out of sight.
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside the checkout: inside it the local ``compress`` would shadow the wheel."""
    assert not tmp_path.is_relative_to(ROOT)
    return tmp_path


def test_compress_is_the_only_top_level_name(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"compress"}


def test_every_file_on_disk_is_in_the_wheel(wheel: Path) -> None:
    expected = {
        "/".join((*package.split("."), *file.relative_to(folder).parts))
        for package, folder in FOLDERS.items()
        for file in folder.rglob("*")
        if file.is_file()
        and "__pycache__" not in file.parts
        and "results"
        not in file.relative_to(folder).parts  # records of measurements, for readers of the repository
        and file.suffix not in (".so", ".pyc", ".c", ".h")
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("compress/")}
    if HAS_COMPILER:
        expected.add(f"compress/kernels/_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert packed == expected
    assert any(name.endswith("/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_installed_packages_come_from_the_wheel(clean: Path, elsewhere: Path) -> None:
    program = "import importlib, sys; [print(importlib.import_module(n).__file__) for n in sys.argv[1:]]"
    printed = run([clean, "-c", program, *FOLDERS], elsewhere).split()
    inside = clean.parents[1].resolve()
    assert [Path(line).resolve().is_relative_to(inside) for line in printed] == [True] * len(FOLDERS)


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
def test_the_c_library_of_the_wheel_is_found(clean: Path, elsewhere: Path) -> None:
    level, path = run([clean, "-c", STATUS], elsewhere).split()
    assert level != "torch"
    assert Path(path).is_relative_to(clean.parents[1].resolve())


def test_without_a_compiler_the_install_goes_through_and_torch_serves(source: Path, elsewhere: Path) -> None:
    copy = shutil.copytree(source, elsewhere / "source")
    target = elsewhere / "target"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    run(["env", "CC=no-such-compiler", *pip, "--target", target, copy], elsewhere)
    printed = run(["env", f"PYTHONPATH={target}", sys.executable, "-P", "-c", STATUS], elsewhere)
    assert printed.split() == ["torch", "None"]


@pytest.mark.parametrize("script", ["compress", "compress-llm"])
def test_help_runs(clean: Path, elsewhere: Path, script: str) -> None:
    printed = run([clean.parent / script, "--help"], elsewhere)
    for verb in ("prune", "quantize", "recover", "eval", "report"):
        assert verb in printed


@pytest.mark.slow
def test_mypy_accepts_the_installed_package(clean: Path, elsewhere: Path) -> None:
    # `make types` looks at the same modules under the same names; its cache spares a second analysis of torch.
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "compress"]
    cache = ROOT / ".mypy_cache"
    printed = run([*command, "--python-executable", clean, "--cache-dir", cache], elsewhere)
    assert printed.startswith("Success: no issues found")


def test_a_user_of_the_wheel_gets_its_types(clean: Path, elsewhere: Path) -> None:
    program = "from compress.errors import CompressError\nreveal_type(CompressError('a', 'b').cause)\n"
    (elsewhere / "user.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", clean]
    printed = run([*command, "--cache-dir", ROOT / ".mypy_cache", "user.py"], elsewhere)
    assert 'Revealed type is "str"' in printed or 'Revealed type is "builtins.str"' in printed


@pytest.mark.slow
def test_the_wheel_installs_with_its_own_dependencies(wheel: Path, elsewhere: Path) -> None:
    run([sys.executable, "-m", "venv", elsewhere / "venv"], elsewhere)
    python = elsewhere / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "-q", "-q", "-c", ROOT / "constraints.txt", wheel], elsewhere, timeout=900)
    assert "No broken requirements found" in run([*pip, "check"], elsewhere)
    assert "prune" in run([python.parent / "compress", "--help"], elsewhere)
