"""What is fuzzed: bytes that pose as a weight file, an index, a config or a recipe; our own errors alone come out."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
from compress.model.tensor_file import read_header
from compress.pipelines.recipe import read_recipe

SCRATCH = tempfile.TemporaryDirectory(prefix="compress-fuzz-")
LARGEST = 1 << 16
"""Data bytes behind a header that is made up."""


def header(data: bytes) -> None:
    """A weight file: as it is, or, after a first byte that is odd, a header of the right length and some data."""
    file = Path(SCRATCH.name) / "header.safetensors"
    if data[:1] and data[0] & 1 and len(data) >= 3:
        (size,) = struct.unpack("<H", data[1:3])
        content = struct.pack("<Q", len(data) - 3) + data[3:] + bytes(min(size, LARGEST))
    else:
        content = data[1:]
    file.write_bytes(content)
    try:
        entries, metadata = read_header(file)
    except CompressError:
        return
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items())
    for entry in entries.values():
        tensor = entry.read()
        assert tuple(tensor.shape) == entry.shape
        assert tensor.dtype == entry.dtype
        assert sum(map(len, entry.chunks())) == entry.nbytes


def index(data: bytes) -> None:
    """An index beside one sound weight file; nothing outside of the folder may be opened."""
    folder = Path(SCRATCH.name) / "index"
    if not folder.is_dir():
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        (folder / "model-00001-of-00001.safetensors").write_bytes(one_tensor("weight"))
    (folder / "model.safetensors.index.json").write_bytes(data)
    try:
        checkpoint = Checkpoint(folder)
    except CompressError:
        return
    for name in checkpoint.names:
        assert name == "weight"
        assert checkpoint.read(name).shape == (2, 3)


def config(data: bytes) -> None:
    """A config.json of a folder with one weight."""
    folder = Path(SCRATCH.name) / "config"
    if not folder.is_dir():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(one_tensor("weight"))
    (folder / "config.json").write_bytes(data)
    try:
        found = Checkpoint(folder)
    except CompressError:
        return
    assert isinstance(found.config, dict)


def recipe(data: bytes) -> None:
    """A recipe file."""
    file = Path(SCRATCH.name) / "recipe.yaml"
    file.write_bytes(data)
    said = ""
    try:
        read_recipe(str(file))
    except CompressError as error:
        said = str(error)
    assert len(said) < 10_000


def one_tensor(name: str) -> bytes:
    """A weight file of one float32 tensor [2, 3]."""
    text = json.dumps({name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


def _headers() -> list[bytes]:
    texts = [
        {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}},
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},
            "b": {"dtype": "I8", "shape": [], "data_offsets": [8, 9]},
            "c": {"dtype": "F8_E4M3", "shape": [0, 7], "data_offsets": [9, 9]},
        },
        {"a": {"dtype": "I64", "shape": [1 << 62, 4, 0], "data_offsets": [0, 0]}},
    ]
    sizes = (24, 9, 0)
    made = [
        b"\x01" + struct.pack("<H", size) + json.dumps(text).encode()
        for text, size in zip(texts, sizes, strict=True)
    ]
    return [
        *made,
        b"\x00" + one_tensor("weight"),
        b"\x00" + struct.pack("<Q", 1 << 63),
        b"\x01\x00\x00" + b"[" * 2000,
    ]


def _indexes() -> list[bytes]:
    shard = "model-00001-of-00001.safetensors"
    maps: list[object] = [
        {"weight": shard},
        {"weight": "../index/" + shard},
        {"weight": "/etc/passwd"},
        {"ghost": shard},
        {"weight": "./" + shard},
        {"weight": "a" * 300 + ".safetensors"},
        {"weight": None},
    ]
    return [json.dumps({"metadata": {"total_size": 24}, "weight_map": found}).encode() for found in maps]


def _configs() -> list[bytes]:
    return [b'{"model_type": "llama", "hidden_size": 64}', b"[]", b'{"a": 1, "a": 2}', b"\xff", b"[" * 3000]


def _recipes() -> list[bytes]:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)
    )
    return [
        b"model: smollm2-135m\nsteps:\n  - prune: {ratio: 0.5}\n  - quantize:\n      budget: 2.75bit\n  - report\n",
        b"steps: [{train: {steps: 3, lr: 1e-3}}, recover]\n",
        b"steps:\n  - !!python/object/apply:os.system ['true']\n",
        b"steps: [prune, prune]\n",
        b"steps: [2001-99-99]\n",
        f"{bomb}steps: [*u]\n".encode(),
    ]


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "header": (header, _headers()),
    "index": (index, _indexes()),
    "config": (config, _configs()),
    "recipe": (recipe, _recipes()),
}
"""Target by name: what is called with bytes, and what it starts from."""

WORDS = (
    '"__metadata__"', '"dtype"', '"shape"', '"data_offsets"', '"F32"', '"BF16"', '"F8_E5M2"', '"BOOL"', "[0,0]",
    "18446744073709551616", "-1", "1e400", "NaN", "null", "true", '"weight_map"', '"weight"', ".safetensors", "../",
    "\\\\u0000", "\\\\ud800", "steps:", "prune", "quantize", "ratio", "budget", "&a", "*a", "!!int", "!!bool", "- ",
)  # fmt: skip
"""What inputs of these kinds are made of."""
