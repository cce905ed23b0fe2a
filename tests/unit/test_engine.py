"""Every engine computes every job once, hands results to the thread that asked, and loses nothing under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.engine import Here, LocalEngine, largest_first, single_thread
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.allocate import Choice
from compress.pipelines.error_tables import TableJob, table_of
from compress.pipelines.knowledge import MatrixKnowledge, layer_knowledge
from compress.pipelines.lq_writer import Decomposed, MatrixJob, decomposed
from compress.pipelines.matrices import matrices_of
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings, resolve
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.hessian import input_statistics
from compress.stopping import Stopped
from tests.tiny import tiny_checkpoint

SQUARED = [job * job for job in range(20)]


def square(job: int) -> int:
    if job < 0:
        raise ArithmeticError(f"{job} is negative")
    return job * job


def threads_seen(job: int) -> tuple[int, int]:
    torch.ones(2, 2).sum()
    return torch.get_num_threads(), threading.get_ident()


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def kept_by(found: dict[int, int]) -> Callable[[int, int], None]:
    here = threading.get_ident()

    def keep(job: int, result: int) -> None:
        assert threading.get_ident() == here
        assert job not in found
        found[job] = result

    return keep


def test_every_job_is_computed_once(threads: int) -> None:
    found: dict[int, int] = {}
    LocalEngine().run(square, range(20), kept_by(found))
    assert [found[job] for job in range(20)] == SQUARED
    assert torch.get_num_threads() == threads
    LocalEngine().run(square, [], kept_by({}))


def test_a_job_has_one_thread_and_jobs_have_several(threads: int) -> None:
    seen: list[tuple[int, int]] = []
    LocalEngine().run(threads_seen, range(40), lambda job, result: seen.append(result))
    assert {count for count, _ in seen} == {1}
    assert 1 <= len({thread for _, thread in seen}) <= threads
    seen.clear()
    LocalEngine().at_most(1).run(threads_seen, range(4), lambda job, result: seen.append(result))
    assert {thread for _, thread in seen} == {threading.get_ident()}


def test_no_more_jobs_are_made_than_can_begin(threads: int) -> None:
    made, found = 0, dict[int, int]()

    def jobs() -> Iterator[int]:
        nonlocal made
        for job in range(30):
            made += 1
            assert made - len(found) <= threads + 1  # one is kept while the next is made
            yield job

    LocalEngine().run(square, jobs(), kept_by(found))
    assert len(found) == 30


def test_at_most_never_allows_more() -> None:
    assert LocalEngine().at_most(4) == LocalEngine(4)
    assert LocalEngine(2).at_most(4) == LocalEngine(2)
    assert LocalEngine(4).at_most(2) == LocalEngine(2)


@given(st.integers(1, 6), st.lists(st.booleans(), min_size=1, max_size=12))
def test_what_is_under_way_when_a_job_fails_is_kept(workers: int, good: list[bool]) -> None:
    jobs = [number if fine else -number - 1 for number, fine in enumerate(good)]
    found: dict[int, int] = {}
    made: list[int] = []

    def asked() -> Iterator[int]:
        for job in jobs:
            made.append(job)
            yield job

    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        if all(good):
            LocalEngine().run(square, asked(), kept_by(found))
            assert len(found) == len(jobs)
        else:
            with pytest.raises(ArithmeticError):
                LocalEngine().run(square, asked(), kept_by(found))
            first = next(at for at, job in enumerate(jobs) if job < 0)
            assert {job for job in jobs[:first] if job >= 0} <= set(found)
            assert set(found) == {job for job in made if job >= 0 or job in found}
        assert torch.get_num_threads() == workers
    finally:
        torch.set_num_threads(before)


def test_a_stop_lets_what_is_under_way_finish(threads: int) -> None:
    found: dict[int, int] = {}

    def jobs() -> Iterator[int]:
        yield from range(7)
        raise Stopped(2)

    with pytest.raises(Stopped):
        LocalEngine().run(square, jobs(), kept_by(found))
    assert [found[job] for job in range(7)] == SQUARED[:7]


def test_large_jobs_come_first_and_equal_ones_as_they_were() -> None:
    assert largest_first(["bb", "a", "ccc", "dd", "e"], len) == ["ccc", "bb", "dd", "a", "e"]


def test_matrices_with_the_same_inputs_share_what_is_known_of_them() -> None:
    one, other = (input_statistics(torch.eye(4, dtype=torch.float64) * size) for size in (1, 2))
    minds = {"q": torch.ones(4), "elsewhere": torch.ones(3)}
    known = layer_knowledge(
        LocalEngine(), ["q", "k", "o"], statistics={"q": one, "k": one, "o": other}, minds=minds, fisher={}
    )
    assert known["q"].inputs is known["k"].inputs
    assert known["q"].statistics is one
    assert known["o"].statistics is other
    assert known["q"].minds is minds["q"]
    assert known["k"].minds is None
    assert MatrixKnowledge().statistics is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelInput:
    checkpoint = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny"))
    arch = checkpoint_architecture(checkpoint)
    return ModelInput(name="tiny", path=checkpoint.path, id="0", checkpoint=checkpoint, architecture=arch)


def test_bytes_do_not_depend_on_the_number_of_threads(model: ModelInput) -> None:
    """Matrices so large that torch divides their factorizations; those rounded otherwise with two threads."""
    settings = resolve(QuantizeSettings, {"budget": "3bit"}, "quick")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, 512, generator=generator).double()
    config = QuantConfig(bits=3, scale_bits=4, scale_dtype="float16", block_size=32, group_size=64)
    matrix = matrices_of(model)[0]
    weights = [torch.randn(256, 512, generator=generator) for _ in range(3)]

    def with_threads(count: int) -> tuple[list[Tensor], list[list[float]]]:
        tensors: list[tuple[int, Tensor]] = []
        tables: list[tuple[int, list[float]]] = []
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            with single_thread():
                statistics = input_statistics(inputs.T @ inputs / 1024)
            jobs = [
                MatrixJob(
                    choice=Choice(matrix=matrix, config=config, rank=rank, factor_config=FACTOR_8BIT, bits=0),
                    weight=weight,
                    settings=settings,
                    seed=seed,
                    known=known,
                    counted=True,
                )
                for seed, (weight, rank, known) in enumerate(
                    (weight, rank, known)
                    for weight in weights
                    for rank, known in (
                        (8, MatrixKnowledge(inputs=Here(statistics))),
                        (8, MatrixKnowledge()),
                    )
                )
            ]

            def keep(job: MatrixJob, result: Decomposed) -> None:
                tensors.extend((job.seed, tensor) for tensor in result.tensors.values())

            LocalEngine().run(decomposed, jobs, keep)
            asked = [
                TableJob(
                    matrix=matrix,
                    weight=job.weight,
                    settings=settings,
                    ranks=(0, 8),
                    seed=job.seed,
                    known=job.known,
                )
                for job in jobs
            ]
            LocalEngine().run(
                table_of, asked, lambda job, table: tables.append((job.seed, table.errors.ravel().tolist()))
            )
        finally:
            torch.set_num_threads(before)
        return (
            [tensor for _, tensor in sorted(tensors, key=lambda pair: pair[0])],
            [table for _, table in sorted(tables)],
        )

    once = with_threads(1)
    for count in (2, 3):
        again = with_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(once[0], again[0], strict=True))
        assert once[1] == again[1]


def test_a_layer_file_is_the_same_in_whatever_order_its_matrices_are_done(
    model: ModelInput, tmp_path: Path
) -> None:
    from compress.pipelines.lq_writer import _LayerParts, layer_file

    settings = resolve(QuantizeSettings, {"budget": "3bit"}, "quick")
    config = QuantConfig(bits=3)
    choices = [
        Choice(matrix=matrix, config=config, rank=0, factor_config=None, bits=0)
        for matrix in matrices_of(model)
        if matrix.layer == 0
    ]
    generator = torch.Generator().manual_seed(0)
    jobs = [
        MatrixJob(
            choice=choice,
            weight=torch.randn(choice.matrix.shape, generator=generator),
            settings=settings,
            seed=0,
            known=MatrixKnowledge(),
            counted=True,
        )
        for choice in choices
    ]
    results = [(job, decomposed(job)) for job in jobs]
    written = []
    for name, order in (("forth", results), ("back", results[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        parts = _LayerParts(folder)
        parts.begin(choices)
        for at, (job, result) in enumerate(order, start=1):
            parts.keep(job, result)
            assert layer_file(folder, 0).is_file() == (at == len(order))
        written.append(layer_file(folder, 0).read_bytes())
    assert written[0] == written[1]
