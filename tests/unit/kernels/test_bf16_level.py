"""The level with bfloat16 instructions, those two computed by others, so that any processor with AVX-512 runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress.kernels import library as loading
from compress.kernels.library import status, using
from compress.kernels.native_product import NARROW_FROM, product, product_transposed
from tests.unit.kernels.compiled import COMPILER, QUICK, shared_library
from tests.unit.kernels.native import LEVEL_BF16 as LEVEL
from tests.unit.kernels.native import multiplied, random_case, random_input

pytestmark = pytest.mark.skipif(
    COMPILER is None or "avx512" not in status().available, reason="needs a C compiler and AVX-512"
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with its bfloat16 instructions emulated."""
    return shared_library(tmp_path_factory.mktemp("emulated"), QUICK)


@pytest.fixture(autouse=True)
def level(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulated library in the place of the installed one, at the level that it adds."""
    caches = (loading.library, loading._load)
    monkeypatch.setattr(loading, "_FILE", emulated)
    for cached in caches:
        cached.cache_clear()
    try:
        with using(LEVEL):
            yield
    finally:
        monkeypatch.undo()
        for cached in caches:
            cached.cache_clear()


def test_it_is_the_best_level() -> None:
    assert status().available[-1] == LEVEL
    assert status().level == LEVEL


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(1, 8, 8), (37, 53, 16), (150, 300, 24), (64, 520, 64)]
)
def test_weights_are_rounded_once_and_summed_in_float32(
    bits: int, rows: int, columns: int, block_size: int
) -> None:
    case = random_case(rows, columns, bits=bits, block_size=block_size)
    left, right = (random_input(3, n, dtype=torch.bfloat16, seed=n) for n in (rows, columns))
    for tokens in (*range(1, 20), 24, 31, 45, NARROW_FROM - 1, NARROW_FROM):
        x = random_input(tokens, columns, dtype=torch.bfloat16)
        weights = multiplied(case, LEVEL, torch.bfloat16, tokens)
        low = x.double() @ right.double().T @ left.double()
        exact = x.double() @ weights.T + low
        sizes = x.double().abs() @ (weights.abs().T + right.double().abs().T @ left.double().abs())
        found, _ = product(x, case.matrix, (left, right))
        bound = 2**-8 * exact.abs() + 2e-6 * sizes
        if tokens >= NARROW_FROM:
            bound += 2**-8 * (x.double() @ right.double().T).abs() @ left.double().abs()
        assert bool(((found.double() - exact).abs() <= bound).all())


def test_the_rounding_of_weights_is_seen() -> None:
    """Table entries are rounded, whole weights from many tokens on, and nothing for other types: errors tell apart."""
    case = random_case(200, 256, bits=4, block_size=64)
    x = random_input(NARROW_FROM, 256, dtype=torch.bfloat16)
    definitions = {
        "entries": case.paired,
        "weights": case.weights.bfloat16().double(),
        "nothing": case.exact,
    }

    def nearest(found: torch.Tensor) -> str:
        wide = x[: len(found)].double()
        errors = {
            name: float((found.double() - wide @ weights.T).abs().mean())
            for name, weights in definitions.items()
        }
        first, second = sorted(errors, key=errors.__getitem__)[:2]
        assert errors[first] < 0.8 * errors[second]
        return first

    for tokens in (3, 9, 16, 40):
        assert nearest(product(x[:tokens], case.matrix, None)[0]) == "entries"
    assert nearest(product(x, case.matrix, None)[0]) == "weights"
    assert nearest(product(x[:9].float(), case.matrix, None)[0]) == "nothing"


@pytest.mark.parametrize(("rows", "columns", "block_size"), [(37, 53, 16), (150, 5000, 24)])
def test_the_gradient_is_of_rounded_weights(rows: int, columns: int, block_size: int) -> None:
    """By slices of columns: more than one for the wide matrix, with factors as more rows of each."""
    case = random_case(rows, columns, bits=3, block_size=block_size)
    left, right = (random_input(3, n, dtype=torch.bfloat16, seed=n) for n in (rows, columns))
    grad = random_input(9, rows, dtype=torch.bfloat16)
    weights, wide = case.weights.bfloat16().double(), grad.double()
    inner = wide @ left.double().T
    for factors, low in ((None, torch.zeros(9, columns)), ((left, right), inner @ right.double())):
        found = product_transposed(grad, case.matrix, factors)
        exact = wide @ weights + low
        sizes = wide.abs() @ weights.abs()
        if factors is not None:
            sizes += inner.abs() @ right.double().abs() * (1 + 2**-8 / 2e-6)
        assert bool(((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2e-6 * sizes).all())


def test_threads_change_no_bit() -> None:
    case = random_case(200, 520, bits=3, block_size=40)
    for tokens in (1, 5, 13, NARROW_FROM - 1):
        x = random_input(tokens, 520, dtype=torch.bfloat16)
        one, _ = product(x, case.matrix, None)
        torch.set_num_threads(2)
        two, _ = product(x, case.matrix, None)
        torch.set_num_threads(1)
        assert torch.equal(one, two)


def test_zeros_and_values_that_are_not_finite() -> None:
    case = random_case(40, 150, bits=4, zero_blocks=True)
    x = random_input(9, 150, dtype=torch.bfloat16)
    x[0, 3], x[0, 70], x[-1, 149] = torch.inf, -torch.inf, torch.nan
    exact = x.double() @ case.paired.T
    found, _ = product(x, case.matrix, None)
    assert torch.equal(found.isnan(), exact.isnan())
    infinite = exact.isinf()
    assert torch.equal(found[infinite].double(), exact[infinite])
