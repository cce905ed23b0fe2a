"""Everything that is made to go wrong."""

from __future__ import annotations

import errno
import json
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from compress.model.tensor_file import TensorEntry
from compress.pipelines import stage
from tests.faults.scene import MERGE, PRUNE, QUANTIZE, RECOVER, TRAIN, VERIFY, Fault, Scene, patched

INDEX = "model.safetensors.index.json"


def _index(change: Callable[[dict[str, str]], object]) -> Callable[[Scene], None]:
    def harm(scene: Scene) -> None:
        file = scene.model / INDEX
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content["weight_map"])
        file.write_text(json.dumps(content), encoding="utf-8")

    return harm


def _duplicate(scene: Scene) -> None:
    file = scene.model / INDEX
    text = file.read_text(encoding="utf-8")
    name = next(iter(json.loads(text)["weight_map"]))
    entry = f'"weight_map": {{ "{name}": "model-00009-of-00009.safetensors",'
    file.write_text(text.replace('"weight_map": {', entry), encoding="utf-8")


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Scene], None]:
    """Change the header of the first weight file, the rest of the file stays."""

    def harm(scene: Scene) -> None:
        file = scene.shards()[0]
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return harm


def _overlap(scene: Scene) -> None:
    """Two tensors of one size lie at one place, and the other place is nobody's."""
    for file in scene.shards():
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        by_shape: dict[str, str] = {}
        for name, entry in header.items():
            other = by_shape.setdefault(str(entry["shape"]), name)
            if other != name:
                entry["data_offsets"] = header[other]["data_offsets"]
                text = json.dumps(header).encode()
                file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
                return
    raise AssertionError("no two tensors of one shape in a file")


def _first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header[next(name for name in header if name != "__metadata__")]
    return entry


def _overwrite(at: int, data: bytes) -> Callable[[Scene], None]:
    def harm(scene: Scene) -> None:
        with scene.shards()[0].open("r+b") as file:
            file.seek(at)
            file.write(data)

    return harm


def _truncate(scene: Scene) -> None:
    file = scene.shards()[-1]
    file.write_bytes(file.read_bytes()[:-100])


def _pickled(scene: Scene) -> None:
    scene.shards()[0].write_bytes(pickle.dumps({"weight": [0.0] * 100}))


def _value(value: float) -> Callable[[Scene], None]:
    """One element of a down projection becomes ``value``."""

    def harm(scene: Scene) -> None:
        for file in scene.shards():
            tensors = load_file(file)
            name = next((name for name in tensors if "down_proj" in name), None)
            if name is not None:
                tensors[name][0, 3] = value
                save_file(tensors, file, {"format": "pt"})
                return
        raise AssertionError("no down projection")

    return harm


def _config(**changes: object) -> Callable[[Scene], None]:
    def harm(scene: Scene) -> None:
        file = scene.model / "config.json"
        content = json.loads(file.read_text(encoding="utf-8")) | changes
        file.write_text(json.dumps(content), encoding="utf-8")

    return harm


def _flipped(verb: str) -> Callable[[Scene], None]:
    """One bit in the middle of the weights of a finished stage."""

    def harm(scene: Scene) -> None:
        file = next(scene.run.glob(f"*-{verb}/*.safetensors"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return harm


def _largest(size: int) -> Callable[[Scene], AbstractContextManager[None]]:
    """No file can grow beyond ``size`` bytes: writes fail part of the way, as they do on a full disk."""

    @contextmanager
    def during(scene: Scene) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return during


def _room(free: int) -> Callable[[Scene], AbstractContextManager[None]]:
    """The disk says that only so many bytes are free."""
    usage = shutil.disk_usage("/")._replace(free=free)
    return lambda scene: patched(shutil, "disk_usage", lambda path: usage)


def _unreadable(number: int, reads: int) -> Callable[[Scene], AbstractContextManager[None]]:
    """Reading a tensor fails with ``number`` after ``reads`` of them."""

    def during(scene: Scene) -> AbstractContextManager[None]:
        read, left = TensorEntry.read, [reads]

        def failing(entry: TensorEntry) -> torch.Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(number, "injected", str(entry.file))
            return read(entry)

        return patched(TensorEntry, "read", failing)

    return during


@contextmanager
def _held(scene: Scene) -> Iterator[None]:
    scene.run.mkdir(exist_ok=True)
    with FileLock(scene.run / ".lock"):
        yield


def _jump(scene: Scene) -> AbstractContextManager[None]:
    class Past(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Past:
            return cls(1970, 1, 2, tzinfo=tz or UTC)

    return patched(stage, "datetime", Past)


def _file_in_place(scene: Scene) -> None:
    scene.run.write_text("not a folder", encoding="utf-8")


def _foreign(scene: Scene) -> None:
    scene.run.mkdir()
    (scene.run / "thesis.txt").write_text("precious", encoding="utf-8")


def _without(name: str) -> Callable[[Scene], None]:
    return lambda scene: (scene.model / name).unlink()


def _remove_shard(scene: Scene) -> None:
    scene.shards()[0].unlink()


def _linked_outside(scene: Scene) -> None:
    outside = scene.folder / "elsewhere.safetensors"
    outside.write_bytes(b"secret")
    shard = scene.shards()[0]
    shard.unlink()
    shard.symlink_to(outside)


FAULTS = (
    Fault(name="A weight file ends too early", harm=_truncate),
    Fault(name="A weight file is missing", harm=_remove_shard),
    Fault(name="A weight file is a pickle with another name", harm=_pickled),
    Fault(name="A weight file is a link to something else", harm=_linked_outside),
    Fault(name="A header claims a length of 2^63", harm=_overwrite(0, struct.pack("<Q", 1 << 63))),
    Fault(name="A header claims to be empty", harm=_overwrite(0, bytes(8))),
    Fault(name="A header is no JSON", harm=_overwrite(8, b"\xff\xfe\xfd")),
    Fault(name="A bit of a header is flipped", harm=_overwrite(9, b"#")),
    Fault(name="A header names an unknown dtype", harm=_header(lambda h: _first(h).update(dtype="F128"))),
    Fault(name="A header names a narrower dtype", harm=_header(lambda h: _first(h).update(dtype="F16"))),
    Fault(name="A header names a negative size", harm=_header(lambda h: _first(h).update(shape=[-4, 8]))),
    Fault(
        name="A header names a size of 2^80",
        harm=_header(lambda h: _first(h).update(shape=[1 << 40, 1 << 40])),
    ),
    Fault(name="Two tensors of a header overlap", harm=_overlap),
    Fault(
        name="The index names a tensor that is not there",
        harm=_index(lambda m: m.update(ghost=min(m.values()))),
    ),
    Fault(name="The index leaves a tensor out", harm=_index(lambda m: m.pop("model.norm.weight"))),
    Fault(name="The index names a tensor twice", harm=_duplicate),
    Fault(name="The index leads out of the folder", harm=_index(lambda m: m.update(x="../../x.safetensors"))),
    Fault(
        name="The index is no JSON",
        harm=lambda scene: (scene.model / INDEX).write_text("{", encoding="utf-8"),
    ),
    Fault(name="The config belongs to a wider model", harm=_config(hidden_size=128)),
    Fault(name="The config belongs to a deeper model", harm=_config(num_hidden_layers=9)),
    Fault(name="The config is missing", harm=_without("config.json")),
    Fault(name="A weight is NaN, when pruning", harm=_value(float("nan"))),
    Fault(name="A weight is infinite, when quantizing", verb=QUANTIZE, harm=_value(float("inf"))),
    Fault(name="A weight is NaN, when quantizing", verb=QUANTIZE, harm=_value(float("nan"))),
    Fault(name="The disk fails while weights are read", during=_unreadable(errno.EIO, 5), heals=True),
    Fault(
        name="The disk fails while quantize reads",
        verb=QUANTIZE,
        during=_unreadable(errno.EIO, 20),
        heals=True,
    ),
    Fault(name="No file can grow beyond 20 kB", during=_largest(20_000), heals=True),
    Fault(name="No file can grow beyond 100 bytes", during=_largest(100), heals=True),
    Fault(name="No file can grow beyond 10 kB", verb=QUANTIZE, during=_largest(10_000), heals=True),
    Fault(
        name="No file can grow beyond 6 kB",
        verb=RECOVER,
        before=(PRUNE, TRAIN),
        during=_largest(6_000),
        heals=True,
    ),
    Fault(name="Another command works in the workspace", during=_held, heals=True),
    Fault(name="The workspace is a file", harm=_file_in_place),
    Fault(name="The workspace is a folder of something else", harm=_foreign),
    Fault(
        name="The clock jumps back by decades", verb=QUANTIZE, before=(PRUNE,), during=_jump, accepted=True
    ),
    Fault(
        name="A bit of a pruned model is flipped, then verify",
        verb=VERIFY,
        before=(PRUNE,),
        harm=_flipped("prune"),
    ),
    Fault(
        name="A bit of a quantized model is flipped, then verify",
        verb=VERIFY,
        before=(QUANTIZE,),
        harm=_flipped("quantize"),
    ),
    Fault(
        name="A bit of a pruned model is flipped, then quantize",
        verb=QUANTIZE,
        before=(PRUNE,),
        harm=_flipped("prune"),
    ),
    Fault(
        name="A file of a pruned model is gone, then train",
        verb=TRAIN,
        before=(PRUNE,),
        harm=lambda scene: (scene.run / "01-prune" / "tokenizer.json").unlink(),
    ),
    Fault(
        name="A bit of an adapter is flipped, then recover",
        verb=RECOVER,
        before=(PRUNE, TRAIN),
        harm=_flipped("train"),
    ),
    Fault(name="The disk has no room for the pruned model", during=_room(100_000), heals=True),
    Fault(name="The disk has no room for a quantized model", verb=QUANTIZE, during=_room(50_000), heals=True),
    Fault(
        name="The disk has no room for a merged model",
        verb=MERGE,
        before=(PRUNE, TRAIN),
        during=_room(4_300_000),
        heals=True,
    ),
)


def text_file(folder: Path) -> Path:
    """Enough made-up text for three splits."""
    words = ("river", "engine", "matrix", "garden", "signal", "harbour", "kernel", "ledger")
    documents = [
        " ".join(f"The {words[(i + j) % 8]} of {words[(i * j) % 8]} {i} meets {j}." for j in range(14))
        for i in range(90)
    ]
    path = folder / "text.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path
