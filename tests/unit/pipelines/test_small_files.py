"""What goes along with a small model that somebody else made: its own records, and nothing that they link to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.adapters.adapter_file import CONFIG_FILE, INITIAL_FILE, ORIGIN_FILE, WEIGHTS_FILE, AdapterFile
from compress.errors import CompressError
from compress.export.card import license_of
from compress.model.base_record import FILE_NAME as BASE
from compress.model.base_record import BaseRecord
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model, load_tokenizer
from compress.pipelines.small_files import carry
from compress.prune.weight_masks import FILE_NAME as MASKS
from compress.prune.weight_masks import WeightMasks, load_masks, pack_bits
from compress.structure import FILE_NAME as STRUCTURE
from compress.structure import StructureMap
from tests.tiny import tiny_checkpoint
from tests.unit.adapters.common import Pair, make_pair

SECRET = "of nobody's business"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("llama_gqa", tmp_path_factory.mktemp("pair"))


@pytest.fixture
def small(pair: Pair, tmp_path: Path) -> Path:
    """A folder with the three records of a small model."""
    folder = tmp_path / "small"
    folder.mkdir()
    pair.structure.save(folder / STRUCTURE)
    BaseRecord(name="full", tensors=pair.full.digests()).save(folder / BASE)
    mask = torch.rand(6, 11, generator=torch.Generator().manual_seed(1)) > 0.5
    masks = WeightMasks(pattern="unstructured", packed={"m": pack_bits(mask)}, columns={"m": 11})
    masks.save(folder / MASKS)
    (tmp_path / "out").mkdir()
    return folder


def swapped_for_link(folder: Path, name: str, outside: Path) -> None:
    """Move a file out of its folder and leave a link to it, or link to a secret where there is none."""
    outside.mkdir(exist_ok=True)
    if (folder / name).is_file():
        (folder / name).rename(outside / name)
    else:
        (outside / name).write_text(SECRET)
    (folder / name).symlink_to(outside / name)


def test_records_are_carried_byte_for_byte(small: Path, tmp_path: Path) -> None:
    carry(small, tmp_path / "out")
    for name in (STRUCTURE, BASE, MASKS):
        assert (tmp_path / "out" / name).read_bytes() == (small / name).read_bytes()


@pytest.mark.parametrize("name", [STRUCTURE, BASE, MASKS])
@pytest.mark.parametrize("genuine", [False, True])
def test_a_link_is_not_carried(name: str, genuine: bool, small: Path, tmp_path: Path) -> None:
    if not genuine:
        (small / name).unlink()
    swapped_for_link(small, name, tmp_path / "outside")
    with pytest.raises(CompressError, match=f"{name} is a link that leads out of its folder"):
        carry(small, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("name", [STRUCTURE, BASE, MASKS])
def test_what_is_no_record_is_not_carried(name: str, small: Path, tmp_path: Path) -> None:
    (small / name).write_text(SECRET)
    with pytest.raises(CompressError, match=name):
        carry(small, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


def test_weights_that_are_called_masks_are_not_carried(small: Path, tmp_path: Path) -> None:
    save_file(
        {"m.mask": torch.ones(2, 2)},
        small / MASKS,
        metadata={"format": "compress-masks", "format_version": "1", "columns": '{"m": 2}'},
    )
    with pytest.raises(CompressError, match="holds no masks"):
        carry(small, tmp_path / "out")


def test_members_that_a_record_has_no_place_for_stay_behind(small: Path, tmp_path: Path) -> None:
    content = json.loads((small / BASE).read_text())
    (small / BASE).write_text(json.dumps({**content, "note": SECRET}))
    carry(small, tmp_path / "out")
    assert SECRET not in (tmp_path / "out" / BASE).read_text()
    assert BaseRecord.load(tmp_path / "out" / BASE) == BaseRecord.load(small / BASE)


@pytest.mark.parametrize("columns", ["{", "[3]", '{"m": "eleven"}', "[" * 100_000])
def test_columns_that_cannot_be_read_are_refused(columns: str, small: Path) -> None:
    save_file(
        {"m.mask": torch.zeros(2, 2, dtype=torch.uint8)},
        small / MASKS,
        metadata={"format": "compress-masks", "format_version": "1", "columns": columns},
    )
    with pytest.raises(CompressError, match="columns"):
        load_masks(small)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (STRUCTURE, lambda folder: StructureMap.load(folder / STRUCTURE)),
        (BASE, lambda folder: BaseRecord.load(folder / BASE)),
        (MASKS, load_masks),
        ("README.md", license_of),
        ("tokenizer.json", load_tokenizer),
        ("chat_template.jinja", load_tokenizer),
        ("generation_config.json", load_model),
    ],
)
def test_no_reader_follows_a_link_out(
    name: str, read: Callable[[Path], Any], small: Path, pair: Pair
) -> None:
    for file in pair.full.path.iterdir():
        (small / file.name).write_bytes(file.read_bytes())
    swapped_for_link(small, name, small.parent / "outside")
    with pytest.raises(CompressError, match=f"{name} is a link that leads out of its folder"):
        read(small)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    factors = {
        f"base_model.model.m.lora_{part}.weight": torch.zeros(shape)
        for part, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    save_file(factors, folder / WEIGHTS_FILE)
    save_file(factors, folder / INITIAL_FILE)
    (folder / ORIGIN_FILE).write_text("{}")
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, INITIAL_FILE, ORIGIN_FILE])
def test_an_adapter_is_not_read_through_a_link(name: str, adapter: Path) -> None:
    AdapterFile(adapter)
    swapped_for_link(adapter, name, adapter.parent / "outside")
    with pytest.raises(CompressError, match=f"{name} is a link that leads out of its folder"):
        AdapterFile(adapter)


@pytest.mark.parametrize("changed", [{"r": 10**12}, {"r": "4"}, {"r": 0}, {"rank_pattern": {"m": 10**12}}])
def test_ranks_that_no_factor_has_are_refused(changed: dict[str, Any], adapter: Path) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**config, **changed}))
    with pytest.raises(CompressError, match="names the rank"):
        AdapterFile(adapter)


def test_an_adapter_inside_a_model_is_refused(tmp_path: Path, adapter: Path) -> None:
    folder = tiny_checkpoint("llama_gqa", tmp_path / "model")
    Checkpoint(folder)
    (folder / CONFIG_FILE).write_bytes((adapter / CONFIG_FILE).read_bytes())
    with pytest.raises(CompressError, match="holds an adapter beside the model"):
        Checkpoint(folder)
