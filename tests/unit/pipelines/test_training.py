from __future__ import annotations

from dataclasses import replace

import pytest

from compress.pipelines.settings import Common, TrainSettings, resolve
from compress.pipelines.training import fit_config


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("auto", "auto"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "auto")],
)
def test_training_computes_in_the_dtype_that_was_asked_for(dtype: str, precision: str) -> None:
    settings = resolve(TrainSettings, {"steps": 7}, "quick")
    config = fit_config(settings, Common(dtype=dtype, seed=3))
    assert (config.precision, config.seed, config.steps) == (precision, 3, 7)
    assert not config.recompute
    assert fit_config(replace(settings, recompute=True), Common(dtype=dtype)).recompute
