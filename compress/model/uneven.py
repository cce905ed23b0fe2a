"""How config.json describes a model whose layers differ in size.

``model_type`` is "compress_" and the family, so that stock loaders name it as unknown instead of building a model of
the wrong shapes; ``architectures`` is renamed for converters that read only that. All other entries, the sizes among
them, stay those of the model it was cut from. ``compress_layers`` has what every layer keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import CompressError
from compress.model.layout import LayerShape

PREFIX = "compress_"
CLASS_PREFIX = "Compress"
LAYERS_KEY = "compress_layers"
FORMAT_KEY = "compress_format"
FORMAT = 1

_SIZES = ("kv_heads", "queries", "channels")
_REMEDY = "Use the config.json that was written beside the weights."


def is_uneven(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes layers of different sizes."""
    return str(config.get("model_type", "")).startswith(PREFIX)


def uneven_entries(config: Mapping[str, Any], shapes: Sequence[LayerShape]) -> dict[str, Any]:
    """A config.json with layers of the given shapes, from that of the model they are cut from."""
    classes = config.get("architectures")
    return {
        **config,
        "model_type": PREFIX + str(config["model_type"]),
        **({"architectures": [CLASS_PREFIX + str(name) for name in classes]} if classes else {}),
        LAYERS_KEY: [{key: getattr(shape, key) for key in _SIZES} for shape in shapes],
        FORMAT_KEY: FORMAT,
    }


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model that an uneven one was cut from; any other config as it is."""
    if not is_uneven(config):
        return dict(config)
    plain = {key: value for key, value in config.items() if key not in (LAYERS_KEY, FORMAT_KEY)}
    plain["model_type"] = str(config["model_type"]).removeprefix(PREFIX)
    if config.get("architectures"):
        plain["architectures"] = [str(name).removeprefix(CLASS_PREFIX) for name in config["architectures"]]
    return plain


def layer_shapes(config: Mapping[str, Any], full: LayerShape, layers: int) -> tuple[LayerShape, ...]:
    """What every layer keeps, read from an uneven config.json.

    Args:
        config: Its content.
        full: A layer of the model it was cut from.
        layers: Number of layers.

    Raises:
        CompressError: The list is of another version, missing, too short or long, or has sizes out of range.
    """
    if config.get(FORMAT_KEY) != FORMAT:
        raise CompressError(
            f"The config has {FORMAT_KEY} {config.get(FORMAT_KEY)!r}, not {FORMAT}.",
            "Use the version of compress that wrote the model.",
        )
    entries = config.get(LAYERS_KEY)
    if not isinstance(entries, list) or len(entries) != layers:
        count = len(entries) if isinstance(entries, list) else "no"
        raise CompressError(f"The config has {count} {LAYERS_KEY} for {layers} layers.", _REMEDY)
    return tuple(_shape(entry, full, index) for index, entry in enumerate(entries))


def shape_fault(shape: LayerShape, full: LayerShape) -> str:
    """Why a layer of shape ``full`` cannot keep ``shape``, or ""."""
    if not (0 <= shape.kv_heads <= full.kv_heads and 0 <= shape.channels <= full.channels):
        return f"keeps {shape.kv_heads} of {full.kv_heads} KV groups and {shape.channels} of {full.channels} channels"
    if shape.kv_heads and not 1 <= shape.queries <= full.queries:
        return f"keeps {shape.queries} of {full.queries} query heads in every KV group"
    return ""


def _shape(entry: Any, full: LayerShape, index: int) -> LayerShape:
    sizes: list[Any] = [entry.get(key) if isinstance(entry, Mapping) else None for key in _SIZES]
    if not all(type(size) is int for size in sizes):
        raise CompressError(
            f"Entry {index} of {LAYERS_KEY} lacks a whole number for {' or '.join(_SIZES)}.", _REMEDY
        )
    kv_heads, queries, channels = sizes
    shape = LayerShape(kv_heads=kv_heads, queries=queries, channels=channels)
    if fault := shape_fault(shape, full):
        raise CompressError(f"Entry {index} of {LAYERS_KEY} {fault}.", _REMEDY)
    return shape
