"""Products and weights by the CUDA C++ kernels against float64; which matrices they serve."""

from __future__ import annotations

from dataclasses import replace
from threading import Event, Thread
from time import sleep

import pytest
import torch

from compress.errors import UsageError
from compress.kernels.cuda import batched, early
from compress.kernels.cuda import counters as counting
from compress.kernels.cuda import product as cuda
from compress.kernels.packed import Geometry, TiledMatrix
from compress.kernels.triton.choice import Fused, Slices, Tiles, choose, forget_tables
from compress.kernels.triton.launch import runs_on
from tests.unit.kernels.native import random_case, random_input

from ..triton.cases import DEVICE, assert_near, placed

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")

if DEVICE.type == "cuda":
    from compress.kernels.triton.product import product

SIZES = [(512, 1024, 64), (1000, 4096, 64), (38, 96, 32), (514, 1160, 128), (48, 88, 64)]
"""Rows, columns and block size: cut evenly, and with rests of rows, chunks and blocks."""


def rounds_weights(matrix: TiledMatrix, tokens: int) -> bool:
    """Whether a fused product rounds weights, as the one for tens of tokens on newer devices does."""
    index = torch.cuda.current_device()
    return tokens > cuda.FEW and batched.serves(index, matrix)


@needs_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rank", [0, 8, 64, 264])
@pytest.mark.parametrize(("rows", "columns", "block_size"), SIZES)
def test_a_product_is_that_of_the_weights(
    bits: int, rank: int, rows: int, columns: int, block_size: int
) -> None:
    case = random_case(
        rows, columns, bits=bits, block_size=block_size, group_size=64, table_type=torch.bfloat16, seed=bits
    )
    matrix = placed(case.matrix)
    assert cuda.serves(DEVICE, matrix.geometry, torch.bfloat16)
    left, right = (random_input(rank, size, dtype=torch.bfloat16, seed=size) for size in (rows, columns))
    factors = (left.to(DEVICE), right.to(DEVICE)) if rank else None
    for tokens in (0, 1, 3, 8, 9, 16, 17, 32, 40, 64, 70):
        x = random_input(tokens, columns, dtype=torch.bfloat16, seed=tokens)
        wide = x.double()
        inner = wide @ right.double().T
        exact = wide @ case.exact.T + inner @ left.double()
        sizes = wide.abs() @ case.exact.abs().T
        sizes += 8 * (wide.abs() @ right.double().abs().T) @ left.double().abs()  # 16 bits of the inner sums
        y, sums = product(x.to(DEVICE), matrix, factors, choice=Fused())
        # which rounds the inner sums, and y once more
        by_torch = rank > 0 and (tokens > cuda.FEW or rank > cuda.MOST_RANK)
        rounded = torch.zeros_like(exact)
        if by_torch:
            rounded += inner.abs() @ left.double().abs() + (wide @ case.exact.T).abs()
        if rounds_weights(matrix, tokens):
            rounded += wide.abs() @ case.exact.abs().T
        assert_near(y, exact, sizes, rounded=rounded)
        bound = 2e-6 * (wide.abs() @ right.double().abs().T)
        assert bool(((sums.cpu().double() - inner).abs() <= bound).all())


@needs_gpu
@pytest.mark.parametrize("scale_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 1 << 20])
def test_scales_of_every_width(scale_bits: int, group_size: int) -> None:
    case = random_case(
        96, 512, scale_bits=scale_bits, block_size=64, group_size=group_size, table_type=torch.bfloat16
    )
    for tokens in (2, 20):
        x = random_input(tokens, 512, dtype=torch.bfloat16)
        matrix, sizes = placed(case.matrix), x.double().abs() @ case.exact.abs().T
        y = product(x.to(DEVICE), matrix, None, choice=Fused())[0]
        rounded = sizes if rounds_weights(matrix, tokens) else None
        assert_near(y, x.double() @ case.exact.T, sizes, rounded=rounded)


@needs_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block_size", [8, 24, 64])
def test_weights_are_those_of_torch_bit_for_bit(bits: int, block_size: int) -> None:
    case = random_case(53, 200, bits=bits, block_size=block_size, group_size=8)
    matrix, expected = placed(case.matrix), case.weights.bfloat16()
    assert cuda.dequantizes(DEVICE, matrix.geometry, torch.bfloat16)
    for start, stop in ((0, 53), (16, 53), (5, 41)):
        out = torch.full((stop - start, 200), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        cuda.dequantize_rows(out, matrix, start)
        assert torch.equal(out.cpu(), expected[start:stop])


@needs_gpu
@pytest.mark.parametrize("streams", [True, False])
def test_results_are_the_same_from_call_to_call_and_from_a_graph(
    streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "STREAMS", streams)
    case = random_case(512, 2048, block_size=64, group_size=64)
    matrix = placed(case.matrix)
    factors = tuple(random_input(24, size, dtype=torch.bfloat16).to(DEVICE) for size in (512, 2048))
    for tokens in (1, 12, 48):
        x = random_input(tokens, 2048, dtype=torch.bfloat16).to(DEVICE)
        first = product(x, matrix, factors, choice=Fused())  # type: ignore[arg-type]
        for _ in range(20):
            again = product(x, matrix, factors, choice=Fused())  # type: ignore[arg-type]
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = [product(x, matrix, factors, choice=Fused()) for _ in range(3)]  # type: ignore[arg-type]
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        for one in held:
            assert all(torch.equal(a, b) for a, b in zip(one, first, strict=True))


@needs_gpu
def test_inputs_may_lie_anywhere() -> None:
    case = random_case(64, 256, block_size=64, group_size=64, table_type=torch.bfloat16)
    x = random_input(3, 256, dtype=torch.bfloat16)
    factors = [random_input(8, size, dtype=torch.bfloat16) for size in (64, 256)]

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        held = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)[1:].view(tensor.shape)
        return held.copy_(tensor)

    plain = product(x.to(DEVICE), placed(case.matrix), tuple(f.to(DEVICE) for f in factors), choice=Fused())  # type: ignore[arg-type]
    found = product(moved(x), placed(case.matrix), tuple(map(moved, factors)), choice=Fused())  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


class Streams:
    """Stands in for torch.cuda: a current stream, which may be captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.cuda_stream, self.pools = False, 7, 0
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda index: self)
        monkeypatch.setattr(counting, "zeros", self.zeros)
        monkeypatch.setattr(counting, "_SLOTS", 4)
        monkeypatch.setattr(counting, "_left", {})
        monkeypatch.setattr(counting, "_of_streams", {})

    def zeros(self, index: int, nbytes: int) -> int:
        self.pools += 1
        assert nbytes == 16 * 4
        return 1000 * self.pools + 100 * index


def test_launches_that_may_meet_never_share_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)

    def given(index: int = 0) -> int | None:
        with counting.counters(index) as found:
            return found

    first = [given() for _ in range(2)]
    assert [given() for _ in range(4)] == first * 2  # those of the one before may still be in use
    assert given(1) not in first
    streams.cuda_stream = 8
    second = [given() for _ in range(2)]
    streams.capturing = True
    assert given() is None  # all four are given away, and a capture may not make more
    streams.capturing, streams.cuda_stream = False, 9
    third = [given() for _ in range(2)]
    streams.capturing = True
    captured = [given() for _ in range(3)]
    assert captured[2] is None
    assert len({*first, *second, *third, *captured[:2]}) == 8
    assert streams.pools == 3


def test_after_a_launch_that_failed_counters_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    Streams(monkeypatch)
    with counting.counters(0) as first:
        assert first
    with pytest.raises(KeyboardInterrupt), counting.counters(0) as second:
        raise KeyboardInterrupt
    with counting.counters(0) as third:
        assert len({first, second, third}) == 3


def test_turns_are_taken_in_the_order_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    Streams(monkeypatch)
    order: list[tuple[str, int | None]] = []
    begun, waiting = Event(), Event()

    def later() -> None:
        begun.wait(10)
        waiting.set()
        with counting.counters(0) as found:
            order.append(("second", found))

    thread = Thread(target=later)
    thread.start()
    with counting.counters(0) as first:
        begun.set()
        waiting.wait(10)
        sleep(0.05)
        order.append(("first", first))
    thread.join()
    assert [name for name, _ in order] == ["first", "second"]
    assert order[0][1] != order[1][1]


def test_what_they_do_not_serve_they_refuse() -> None:
    from compress.kernels.triton.product import product as any_product

    case = random_case(16, 64, block_size=64)
    if DEVICE.type == "cpu" and not runs_on(DEVICE):
        pytest.skip("no kernel runs here")
    with pytest.raises(UsageError, match="do not serve"):
        any_product(torch.zeros(1, 64, device=DEVICE), placed(case.matrix), None, choice=Fused())


GEOMETRY = Geometry(rows=64, columns=128, bits=4, scale_bits=8, block_size=64, group_size=16)
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("change", "dtype", "expected"),
    [
        ({}, torch.bfloat16, True),
        ({"rows": 63}, torch.bfloat16, False),
        ({"columns": 124}, torch.bfloat16, False),
        ({"block_size": 16}, torch.bfloat16, False),
        ({"block_size": 96}, torch.bfloat16, False),
        ({"block_size": 128}, torch.bfloat16, True),
        ({"group_size": 12}, torch.bfloat16, False),
        ({"group_size": 1000}, torch.bfloat16, True),
        ({}, torch.float16, False),
        ({}, torch.float32, False),
    ],
)
def test_which_products_they_serve(
    change: dict[str, int], dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "standing", lambda index: (True, ""))
    assert cuda.serves(CUDA, replace(GEOMETRY, **change), dtype) is expected
    assert not cuda.serves(torch.device("cpu"), GEOMETRY, torch.bfloat16)
    monkeypatch.setattr(cuda, "standing", lambda index: (False, "too old"))
    assert not cuda.serves(CUDA, GEOMETRY, torch.bfloat16)


@pytest.mark.parametrize("serves", [True, False])
def test_rules_of_theirs_are_passed_over_where_they_do_not_serve(
    serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.kernels.triton import choice

    monkeypatch.setattr(choice, "serves", lambda *_: serves)
    forget_tables()
    try:
        device = torch.device("cpu")
        found = [type(choose(device, GEOMETRY, tokens, torch.bfloat16)) for tokens in (1, 64, 128, 129)]
        assert found == ([Fused, Fused, Fused, Slices] if serves else [Tiles, Tiles, Slices, Slices])
        assert isinstance(choose(device, GEOMETRY, 1, torch.bfloat16, fused=False), Tiles)
        assert isinstance(choose(device, GEOMETRY, 1, torch.bfloat16, transposed=True), Tiles)
    finally:
        forget_tables()


@pytest.mark.parametrize(
    ("properties", "wanted", "why"),
    [
        ({"major": 7, "shared_memory_per_block_optin": 1 << 18}, "", "shared memory"),
        ({"major": 8, "shared_memory_per_block_optin": 99 << 10}, "", "99 KB of shared memory"),
        ({"major": 9, "shared_memory_per_block_optin": 227 << 10}, "torch", "asks for torch"),
        ({"major": 9, "shared_memory_per_block_optin": 227 << 10}, "triton", "asks for triton"),
    ],
)
def test_why_a_device_is_not_served(
    properties: dict[str, int], wanted: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        minor = 0

        def __init__(self) -> None:
            self.__dict__.update(properties)

    monkeypatch.setenv("COMPRESS_KERNELS", wanted)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    served, reason = cuda.standing.__wrapped__(0)
    assert not served
    assert why in reason
