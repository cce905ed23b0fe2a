"""``compress verify`` of quantized models: every recorded error is measured again, those on text where it is asked for.

Records are changed many values at a time: each of them has to be found, and nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.__main__ import app
from compress.machine import Capacity, capacity
from compress.model import layerwise
from compress.pipelines import hessian_walk, verify_calibration
from compress.pipelines.settings import Common
from compress.pipelines.way import Way
from tests.fresh import ForkServer
from tests.integration.common import run
from tests.integration.test_verify import change_json, change_tensors, contents, scaled, set_in, verify
from tests.tiny import tiny_checkpoint

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "hessian": ("llama_gqa", {"budget": "5bit", "rank": "4"}),
    "menu": ("llama_tied", {"budget": "5bit", "embeddings": "menu"}),
    "8bit": ("llama_mha", {"budget": "5bit", "rank": "0", "embeddings": "8bit"}),
    "fisher": ("llama_gqa", {"budget": "5bit", "objective": "fisher", "rank": "4", "factors": "16bit"}),
    "fisher-0": ("llama_mha", {"budget": "5bit", "objective": "fisher", "rank": "0"}),
    "frobenius": (
        "llama_mha",
        {"budget": "5bit", "objective": "frobenius", "rank": "0", "embeddings": "8bit"},
    ),
}
STAGE = "01-quantize"
MEASURED = {
    "hessian": "output errors",
    "menu": "output errors",
    "8bit": "output errors",
    "fisher": "weighted errors",
    "fisher-0": "weighted errors",
}
"""By kind, the check that takes text."""
DOWN = "model.layers.0.mlp.down_proj"


@dataclass(frozen=True, slots=True)
class Made:
    """Finished chains by kind, made when they are asked for."""

    place: Path
    text: Path

    def run(self, kind: str) -> Path:
        place = self.place / kind
        if not place.is_dir():
            model, given = KINDS[kind]
            full = tiny_checkpoint(model, place / "full")
            shutil.copyfile(self.text, place / "text.txt")
            common = Common(
                run=place / "run",
                model=str(full),
                data=str(place / "text.txt"),
                dtype="float32",
                threads=1,
                effort="quick",
            )
            run("quantize", common, calibration_tokens=512, **given)
        return place / "run"


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, fork_server: ForkServer
) -> Iterator[Made]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)
        yield Made(tmp_path_factory.mktemp("calibration"), text_file)


def copied(made: Made, kind: str, tmp_path: Path) -> Path:
    """A copy of a chain that has no hashes, whose original and text stay where they are."""
    shutil.copytree(made.run(kind), tmp_path / "run")
    change_json(tmp_path / "run" / STAGE / "stage.json", lambda r: (r.pop("files"), r.pop("record_sha256")))
    return tmp_path / "run"


def wrong(*arguments: object) -> list[dict[str, str]]:
    return [check for check in verify(*arguments)[1] if check["result"] == "differs"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_quantize_recorded_is_measured_again(kind: str, made: Made) -> None:
    chain = made.run(kind)
    before = contents(made.place / kind)
    code, checks = verify("--run", chain, "--calibration")
    assert code == 0, [check for check in checks if check["result"] != "ok"]
    assert {check["result"] for check in checks} == {"ok"}
    records = json.loads((chain / STAGE / "stage.json").read_text())["metrics"]["matrices"]
    text = [len(record.keys() & {"relative_output_error", "relative_weighted_error"}) for record in records]
    decoder = [kind in MEASURED and (kind == "menu" or ".layers." in record["name"]) for record in records]
    assert text == decoder
    measured = sum(text)
    found = [check for check in checks if check["check"] in MEASURED.values()]
    assert [check["check"] for check in found] == ([MEASURED[kind]] if kind in MEASURED else [])
    assert all(check["detail"].startswith(f"{measured} measured again") for check in found)
    assert contents(made.place / kind) == before


@pytest.mark.parametrize("kind", ["hessian", "menu"])
def test_layer_by_layer_it_is_the_same(kind: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, ways = made.run(kind), []
    whole = verify("--run", chain, "--calibration")

    def opened(self: Way, *args: Any, **given: Any) -> Any:
        ways.append(self.streamed)
        return open_(self, *args, **given)

    def full(place: Path, device: str) -> Capacity:
        return replace(capacity(place, device), host_free=1)

    open_ = Way.open
    monkeypatch.setattr(Way, "open", opened)
    for module in ("ways", "verify_logits"):
        monkeypatch.setattr(f"compress.pipelines.{module}.capacity", full)
    assert verify("--run", chain, "--calibration") == whole
    assert ways == [True] * len(ways)
    assert len(ways) == (3 if kind == "menu" else 2)  # logits, sensitivities of embeddings, the walk


def test_without_the_option_one_line_says_what_was_left_out(made: Made) -> None:
    result = CliRunner().invoke(app, ["verify", "--run", str(made.run("hessian"))], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    (line,) = [line for line in result.stdout.splitlines() if "not checked" in line]
    assert "output errors" in line
    assert "compress verify --calibration" in line
    assert (
        "not checked" not in CliRunner().invoke(app, ["verify", "--run", str(made.run("frobenius"))]).stdout
    )


Change = tuple[str, Callable[[Any], None], str, str]
"""A file of the stage, what is changed in it, and the check and the words that name it."""
RECORD, CHOICE = "stage.json", "allocation.json"


def lost(*keys: str | int) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


def also(value: Any) -> None:
    """No change: the one before is found by another check too."""


OUTPUTS: list[Change] = [
    (RECORD, scaled("metrics", "matrices", 2, "relative_output_error", by=1.001), "output errors", "output_error of"),
    (RECORD, scaled("metrics", "matrices", 3, "damping", by=10), "output errors", "damping of"),
    (RECORD, set_in("metrics", "matrices", 5, "dead_inputs", to=3), "output errors", "dead_inputs of"),
    (RECORD, also, "stored bits", "singular"),
    (RECORD, lost("metrics", "matrices", 6, "relative_output_error"), "output errors", "nothing recorded"),
    (RECORD, scaled("metrics", "matrices", 8, "squared_error", by=1.0001), "errors", "squared_error of model"),
    (RECORD, scaled("metrics", "matrices", 9, "relative_error", by=1.001), "errors", "relative_error of"),
    (RECORD, scaled("metrics", "squared_error", by=1.0001), "errors", "squared_error of all"),
    (RECORD, scaled("metrics", "before", "bits_per_weight", by=1.01), "stored bits", "bits_per_weight before"),
    (RECORD, set_in("metrics", "left_dense", to=["model.layers.0.x"]), "stored bits", "left_dense"),
    (RECORD, set_in("metrics", "lower_ranks", to={DOWN: 2}), "stored bits", "lower_ranks"),
    (RECORD, set_in("metrics", "matrices", 1, "counted", to=False), "stored bits", "counted of"),
    (RECORD, set_in("metrics", "reopened_relative_error", to=0.01), "logits", "reopened_relative_error"),
]  # fmt: skip
WEIGHTED: list[Change] = [
    (RECORD, scaled("metrics", "matrices", 2, "relative_weighted_error", by=1.001), "weighted errors", "d_error of"),
    (RECORD, lost("metrics", "matrices", 3, "relative_weighted_error"), "weighted errors", "nothing recorded"),
    (CHOICE, scaled("matrices", 5, "squared_norm", by=1.001), "weighted errors", "squared_norm of"),
    (CHOICE, scaled("matrices", 6, "expected_cost", by=1.001), "weighted errors", "expected_cost of"),
    (CHOICE, also, "allocation", "objective"),
]  # fmt: skip
PLAIN: list[Change] = [
    (RECORD, scaled("metrics", "plain_rounding", "squared_error", by=1.0001), "errors", "plain_rounding in stage"),
    (CHOICE, scaled("plain_rounding", "squared_error", by=1.0001), "errors", "squared_error of plain_rounding"),
    (CHOICE, scaled("plain_rounding", "stored_bits", by=2), "errors", "stored_bits of plain_rounding"),
    (CHOICE, scaled("plain_rounding", "config", "block_size", by=2), "errors", "config of plain_rounding"),
    (CHOICE, scaled("matrices", 5, "squared_norm", by=1.001), "errors", "squared_norm of"),
    (CHOICE, scaled("matrices", 6, "expected_cost", by=1.001), "errors", "expected_cost of"),
    (CHOICE, also, "allocation", "objective"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("hessian", OUTPUTS), ("fisher-0", WEIGHTED), ("frobenius", PLAIN)],
    ids=["hessian", "fisher", "frobenius"],
)
def test_every_changed_value_is_found_and_no_other(
    kind: str, changes: list[Change], made: Made, tmp_path: Path
) -> None:
    chain = copied(made, kind, tmp_path)
    for file, change, _, _ in changes:
        change_json(chain / STAGE / file, change)
    found = wrong(chain, "--calibration")
    for _, _, check, words in changes:
        assert any(f["check"] == check and words in f["detail"] for f in found), (check, words, found)
    assert len(found) == len(changes), found


@pytest.mark.parametrize("kind", ["menu", "8bit"])
def test_changed_output_errors_beside_quantized_embeddings(kind: str, made: Made, tmp_path: Path) -> None:
    chain = copied(made, kind, tmp_path)
    records = json.loads((chain / STAGE / "stage.json").read_text())["metrics"]["matrices"]
    first = next(at for at, record in enumerate(records) if "relative_output_error" in record)
    assert (records[first]["name"] == "model.embed_tokens") == (kind == "menu")
    change_json(
        chain / STAGE / "stage.json", scaled("metrics", "matrices", first, "relative_output_error", by=1.001)
    )
    (found,) = wrong(chain, "--calibration")
    assert found["check"] == "output errors"
    assert records[first]["name"] in found["detail"]


def test_a_changed_matrix_changes_its_error_and_the_inputs_behind_it(made: Made, tmp_path: Path) -> None:
    chain = copied(made, "hessian", tmp_path)

    def louder(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.weight_scale_max"] *= 1.25

    change_tensors(chain / STAGE / "model.safetensors", louder)
    found = wrong(chain, "--calibration")
    details = [f["detail"] for f in found if f["check"] == "output errors"]
    assert any(f"relative_output_error of {DOWN}:" in detail for detail in details)
    assert any("relative_output_error of model.layers.1." in detail for detail in details)
    assert not any("of model.layers.0.mlp.up_proj" in detail for detail in details)
    assert {"errors", "logits"} <= {f["check"] for f in found}


@pytest.mark.parametrize(
    ("kind", "unit"), [("hessian", "relative_output_error"), ("fisher", "relative_weighted_error")]
)
def test_a_changed_matrix_with_a_record_made_to_fit(kind: str, unit: str, made: Made, tmp_path: Path) -> None:
    """The squared errors are made those of the changed matrix, so only text can tell."""
    chain = copied(made, kind, tmp_path)
    config = json.loads((chain / STAGE / "config.json").read_text())["quantization_config"]

    def flipped(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.weight"][:64] ^= 1

    assert DOWN in config["matrices"]
    change_tensors(chain / STAGE / "model.safetensors", flipped)
    values = {f["detail"].split(":")[0]: f["detail"] for f in wrong(chain) if f["check"] == "errors"}

    def fitted(record: Any) -> None:
        (entry,) = [entry for entry in record["metrics"]["matrices"] if entry["name"] == DOWN]
        places = {
            f"squared_error of {DOWN}": (entry, "squared_error"),
            f"relative_error of {DOWN}": (entry, "relative_error"),
        }
        places["squared_error of all matrices"] = (record["metrics"], "squared_error")
        for name, (place, key) in places.items():
            if name in values:
                place[key] = float(values[name].rpartition(", ")[2].split()[0])

    change_json(chain / STAGE / "stage.json", fitted)
    found = wrong(chain, "--calibration")
    assert not [f for f in found if f["check"] == "errors"]
    assert any(f["detail"].startswith(f"{unit} of {DOWN}:") for f in found)


@pytest.mark.parametrize("kind", ["hessian", "fisher"])
def test_another_text_is_refused(kind: str, made: Made, tmp_path: Path) -> None:
    chain, text = copied(made, kind, tmp_path), made.place / kind / "text.txt"
    content = text.read_bytes()

    def refusal() -> str:
        (found,) = [f for f in wrong("--run", chain, "--calibration") if f["check"] == MEASURED[kind]]
        assert "--calibration" in found["remedy"]
        return found["detail"]

    try:
        text.write_bytes(content[: len(content) // 2])
        assert "changed since quantize read it" in refusal()
        text.unlink()
        assert "is not here" in refusal()
    finally:
        text.write_bytes(content)
    change_json(chain / STAGE / "stage.json", set_in("metrics", "calibration", "ids_sha256", to="0" * 64))
    assert "gives other tokens" in refusal()
    change_json(chain / STAGE / "stage.json", set_in("config", "data", to="self"))
    assert "is not in the workspace any more" in refusal()


def repeated(dtype: str, objective: str, place: Path, text: Path, change: Callable[[], None]) -> float:
    """The largest relative difference of a chain verified after ``change``."""
    full = tiny_checkpoint("llama_tied", place / "full")
    common = Common(
        run=place / "run", model=str(full), data=str(text), dtype=dtype, threads=1, effort="quick"
    )
    run("quantize", common, budget="6bit", rank="4", objective=objective, calibration_tokens=1024)
    change()
    code, checks = verify("--run", place / "run", "--calibration")
    assert code == 0, [check for check in checks if check["result"] == "differs"]
    (found,) = [check for check in checks if check["check"] in MEASURED.values()]
    return float(found["detail"].rpartition(" ")[2])


@pytest.mark.usefixtures("forked_reopen")
@pytest.mark.parametrize("objective", ["hessian", "fisher"])
def test_sums_in_another_order_stay_far_within_the_tolerance(
    objective: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        monkeypatch.setattr(hessian_walk, "BATCH", 1)
        monkeypatch.setattr(layerwise, "_STRIPE", 16)
        torch.set_num_threads(2)

    worst = repeated("float32", objective, tmp_path, text_file, change)
    assert worst < verify_calibration.TOLERANCE[torch.float32] / 10


@pytest.mark.usefixtures("forked_reopen")
@pytest.mark.parametrize("objective", ["hessian", "fisher"])
def test_rounding_of_a_whole_pass_to_16_bits_stays_within_the_tolerance(
    objective: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        monkeypatch.setattr(verify_calibration, "device_and_dtype", lambda common: ("cpu", torch.float32))
        for bars in ("TOLERANCE", "SUMS"):
            wide = getattr(verify_calibration, bars)[torch.bfloat16]
            monkeypatch.setattr(verify_calibration, bars, {torch.float32: wide})

    worst = repeated("bfloat16", objective, tmp_path, text_file, change)
    assert worst > 1e-5  # it was another rounding


def test_what_is_not_here_is_no_failure(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.run("hessian") / STAGE, tmp_path / "alone")
    code, checks = verify(tmp_path / "alone", "--calibration")
    assert code == 0
    (found,) = [check for check in checks if check["check"] == "output errors"]
    assert (found["result"], found["detail"]) == ("not checked", "the model before quantization is not here")


def test_the_record_names_the_windows(made: Made) -> None:
    for kind in ("hessian", "fisher", "frobenius"):
        known = json.loads((made.run(kind) / STAGE / "stage.json").read_text())["metrics"]["calibration"]
        if kind == "frobenius":
            assert known is None
            continue
        assert known["windows"] * known["length"] == 512
        assert known["split"] == "train"
        assert len(known["ids_sha256"]) == 64
