"""The smoke run: what ``--short`` leaves out, and that its verdicts are those of the comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.benchmarks import smoke
from compress.pipelines.settings import Common, EvalSettings, PruneSettings, resolve

PRUNED = 40.0


class Chain:
    """Stands in for the stages: notes their settings, and answers with the figures of a chain that wins."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.random = 90.0

    def run(self, verb: str, common: Common, **given: Any) -> dict[str, Any]:
        self.asked.append((verb, given))
        rows = [
            {"name": name, "held_out_loss": loss}
            for name, loss in (("original", 3.0), ("full + recovered", 2.9))
        ]
        after = {"perplexity": 1.2 * PRUNED if verb == "quantize" else PRUNED, "protocol_line": ""}
        metrics = {"after": after, "stored_bits_per_weight": 2.7, "delta_norm": 1.0, "rows": rows}
        record = {"verb": verb, "path": str(common.run / verb), "seconds": 1.0, "versions": {}, "host": {}}
        return {**record, "metrics": {**metrics, "protocol_line": ""}}


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Chain:
    chain = Chain()
    monkeypatch.setattr(smoke, "run", chain.run)
    monkeypatch.setattr(smoke, "randomly_pruned", lambda *_, **__: {"perplexity": chain.random})
    plain = {"perplexity": 80.0, "stored_bits_per_weight": 3.125}
    monkeypatch.setattr(smoke, "plain_rounding_perplexity", lambda *_, **__: plain)
    return chain


def test_a_short_run_does_all_that_a_long_one_does_with_less_repair(chain: Chain, tmp_path: Path) -> None:
    whole, asked = smoke.smoke(tmp_path, effort="quick"), list(chain.asked)
    chain.asked.clear()
    short = smoke.smoke(tmp_path, effort="quick", short=True)
    assert [verb for verb, _ in chain.asked] == [verb for verb, _ in asked]
    assert [item["name"] for item in short["checks"]] == [item["name"] for item in whole["checks"]]
    assert (whole["short"], short["short"]) == (False, True)
    for (verb, more), (_, less) in zip(asked, chain.asked, strict=True):
        assert less == {**more, **smoke.SHORT.get(verb, {})}
    pruning = resolve(PruneSettings, {"ratio": 0.5, **smoke.SHORT["prune"]}, "quick")
    usual = resolve(PruneSettings, {"ratio": 0.5}, "quick")
    assert 0 < pruning.repair_steps < usual.repair_steps
    assert pruning.calibration_tokens == usual.calibration_tokens
    assert (
        resolve(EvalSettings, smoke.SHORT["eval"], "quick").windows
        == resolve(EvalSettings, {}, "quick").windows
    )


def test_a_lost_comparison_is_said(chain: Chain, tmp_path: Path) -> None:
    assert all(item["passed"] for item in smoke.smoke(tmp_path, effort="quick")["checks"])
    chain.random = PRUNED - 1
    lost = [item["name"] for item in smoke.smoke(tmp_path, effort="quick")["checks"] if not item["passed"]]
    assert lost == ["pruned below randomly pruned"]
