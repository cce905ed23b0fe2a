from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.pipelines.setting_values import EFFORTS, as_type
from compress.pipelines.settings import (
    VERBS,
    Common,
    EvalSettings,
    PlanSettings,
    PruneSettings,
    QuantizeSettings,
    TrainSettings,
    resolve,
)


def test_given_beats_effort_beats_default() -> None:
    assert resolve(TrainSettings, {}, "quick").steps == 40
    assert resolve(TrainSettings, {"steps": 7}, "quick").steps == 7
    assert resolve(TrainSettings, {"steps": None}, "standard").steps == 400
    assert resolve(PruneSettings, {}, "quick").criterion == "obs"
    assert resolve(PruneSettings, {}, "paper").criterion == "lora"
    assert resolve(PruneSettings, {"criterion": "wanda"}, "paper").criterion == "wanda"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_every_effort_fills_every_setting(verb: str, effort: str) -> None:
    resolve(VERBS[verb], {}, effort)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"no setting 'budgt' here\. Did you mean 'budget'\?"):
        resolve(QuantizeSettings, {"budgt": "3bit"}, "quick")
    with pytest.raises(UsageError, match="Known settings: sequence, windows"):
        resolve(EvalSettings, {"zzz": 1}, "quick")
    with pytest.raises(UsageError, match="no effort 'heroic'"):
        resolve(EvalSettings, {}, "heroic")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e-3", float, 1e-3),
        (1, float, 1.0),
        ("16", int, 16),
        (16.0, int, 16),
        (16, str, "16"),
        (2.75, str, "2.75"),
        (True, bool, True),
        ("refit", Literal["refit", "lora"], "refit"),
        (5, int | None, 5),
        ("x", str | None, "x"),
        ("x", tuple[str, ...], ("x",)),
        (["x", "y"], tuple[str, ...], ("x", "y")),
        ([], tuple[str, ...], ()),
    ],
)
def test_values_come_in_the_declared_type(value: Any, annotation: Any, expected: Any) -> None:
    result = as_type("name", value, annotation)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("many", int),
        (1.5, int),
        ("1.5", int),
        (float("inf"), int),
        ("half", float),
        (True, int),
        (True, str),
        (1, bool),
        ("true", bool),
        ([1], str),
        ({"a": 1}, int),
        ("magic", Literal["refit", "lora"]),
        (["refit"], Literal["refit", "lora"]),
        ([["x"]], tuple[str, ...]),
    ],
)
def test_values_of_another_type_are_refused(value: Any, annotation: Any) -> None:
    with pytest.raises(UsageError, match="some-name"):
        as_type("some_name", value, annotation)


@pytest.mark.parametrize(("name", "wrong"), [("factors", "4bit"), ("objective", "hessians")])
def test_choices_of_quantize(name: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=f"no {name} '{wrong}'"):
        resolve(QuantizeSettings, {name: wrong}, "quick")
    given = {"factors": "16bit", "objective": "fisher"}
    assert getattr(resolve(QuantizeSettings, given, "quick"), name) == given[name]
    assert resolve(QuantizeSettings, {}, "paper").objective == "frobenius"


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_ratio_is_between_0_and_1(ratio: float) -> None:
    if 0 < ratio < 1:
        assert resolve(PruneSettings, {"ratio": ratio}, "quick").ratio == ratio
    else:
        with pytest.raises(UsageError, match="is not between 0 and 1"):
            resolve(PruneSettings, {"ratio": ratio}, "quick")


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (PruneSettings, {"skip_first": -1}),
        (PruneSettings, {"skip_last": -1}),
        (PruneSettings, {"rounds": 0}),
        (PruneSettings, {"repair_rank": 0}),
        (PruneSettings, {"repair_steps": -1}),
        (PruneSettings, {"repair_features": -0.1}),
        (PruneSettings, {"repair_features": float("inf")}),
        (PruneSettings, {"steps": -1}),
        (PruneSettings, {"micro_batch": 0}),
        (PruneSettings, {"accumulation": 0}),
        (PruneSettings, {"sequence": 1}),
        (PruneSettings, {"multiple": 0}),
        (PruneSettings, {"calibration_tokens": 0}),
        (PruneSettings, {"repair_lr": float("nan")}),
        (TrainSettings, {"steps": 0}),
        (TrainSettings, {"alpha": 0}),
        (TrainSettings, {"lr": float("inf")}),
        (TrainSettings, {"dropout": -0.1}),
        (QuantizeSettings, {"iterations": 0}),
        (EvalSettings, {"windows": 0}),
    ],
)
def test_values_out_of_range_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} "):
        resolve(kind, wrong, "quick")


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"ratio": 0.5, "params": "80M"}, "--ratio and --params are given together"),
        (
            {"ratio": 0.5, "params": "80M", "size": "1MB"},
            "--ratio and --params and --size are given together",
        ),
        ({"repair_features": 0.1, "repair_loss": "text"}, "--repair-loss text does not"),
        ({"rounds": 2, "shape": "allocated"}, "in 2 rounds needs plain models"),
        ({"rounds": 3, "repair": "bias"}, "in 3 rounds needs plain models"),
    ],
)
def test_settings_of_prune_that_contradict_each_other(given: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        resolve(PruneSettings, given, "quick")
    for one in given:
        resolve(PruneSettings, {one: given[one]}, "quick")


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**63}, {"threads": 0}, {"effort": "heroic"}])
def test_common_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Common(**wrong)


def test_own_tasks_of_lm_eval_need_a_name() -> None:
    with pytest.raises(UsageError, match="--lm-eval-tasks names a folder"):
        resolve(EvalSettings, {"lm_eval_tasks": "folder"}, "quick")
    found = resolve(EvalSettings, {"lm_eval_tasks": "folder", "lm_eval": "mine", "task": "a.jsonl"}, "quick")
    assert (found.lm_eval, found.task) == ("mine", ("a.jsonl",))


@pytest.mark.parametrize("given", [{"ratios": "0.5"}, {"skip_first": 2}, {"skip_last": 0}])
def test_what_is_about_loram_needs_it(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(given)).replace('_', '-')} is about --loram"):
        PlanSettings(**given)
    PlanSettings(loram=True, **given)
