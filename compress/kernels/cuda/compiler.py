"""CUDA C++ to machine code by NVRTC, which torch brings along; what is built is kept on disk.

It lies under ``$COMPRESS_CACHE`` (``~/.cache/compress``) in ``kernels/``, by the digest of all that it comes from, and
with its own. A folder that others can write is not used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from compress.errors import CompressError

SOURCES = Path(__file__).parent
_SHARED = "common.cuh"
_OPTIONS = ("--std=c++17", "--fmad=true")


def _found() -> ctypes.CDLL | None:
    """NVRTC of torch's version of CUDA, as the loader finds it, or beside torch in NVIDIA's packages."""
    own = (torch.version.cuda or "").split(".")[0]
    for name in (*([f"libnvrtc.so.{own}"] if own else []), "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    packages = find_spec("nvidia")  # the namespace of NVIDIA's packages
    for folder in () if packages is None else packages.submodule_search_locations or ():
        files = sorted(Path(folder).glob("*/lib/libnvrtc.so.*"), reverse=True)
        for file in sorted(files, key=lambda file: not file.name.endswith(f".{own}")):
            try:
                for part in file.parent.glob("libnvrtc-builtins.so.*"):  # the loader looks for it elsewhere
                    ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
                return ctypes.CDLL(str(file))
            except OSError:
                continue
    return None


@cache
def nvrtc() -> ctypes.CDLL | None:
    """The compiler's library; None where it is not installed."""
    return _found()


def _call(name: str, *arguments: object) -> None:
    library = nvrtc()
    function = getattr(library, name, None)
    if library is None or function is None:
        raise CompressError(f"NVRTC has no {name}: it is too old.", "Update nvidia-cuda-nvrtc.")
    code = function(*arguments)
    if code:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        message = library.nvrtcGetErrorString(code).decode()
        raise CompressError(f"The CUDA compiler fails in {name}: {message}.", "Set COMPRESS_KERNELS=torch.")


def _text(program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, text)
    return text.value.decode(errors="replace")


def compiled(file: str, instance: str, arch: str) -> tuple[bytes, str]:
    """Machine code of one instance of a kernel template, and the name it has in it.

    Args:
        file: Source beside this module, compiled after ``common.cuh``.
        instance: C++ expression, such as ``dequantize<4, 8>``.
        arch: ``sm_90`` and the like.

    Raises:
        CompressError: NVRTC is not installed, or does not compile it.
    """
    if nvrtc() is None:
        raise CompressError(
            "NVRTC, NVIDIA's run-time compiler, is not installed.",
            "Install nvidia-cuda-nvrtc, or set COMPRESS_KERNELS=triton.",
        )
    source = "\n".join((SOURCES / name).read_text(encoding="utf-8") for name in (_SHARED, file))
    program, expression = ctypes.c_void_p(), instance.encode()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), file.encode(), 0, None, None)
    try:
        _call("nvrtcAddNameExpression", program, expression)
        options = (f"--gpu-architecture={arch}", *_OPTIONS)
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        library = nvrtc()
        assert library is not None
        if library.nvrtcCompileProgram(program, len(options), given):
            raise CompressError(
                f"{instance} does not compile for {arch}:\n{_text(program, 'ProgramLog')}",
                "Report it; COMPRESS_KERNELS=triton does without.",
            )
        lowered = ctypes.c_char_p()
        _call("nvrtcGetLoweredName", program, expression, ctypes.byref(lowered))
        assert lowered.value is not None
        size = ctypes.c_size_t()
        _call("nvrtcGetCUBINSize", program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        _call("nvrtcGetCUBIN", program, code)
        return code.raw, lowered.value.decode()
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def _version() -> str:
    library = nvrtc()
    if library is None:
        return "none"
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _cache() -> Path | None:
    """Where what is built is kept: a folder that nobody else can write; None where there is none."""
    try:
        root = os.environ.get("COMPRESS_CACHE") or Path.home() / ".cache" / "compress"
        folder = Path(root).expanduser() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    return folder if found.st_uid == os.getuid() and not found.st_mode & 0o022 else None


def _kept(path: Path) -> tuple[bytes, str] | None:
    """What a file holds; None where it is not there or damaged."""
    try:
        head, _, code = path.read_bytes().partition(b"\n")
        digest, _, symbol = head.decode("ascii").partition(" ")
    except (OSError, ValueError):
        return None
    return (code, symbol) if hashlib.sha256(code).hexdigest() == digest else None


def _keep(path: Path, code: bytes, symbol: str) -> None:
    head = f"{hashlib.sha256(code).hexdigest()} {symbol}\n".encode("ascii")
    held = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            held = file.name
            file.write(head + code)
        os.replace(held, path)
    except OSError:
        if held is not None:
            Path(held).unlink(missing_ok=True)


def build(file: str, instance: str, arch: str) -> tuple[bytes, str]:
    """As :func:`compiled`, from disk where it has been compiled before.

    Raises:
        CompressError: As :func:`compiled`. That it cannot be kept on disk is no error.
    """
    sources = [(SOURCES / name).read_bytes() for name in (_SHARED, file)]
    parts = (*sources, *(text.encode() for text in (instance, arch, *_OPTIONS, _version())))
    folder = _cache()
    if folder is None:
        return compiled(file, instance, arch)
    path = folder / f"{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:32]}.cubin"
    found = _kept(path)
    if found is None:
        found = compiled(file, instance, arch)
        _keep(path, *found)
    return found
