"""CUDA C++ to machine code by NVRTC, which torch brings along; what is built is kept on disk.

They lie under ``$COMPRESS_CACHE`` (``~/.cache/compress``) in ``kernels/``, by the digest of all that they come from.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from compress.errors import CompressError

SOURCES = Path(__file__).parent
_SHARED = "common.cuh"
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def _found() -> ctypes.CDLL | None:
    """NVRTC as the loader finds it, or beside torch in NVIDIA's packages."""
    for name in _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    packages = find_spec("nvidia")  # the namespace of NVIDIA's packages
    for folder in () if packages is None else packages.submodule_search_locations or ():
        for file in sorted(Path(folder).glob("*/lib/libnvrtc.so.*"), reverse=True):
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
    assert library is not None  # build() has looked
    code = getattr(library, name)(*arguments)
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
        options = (f"--gpu-architecture={arch}", "--std=c++17", "--fmad=true")
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


def build(file: str, instance: str, arch: str) -> tuple[bytes, str]:
    """As :func:`compiled`, from disk where it has been compiled before.

    Raises:
        CompressError: As :func:`compiled`. That it cannot be kept on disk is no error.
    """
    sources = [(SOURCES / name).read_bytes() for name in (_SHARED, file)]
    parts = (*sources, instance.encode(), arch.encode(), _version().encode())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    root = os.environ.get("COMPRESS_CACHE") or Path.home() / ".cache" / "compress"
    path = Path(root).expanduser() / "kernels" / f"{name}.cubin"
    try:
        lowered, _, code = path.read_bytes().partition(b"\n")
        if code:
            return code, lowered.decode()
    except OSError:
        pass
    code, symbol = compiled(file, instance, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as held:
            held.write(symbol.encode() + b"\n" + code)
        os.replace(held.name, path)
    except OSError:
        pass
    return code, symbol
