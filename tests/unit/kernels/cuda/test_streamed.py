"""Products that stream codes and begin early: when they may, how they are launched, and on a GPU what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from compress.kernels.cuda import batched as batching
from compress.kernels.cuda import early as module
from compress.kernels.cuda import launch as launching
from compress.kernels.cuda import streamed as streaming
from compress.kernels.cuda.early import SHARED, forget, settled, versions
from compress.kernels.cuda.launch import Kernel
from compress.kernels.cuda.streamed import plan, streamed
from compress.kernels.packed import Geometry
from compress.kernels.triton.choice import Fused
from tests.unit.kernels.native import random_case, random_input

from ..triton.cases import DEVICE, assert_near, placed

HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE)[0] >= 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="there is no GPU of compute capability 9.0")

if DEVICE.type == "cuda":
    from compress.kernels.triton.product import product


def settle(tensors: list[torch.Tensor], stream: int, captured: bool) -> None:
    module.settle(tensors, versions(tensors), stream, captured)


def test_weights_are_settled_in_a_stream_until_they_are_written() -> None:
    codes, steps = torch.zeros(8, dtype=torch.int32), torch.zeros(2)
    assert not settled([codes, steps], 7, False)
    settle([codes], 7, False)
    assert not settled([codes, steps], 7, False)
    settle([steps], 7, False)
    assert settled([codes, steps], 7, False)
    assert settled([codes.detach().view(2, 4), steps[:1]], 7, False)  # other tensors of the same memory
    assert not settled([codes, steps], 8, False)
    settle([codes, steps], 8, False)
    codes.view(4, 2)[0] += 1
    assert not settled([codes, steps], 7, False)
    assert not settled([codes, steps], 8, False)
    settle([codes, steps], 7, False)
    assert settled([codes, steps], 7, False)
    assert not settled([codes.clone(), steps], 7, False)


def test_what_was_written_since_the_versions_were_read_is_not_settled() -> None:
    codes = torch.zeros(8)
    before = versions([codes])
    codes += 1
    module.settle([codes], before, 7, False)
    assert not settled([codes], 7, False)


def test_parts_of_one_memory_are_settled_apart() -> None:
    both = torch.zeros(8)
    first, second = both[:4].data, both[4:].data  # with a version each
    second += 1
    settle([first, second], 7, False)
    assert settled([first, second], 7, False)
    first += 1  # has now the version of the second
    assert not settled([first, second], 7, False)


def test_what_no_version_shows_is_told() -> None:
    codes = torch.zeros(8)
    settle([codes], 7, False)
    codes.data.fill_(1)
    assert settled([codes], 7, False)
    forget(codes)
    forget(codes)
    assert not settled([codes], 7, False)


def test_graphs_find_settled_what_was_used_before() -> None:
    codes = torch.zeros(8, dtype=torch.int32)
    assert not settled([codes], 9, True)
    settle([codes], 9, True)
    assert settled([codes], 9, True)
    assert not settled([codes], 10, True)  # branches of a graph
    assert not settled([codes], 9, False)
    settle([codes], 7, False)
    assert settled([codes], 10, True)
    codes += 1  # in the graph
    assert not settled([codes], 9, True)
    assert not settled([codes], 10, True)
    settle([codes], 10, True)
    assert settled([codes], 10, True)
    assert not settled([codes], 9, True)


def test_tensors_without_a_version_are_never_settled() -> None:
    with torch.inference_mode():
        made = torch.zeros(3)
    settle([made], 7, False)
    assert not settled([made], 7, False)


class Properties:
    """Of a device that is not there."""

    def __init__(self, **given: int) -> None:
        self.__dict__.update(given)


HERE = {"major": 9, "shared_memory_per_block_optin": SHARED, "multi_processor_count": 132}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets a device's properties."""

    def become(**given: int) -> None:
        module._able.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties(**(HERE | given)))
        monkeypatch.setattr(streaming, "kernel", lambda *_: None)
        monkeypatch.setattr(streaming, "counters", lambda index: nullcontext(1000))

    yield become
    module._able.cache_clear()


GEOMETRY = Geometry(rows=11008, columns=4096, bits=4, scale_bits=8, block_size=64, group_size=256)


@pytest.mark.parametrize(
    ("rows", "rank", "processors", "at_once", "blocks", "each"),
    [
        (11008, 0, 132, 6, 132, 5),
        (11008, 64, 132, 4, 132, 5),
        (4096, 0, 132, 2, 132, 1),
        (6400, 0, 132, 4, 132, 3),
        (30000, 0, 132, 6, 132, 14),
        (160, 0, 132, 2, 10, 1),
        (4096, 64, 80, 4, 80, 3),
        (4096, 0, 32, 6, 32, 8),
    ],
)
def test_blocks_share_the_tiles_out(
    rows: int, rank: int, processors: int, at_once: int, blocks: int, each: int
) -> None:
    found = plan(replace(GEOMETRY, rows=rows), 9, rank, processors)
    instance = f"streamed<4, 8, 2, {at_once}, 16, 2, true, {str(rank > 0).lower()}>"
    assert (found.instance, found.blocks, found.each) == (instance, blocks, each)
    tiles = -(-rows // 16)
    assert blocks * each <= tiles < blocks * (each + 1)


def test_what_it_cannot_serve_it_leaves(device: Callable[..., None]) -> None:
    matrix = random_case(32, 128, block_size=64).matrix
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    device(major=8)
    assert streamed(0, x, matrix, None) is None
    device(shared_memory_per_block_optin=163 << 10)
    assert streamed(0, x, matrix, None) is None
    device()
    moved = torch.empty(matrix.codes.numel() + 1, dtype=torch.int32)[1:].view(matrix.codes.shape)
    assert streamed(0, x, replace(matrix, codes=moved.copy_(matrix.codes)), None) is None


def test_launches_begin_early_only_where_weights_are_settled(
    device: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    threads: list[int] = []

    def launched(*given: Any, **more: Any) -> None:
        threads.append(given[3])
        made.append(more)

    stream = Properties(cuda_stream=7, capturing=False)
    device()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.capturing)
    monkeypatch.setattr(module, "starts_early", lambda: True)
    monkeypatch.setattr(module, "launch", launched)
    matrix = random_case(32, 128, block_size=64).matrix
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    left, right = torch.zeros(8, 32, dtype=torch.bfloat16), torch.zeros(8, 128, dtype=torch.bfloat16)

    def early(factors: tuple[torch.Tensor, torch.Tensor] | None = None) -> bool:
        assert streamed(0, x, matrix, factors) is not None
        assert threads[-1] == (512 if factors is None else 640)
        return bool(made[-1]["early"])

    assert [early(), early(), early()] == [False, True, True]
    assert [early((left, right)), early((left, right)), early()] == [False, True, True]
    right.add_(1)
    assert [early((left, right)), early(), early((left, right))] == [False, True, True]
    stream.cuda_stream = 8
    assert [early(), early()] == [False, True]
    matrix.scale_codes.zero_()
    assert [early(), early()] == [False, True]
    matrix = replace(matrix, codes=matrix.codes.clone())
    assert [early(), early()] == [False, True]
    stream.capturing, stream.cuda_stream = True, 9
    assert early()
    matrix.steps.mul_(2)
    assert [early(), early()] == [False, True]
    monkeypatch.setattr(module, "starts_early", lambda: False)
    assert not early()


def test_the_driver_is_told_of_early_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, list[tuple[int, list[int]]], tuple[int, ...]]] = []

    def bound(device: int, name: str, *arguments: Any) -> None:
        if name != "cuLaunchKernelEx":
            told.append((name, [], ()))
            return
        config = arguments[0]._obj
        found = [config.attributes[i] for i in range(config.count)]
        sizes = (config.grid_x, config.x, config.shared, config.stream)
        told.append((name, [(one.name, list(one.value)[:3]) for one in found], sizes))

    monkeypatch.setattr(launching, "_bound", bound)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Properties(cuda_stream=7))
    kernel = Kernel(launching.ctypes.c_void_p(1), 1000, launching.ctypes.c_void_p(1))
    for given in ({}, {"together": True}, {"early": True}):
        launching.launch(0, kernel, (16, 1, 1), 512, (), **given)  # type: ignore[arg-type]
    sizes = (16, 512, 1000, 7)
    assert told == [
        ("cuLaunchKernel", [], ()),
        ("cuLaunchCooperativeKernel", [], ()),
        ("cuLaunchKernelEx", [(6, [1, 0, 0])], sizes),
    ]
    assert launching.ctypes.sizeof(launching._Attribute) == 72


Factors = tuple[torch.Tensor, torch.Tensor]


def factors_of(rank: int, rows: int, columns: int, seed: int = 0) -> Factors | None:
    if not rank:
        return None
    sizes = (rows, columns)
    left, right = (random_input(rank, size, dtype=torch.bfloat16, seed=seed + size) for size in sizes)
    return left.to(DEVICE), right.to(DEVICE)


@pytest.fixture
def with_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes factors with any number of tokens, whatever is faster."""
    monkeypatch.setattr(streaming, "FACTORS_UP_TO", 16)


@needs_hopper
@pytest.mark.usefixtures("with_factors")
@pytest.mark.parametrize("rank", [0, 24, 64])
@pytest.mark.parametrize(("each", "bits"), [(3, 2), (5, 4), (5, 8), (8, 3), (13, 4)])
def test_several_tiles_of_a_block(each: int, rank: int, bits: int) -> None:
    rows = 16 * (each * torch.cuda.get_device_properties(DEVICE).multi_processor_count - 5) - 6
    case = random_case(
        rows, 264, bits=bits, block_size=64, group_size=64, table_type=torch.bfloat16, seed=each
    )
    matrix, factors = placed(case.matrix), factors_of(rank, rows, 264)
    weights = case.exact.to(DEVICE)
    for tokens in (1, 7, 16):
        x = random_input(tokens, 264, dtype=torch.bfloat16, seed=tokens).to(DEVICE)
        found = [product(x, matrix, factors, choice=Fused()) for _ in range(3)]
        exact, sizes = x.double() @ weights.T, x.double().abs() @ weights.abs().T
        if factors is not None:
            left, right = (factor.double() for factor in factors)
            exact += x.double() @ right.T @ left
            sizes += 8 * (x.double().abs() @ right.abs().T) @ left.abs()
        assert_near(found[0][0], exact.cpu(), sizes.cpu())
        for y, inner in found[1:]:
            assert torch.equal(y, found[0][0])
            assert torch.equal(inner, found[0][1])


@needs_hopper
@pytest.mark.usefixtures("with_factors")
@pytest.mark.parametrize(
    ("each", "columns", "bits", "rank"),
    [(2, 8512, 4, 0), (2, 8448, 2, 40), (3, 4224, 3, 0), (6, 4224, 4, 40), (6, 2560, 4, 40), (6, 2560, 2, 0)],
)
def test_many_inputs(each: int, columns: int, rank: int, bits: int) -> None:
    rows = 16 * (each * torch.cuda.get_device_properties(DEVICE).multi_processor_count - 37)
    case = random_case(
        rows, columns, bits=bits, block_size=64, group_size=64, table_type=torch.bfloat16, seed=each
    )
    matrix, factors = placed(case.matrix), factors_of(rank, rows, columns)
    weights = case.exact.to(DEVICE)
    for tokens in (8, 16):
        x = random_input(tokens, columns, dtype=torch.bfloat16, seed=tokens).to(DEVICE)
        found = [product(x, matrix, factors, choice=Fused()) for _ in range(3)]
        exact, sizes = x.double() @ weights.T, x.double().abs() @ weights.abs().T
        if factors is not None:
            left, right = (factor.double() for factor in factors)
            exact += x.double() @ right.T @ left
            sizes += 8 * (x.double().abs() @ right.abs().T) @ left.abs()
        assert_near(found[0][0], exact.cpu(), sizes.cpu())
        assert all(torch.equal(y, found[0][0]) for y, _ in found)


def chain(length: int, rank: int) -> list[tuple[Any, Factors | None]]:
    """Square matrices, every one to be applied to what the one before it gives."""
    made = []
    for seed in range(length):
        case = random_case(
            1024, 1024, block_size=64, group_size=64, table_type=torch.bfloat16, seed=100 + seed
        )
        scaled = replace(case.matrix, table=case.matrix.table / 16)
        made.append((placed(scaled), factors_of(rank, 1024, 1024, seed=seed)))
    return made


def run(links: list[tuple[Any, Factors | None]], x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for matrix, factors in links:
        x = product(x, matrix, factors, choice=Fused())[0]
        x = x / x.float().norm() if len(found) % 3 == 2 else x  # torch's kernels in between
        found.append(x.to(torch.bfloat16))
        x = found[-1]
    return found


@needs_hopper
@pytest.mark.usefixtures("with_factors")
@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("tokens", [1, 16])
def test_chains_that_begin_early_give_what_waiting_gives(
    tokens: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    links, x = chain(6, rank), random_input(tokens, 1024, dtype=torch.bfloat16).to(DEVICE)
    monkeypatch.setattr(module, "EARLY", False)
    expected = run(links, x)
    monkeypatch.setattr(module, "EARLY", True)
    for _ in range(20):
        assert all(torch.equal(*pair) for pair in zip(run(links, x), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [run(links, x) for _ in range(3)]
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    for found in held:
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@needs_hopper
@pytest.mark.usefixtures("with_factors")
@pytest.mark.parametrize("rank", [0, 64])
def test_streams_beside_each_other(rank: int) -> None:
    links, x = chain(6, rank), random_input(5, 1024, dtype=torch.bfloat16).to(DEVICE)
    expected = run(links, x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run(links, x))
    torch.cuda.synchronize()
    for one in found:
        assert all(torch.equal(*pair) for pair in zip(one, expected, strict=True))


@needs_hopper
def test_weights_written_just_before() -> None:
    a, b = (random_case(4096, 1024, block_size=64, group_size=64, seed=seed) for seed in (1, 2))
    first, second = placed(a.matrix), placed(b.matrix)
    x = random_input(2, 1024, dtype=torch.bfloat16).to(DEVICE)
    table = first.table
    second = replace(second, table=table)
    expected = [
        product(x, replace(one, codes=one.codes.clone()), None, choice=Fused())[0] for one in (first, second)
    ]
    torch.cuda.synchronize()
    held = replace(
        first, **{name: getattr(first, name).clone() for name in ("codes", "scale_codes", "steps", "offset")}
    )
    found = []
    for turn in range(40):
        source = (first, second)[turn % 2]
        torch.cuda._sleep(20_000)
        for name in ("scale_codes", "steps", "offset", "codes"):
            getattr(held, name).copy_(getattr(source, name))
        found += [product(x, held, None, choice=Fused())[0] for _ in range(2)]
        torch.cuda._sleep(20_000)
        fresh = replace(source, codes=source.codes.clone())  # often where one was a moment ago
        found += [product(x, fresh, None, choice=Fused())[0] for _ in range(2)]
    torch.cuda.synchronize()
    for index, y in enumerate(found):
        assert torch.equal(y, expected[index // 4 % 2]), index


@needs_hopper
@pytest.mark.usefixtures("with_factors")
def test_it_gives_what_the_kernel_for_older_devices_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits, rank, tokens in ((4, 0, 1), (2, 8, 3), (3, 64, 16), (8, 40, 9)):
        case = random_case(528, 1152, bits=bits, block_size=64, group_size=64, table_type=torch.bfloat16)
        matrix, factors = placed(case.matrix), factors_of(rank, 528, 1152)
        x = random_input(tokens, 1152, dtype=torch.bfloat16).to(DEVICE)
        y, inner = product(x, matrix, factors, choice=Fused())
        monkeypatch.setattr(module, "STREAMS", False)
        other, other_inner = product(x, matrix, factors, choice=Fused())
        monkeypatch.undo()
        sizes = x.double().abs() @ case.exact.abs().T.to(DEVICE)
        if factors is not None:
            left, right = (factor.double().abs() for factor in factors)
            sizes += 8 * (x.double().abs() @ right.T) @ left
        assert_near(y, other.double().cpu(), sizes.cpu(), rounded=other.double().cpu())
        assert torch.allclose(inner, other_inner, rtol=1e-4, atol=1e-3)


def test_tens_of_tokens_share_the_columns_out() -> None:
    g = replace(GEOMETRY, rows=11008, columns=4096)
    assert batching.plan(g, 64, 132) == batching.Plan("batched<4, 8, 8, 2, true>", (22, 6, 1))
    assert batching.plan(g, 32, 132) == batching.Plan("batched<4, 8, 4, 2, true>", (22, 6, 1))
    assert batching.plan(g, 200, 132) == batching.Plan("batched<4, 8, 8, 2, true>", (22, 1, 4))
    assert batching.plan(replace(g, rows=38, columns=96), 17, 132).grid == (1, 1, 1)


@needs_hopper
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (1040, 2144), (528, 8512)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tens_of_tokens(rows: int, columns: int, bits: int) -> None:
    case = random_case(rows, columns, bits=bits, block_size=64, group_size=64, table_type=torch.bfloat16)
    matrix, weights = placed(case.matrix), case.exact.to(DEVICE)
    assert batching.serves(torch.cuda.current_device(), matrix)
    for tokens in (17, 33, 64, 100):
        x = random_input(tokens, columns, dtype=torch.bfloat16, seed=tokens).to(DEVICE)
        found = [product(x, matrix, None, choice=Fused())[0] for _ in range(4)]
        sizes = (x.double().abs() @ weights.abs().T).cpu()
        assert_near(found[0], (x.double() @ weights.T).cpu(), sizes, rounded=sizes)
        assert all(torch.equal(y, found[0]) for y in found[1:])
