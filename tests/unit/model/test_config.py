"""Shapes from configs: those that are kept are those that transformers builds."""

from __future__ import annotations

import pytest

from compress.errors import CompressError
from compress.model import config as configs
from compress.model.config import build_config, meta_model, meta_shapes
from tests.tiny import DENSE, TINY


@pytest.mark.parametrize("kind", DENSE)
def test_kept_shapes_are_those_of_the_model(kind: str) -> None:
    for channels in (96, 64, 96):
        config = TINY[kind]()
        config.intermediate_size = channels
        expected = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
        for _ in range(2):
            found = meta_shapes(config)
            assert found == expected
            found.clear()  # the caller's own


def test_the_quantization_of_the_weights_does_not_matter() -> None:
    plain = TINY["llama_mha"]().to_dict()
    quantized = build_config(plain | {"quantization_config": {"quant_method": "lq", "matrices": {}}})
    assert meta_shapes(quantized) == meta_shapes(build_config(plain))


def test_a_config_that_is_refused_is_refused_again() -> None:
    config = TINY["llama_mha"]()
    config.hidden_size = -1
    for _ in range(2):
        with pytest.raises(CompressError, match="cannot be built"):
            meta_shapes(config)


def test_a_model_is_built_once_and_the_one_used_longest_ago_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def counted(config: object) -> object:
        built.append(int(vars(config)["intermediate_size"]))
        return meta_model(config)

    monkeypatch.setattr(configs, "meta_model", counted)
    monkeypatch.setattr(configs, "_SHAPES", {})
    monkeypatch.setattr(configs, "_KEPT", 2)
    for channels in (8, 16, 8, 24, 8, 16):
        config = TINY["llama_mha"]()
        config.intermediate_size = channels
        meta_shapes(config)
    assert built == [8, 16, 24, 16]
