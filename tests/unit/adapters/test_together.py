from __future__ import annotations

import pytest

from tests.ranks import RankForks, Request


@pytest.mark.parametrize("case", ["gradients", "other_starts", "parts", "recomputed", "skipped", "talk"])
@pytest.mark.parametrize("size", [3])
def test_what_several_processes_check_together(case: str, size: int, rank_forks: RankForks) -> None:
    answer = rank_forks.run(Request(size=size, call=f"tests.unit.adapters.rank_cases:{case}"))
    assert list(answer.codes) == [0] * size, answer.err
