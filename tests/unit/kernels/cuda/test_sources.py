"""The CUDA C++ is compiled for GPUs that are not there, by those of NVIDIA's compilers that are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.kernels.cuda import compiler
from compress.kernels.cuda.compiler import SOURCES, build, compiled, nvrtc

NVCC = shutil.which("nvcc")

FEW = [
    "few_tokens<4, 8, 1, 2, 16, 2, true, false>",
    "few_tokens<3, 3, 2, 2, 16, 4, false, true>",
    "few_tokens<8, 4, 2, 2, 16, 1, false, true>",
    "few_tokens<2, 2, 1, 2, 16, 2, true, true>",
]
STREAMED = [
    "streamed<4, 8, 1, 6, 16, 2, true, false>",
    "streamed<2, 8, 1, 6, 16, 2, true, false>",
    "streamed<3, 8, 1, 6, 16, 2, true, true>",
    "streamed<4, 8, 2, 4, 16, 2, true, true>",
    "streamed<3, 3, 2, 2, 16, 4, false, true>",
    "streamed<8, 4, 1, 4, 16, 1, false, false>",
]
BATCHED = ["batched<4, 8, 8, 2, true>", "batched<3, 3, 4, 4, false>", "batched<2, 8, 8, 1, true>"]
MORE = ["more_tokens<4, 8, 8, 2, 2, true>", "more_tokens<3, 8, 4, 2, 1, false>"]
WEIGHTS = ["dequantize<2, 2>", "dequantize<3, 3>", "dequantize<4, 8>", "dequantize<8, 4>"]
INSTANCES = {
    "few_tokens.cu": FEW,
    "streamed.cu": STREAMED,
    "batched.cu": BATCHED,
    "more_tokens.cu": MORE,
    "dequantize.cu": WEIGHTS,
}
NEWER = ("streamed.cu", "batched.cu")
ARCHITECTURES = [
    (file, arch)
    for file in INSTANCES
    for arch in ("sm_80", "sm_90a", "sm_100a")
    if arch != "sm_80" or file not in NEWER
]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("file", "arch"), ARCHITECTURES)
def test_kernels_compile_without_a_warning(file: str, arch: str, tmp_path: Path) -> None:
    source = tmp_path / "all.cu"
    text = "\n".join((SOURCES / name).read_text(encoding="utf-8") for name in ("common.cuh", file))
    uses = ", ".join(f"(void*){instance}" for instance in INSTANCES[file])
    source.write_text(f"{text}\nvoid* uses[] = {{{uses}}};\n", encoding="utf-8")
    done = subprocess.run(
        [
            *(str(NVCC), "-std=c++17", f"-arch={arch}", "-cubin", "-Werror=all-warnings", "-Xptxas=-v"),
            *("-o", str(tmp_path / "all.cubin"), str(source)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert len(spilled) == len(INSTANCES[file])
    assert max(spilled) <= 160, done.stderr


@pytest.mark.skipif(nvrtc() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("file", INSTANCES)
def test_the_run_time_compiler_takes_them_as_they_are(file: str) -> None:
    code, name = compiled(file, INSTANCES[file][0], "sm_90a" if file in NEWER else "sm_80")
    assert code[:4] == b"\x7fELF"
    assert file.removesuffix(".cu") in name


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "nvrtc", lambda: None)
    with pytest.raises(CompressError, match="NVRTC") as caught:
        compiled("dequantize.cu", WEIGHTS[0], "sm_90")
    assert "nvidia-cuda-nvrtc" in str(caught.value)


def test_what_was_compiled_is_kept_by_all_that_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[str, str]] = []

    def compile_it(file: str, instance: str, arch: str) -> tuple[bytes, str]:
        made.append((instance, arch))
        return f"{instance}\n{arch}".encode(), f"_Z{len(made)}"

    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "compiled", compile_it)
    monkeypatch.setattr(compiler, "_version", lambda: "13.0")
    first = build("dequantize.cu", WEIGHTS[0], "sm_90")
    assert first == (f"{WEIGHTS[0]}\nsm_90".encode(), "_Z1")
    assert build("dequantize.cu", WEIGHTS[0], "sm_90") == first
    assert len(made) == 1
    build("dequantize.cu", WEIGHTS[0], "sm_80")
    build("dequantize.cu", WEIGHTS[1], "sm_90")
    monkeypatch.setattr(compiler, "_version", lambda: "13.1")
    build("dequantize.cu", WEIGHTS[0], "sm_90")
    assert len(made) == 4
    for cut in (0, 70, -1):  # a machine that lost power
        for file in (tmp_path / "kernels").iterdir():
            file.write_bytes(file.read_bytes()[:cut])
        before = len(made)
        again = build("dequantize.cu", WEIGHTS[0], "sm_90")
        assert (again[0], len(made)) == (f"{WEIGHTS[0]}\nsm_90".encode(), before + 1)


def test_a_cache_that_others_can_write_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "compiled", lambda *_: (b"ours", "name"))
    build("dequantize.cu", WEIGHTS[0], "sm_90")
    monkeypatch.setattr(compiler, "compiled", lambda *_: (b"anew", "name"))
    assert build("dequantize.cu", WEIGHTS[0], "sm_90")[0] == b"ours"
    (tmp_path / "kernels").chmod(0o777)
    assert build("dequantize.cu", WEIGHTS[0], "sm_90")[0] == b"anew"


def test_a_failed_write_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "compiled", lambda *_: (b"code", "name"))
    monkeypatch.setattr(compiler.os, "replace", full)
    assert build("dequantize.cu", WEIGHTS[0], "sm_90") == (b"code", "name")
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("in the way")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "compiled", lambda *_: (b"code", "name"))
    assert build("dequantize.cu", WEIGHTS[0], "sm_90") == (b"code", "name")
