"""An engine is found by its name, or refused with what to do."""

from __future__ import annotations

import sys

import pytest

from compress.engine import LocalEngine
from compress.errors import CompressError, UsageError
from compress.pipelines.engines import opened_engine, require_processors
from compress.pipelines.settings import Common


def test_the_machine_itself_is_the_default() -> None:
    with opened_engine(Common(), print) as engine:
        assert engine == LocalEngine()


def test_a_dry_run_needs_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with opened_engine(Common(engine="ray", dry_run=True), print) as engine:
        assert engine == LocalEngine()


@pytest.mark.parametrize(
    ("common", "kind", "words"),
    [
        (Common(engine="rya"), UsageError, ("'rya'", "'ray'")),
        (Common(engine="ray", memory_limit="4GiB"), UsageError, ("--memory-limit", "--engine local")),
        (Common(engine="ray"), CompressError, ("not installed", "compress-llm[cluster]")),
    ],
)
def test_what_cannot_be_is_refused(
    common: Common, kind: type[CompressError], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(kind) as error, opened_engine(common, print):
        raise AssertionError("opened")
    assert all(word in str(error.value) for word in words)


def test_a_cluster_is_for_processors() -> None:
    require_processors(Common(engine="ray"), "cpu")
    require_processors(Common(), "cuda")
    with pytest.raises(UsageError, match="--device cpu"):
        require_processors(Common(engine="ray"), "cuda")
