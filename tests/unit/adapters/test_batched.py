"""Jobs on lanes: grouping, order, buffers, limits; the same on the host, on simulated devices and on a GPU."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.adapters.batched import (
    ALIGNED,
    Job,
    Spec,
    device_bytes,
    fitting_windows,
    run_batched,
    windows_of,
)
from compress.adapters.lanes import HostLanes, Lanes, device_lanes
from compress.errors import CompressError
from tests.unit.adapters.simulated import SimulatedLanes, every_lanes

LANES = every_lanes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """The sum of two stacks times a factor, where the first of them lies or elsewhere."""

    factor: float = 2.0
    in_place: bool = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        assert all(len(one) == len(inputs[0]) for one in inputs)
        total = (inputs[0] + inputs[1]) * self.factor
        return (inputs[0].copy_(total) if self.in_place else total,)

    def workspace(self, inputs: Sequence[Spec]) -> int:
        return 2 * inputs[0].nbytes


def job(value: float, size: int, *, filled: list[float] | None = None, **operation: bool | float) -> Job:
    spec = Spec((size,), torch.float32)

    def fill(targets: Sequence[Tensor]) -> None:
        targets[0].fill_(value)
        targets[1].copy_(torch.arange(size))
        if filled is not None:
            filled.append(value)

    return Job(operation=Scaled(**operation), inputs=(spec, spec), outputs=(spec,), fill=fill)  # type: ignore[arg-type]


def expected(value: float, size: int, factor: float = 2.0) -> Tensor:
    return (torch.arange(size) + value) * factor


@given(
    st.lists(st.tuples(st.integers(1, 300), st.booleans(), st.sampled_from([1.0, 2.0])), max_size=20),
    st.integers(0, 8000),
)
def test_windows_hold_every_job_once_in_order(kinds: list[tuple[int, bool, float]], limit: int) -> None:
    jobs = [job(i, size, in_place=here, factor=factor) for i, (size, here, factor) in enumerate(kinds)]
    windows = windows_of(jobs, limit)
    assert [index for window in windows for index in window.jobs] == list(range(len(jobs)))
    for window in windows:
        assert len(window.jobs) == 1 or max(window.input_bytes, window.output_bytes) <= limit
        members = [index for batch in window.batches for index in batch.jobs]
        assert sorted(members) == list(window.jobs)
        kinds_here = {(jobs[i].operation, jobs[i].inputs) for i in window.jobs}
        assert len(window.batches) == len(kinds_here)  # equal ones are together
        spans = []
        for batch in window.batches:
            size = len(batch.jobs) * jobs[batch.jobs[0]].inputs[0].nbytes
            spans += [(start, start + size) for start in batch.inputs]
            assert batch.inputs_end <= window.input_bytes
            assert all(start % ALIGNED == 0 for start in (*batch.inputs, *batch.outputs))
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for first, second in itertools.pairwise(windows):  # no window could have taken one more
        assert sum(_padded(jobs[i]) for i in first.jobs) + _padded(jobs[second.jobs[0]]) > limit


def _padded(one: Job) -> int:
    return sum(-(-spec.nbytes // ALIGNED) * ALIGNED for spec in one.inputs)


@pytest.mark.parametrize("limit", [0, 3000, 1 << 20])
@pytest.mark.parametrize("make", LANES.values(), ids=LANES)
def test_results_come_in_order_whatever_the_lanes_do(make: Callable[[], Lanes], limit: int) -> None:
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randint(0, 4, (40,), generator=generator).tolist()
    sizes = [(64, 65, 200, 700)[kind] for kind in kinds]
    jobs = [job(i, size, in_place=i % 3 > 0) for i, size in enumerate(sizes)]
    found = [result[0].clone() for result in run_batched(jobs, make(), limit=limit)]
    assert len(found) == len(jobs)
    for index, (result, size) in enumerate(zip(found, sizes, strict=True)):
        assert torch.equal(result, expected(index, size)), index


def test_nothing_to_do_is_done() -> None:
    lanes = SimulatedLanes()
    assert list(run_batched([], lanes)) == []
    assert lanes.events == []


def test_the_next_window_is_queued_and_the_one_after_it_read_before_results_are_taken() -> None:
    filled: list[float] = []
    jobs = [job(i, 64, filled=filled) for i in range(5)]
    lanes = SimulatedLanes()  # nothing happens but what somebody waits for
    with closing(run_batched(jobs, lanes, limit=0)) as results:
        assert torch.equal(next(results)[0], expected(0, 64))
        queued = [lane for what, lane in lanes.events if what == "queued"]
        assert queued == ["in", "compute", "out"] * 2
        done = [lane for what, lane in lanes.events if what == "done"]
        assert done == ["in", "compute", "out"]  # the second window waits for nobody
        for _ in range(500):
            if len(filled) == 3:
                break
            threading.Event().wait(0.01)
        assert filled == [0, 1, 2]  # by another thread, while this one holds the first result
        assert torch.equal(next(results)[0], expected(1, 64))
    assert lanes.events[-1] == ("finished", "")


def test_memory_is_two_windows_whatever_the_number_of_jobs() -> None:
    for count, windows in ((2, 1), (4, 2), (30, 2)):
        lanes = SimulatedLanes()
        list(run_batched([job(i, 256) for i in range(count)], lanes, limit=4096))  # 2 KiB of inputs each
        assert lanes.device_bytes == windows * 4096
        assert lanes.host_bytes == windows * (4096 + 2048)


def test_windows_shrink_until_they_fit_and_one_that_cannot_is_refused() -> None:
    jobs = [job(i, 1024) for i in range(8)]  # 8 KiB of inputs each, 8 KiB of work
    generous = fitting_windows(jobs, limit=1 << 16, free=None)
    assert len(generous) == 1
    for free in (1 << 17, 1 << 16, 3 << 14, 3 << 13):
        windows = fitting_windows(jobs, limit=1 << 16, free=free)
        assert device_bytes(jobs, windows) <= free
        found = [one[0].clone() for one in run_batched(jobs, SimulatedLanes(1, free=free), limit=1 << 16)]
        assert all(torch.equal(one, expected(i, 1024)) for i, one in enumerate(found))
    assert len(windows) == 8
    with pytest.raises(CompressError, match=r"largest adapted matrix needs 0\.00 GB.*can be had") as raised:
        list(run_batched(jobs, SimulatedLanes(free=(3 << 13) - 1)))
    assert "--device cpu" in str(raised.value.remedy)


def test_results_that_lie_elsewhere_count_for_the_windows_under_way() -> None:
    jobs = [job(i, 1024, in_place=False) for i in range(3)]
    windows = windows_of(jobs, 0)
    assert device_bytes(jobs, windows) == 2 * 8192 + 2 * 4096 + 8192


@pytest.mark.parametrize("make", LANES.values(), ids=LANES)
def test_an_error_while_reading_reaches_the_caller_and_leaves_nothing_running(
    make: Callable[[], Lanes],
) -> None:
    def broken(targets: Sequence[Tensor]) -> None:
        raise CompressError("The file is cut short.", "Get it again.")

    good = [job(i, 64) for i in range(6)]
    bad = Job(operation=good[0].operation, inputs=good[0].inputs, outputs=good[0].outputs, fill=broken)
    before = threading.active_count()
    taken = 0
    with pytest.raises(CompressError, match="cut short"):  # noqa: PT012
        for _ in run_batched([*good[:3], bad, *good[3:]], make(), limit=0):
            taken += 1
    assert taken == 2  # the third was under way
    assert threading.active_count() == before


def test_an_error_in_a_product_reaches_the_caller() -> None:
    before = threading.active_count()
    jobs = [job(0, 64), job(1, 64)]
    wrong = Job(operation=_Failing(), inputs=jobs[0].inputs, outputs=jobs[0].outputs, fill=jobs[0].fill)
    with pytest.raises(RuntimeError, match="no such product"):
        list(run_batched([jobs[0], wrong, jobs[1]], HostLanes(), limit=0))
    assert threading.active_count() == before


@dataclass(frozen=True)
class _Failing:
    in_place: bool = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("no such product")

    def workspace(self, inputs: Sequence[Spec]) -> int:
        return 0


@pytest.mark.parametrize("make", LANES.values(), ids=LANES)
def test_whoever_stops_early_leaves_nothing_running(make: Callable[[], Lanes]) -> None:
    before = threading.active_count()
    with closing(run_batched([job(i, 64) for i in range(9)], make(), limit=1000)) as results:
        assert torch.equal(next(results)[0], expected(0, 64))
    assert threading.active_count() == before


def test_the_host_has_no_lanes_of_its_own() -> None:
    assert device_lanes("cpu") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_gpu_holds_no_more_than_was_counted() -> None:
    jobs = [job(i, 1 << 20, in_place=i % 2 > 0) for i in range(12)]
    lanes = device_lanes("cuda:0")
    assert lanes is not None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    list(run_batched(jobs, lanes, limit=1 << 24))
    counted = device_bytes(jobs, windows_of(jobs, 1 << 24))
    assert torch.cuda.max_memory_allocated(0) - before <= counted + (4 << 20)
