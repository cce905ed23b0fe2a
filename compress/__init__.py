"""Structured pruning, quantization with low-rank factors, and adapter recovery for language models.

Importing this package teaches transformers to open LQ checkpoints. It imports neither torch nor transformers:
the registration waits until transformers' quantizer table is itself imported, and the names below are loaded
on first use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"

_EXPORTS = {
    "Architecture": "compress.model.architecture",
    "architecture_of": "compress.model.architecture",
    "Checkpoint": "compress.model.checkpoint",
    "CheckpointWriter": "compress.model.checkpoint",
    "load_model": "compress.model.load",
    "load_tokenizer": "compress.model.load",
    "resolve": "compress.model.load",
    "StructureMap": "compress.structure",
    "QuantConfig": "compress.quantize.config",
    "QuantizedTensor": "compress.quantize.blockwise",
    "quantize_blockwise": "compress.quantize.blockwise",
    "Decomposition": "compress.quantize.decompose",
    "decompose": "compress.quantize.decompose",
    "ErrorTable": "compress.quantize.error_table",
    "error_table": "compress.quantize.error_table",
    "LQLinear": "compress.quantize.linear",
    "CompressError": "compress.errors",
    "UsageError": "compress.errors",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("compress-llm")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, "__version__"})


def _register() -> None:
    importlib.import_module("compress.quantize.hf").register()


class _RegisteringLoader(Loader):
    """Loads a module as its own loader does, then registers ours with it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _TableFinder(MetaPathFinder):
    """Waits for the import of transformers' quantizer table."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


if _TABLE in sys.modules:
    _register()
elif not any(type(finder).__name__ == "_TableFinder" for finder in sys.meta_path):
    sys.meta_path.insert(0, _TableFinder())
