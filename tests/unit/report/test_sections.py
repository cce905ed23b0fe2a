"""Error spectrum, memory over time, lineage, commands, and what is said of records that are not there."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.report.charts import Line, log_chart
from compress.report.memory import timeline_figure
from compress.report.omitted import missing
from compress.report.page import render
from compress.report.spectrum import measure, spectrum_figure, worst_table
from tests.unit.report.reading import (
    drawing,
    elements,
    middles,
    parts,
    section,
    spaced,
    table_rows,
    text,
    words,
)
from tests.unit.report.samples import sample_run


def matrices(**errors: list[float]) -> list[dict[str, Any]]:
    """Two kinds of matrices in as many layers as there are errors."""
    count = len(next(iter(errors.values())))
    return [
        {"name": f"model.layers.{n // 2}.mlp.{('up', 'down')[n % 2]}_proj", "bits": 3, "rank": 0}
        | {key: values[n] for key, values in errors.items()}
        for n in range(count)
    ]


def test_the_spectrum_has_every_error_at_its_layer_and_height() -> None:
    errors = [0.1, 0.01, 0.2, 0.02, 0.05, 0.08]
    page = render(
        {"stages": [{"verb": "quantize", "metrics": {"matrices": matrices(relative_error=errors)}}]}
    )
    found = drawing(page, "Error spectrum")
    groups = [g for g in parts(found, "g") if "line" in (g.get("class") or "")]
    ticks = {
        float(str(e.text)): float(e.get("y", 0)) - 4
        for e in parts(found, "text")
        if e.get("class") == "tick end"
    }
    low, high = min(ticks), max(ticks)
    for start, group in enumerate(groups):
        own = errors[start::2]
        heights = [
            ticks[low] + (ticks[high] - ticks[low]) * math.log(e / low) / math.log(high / low) for e in own
        ]
        assert [y for _, y in middles(group)] == pytest.approx(heights, abs=0.15)
    assert "up 0.05 to 0.2; down 0.01 to 0.08" in str(found.get("aria-label"))
    worst = next(t for t in elements(page, "table") if "Largest" in text(t[0]))
    assert [line[4] for line in table_rows(worst)[1:]] == ["0.2", "0.1", "0.08", "0.05", "0.02"]
    assert table_rows(worst)[1][0] == "layer 1, up"


def test_the_spectrum_shows_the_error_nearest_to_the_loss() -> None:
    both = matrices(relative_error=[0.3, 0.2], relative_output_error=[0.1, 0.05])
    assert measure(both)[0] == "relative_output_error"
    assert "outputs on calibration text" in str(spectrum_figure(both))
    assert measure(matrices(relative_weighted_error=[0.3, 0.2]))[0] == "relative_weighted_error"
    partly = matrices(relative_error=[0.3, 0.2])
    partly[0]["relative_output_error"] = 0.1
    assert measure(partly)[0] == "relative_error"
    for nothing in ([], matrices(relative_error=[0.0, 0.0]), [{"name": 3}, None, "x"]):
        assert spectrum_figure(nothing) is None
        assert worst_table(nothing) is None


def timeline(*stages: tuple[float, float, list[float]]) -> Any:
    return [
        {
            "verb": f"v{n}",
            "seconds": seconds,
            "memory_timeline": {"interval_seconds": interval, "host_bytes": values},
        }
        for n, (seconds, interval, values) in enumerate(stages)
    ]


def test_memory_is_drawn_stage_after_stage() -> None:
    stages = timeline((4.0, 1.0, [1e9, 2e9, 2e9, 1e9]), (12.0, 4.0, [4e9, 3e9, 1e9]))
    stages.insert(1, {"verb": "old", "seconds": 4.0})
    found = drawing(render({"stages": stages}), "Memory timeline over 20.0")
    areas = [e for e in parts(found, "path") if e.get("class") == "area"]
    assert [text(e) for e in areas] == ["1 v0", "3 v1"]
    zero, top = 250 - 36, 44
    tick = {
        str(e.text): float(e.get("y", 0)) - 4 for e in parts(found, "text") if e.get("class") == "tick end"
    }
    assert (tick["0"], tick["4\u202fGB"]) == pytest.approx((zero, top))
    first, second = (
        [(float(x), float(y)) for x, y in re.findall(r"([-0-9.]+),([-0-9.]+)", str(e.get("d")))]
        for e in areas
    )
    left, width = 62, 720 - 62 - 14
    assert first[0] == pytest.approx((left, zero), abs=0.1)
    assert max(x for x, _ in first) == pytest.approx(left + width * 4 / 20, abs=0.1)
    assert min(x for x, _ in second) == pytest.approx(left + width * 8 / 20, abs=0.1)
    assert min(y for _, y in first) == pytest.approx((zero + top) / 2, abs=0.1)  # 2 GB of 4
    told = str(found.get("aria-label"))
    assert "1 v0 up to 2.00\u202fGB; 3 v1 up to 4.00\u202fGB" in told
    assert "Not recorded by: 2 old." in told


def test_memory_of_a_gpu_has_a_drawing_of_its_own() -> None:
    stages = timeline((4.0, 1.0, [1e9] * 4), (4.0, 1.0, [2e9] * 4))
    assert not [e for e in elements(render({"stages": stages}), "svg") if "GPU" in str(e.get("aria-label"))]
    stages[1]["memory_timeline"]["device_bytes"] = [0, 7e9, 3e9, 3e9]
    page = render({"stages": stages})
    told = str(drawing(page, "GPU memory timeline").get("aria-label"))
    assert "highest 7.00\u202fGB: 2 v1 up to 7.00\u202fGB. Not recorded by: 1 v0." in told
    assert "highest 2.00\u202fGB" in str(drawing(page, "Memory timeline").get("aria-label"))


def test_peaks_of_a_gpu_and_of_the_host_are_told_apart() -> None:
    old = {"verb": "prune", "seconds": 3.0, "peak_memory_bytes": 1e9}  # its one peak is the host's
    new = {
        "verb": "train",
        "seconds": 5.0,
        "peak_memory_bytes": 7e9,
        "peak_host_bytes": 2e9,
        "peak_device_bytes": 7e9,
    }
    page = render({"stages": [old, new]})
    costs = next(t for t in elements(page, "table") if "What every stage took" in text(t))
    assert [text(cell) for cell in parts(costs, "th")][:4] == [
        "Stage",
        "Time",
        "Peak memory on the GPU",
        "Peak memory on the host",
    ]
    assert "1.00 GB" in text(costs)
    assert text(costs).count("7.00 GB") == 1
    told = words(page)
    assert "peak 7.00 GB on the GPU, 2.00 GB on the host" in told
    assert "peak memory 7.00 GB on the GPU, 2.00 GB on the host" in told
    alone = render({"stages": [old]})
    assert "Peak memory on the GPU" not in alone
    assert "Peak memory on the host" in alone


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "verb": st.sampled_from(["prune", "<b>", None]),
                "seconds": st.one_of(st.floats(), st.floats(0, 1e6), st.none(), st.just("x")),
                "memory_timeline": st.one_of(
                    st.none(),
                    st.fixed_dictionaries(
                        {
                            "interval_seconds": st.one_of(st.floats(), st.floats(0, 100)),
                            "host_bytes": st.one_of(
                                st.none(),
                                st.lists(st.one_of(st.floats(), st.integers(-1, 10**13)), max_size=5),
                            ),
                        }
                    ),
                ),
            }
        ),
        max_size=4,
    )
)
def test_any_timeline_gives_a_page(stages: list[dict[str, Any]]) -> None:
    timeline_figure(stages)
    for element in elements(render({"stages": stages}), "path"):
        assert "nan" not in str(element.get("d"))
        assert "inf" not in str(element.get("d"))


@given(st.lists(st.floats(1e-290, 1e290), min_size=1, max_size=6))
def test_the_logarithmic_axis_encloses_what_it_shows(values: list[float]) -> None:
    drawn = log_chart(
        [Line(name="n", points=[(float(x), y) for x, y in enumerate(values)])],
        alt="a",
        x_title="x",
        y_title="y",
        x_label=str,
    )
    page = render({}).split("<main")[0].split("\n")[0] + f"\n{drawn}"
    heights = [y for _, y in middles(elements(page, "g")[0])]
    assert all(26 - 0.2 <= y <= 26 + 240 + 0.2 for y in heights)


def test_close_values_have_an_axis_of_their_own() -> None:
    points = [(0.0, 244.6), (1.0, 272.4)]
    drawn = log_chart(
        [Line(name="n", points=points)], alt="a", x_title="x", y_title="y", x_label=lambda x: f"x{x:g}"
    )
    page = f"<!DOCTYPE html>\n{drawn}"
    ticks = [float(str(e.text)) for e in elements(page, "text") if e.get("class") == "tick end"]
    assert (ticks[0], ticks[-1]) == (240.0, 280.0)


@pytest.mark.parametrize(("before", "after"), [(3.9, 3.5), (3.52, 3.5), (3.5, 3.52)])
def test_names_of_close_marks_lie_apart(before: float, after: float) -> None:
    run = sample_run(layers=2)
    run["stages"][2]["metrics"] |= {"validation_loss_before": before, "validation_loss_after": after}
    found = drawing(render(run), "Training loss")
    (first, second) = (
        float(e.get("y", 0)) for e in parts(found, "text") if str(e.text).startswith("validation")
    )
    assert abs(first - second) >= 12
    assert (first < second) == (before > after)


def test_layers_have_whole_numbers() -> None:
    found = matrices(relative_error=[0.1, 0.01, 0.2, 0.02])
    page = render({"stages": [{"verb": "quantize", "metrics": {"matrices": found}}]})
    ticks = [
        e.text for e in parts(drawing(page, "Error spectrum"), "text") if e.get("class") == "tick middle"
    ]
    assert [tick for tick in ticks if tick] == ["0", "1", "layer"]


def test_the_lineage_names_settings_cost_and_the_stage_before() -> None:
    page = render(sample_run(layers=2))
    steps = [text(e) for e in section(page, "chain").iter() if e.tag.endswith("li")]
    assert len(steps) == 5
    assert "--ratio 0.5" in steps[0]
    assert "2 min 21 s · peak 2.00 GB on the host · effort quick" in steps[0]
    assert "from model: stage 1" in steps[1]
    assert "from model 000000000000" in steps[0]  # the original, by its fingerprint


def test_versions_that_an_index_has_not_got_are_told_and_not_installed() -> None:
    run = sample_run()
    run["stages"][-1]["versions"] |= {"torch": "2.13.0+cpu", "odd; rm -rf": "1", "numpy": "2.0; x"}
    code = next(
        text(e) for e in elements(render(run), "code") if "pip install torch" in "".join(e.itertext())
    )
    assert "torch==2.13.0 transformers==5.23.0" in code
    assert "# the builds here were torch 2.13.0+cpu" in code
    assert "compress-llm==" not in code
    assert "rm -rf" not in code
    assert "numpy" not in code


def test_a_command_that_made_two_stages_is_written_once() -> None:
    run = sample_run(layers=2)
    for stage in run["stages"][2:4]:
        stage["command"] = ["compress", "recover", "--run", "a b"]
    page = render(run)
    blocks = [str(e[0].text) for e in elements(page, "pre")]
    assert blocks == [
        "pip install torch==2.13.0 transformers==5.23.0\n"
        "pip install --no-deps .  # in a checkout of compress-llm at version 0.1.0",
        "compress prune --ratio 0.5\ncompress quantize --budget 2.75bit\n"
        "compress recover --run 'a b'\ncompress eval",
    ]
    steps = [text(e) for e in section(page, "chain").iter() if e.tag.endswith("li")]
    assert "compress recover --run a b" in steps[2]  # made by another verb's command


def test_versions_that_are_none_are_not_installed() -> None:
    run = sample_run(layers=2)
    run["stages"][-1]["versions"] = {"python": "3", "torch": "1; rm -rf ~", "$(x)": "1", "numpy": "2.3"}
    assert next(str(e[0].text) for e in elements(render(run), "pre")) == "pip install numpy==2.3"


def test_what_is_not_recorded_is_said_and_nothing_else() -> None:
    assert missing(sample_run(layers=2)["stages"]) == []
    run = sample_run(layers=2)
    prune, quantize, train, _, _ = run["stages"]
    del prune["metrics"]["kept"], quantize["metrics"]["matrices"], train["metrics"]["losses"]
    del quantize["metrics"]["tradeoff"], quantize["memory_timeline"]
    run["stages"].pop()
    told = missing(run["stages"])
    assert [sentence.split(":")[0] for sentence in told] == [
        "Size, speed and perplexity of all models side by side",
        "The map of what was kept",
        "Bits, ranks and errors of the matrices",
        "The cost of other budgets",
        "The training curve",
        "Memory over time of stage 2 (quantize)",
    ]
    assert spaced(section(render(run), "omitted")).startswith("Not on this page Size, speed")
    assert missing([]) != []


def test_a_chain_without_an_evaluation_shows_what_its_stages_measured() -> None:
    run = sample_run(layers=2)
    run["stages"].pop()
    cards = spaced(section(render(run), "summary"))
    assert "Perplexity 74.50 before 30.20: +146.7 %" in cards
    assert "tokens/s" not in cards
    run["stages"][0]["metrics"]["before"]["protocol_line"] = "another"
    assert "Perplexity" not in spaced(section(render(run), "summary"))


def test_cards_of_speed_are_of_the_smallest_model() -> None:
    cards = spaced(section(render(sample_run(layers=2)), "summary"))
    assert "Prefill tokens/s, quantized 930 original 812: 1.15 times as fast" in cards
    assert "Decoded tokens/s, quantized 24.2 original 21.4: 1.13 times as fast" in cards
    assert "from 16, 5.8 times fewer" in cards


def test_a_page_of_a_large_model_is_small() -> None:
    run = sample_run(layers=32, steps=2000)
    prune = run["stages"][0]["metrics"]
    prune["original"] |= {"kv_heads": 32, "queries": 1}
    prune["kept"]["kv_groups"] = [list(range(0, 32, 2)) for _ in range(32)]
    for stage in run["stages"]:
        stage["memory_timeline"]["host_bytes"] = [10**10] * 240
    assert len(render(run).encode()) < 500_000
