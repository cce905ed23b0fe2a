"""Names, records and versions of quantized matrices in a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.quantize.checkpoint import MatrixRecord, lq_config, lq_tensors, read_lq_config, record_of
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import decompose
from tests.unit.quantize.test_decompose import trained

CONFIG = QuantConfig(bits=3, scale_bits=3, scale_dtype="float16", block_size=16, group_size=16)


@pytest.mark.parametrize(("rank", "factor_config"), [(0, FACTOR_8BIT), (5, FACTOR_8BIT), (5, None)])
def test_stored_tensors_match_the_record_and_the_promised_size(
    rank: int, factor_config: QuantConfig | None
) -> None:
    result = decompose(trained((37, 53)), CONFIG, rank=rank, factor_config=factor_config, iterations=2)
    record = record_of(result)
    bias = torch.randn(37)
    tensors = lq_tensors("model.x", result, bias)
    assert torch.equal(tensors.pop("model.x.bias"), bias)
    layout = {f"model.x.{name}": place for name, place in record.layout().items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == layout
    stored = 8 * sum(t.numel() * t.itemsize for t in tensors.values())
    assert stored == record.storage_bits == result.storage_bits
    assert record.rank == rank
    assert tensors["model.x.weight"].shape == (37 * 64 * 3 // 8,)


def test_records_survive_json() -> None:
    records = {
        "a": MatrixRecord(shape=(3, 4), config=CONFIG),
        "b": MatrixRecord(shape=(3, 4), config=CONFIG, rank=1, factor_config=FACTOR_8BIT),
    }
    assert read_lq_config(json.loads(json.dumps(lq_config(records)))) == records


@pytest.mark.parametrize(
    "change", [{"format_version": 2}, {"quant_method": "gptq"}, {"matrices": {"a": {"shape": [1, 2]}}}]
)
def test_another_format_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CompressError):
        read_lq_config({**lq_config({}), **change})


def test_a_record_with_an_unknown_key_in_its_configuration_is_refused() -> None:
    values = MatrixRecord(shape=(3, 4), config=CONFIG).to_dict()
    values["config"]["zero_point"] = 1
    with pytest.raises(UsageError, match="zero_point"):
        MatrixRecord.from_dict(values)
