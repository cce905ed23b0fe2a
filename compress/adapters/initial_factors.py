"""The factors that training started from, kept beside an adapter where they were not zero."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compress.errors import CompressError
from compress.model.tensor_file import TensorEntry

INITIAL_FILE = "initial_factors.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before every module name."""


def pair_of(module: str) -> tuple[str, str]:
    """Names of A [r, in] and B [out, r] of a module in an adapter file."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


class InitialFactors:
    """A0 [r0, in] and B0 [out, r0] of the modules that started from a part of their base.

    Args:
        path: The file, for messages.
        entries: What its header says, by name.
    """

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.path = path
        self._entries = entries
        suffix = ".lora_A.weight"
        self.modules = tuple(
            name.removeprefix(PREFIX).removesuffix(suffix)
            for name in sorted(entries)
            if name.endswith(suffix)
        )

    def require_match(self, trained: Mapping[str, TensorEntry]) -> None:
        """Refuse factors that are not those of the trained ones; reads no tensor.

        Args:
            trained: What the header of the adapter's own file says, by name.

        Raises:
            CompressError: One of a pair is missing, ranks differ, or the adapter has no such module, or one of another
                width.
        """
        for name in self._entries:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
            pair = pair_of(module)
            if name not in pair:
                self._refuse(f"{name} is no factor of a linear")
            missing = [each for each in pair if each not in self._entries]
            if missing:
                self._refuse(f"it has no {missing[0]}")
            if any(each not in trained for each in pair):
                self._refuse(f"the adapter has no factors of {module}")
            shapes, widths = ([of[each].shape for each in pair] for of in (self._entries, trained))
            if any(len(shape) != 2 for shape in (*shapes, *widths)) or shapes[0][0] != shapes[1][1]:
                self._refuse(f"the factors of {module} are {_times(shapes)}, which differ in rank")
            if (shapes[1][0], shapes[0][1]) != (widths[1][0], widths[0][1]):
                self._refuse(
                    f"the factors of {module} are {_times(shapes)}, the trained ones {_times(widths)}"
                )

    def _refuse(self, why: str) -> None:
        raise CompressError(
            f"{self.path} does not belong to the adapter beside it: {why}.",
            "Copy both files again from where the adapter was saved.",
        )

    def rank(self, module: str) -> int | None:
        """Rank of ``B0 A0``; None where it was zero."""
        entry = self._entries.get(pair_of(module)[0])
        return None if entry is None else entry.shape[0]

    def read(self, module: str) -> tuple[Tensor, Tensor] | None:
        """(A0, B0), or None where their product was zero."""
        if self.rank(module) is None:
            return None
        factor_a, factor_b = (self._entries[name].read() for name in pair_of(module))
        return factor_a, factor_b


def _times(shapes: list[tuple[int, ...]]) -> str:
    """The shapes of A and B as the product B A."""
    return " x ".join(str(list(shape)) for shape in reversed(shapes))
