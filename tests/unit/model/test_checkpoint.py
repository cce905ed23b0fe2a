"""Reading and writing checkpoints, and refusing broken or hostile ones."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.model.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    checkpoint_architecture,
    copy_side_files,
    require_dense,
)
from compress.model.tensor_file import DTYPES, read_header
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_tied", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


def rewrite(source: Path, target: Path, **options: Any) -> Checkpoint:
    checkpoint = Checkpoint(source)
    with CheckpointWriter(target, config=checkpoint.config, **options) as writer:
        for name in checkpoint.names:
            writer.add(name, checkpoint.read(name))
    return Checkpoint(target)


def test_reading_equals_the_safetensors_library(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    reference = load_file(llama / "model.safetensors")
    assert set(checkpoint.names) == set(reference)
    assert "lm_head.weight" not in checkpoint.names
    for name, tensor in reference.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype == torch.bfloat16
        assert checkpoint.nbytes(name) == tensor.nbytes
    assert checkpoint.parameters == sum(t.numel() for t in reference.values())
    assert checkpoint.bytes == sum(t.nbytes for t in reference.values())


def test_a_read_tensor_may_be_changed_without_touching_the_file(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    checkpoint.read("model.norm.weight").zero_()
    assert checkpoint.read("model.norm.weight").abs().sum() > 0


def test_sharded_copy_is_the_same_model(llama: Path, tmp_path: Path) -> None:
    copy = rewrite(llama, tmp_path / "sharded", max_shard_bytes=20_000)
    shards = sorted(file.name for file in copy.path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((copy.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == copy.bytes
    assert sorted(p.name for p in copy.path.iterdir()) == sorted(
        [*shards, "config.json", "model.safetensors.index.json"]
    )
    assert copy.fingerprint() == Checkpoint(llama).fingerprint()
    first = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    second = AutoModelForCausalLM.from_pretrained(copy.path).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fingerprint_sees_names_values_shapes_and_dtypes(tmp_path: Path) -> None:
    def of(folder: str, **tensors: torch.Tensor) -> str:
        with CheckpointWriter(tmp_path / folder, config={}) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        return Checkpoint(tmp_path / folder).fingerprint()

    a, b = torch.arange(6.0), torch.ones(2)
    prints = [
        of("base", a=a, b=b),
        of("renamed", a=a, c=b),
        of("value", a=a + 1, b=b),
        of("shape", a=a.reshape(2, 3), b=b),
        of("dtype", a=a.view(torch.int32), b=b),
    ]
    assert len(set(prints)) == len(prints)
    assert of("order", b=b, a=a) == prints[0]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 200),
)
def test_any_mix_of_dtypes_and_shapes_round_trips(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, list[int]]], shard: int
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (dtype, shape) in enumerate(plan):
        high = 2 if dtype == "BOOL" else 100
        tensors[f"t{number}"] = torch.randint(0, high, shape, generator=generator).to(DTYPES[dtype])
    with CheckpointWriter(folder, config={}, max_shard_bytes=shard, metadata={"note": "x"}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    checkpoint = Checkpoint(folder)
    library: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        library |= load_file(file)
        assert read_header(file)[1] == {"format": "pt", "note": "x"}
    for name, tensor in tensors.items():
        for found in (checkpoint.read(name), library[name]):
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found.float(), tensor.float())


def test_non_contiguous_tensors_are_written_by_value(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    with CheckpointWriter(tmp_path, config={}) as writer:
        writer.add("t", matrix.T)
    assert torch.equal(Checkpoint(tmp_path).read("t"), matrix.T)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with CheckpointWriter(tmp_path, config={}, max_shard_bytes=8) as writer:
            writer.add("a", torch.ones(4))
            writer.add("b", torch.ones(4))
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_doubles_empties_and_occupied_folders(llama: Path, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, config={"_name_or_path": "/home/me", "hidden_size": 1})
    with pytest.raises(ValueError, match="at least one"):
        writer.finish()
    writer.add("a", torch.ones(1))
    with pytest.raises(ValueError, match="already written"):
        writer.add("a", torch.ones(1))
    assert writer.finish() == writer.finish() == tmp_path
    with pytest.raises(ValueError, match="finished"):
        writer.add("b", torch.ones(1))
    assert json.loads((tmp_path / "config.json").read_text()) == {"hidden_size": 1}
    with pytest.raises(CompressError, match="already holds weights"):
        CheckpointWriter(llama, config={})


def test_side_files_travel_without_weights_and_config(llama: Path, tmp_path: Path) -> None:
    copy_side_files(llama, tmp_path / "target")
    names = {file.name for file in (tmp_path / "target").iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= names
    assert not names & {"config.json", "model.safetensors"}


def test_missing_tensor_is_named(llama: Path) -> None:
    with pytest.raises(CompressError, match=r"no tensor 'model\.nothing'"):
        Checkpoint(llama).read("model.nothing")
    assert "model.norm.weight" in Checkpoint(llama)
    assert "model.nothing" not in Checkpoint(llama)


def test_architecture_of_a_checkpoint_checks_shapes(llama: Path, tmp_path: Path) -> None:
    assert checkpoint_architecture(Checkpoint(llama)).layers == 3
    checkpoint = Checkpoint(llama)
    wrong = {**checkpoint.config, "intermediate_size": 64}
    with CheckpointWriter(tmp_path, config=wrong) as writer:
        for name in checkpoint.names:
            writer.add(name, checkpoint.read(name))
    with pytest.raises(CompressError, match=r"shape \(96, 32\) where the config asks for \(64, 32\)"):
        checkpoint_architecture(Checkpoint(tmp_path))


def test_quantized_checkpoints_are_refused(llama: Path, tmp_path: Path) -> None:
    require_dense(Checkpoint(llama), allow_lq=False)
    for method, allow_lq, refused in (("gptq", True, True), ("lq", True, False), ("lq", False, True)):
        checkpoint = Checkpoint(llama)
        checkpoint.config["quantization_config"] = {"quant_method": method}
        if refused:
            with pytest.raises(CompressError, match=method):
                require_dense(checkpoint, allow_lq=allow_lq)
        else:
            require_dense(checkpoint, allow_lq=allow_lq)


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name in names:
        (path / name).write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("pytorch_model.bin",), "pickled weights only"),
        (("model.pth",), "pickled weights only"),
        (("model.gguf",), "GGUF files only"),
        ((), "no model.safetensors"),
    ],
)
def test_folders_without_safetensors_are_refused(tmp_path: Path, names: tuple[str, ...], reason: str) -> None:
    with pytest.raises(CompressError, match=reason):
        Checkpoint(folder_with(tmp_path, *names))


def test_folders_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no model folder"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(CompressError, match="no config"):
        Checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CompressError, match="adapter, not a model"):
        Checkpoint(tmp_path)
    for content, reason in (("{", "no valid JSON"), ("[]", "no JSON object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CompressError, match=reason):
            Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../out.safetensors",
        "/tmp/out.safetensors",
        "a/../../out.safetensors",
        "..\\out.safetensors",
        "C:\\out.safetensors",
        "C:out.safetensors",
        "weights.bin",
    ],
)
def test_an_index_cannot_lead_outside(tmp_path: Path, shard: str) -> None:
    folder = folder_with(tmp_path / "model")
    save_file({"t": torch.ones(1)}, tmp_path / "out.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": shard}}))
    with pytest.raises(CompressError, match="no safetensors file inside the folder"):
        Checkpoint(folder)


def test_incomplete_indexes_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = rewrite(llama, tmp_path / "m", max_shard_bytes=20_000).path
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"extra": "model.safetensors"}}))
    with pytest.raises(CompressError, match="is missing"):
        Checkpoint(folder)
    shard = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": {"extra": shard}}))
    with pytest.raises(CompressError, match="lacks the tensor 'extra'"):
        Checkpoint(folder)
    index.write_text(json.dumps({"weight_map": ["x"]}))
    with pytest.raises(CompressError, match="no weight_map"):
        Checkpoint(folder)


def test_hub_snapshots_made_of_links_are_read(llama: Path, tmp_path: Path) -> None:
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0f3e"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.copyfile(llama / name, blobs / name[:5])
        (folder / name).symlink_to(Path("..", "..", "blobs", name[:5]))
    assert Checkpoint(folder).fingerprint() == Checkpoint(llama).fingerprint()
    copy_side_files(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "LICENSE", "chat_template.jinja"])
def test_links_out_of_the_folder_are_not_followed(name: str, llama: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "secret"
    shutil.copytree(llama, folder)
    if (folder / name).is_file():
        shutil.move(folder / name, elsewhere)
    else:
        elsewhere.write_text("of nobody's business")
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(CompressError, match=f"{name} is a link that leads out of its folder"):
        copy_side_files(Checkpoint(folder).path, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


def test_a_linked_folder_is_read(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(llama)
    assert Checkpoint(tmp_path / "link").fingerprint() == Checkpoint(llama).fingerprint()


def weight_file(header: Any, data: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not fit"),
        (struct.pack("<Q", 1 << 60) + b"{}", "does not fit"),
        (weight_file(b"{oops"), "no JSON"),
        (weight_file(b"\xff\xfe"), "no JSON"),
        (weight_file([]), "no JSON object"),
        (weight_file({"t": 1}), "no JSON object"),
        (weight_file({"t": entry(dtype="F31")}), "unknown dtype 'F31'"),
        (weight_file({"t": entry(shape=[3])}), "contradicts"),
        (weight_file({"t": entry(shape=[-2])}), "natural numbers"),
        (weight_file({"t": entry(shape=[True, 2])}), "natural numbers"),
        (weight_file({"t": entry(offsets=[0, 8, 9])}), "natural numbers"),
        (weight_file({"t": entry(offsets=[8, 0])}), "contradicts"),
        (weight_file({"t": entry(shape=[4], offsets=[0, 16])}), "contradicts"),
        (weight_file({"t": entry(), "u": entry()}), "overlap"),
        (weight_file({"t": entry(shape=[1], offsets=[4, 8])}), "holes"),
        (weight_file({"t": entry()}, data=9), "its size"),
    ],
)
def test_broken_weight_files_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    folder_with(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CompressError, match=reason):
        Checkpoint(tmp_path)


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    folder_with(tmp_path)
    save_file({"t": torch.ones(64)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(CompressError, match="shorter"):
        checkpoint.read("t")
    with pytest.raises(CompressError, match="shorter"):
        checkpoint.fingerprint()
