"""A safetensors file written tensor by tensor: the bytes of the library's own writer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.model.placed import PlacedWriter, Spec

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int8]


def specs_of(tensors: dict[str, Tensor]) -> dict[str, Spec]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@given(
    st.dictionaries(
        st.text("ab.19_", min_size=1, max_size=6),
        st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_the_bytes_are_those_of_safetensors(
    shapes: dict[str, tuple[list[int], torch.dtype]], order: object
) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = {
        name: (9 * torch.randn(shape, generator=generator)).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    names = list(tensors)
    order.shuffle(names)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as place:
        ours, theirs = Path(place) / "ours", Path(place) / "theirs"
        with PlacedWriter(ours, specs_of(tensors)) as writer:
            for name in names:
                writer.put(name, tensors[name])
        save_file(tensors, theirs, metadata={"format": "pt"})
        assert ours.read_bytes() == theirs.read_bytes()


def test_views_are_written_as_they_read(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    with PlacedWriter(tmp_path / "file", {"t": ((3, 2), torch.float32)}) as writer:
        writer.put("t", tensor.T)
    assert torch.equal(load_file(tmp_path / "file")["t"], tensor.T)


def write_ones(file: Path, specs: dict[str, Spec], names: list[str]) -> None:
    with PlacedWriter(file, specs) as writer:
        for name in names:
            writer.put(name, torch.ones(2))


def test_what_is_not_foreseen_leaves_nothing(tmp_path: Path) -> None:
    file, one = tmp_path / "file", torch.ones(2)
    specs = specs_of({"a": one, "b": one})
    wrong = [("c", one), ("a", torch.ones(3)), ("a", one.double())]
    for name, tensor in wrong:
        with pytest.raises(ValueError, match="has no place"), PlacedWriter(file, specs) as writer:
            writer.put(name, tensor)
        assert not file.exists()
    for names, message in ((["a", "a"], "has no place"), (["a"], "1 tensors were not written, 'b' first")):
        with pytest.raises(ValueError, match=message):
            write_ones(file, specs, names)
        assert not file.exists()
