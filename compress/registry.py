"""Registries whose entries are files: one module in a package is one entry, named after the file."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from compress.errors import UsageError, choose

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries of one kind, found as modules of one package.

    Names are read from the folder, so that listing them (``--help``) imports nothing. The module
    ``compress/importance/lora.py`` holds the entry ``lora`` and registers it with ``@REGISTRY.register("lora")``.

    Args:
        kind: What an entry is, in the words of an error message ("criterion").
        package: The package whose modules are the entries ("compress.importance").
        helpers: Module names in that package that are not entries.
    """

    def __init__(self, kind: str, package: str, helpers: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.package = package
        self.helpers = frozenset(helpers)
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that records its argument as entry ``name``."""

        def record(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and getattr(known, "__module__", None) != getattr(entry, "__module__", None):
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return record

    def names(self) -> list[str]:
        """Every entry's name, sorted, without importing any entry."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise ImportError(f"package {self.package} is not installed")
        modules = pkgutil.iter_modules([str(Path(spec.origin).parent)])
        return sorted(
            m.name.replace("_", "-")
            for m in modules
            if m.name not in self.helpers and not m.name.startswith("_")
        )

    def get(self, name: str) -> T:
        """The entry ``name``.

        Raises:
            UsageError: There is no such entry; the message lists the ones there are.
        """
        if name not in self.names():
            raise UsageError(f"There is no {self.kind} {name!r}.", choose(name, self.names()))
        importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
        return self._entries[name]
