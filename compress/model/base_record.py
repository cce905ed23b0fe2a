"""What a small model was cut from: the digest of every tensor, so that another full model can be told and refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.model.inside import require_inside

FILE_NAME = "base.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """What one stored tensor is: safetensors' name of its dtype, its shape, SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def fingerprint_of(digests: Mapping[str, TensorDigest]) -> str:
    """SHA-256 over name, dtype, shape and content of every tensor, sorted by name."""
    total = hashlib.sha256()
    for name in sorted(digests):
        digest = digests[name]
        line = [name, digest.dtype, list(digest.shape), digest.sha256]
        total.update(json.dumps(line).encode() + b"\n")
    return total.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """The full model behind a small one.

    Attributes:
        name: What its publisher called it; never a path.
        tensors: Digest of every tensor, by name.
    """

    name: str
    tensors: Mapping[str, TensorDigest]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the full model's checkpoint."""
        return fingerprint_of(self.tensors)

    def difference(self, other: Mapping[str, TensorDigest]) -> str | None:
        """What the first tensor, in alphabetical order, is in ``other`` that it should not be; None: all agree."""
        for name in sorted({*self.tensors, *other}):
            ours, theirs = self.tensors.get(name), other.get(name)
            if ours == theirs:
                continue
            if theirs is None:
                return f"it has no tensor {name}"
            if ours is None:
                return f"it has a tensor {name}, which the other has not"
            if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
                return (
                    f"its tensor {name} is {theirs.dtype} {list(theirs.shape)} "
                    f"instead of {ours.dtype} {list(ours.shape)}"
                )
            return f"its tensor {name} has other values"
        return None

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        content = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "tensors": {name: asdict(digest) for name, digest in self.tensors.items()},
        }
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> BaseRecord:
        """Read a file written by :meth:`save`.

        Raises:
            CompressError: It is no such file, a link out of its folder, of a newer version, or its fingerprint is not
                that of its tensors.
        """
        remedy = "Take the small model again from where it came."
        require_inside(path.parent, path)
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise CompressError(
                    f"{path} has format version {version}, not {FORMAT_VERSION}.", "Upgrade compress."
                )
            record = cls(
                name=str(content["name"]),
                tensors={
                    name: TensorDigest(
                        dtype=str(entry["dtype"]), shape=tuple(entry["shape"]), sha256=str(entry["sha256"])
                    )
                    for name, entry in content["tensors"].items()
                },
            )
            whole = record.fingerprint == content["fingerprint"]
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise CompressError(f"{path} is no record of a base model.", remedy) from error
        if not whole:
            raise CompressError(f"The fingerprint in {path} is not that of its tensors.", remedy)
        return record
