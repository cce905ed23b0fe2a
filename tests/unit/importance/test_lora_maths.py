from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.importance.base import GroupScores, LayerScores
from compress.importance.lora import Element, gradient_factors, lora_group_sums, moving_average
from compress.importance.modules import WeightRows
from compress.importance.reduce import query_segment, row_chunks, segments
from tests.unit.importance.common import Allocations
from tests.unit.prune.common import FUSED, SPECS, architecture

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10_000))


def problem(out: int, inner: int, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A linear with LoRA in a non-linear loss: factors, their gradients, and the true gradient of W."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scaling = 0.1 + 3 * torch.rand((), generator=generator, dtype=torch.float64)
    base, a, b = normal(out, inner), normal(rank, inner).requires_grad_(), normal(out, rank).requires_grad_()
    merged = base + scaling * b @ a
    merged.retain_grad()
    loss = torch.tanh(normal(5, inner) @ merged.T).sub(normal(5, out)).square().sum()
    loss.backward()
    grads = (merged.grad, a.grad, b.grad)
    assert all(grad is not None for grad in grads)
    return {
        "base": base,
        "a": a.detach(),
        "b": b.detach(),
        "s": scaling,
        "merged": merged.detach(),
        **dict(zip(("true", "grad_a", "grad_b"), [g for g in grads if g is not None], strict=True)),
    }


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_estimate_against_autograd_and_an_explicit_step(size: tuple[int, int, int, int]) -> None:
    p = problem(*size)
    a, b, true, s = p["a"], p["b"], p["true"], p["s"]
    left, right = gradient_factors(a, b, p["grad_a"], p["grad_b"], first_order=True)
    linear = left @ right
    torch.testing.assert_close(linear, s * (true @ a.T @ a + b @ b.T @ true), rtol=1e-9, atol=1e-9)
    stepped = (b - p["grad_b"]) @ (a - p["grad_a"])
    left, right = gradient_factors(a, b, p["grad_a"], p["grad_b"])
    full = left @ right
    torch.testing.assert_close(full, b @ a - stepped, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        full, s * (true @ a.T @ a + b @ b.T @ true) - s**2 * true @ a.T @ b.T @ true, rtol=1e-9, atol=1e-9
    )


@given(
    sizes,
    st.integers(1, 100),
    st.sampled_from(["rows", "columns"]),
    st.sampled_from(["square", "abs"]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_chunked_sums_equal_the_dense_formula(
    size: tuple[int, int, int, int],
    chunk: int,
    over: Literal["rows", "columns"],
    element: Element,
    first_order: bool,
) -> None:
    p = problem(*size)
    estimate = p["grad_b"] @ p["a"] + p["b"] @ p["grad_a"]
    if not first_order:
        estimate = estimate - p["grad_b"] @ p["grad_a"]
    product = estimate * p["merged"]
    dense = product**2 if element == "square" else product.abs()
    sums = lora_group_sums(
        WeightRows.of(p["base"]),
        p["a"],
        p["b"],
        p["grad_a"],
        p["grad_b"],
        scaling=float(p["s"]),
        over=over,
        element=element,
        first_order=first_order,
        chunk_elements=chunk,
    )
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, dense.sum(dim=1 if over == "rows" else 0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_weights_are_computed_in_float32(dtype: torch.dtype) -> None:
    p = problem(6, 8, 2, 3)
    factors = [p[name].to(torch.bfloat16) for name in ("a", "b", "grad_a", "grad_b")]
    weight = p["base"].to(dtype)
    sums = lora_group_sums(WeightRows.of(weight), *factors, scaling=0.5, over="rows", chunk_elements=16)
    wide = [factor.double() for factor in factors]
    expected = lora_group_sums(WeightRows.of(weight.double()), *wide, scaling=0.5, over="rows")
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("over", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "inner", "chunk"), [(512, 688, None), (512, 688, 1024), (688, 512, 1024)])
def test_no_temporary_is_larger_than_a_chunk(
    over: Literal["rows", "columns"], dtype: torch.dtype, out: int, inner: int, chunk: int | None
) -> None:
    rank = 1
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(out, inner, generator=generator).to(dtype)
    a, grad_a = torch.randn(2, rank, inner, generator=generator)
    b, grad_b = torch.randn(2, out, rank, generator=generator)
    with Allocations() as seen:
        lora_group_sums(
            WeightRows.of(base), a, b, grad_a, grad_b, scaling=1.0, over=over, chunk_elements=chunk
        )
    small = 3 * rank * max(out, inner)  # the factors of the estimate and of the merged weight
    assert seen.largest <= max(1 << 17 if chunk is None else chunk, small)
    assert seen.largest > small / 4  # something was seen
    if chunk is not None:
        assert seen.largest < 0.01 * out * inner


def test_the_default_chunk_is_under_one_percent_of_a_large_matrix() -> None:
    weight = WeightRows.of(torch.empty(1).expand(4096, 11008))
    assert max((c.stop - c.start) * 11008 for c in row_chunks(weight)) < 0.01 * 4096 * 11008


@given(st.integers(1, 5000), st.integers(1, 5000), st.none() | st.integers(1, 300_000))
@settings(deadline=None)
def test_row_chunks_cover_all_rows_within_the_limit(rows: int, columns: int, limit: int | None) -> None:
    chunks = list(row_chunks(WeightRows.of(torch.empty(1).expand(rows, columns)), limit))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == rows
    largest = max(1 << 18 if limit is None else limit, columns)
    assert all(0 < (chunk.stop - chunk.start) * columns <= largest for chunk in chunks)


def test_segments_of_fused_linears_are_those_of_their_parts() -> None:
    arch = architecture()
    generator = torch.Generator().manual_seed(1)
    by_role = {str(spec.role): spec for spec in (*SPECS, *FUSED)}
    rows = {role: torch.rand(arch.linear_shape(by_role[role])[0], generator=generator) for role in "qkv"}
    separate = [segments(arch, by_role[role], rows[role])[0] for role in "qkv"]
    fused = segments(arch, by_role["qkv"], torch.cat([rows[role] for role in "qkv"]))
    assert all(torch.equal(one, other) for one, other in zip(separate, fused, strict=True))
    assert separate[0].tolist() == pytest.approx(rows["q"].view(4, 8).sum(1).tolist())
    heads = [
        query_segment(arch, by_role["q"], rows["q"]),
        query_segment(arch, by_role["qkv"], torch.cat([rows[role] for role in "qkv"])),
        query_segment(arch, by_role["o"], rows["q"]),
    ]
    for found in heads:
        assert found is not None
        assert found.tolist() == pytest.approx([float(rows["q"][4 * h : 4 * h + 4].sum()) for h in range(8)])
    assert query_segment(arch, by_role["k"], rows["k"]) is None
    gate, up = torch.rand(24, generator=generator), torch.rand(24, generator=generator)
    assert [part.tolist() for part in segments(arch, by_role["gate_up"], torch.cat([gate, up]))] == [
        gate.tolist(),
        up.tolist(),
    ]


def test_moving_average_starts_at_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [
        GroupScores(
            layers=(
                LayerScores(
                    kv_groups=torch.rand(3, generator=generator, dtype=torch.float64),
                    channels=torch.rand(5, generator=generator, dtype=torch.float64),
                    query_heads=torch.rand(6, generator=generator, dtype=torch.float64),
                ),
            )
        )
        for _ in range(4)
    ]
    average = None
    for step in steps:
        average = moving_average(average, step, 0.9)
    assert average is not None
    for part in ("kv_groups", "channels", "query_heads"):
        expected = sum(0.1 * 0.9 ** (3 - i) * getattr(step.layers[0], part) for i, step in enumerate(steps))
        torch.testing.assert_close(getattr(average.layers[0], part), expected)
