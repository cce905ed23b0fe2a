"""Sizes of the whole model as a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.prune.goal import parse_count, ratio_for_bytes, ratio_for_parameters
from compress.prune.uniform import choose_shape
from tests.unit.prune.layouts import smol

TOTAL = 134_515_008  # SmolLM2-135M: 106,168,320 in its linears, a tied embedding, norms


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80M", 80_000_000),
        ("1.3B", 1_300_000_000),
        ("80e6", 80_000_000),
        ("120000000", 120_000_000),
        (" 7 b ", 7_000_000_000),
        ("0.5k", 500),
        (".5m", 500_000),
        ("8.03E+9", 8_030_000_000),
        ("1t", 10**12),
        ("1e2M", 10**8),
    ],
)
def test_counts_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "80MB",
        "80 parameters",
        "-80M",
        "0",
        "0M",
        "1.5",
        "1.2345k",
        "nan",
        "inf",
        "1e-3",
        "8,0M",
        "٣",
    ],
)
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"such as 80M, 1\.3B"):
        parse_count(text)


@given(st.integers(60_000_000, 130_000_000))
def test_the_ratio_brings_the_whole_model_to_its_size(target: int) -> None:
    arch = smol()
    ratio = ratio_for_parameters(TOTAL, arch, target)
    assert TOTAL - ratio * arch.decoder_linear_parameters() == pytest.approx(target)
    assert ratio_for_bytes(2 * TOTAL, 2.0, arch, 2 * target) == pytest.approx(ratio)
    plan = choose_shape(arch, ratio)
    kept = TOTAL - plan.achieved * arch.decoder_linear_parameters()
    assert kept == pytest.approx(target, abs=0.03 * arch.decoder_linear_parameters())


def test_sizes_out_of_reach_name_the_range() -> None:
    arch = smol()
    # one KV group with one query head, and 64 channels, in each of the 30 layers
    smallest = TOTAL - 106_168_320 + 30 * (4 * 64 * 576 + 64 * 3 * 576)
    for target in (10_000_000, TOTAL, 200_000_000):
        with pytest.raises(CompressError) as error:
            ratio_for_parameters(TOTAL, arch, target)
        assert f"of {TOTAL:,} parameters down to {smallest:,} parameters, not to {target:,}" in str(
            error.value
        )
    with pytest.raises(CompressError, match=r"of 269.0 MB down to .* MB, not to 20.0 MB"):
        ratio_for_bytes(2 * TOTAL, 2.0, arch, 20e6)
    with pytest.raises(CompressError, match="not to"):
        ratio_for_parameters(TOTAL, arch, 100_000_000, targets=["heads"])
    assert 0 < ratio_for_parameters(TOTAL, arch, smallest) < 1
