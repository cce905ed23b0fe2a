"""Importance of KV groups and MLP channels: one file a criterion, found through ``CRITERIA``."""

from __future__ import annotations

from typing import Any

from compress.registry import Registry

CRITERIA: Registry[type[Any]] = Registry(
    "criterion",
    "compress.importance",
    helpers=(
        "activations",
        "base",
        "branches",
        "collect",
        "gram_store",
        "input_norms",
        "modules",
        "moments",
        "output_gradients",
        "reduce",
        "surgeon",
    ),
)
"""Name -> subclass of :class:`compress.importance.base.Criterion`; listing the names imports no torch."""
