"""What a Ray cluster prunes and quantizes has the bytes of what is made here, whatever becomes of workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.engine import Handle
from compress.errors import CompressError
from compress.pipelines import engine_ray
from compress.pipelines.dispatch import run_verb
from compress.pipelines.engine_ray import Node, RayEngine, opened
from compress.pipelines.settings import Common
from compress.stopping import Stopped
from tests.faults.kill import contents
from tests.tiny import tiny_checkpoint

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """Two machines with one processor each, as processes of this one."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    yield
    cluster.shutdown()
    if before is None:
        del os.environ["RAY_ADDRESS"]
    else:
        os.environ["RAY_ADDRESS"] = before


@pytest.fixture
def engine(two_nodes: None) -> Iterator[RayEngine]:
    lines: list[str] = []
    with opened(lines.append) as found:
        assert lines == ["Ray: 2 workers on 2 machines."]
        assert found.workers == 2
        yield found


def square(job: int) -> int:
    if job < 0:
        raise CompressError(f"{job} is negative.", "Give another.")
    return job * job


def total(job: tuple[Handle, int]) -> float:
    tensor: Any = job[0].get()
    return float(tensor.sum()) + job[1]


def die_once(job: tuple[Path, int]) -> int:
    """Kills its worker the first time."""
    marker, value = job
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return value


def die(job: int) -> int:
    os._exit(1)


def threads(job: int) -> int:
    return torch.get_num_threads()


def test_every_job_is_computed_once_by_one_thread(engine: RayEngine) -> None:
    found: dict[int, int] = {}
    engine.run(square, range(12), found.__setitem__)
    assert found == {job: job * job for job in range(12)}
    engine.run(threads, range(4), found.__setitem__)
    assert {found[job] for job in range(4)} == {1}
    assert engine.at_most(1) is engine


def test_a_shared_value_is_read_there(engine: RayEngine) -> None:
    shared = engine.share(torch.arange(1000.0))
    found: dict[int, float] = {}
    engine.run(total, [(shared, n) for n in range(3)], lambda job, result: found.__setitem__(job[1], result))
    assert found == {n: 499500.0 + n for n in range(3)}


def test_a_failure_is_told_as_here_and_what_is_under_way_is_kept(engine: RayEngine) -> None:
    found: dict[int, int] = {}
    with pytest.raises(CompressError, match="-1 is negative"):
        engine.run(square, [1, 2, -1, 3, 4, 5, 6, 7, 8], found.__setitem__)
    assert {1, 2} <= set(found) <= {1, 2, 3, 4, 5, 6, 7, 8}

    def stopped() -> Iterator[int]:
        yield from range(5)
        raise Stopped(2)

    found.clear()
    with pytest.raises(Stopped):
        engine.run(square, stopped(), found.__setitem__)
    assert found == {job: job * job for job in range(5)}


def test_what_a_lost_worker_had_is_given_to_another(engine: RayEngine, tmp_path: Path) -> None:
    found: list[int] = []
    jobs = [(tmp_path / f"{n}", n) for n in range(4)]
    engine.run(die_once, jobs, lambda job, result: found.append(result))
    assert sorted(found) == [0, 1, 2, 3]
    assert all(marker.exists() for marker, _ in jobs)


def test_work_that_kills_every_worker_ends(engine: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ray, "RETRIES", 1)
    with pytest.raises(CompressError, match=r"lost a piece of work .*what is finished is kept"):
        engine.run(die, [0], lambda job, result: None)


def made_by_both(folder: Path, verb: str, given: dict[str, Any]) -> list[Any]:
    """What a stage leaves on the disk: made by this machine, and by the cluster."""
    model = tiny_checkpoint("llama_gqa", folder / "tiny")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text that has no other purpose. " * 20 for i in range(60)))
    found = []
    for engine in ("local", "ray"):
        common = Common(
            run=folder / engine, model=str(model), data=str(text), dtype="float32", threads=1, engine=engine
        )
        found.append(contents(Path(run_verb(verb, common, given, quiet=True)["path"])))
    return found


@pytest.mark.usefixtures("two_nodes", "forked_reopen")
@pytest.mark.parametrize("objective", ["frobenius", "fisher", "hessian"])
def test_bytes_are_those_of_this_machine_alone(tmp_path: Path, objective: str) -> None:
    given = {"budget": "5bit", "objective": objective, "rank": "4", "calibration_tokens": 512}
    here, there = made_by_both(tmp_path, "quantize", given)
    assert here == there


@pytest.mark.usefixtures("two_nodes", "forked_reopen")
@pytest.mark.parametrize("given", [{}, {"shape": "allocated"}, {"criterion": "wanda"}])
def test_a_model_is_pruned_to_the_bytes_of_this_machine_alone(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[str] = []
    run = RayEngine.run

    def counted(self: RayEngine, work: Any, jobs: Any, keep: Any) -> None:
        handed.append(work.__name__)
        run(self, work, jobs, keep)

    monkeypatch.setattr(RayEngine, "run", counted)
    asked = {"ratio": 0.4, "calibration_tokens": 1024, "trials": 2, "repair_steps": 2, **given}
    here, there = made_by_both(tmp_path, "prune", asked)
    assert here == there
    ranks = given.get("criterion", "obs") == "obs" or given.get("shape") == "allocated"
    assert ("ranked_branch" in handed) == ranks
    assert "_solved" in handed


def test_other_versions_are_refused(two_nodes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = dict(engine_ray.this_node().versions)
    other = Node(versions=tuple((own | {"torch": "1.0"}).items()), processor="")
    monkeypatch.setattr(engine_ray, "_nodes", lambda: {"10.0.0.1 (abc)": other})
    with pytest.raises(CompressError, match=r"10\.0\.0\.1 \(abc\).*torch 1\.0"), opened(print):
        raise AssertionError("opened")
    assert not ray.is_initialized()


def test_a_cluster_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(CompressError, match="cannot be reached"), opened(print):
        raise AssertionError("opened")
