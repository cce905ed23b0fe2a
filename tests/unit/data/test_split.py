from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data.split import assign_splits, clusters, normalised, split_items
from compress.errors import CompressError

WEIGHTS = st.dictionaries(st.text(min_size=1, max_size=6), st.integers(1, 10_000), min_size=3, max_size=60)


@given(WEIGHTS)
def test_every_key_gets_one_split_and_no_split_is_empty(weights: dict[str, int]) -> None:
    assigned = assign_splits(weights)
    assert assigned.keys() == weights.keys()
    assert set(assigned.values()) == {"train", "validation", "test"}


@given(WEIGHTS, st.randoms())
def test_assignment_does_not_depend_on_order(weights: dict[str, int], random: object) -> None:
    keys = list(weights)
    random.shuffle(keys)  # type: ignore[attr-defined]
    assert assign_splits({key: weights[key] for key in keys}) == assign_splits(weights)


def test_shares_are_near_a_tenth_for_many_documents() -> None:
    weights = {f"document {i}": 100 + 7 * (i % 13) for i in range(500)}
    assigned = assign_splits(weights)
    total = sum(weights.values())
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        part = sum(weight for key, weight in weights.items() if assigned[key] == split)
        assert abs(part / total - share) < 0.005


def test_a_giant_goes_to_train() -> None:
    weights = {"giant": 100_000} | {str(i): 100 for i in range(400)}
    assert assign_splits(weights)["giant"] == "train"


@given(st.lists(st.sampled_from("abcdefg ") | st.text(max_size=3), min_size=1, max_size=40))
def test_equal_documents_never_separate(items: list[str]) -> None:
    if len({normalised(item) for item in items}) < 3:
        with pytest.raises(CompressError, match="too few"):
            split_items(items, str)
        return
    parts = split_items(items, str)
    seen = [{normalised(item) for item in part} for part in parts.values()]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert sorted(sum(parts.values(), ())) == sorted(items)


def test_clusters_join_documents_through_shared_paragraphs() -> None:
    long = "a paragraph that is certainly longer than sixty characters, white space aside"
    other = "another paragraph that is certainly longer than sixty characters, for the chain"
    found = clusters(
        {"a": f"x\n\n{long}", "b": f"{long}\n\n{other}", "c": f"{other}\n \ny", "d": "short", "e": "short"}
    )
    assert found == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}
