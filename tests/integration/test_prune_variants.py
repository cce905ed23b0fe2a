"""``prune`` with other options than its defaults, end to end on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.uneven import is_uneven
from compress.pipelines.measure import calibration_windows
from compress.pipelines.prune_trial import TRIAL_TOKENS
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace
from compress.prune.slice import slice_weight
from compress.structure import LayerShape, StructureMap
from tests.integration.common import TRAINING, assert_recorded, logits, run
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("forked_reopen")

BARE: dict[str, Any] = {
    **TRAINING,
    "ratio": 0.4,
    "calibration_tokens": 512,
    "repair_steps": 0,
    "repair": "none",
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "full")


@pytest.fixture
def common(full: Path, text_file: Path, tmp_path: Path) -> Common:
    return Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", threads=1, effort="quick"
    )


def stock(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def assert_cut(full: Path, small: Path, *, but: tuple[str, ...] = ()) -> StructureMap:
    """The small model holds what its structure keeps of the full one, bit for bit, except in the roles ``but``."""
    structure = StructureMap.load(small / "structure.safetensors")
    before, after = Checkpoint(full), Checkpoint(small)
    arch = checkpoint_architecture(before)
    structure.check_matches(arch)
    assert structure.base_fingerprint == before.fingerprint()
    compared = 0
    for index, layer in enumerate(structure.layers):
        for spec in arch.linears:
            name = arch.tensor_name(index, spec)
            if spec.role not in but and name in after.names:
                expected = slice_weight(before.read(name), arch, spec, layer)
                assert torch.equal(after.read(name), expected), name
                compared += 1
    assert compared > 0
    return structure


def test_a_repair_by_biases_opens_in_stock_transformers(common: Common, full: Path) -> None:
    stage = run("prune", common, **BARE | {"criterion": "flap", "repair": "bias", "ratio": 0.7})
    path = Path(stage["path"])
    model = stock(path)
    assert_recorded(model, path)
    assert_cut(full, path)
    assert (model.config.attention_bias, model.config.mlp_bias) == (True, True)
    for layer in model.model.layers:
        for repaired in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert bool(repaired.bias.any())
        for silent in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
            assert not silent.bias.any()
    assert "losses" not in stage["metrics"]
    assert stage["metrics"]["scoring_tokens"] == 512


@pytest.mark.parametrize(
    "given",
    [{"shape": "allocated"}, {"shape": "local", "skip_first": 0, "skip_last": 1}],
    ids=lambda given: given["shape"],
)
def test_layers_that_differ_go_through_the_whole_chain(
    given: dict[str, Any], common: Common, full: Path
) -> None:
    stage = run("prune", common, **BARE | {"repair": "refit", "repair_steps": 2} | given)
    pruned, metrics = Path(stage["path"]), stage["metrics"]
    structure = StructureMap.load(pruned / "structure.safetensors")
    assert metrics["shape"] is None
    assert structure.uniform is None
    assert is_uneven(Checkpoint(pruned).config)
    assert metrics["achieved_ratio"] == pytest.approx(0.4, abs=0.03)
    if given["shape"] == "allocated":
        assert metrics["achieved_ratio"] >= 0.4 - 1e-9
        assert metrics["certificate"]["gap"] <= 1e-4
        assert metrics["certificate"]["lower_bound"] <= metrics["certificate"]["damage"] * (1 + 1e-9)
    else:
        assert metrics["certificate"] is None
        assert structure.shapes[-1] == LayerShape(kv_heads=4, queries=2, channels=96)
    assert_recorded(compress.load_model(pruned, dtype=torch.float32), pruned)
    with pytest.raises(ValueError, match="compress_llama"):
        stock(pruned)

    quantized = Path(run("quantize", common, budget="6bit", rank="4", calibration_tokens=512)["path"])
    assert_recorded(compress.load_model(quantized, dtype=torch.float32), quantized)
    run("train", common, **TRAINING)
    recovered = Path(run("recover", common)["path"])
    whole = stock(full)
    record = load_file(recovered / "logits.safetensors")
    plain = logits(whole, record["input_ids"])
    assert_recorded(PeftModel.from_pretrained(whole, recovered).eval(), recovered)
    assert not torch.allclose(plain, record["logits"])


def test_a_size_asked_for_is_named_beside_the_one_reached(common: Common) -> None:
    asked = 50_000
    metrics = run("prune", common, **BARE | {"ratio": None, "params": str(asked), "trials": 1})["metrics"]
    reached = metrics["after"]["parameters"]
    assert metrics["requested_size"] == str(asked)
    assert reached == pytest.approx(asked, rel=0.05)
    share = reached / asked - 1
    assert metrics["reason"].startswith(f"{reached:,} parameters for {asked:,} asked for ({share:+.2%}). ")
    assert "instead of" in metrics["reason"] or "Exactly" in metrics["reason"]


def test_the_mean_of_a_branch_that_goes_whole_is_said_to_be_lost(common: Common) -> None:
    given = {"criterion": "flap", "repair": "bias", "shape": "allocated", "solver": "dynamic"}
    given |= {"targets": "mlp", "ratio": 0.57}  # of 60 %: eight channels stay, in one of the two layers
    stage = run("prune", common, **BARE | given)
    structure = StructureMap.load(Path(stage["path"]) / "structure.safetensors")
    gone = [
        f"model.layers.{index}.{name}"
        for index, shape in enumerate(structure.shapes)
        for name, left in (("self_attn.o_proj", shape.kv_heads), ("mlp.down_proj", shape.channels))
        if not left
    ]
    assert len(gone) == 1
    metrics = stage["metrics"]
    assert metrics["biases_lost"] == gone
    assert f"The mean of {len(gone)} branches that are gone whole" in metrics["reason"]


def test_two_rounds_are_one_structure_of_the_full_model(common: Common, full: Path) -> None:
    stage = run("prune", common, **BARE | {"rounds": 2, "ratio": 0.5})
    path = Path(stage["path"])
    structure = assert_cut(full, path)
    metrics = stage["metrics"]
    assert structure.uniform is not None
    assert (metrics["rounds"], metrics["requested_ratio"]) == (2, 0.5)
    assert metrics["achieved_ratio"] == pytest.approx(0.5, abs=0.03)
    assert metrics["kept"]["kv_groups"] == [layer.kv_groups.tolist() for layer in structure.layers]
    assert not list(path.glob("round-*"))
    assert_recorded(stock(path), path)
    run("train", common, **TRAINING)
    recovered = Path(run("recover", common)["path"])
    assert_recorded(PeftModel.from_pretrained(stock(full), recovered).eval(), recovered)


def test_rounds_share_the_steps_of_repair(common: Common) -> None:
    stage = run("prune", common, **BARE | {"rounds": 2, "ratio": 0.5, "repair": "refit", "repair_steps": 3})
    assert len(stage["metrics"]["repair"]["losses"]) == 2  # of the second round; the first took one
    first, second = stage["metrics"]["by_round"]
    assert [len(each["repair"]["losses"]) for each in (first, second)] == [1, 2]
    assert second["repair"] == stage["metrics"]["repair"]
    assert second["requested_ratio"] == pytest.approx(first["requested_ratio"], abs=0.05)
    for each in (first, second):
        assert len(each["trials"]) >= 2
        assert each["scoring_tokens"] == 512
        assert each["skipped_steps"] == 0
        assert each["reason"]
    assert_recorded(stock(Path(stage["path"])), Path(stage["path"]))


def test_codes_of_8_bit_are_for_scoring_only(common: Common, full: Path) -> None:
    stage = run("prune", common, **BARE | {"criterion": "lora", "int8": True})
    assert_cut(full, Path(stage["path"]))
    assert len(stage["metrics"]["losses"]) == TRAINING["steps"]
    assert_recorded(stock(Path(stage["path"])), Path(stage["path"]))


def test_single_query_heads_go_and_all_groups_stay(common: Common, full: Path) -> None:
    stage = run("prune", common, **BARE | {"head_unit": "query", "targets": "heads", "ratio": 0.13})
    path = Path(stage["path"])
    structure = assert_cut(full, path)
    assert structure.uniform == LayerShape(kv_heads=4, queries=1, channels=96)
    assert stage["metrics"]["shape"] == {"kv_heads": 4, "queries": 1, "channels": 96}
    assert stage["metrics"]["kept"]["queries_per_layer"] == [1, 1]
    assert all(layer.query_heads is not None for layer in structure.layers)
    model = stock(path)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 4)
    assert_recorded(model, path)


def test_losses_of_repair_lead_to_different_models(common: Common, tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "distill": {},
        "text": {"repair_loss": "text"},
        "both": {"repair_loss": "both", "repair_features": 0.5},
    }
    found = {}
    for name, given in variants.items():
        other = Common(
            run=tmp_path / name,
            model=common.model,
            data=common.data,
            dtype="float32",
            threads=1,
            effort="quick",
        )
        stage = run(
            "prune", other, **BARE | {"repair": "refit", "repair_steps": 3, "repair_lr": 1e-2} | given
        )
        losses = stage["metrics"]["repair"]["losses"]
        assert len(losses) == 3
        found[name] = losses[0]
        assert_recorded(stock(Path(stage["path"])), Path(stage["path"]))
        assert stage["config"]["repair_loss"] == given.get("repair_loss", "distill")
    # at the first step all three read the same windows with the same model; the hidden states come on top
    assert found["distill"] != found["text"]
    assert found["both"] > (found["distill"] + found["text"]) / 2


TRIED: list[dict[str, Any]] = [
    {"criterion": "obs", "repair": "refit"},
    {"criterion": "flap", "repair": "bias"},
    {"criterion": "lora", "one_shot": True, "repair": "none"},
    {"criterion": "lora", "one_shot": True, "repair": "refit", "int8": True},
    {"criterion": "lora", "one_shot": True, "repair": "lora", "lr": 0.1},
]


@pytest.mark.parametrize("given", TRIED, ids=lambda given: f"{given['criterion']}-{given['repair']}")
def test_shapes_of_nearly_one_size_are_tried_and_the_best_is_taken(
    given: dict[str, Any], common: Common, full: Path
) -> None:
    given = BARE | {"ratio": 0.5} | given
    metrics = run("prune", common, **given)["metrics"]
    trials = metrics["trials"]
    assert len(trials) == 4
    best = min(trials, key=lambda trial: float(trial["loss"]))
    assert {key: best[key] for key in ("kv_heads", "queries", "channels")} == metrics["shape"]
    assert f"{best['channels']} of 96 channels stay" in metrics["reason"]
    assert len({tuple(trial[key] for key in ("kv_heads", "queries", "channels")) for trial in trials}) == 4
    assert len({round(trial["loss"] - trial["rise"], 9) for trial in trials}) == 1

    # a trial is the loss of the model as it is written, on training text that calibration does not read
    workspace = Workspace(common.run)
    context = Context(common=common, workspace=workspace, reporter=Reporter(quiet=True))
    source = str(common.data)
    read = calibration_windows(context, full, source, tokens=512)
    windows = calibration_windows(context, full, source, tokens=TRIAL_TOKENS, apart_from=512)
    assert windows.protocol == metrics["trials_protocol"]
    assert windows.protocol["shared_windows"] == 0
    assert {tuple(row) for row in read.ids.tolist()}.isdisjoint(map(tuple, windows.ids.tolist()))
    small = stock(workspace.stages[0].path)
    with torch.no_grad():
        scores = small(windows.ids).logits[:, :-1].double().log_softmax(-1)
    loss = -scores.gather(-1, windows.ids[:, 1:, None]).mean()
    assert best["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert read.protocol["split"] == windows.protocol["split"] == "train"
    if given["criterion"] != "obs":
        return
    untried = run("prune", replace(common, redo=True), **given | {"trials": 1})["metrics"]
    assert "trials" not in untried
    assert untried["shape"] == {key: trials[0][key] for key in ("kv_heads", "queries", "channels")}


def test_masks_that_close_in_training_need_their_shape_before(common: Common) -> None:
    metrics = run("prune", common, **BARE | {"ratio": 0.5, "criterion": "lora"})["metrics"]
    assert "trials" not in metrics
    assert len(metrics["losses"]) == TRAINING["steps"]
