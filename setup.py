"""The C library of compress/kernels: built when a compiler is there, skipped when not."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("compress", "kernels", "native")


class BuildLibrary(build_ext):
    """A library for ctypes, not a Python module: it has no PyInit function to export. Files compile side by side."""

    def build_extensions(self) -> None:
        """With a compiler that takes one file a process and as many processes as there are cores."""
        one_by_one = self.compiler.compile

        def compile(sources: list[str], *args: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: one_by_one([source], *args, **options), sources)
                return [file for files in made for file in files]

        self.compiler.compile = compile
        super().build_extensions()

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: what is exported is marked in the source."""
        return []


# No flag of an instruction set: files that need one ask for it themselves (native/levels.h). Contraction stays
# off because dequantized values are equal to torch's bit for bit.
LIBRARY = Extension(
    "compress.kernels._native",
    sources=sorted(str(file) for file in NATIVE.glob("*.c")),
    depends=sorted(str(file) for file in NATIVE.glob("*.h")),
    extra_compile_args=[
        "-std=c11",
        "-D_POSIX_C_SOURCE=200809L",
        "-O2",
        "-ftree-vectorize",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
    ],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(ext_modules=[LIBRARY], cmdclass={"build_ext": BuildLibrary})
