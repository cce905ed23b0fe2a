"""The benchmark of engines computes the same with each, and sees it when one does not."""

from __future__ import annotations

import torch

from compress.benchmarks import engines
from compress.engine import LocalEngine


def test_threads_change_nothing_and_a_changed_weight_does() -> None:
    jobs = engines.jobs_of(1, 32, 64, 16)
    assert [job.choice.matrix.shape for job in jobs[:3]] == [(64, 32), (64, 32), (32, 64)]
    seconds, digest = engines.compute(LocalEngine(1), jobs)
    assert seconds > 0
    with engines.threads(3):
        assert engines.compute(LocalEngine(), jobs)[1] == digest
    assert torch.get_num_threads() == 1
    jobs[0].weight[0, 0] += 1.0
    assert engines.compute(LocalEngine(1), jobs)[1] != digest
