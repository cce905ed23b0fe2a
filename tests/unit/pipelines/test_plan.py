"""``compress plan``: sizes against published figures and real files, peaks against what stages hold, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from compress.__main__ import app
from compress.errors import CompressError, UsageError
from compress.evaluate.perplexity import CHUNK_ELEMENTS
from compress.evaluate.speed import Speed, measure_speed
from compress.importance.gram_store import GramStore
from compress.importance.moments import OUTPUTS
from compress.machine import capacity
from compress.model.checkpoint import Checkpoint, CheckpointWriter, checkpoint_architecture
from compress.model.planned import PlannedCheckpoint, headers_of
from compress.model.tensor_file import TensorEntry
from compress.pipelines.dispatch import run_verb
from compress.pipelines.footprint import eval_footprint
from compress.pipelines.model_input import ModelInput
from compress.pipelines.operations import Work, eval_work, forward
from compress.pipelines.phase import AGAIN, Footprint, Ground, Phase
from compress.pipelines.plan import planned_chain
from compress.pipelines.plan_models import PlannedModel, quantized
from compress.pipelines.plan_verdict import PROCESS, RETAINED, Limits, verdict
from compress.pipelines.prune_footprint import prune_footprint
from compress.pipelines.settings import Common, PlanSettings, PruneSettings, QuantizeSettings, resolve
from compress.prune.slice import slice_checkpoint
from compress.structure import LayerStructure, structure_map
from tests.tiny import tiny_checkpoint
from tests.unit.prune.common import architecture

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "torch_dtype": "float16",
}
LLAMA_2_70B = LLAMA_2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LLAMA_31_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
GROUND = Ground(itemsize=4, length=128, windows=8)


def config_alone(config: Mapping[str, Any], place: Path) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def planned(model: Path, **given: Any) -> dict[str, Any]:
    return run_verb("plan", Common(), {"model": str(model), "no_time": True, **given}, quiet=True)


def row(plan: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in plan["sizes"] if each["name"] == name)
    return found


def pruned_architecture(folder: Path, plan: Mapping[str, Any]) -> Any:
    """That of the small model of a plan, whose layers are alike."""
    arch, shape = checkpoint_architecture(Checkpoint(folder)), plan["rounding"]["shape"]
    heads = shape["kv_heads"] * shape["queries"]
    return replace(arch, heads=heads, kv_heads=shape["kv_heads"], channels=shape["channels"])


def model_of(folder: Path) -> PlannedModel:
    checkpoint = Checkpoint(folder)
    arch = checkpoint_architecture(checkpoint)
    given = ModelInput(name="m", path=folder, id="", checkpoint=checkpoint, architecture=arch)
    return PlannedModel(name="original", input=given)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("plan") / "tiny", dtype=torch.bfloat16)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor, or giving a model's parameters memory, is a failure."""
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was read")

    build = AutoModelForCausalLM.from_config

    def watched(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        return model

    monkeypatch.setattr(TensorEntry, "read", refuse)
    monkeypatch.setattr(TensorEntry, "chunks", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", watched)


@pytest.mark.usefixtures("no_weights")
def test_effective_bits_of_lq_lora(tmp_path: Path) -> None:
    """arXiv 2311.12023: 2.75 bits and rank 64 in 8 bits are 2.95 (7B) and 2.85 (70B); 25.4 GB of weights."""
    asked = {"budget": "2.75bit", "budget_includes": "none", "rank": "64"}
    bits = {}
    for name, config in (("7b", LLAMA_2_7B), ("70b", LLAMA_2_70B)):
        plan = planned(config_alone(config, tmp_path / name), **asked)
        assert [each["name"] for each in plan["sizes"]][:2] == [
            "original",
            "quantized",
        ]  # nothing asks to prune
        bits[name] = row(plan, "quantized")
    assert round(bits["7b"]["bits_per_weight"], 2) == 2.95
    assert round(bits["70b"]["bits_per_weight"], 2) == 2.85
    assert round(bits["70b"]["bytes"] / 1e9, 1) == 25.4
    weights = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    sides = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    assert bits["70b"]["bits_per_weight"] == pytest.approx(2.75 + 8.127 * 64 * sides / weights, rel=1e-3)


@pytest.mark.usefixtures("no_weights")
def test_llama_31_70b_from_a_config_alone(tmp_path: Path) -> None:
    folder = config_alone(LLAMA_31_70B, tmp_path / "llama-3.1-70b")
    plan = planned(folder, ratio=0.5, budget="3bit", embeddings="8bit", memory="80GiB", align=True)
    assert (plan["source"], plan["parameters"]) == ("config", 70_553_706_496)
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    others = 2 * 128256 * 8192 + 161 * 8192
    full, small, low = (row(plan, name) for name in ("original", "pruned", "quantized"))
    assert full["bytes"] == pytest.approx(2 * (80 * layer + others), rel=1e-6)
    shape = plan["rounding"]["shape"]
    queries, kv, channels = (
        shape["kv_heads"] * shape["queries"] * 128,
        shape["kv_heads"] * 128,
        shape["channels"],
    )
    kept = 2 * 8192 * queries + 2 * 8192 * kv + 3 * 8192 * channels
    assert channels % 128 == 0
    assert plan["rounding"]["achieved"] == pytest.approx(1 - kept / layer)
    assert small["parameters"] == 80 * kept + others
    assert low["bits_per_weight"] == pytest.approx(3, rel=1e-6)
    expected = (3 * 80 * kept + 8.1 * 2 * 128256 * 8192) / 8 + 2 * 161 * 8192
    assert low["bytes"] == pytest.approx(expected, rel=0.005)
    verbs = [stage["verb"] for stage in plan["stages"]]
    assert verbs == ["prune", "align", "quantize", "train", "recover", "eval"]
    aligned = plan["stages"][1]
    device = next(each for each in aligned["resources"] if each["resource"] == "device memory")
    trained = small["parameters"] - 128256 * 8192
    assert device["needs"] > 16 * trained
    assert device["fits"] is False
    assert "larger" in aligned["change"] or "galore" in aligned["change"]
    assert [path.name for path in tmp_path.rglob("*")] == [folder.name, "config.json"]


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "phi3", "gemma2", "gpt2"])
def test_a_config_tells_what_headers_tell(kind: str, tmp_path: Path) -> None:
    """Names, shapes and dtypes: from files, and from the same folder without them."""
    folder = tiny_checkpoint(kind, tmp_path / "full", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored, source = headers_of(str(folder))
    alone, other = headers_of(str(config_alone(config, tmp_path / "alone")))
    assert (source, other) == ("headers", "config")
    assert {n: (stored.shape(n), stored.dtype(n)) for n in stored.names} == {
        n: (alone.shape(n), alone.dtype(n)) for n in alone.names
    }
    with pytest.raises(CompressError, match="planned, not stored"):
        alone.read(alone.names[0])


def test_layers_of_different_sizes_are_told_by_their_config(tiny: Path, tmp_path: Path) -> None:
    """What a cut wrote, from its files and from its config alone."""
    source = Checkpoint(tiny)
    arch = checkpoint_architecture(source)
    layers = [
        LayerStructure(
            kv_groups=torch.arange(kv, dtype=torch.int32), channels=torch.arange(c, dtype=torch.int32)
        )
        for kv, c in ((4, 32), (2, 64))
    ]
    slice_checkpoint(source, arch, structure_map(arch, layers, base_fingerprint=""), tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text(encoding="utf-8"))
    stored, _ = headers_of(str(tmp_path / "cut"))
    alone, source_of_sizes = headers_of(str(config_alone(config, tmp_path / "alone")))
    assert source_of_sizes == "config"
    assert {n: stored.shape(n) for n in stored.names} == {n: alone.shape(n) for n in alone.names}
    plan = planned(tmp_path / "alone", budget="4bit")
    assert plan["parameters"] == stored.parameters
    with pytest.raises(CompressError, match="differ"):
        planned(tmp_path / "alone", ratio=0.3)


@pytest.mark.parametrize(("bytes_each", "dtype"), [(4, torch.float32), (2, torch.bfloat16)])
def test_an_index_without_shards_tells_the_width(bytes_each: int, dtype: torch.dtype, tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA_2_7B.items() if key != "torch_dtype"}
    folder = config_alone(config | {"num_hidden_layers": 2}, tmp_path / "indexed")
    total = bytes_each * (2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 2 * 32000 * 4096)
    content = {
        "metadata": {"total_size": total},
        "weight_map": {"lm_head.weight": "model-00001-of-00009.safetensors"},
    }
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(content), encoding="utf-8")
    checkpoint, source = headers_of(str(folder))
    assert (source, checkpoint.bytes, checkpoint.dtype("lm_head.weight")) == ("index", total, dtype)
    index.write_text("[]", encoding="utf-8")
    with pytest.raises(CompressError, match="no weight_map"):
        headers_of(str(folder))


def test_of_a_hub_model_only_config_and_index_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = config_alone(LLAMA_2_7B, tmp_path / "snapshot"), []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("compress.model.load.snapshot_download", download)
    plan = run_verb("plan", Common(), {"model": "org/llama", "no_time": True}, quiet=True)
    assert asked == [("org/llama", ["config.json", "model.safetensors.index.json"])]
    assert plan["parameters"] == 6_738_415_616


def test_file_sizes_are_those_of_written_files(tiny: Path, tmp_path: Path) -> None:
    source = Checkpoint(tiny)
    with CheckpointWriter(tmp_path / "copy", config=source.config) as writer:
        for name in source.names:
            writer.add(name, source.read(name))
    size = (tmp_path / "copy" / "model.safetensors").stat().st_size
    assert abs(model_of(tmp_path / "copy").file_bytes - size) <= 64  # digits of offsets, in another order


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"params": "1.0M"}, "down to"),
        ({"ratio": 0.999}, "can remove"),
        ({"budget": "0.5bit"}, "below the smallest"),
    ],
)
def test_what_a_stage_refuses_is_refused(tiny: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressError, match=words):
        planned(tiny, **asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ratio": 0.5, "size": "1MB"}, "given together"),
        ({"rank": "many"}, "not understood"),
        ({"budget_includes": "some"}, "There is no"),
        ({"targets": "norms"}, "not understood"),
        ({"align": True, "budget": "4bit"}, "this chain has none"),
        ({"sequence": 1}, "too small"),
    ],
)
def test_wrong_options_are_wrong_usage(tiny: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        planned(tiny, **asked)


@given(bits=st.floats(2.6, 8.0), embeddings=st.sampled_from(["keep", "8bit"]))
def test_a_budget_in_bits_is_what_matrices_get(tiny: Path, bits: float, embeddings: str) -> None:
    settings = resolve(QuantizeSettings, {"budget": f"{bits:.3f}bit", "embeddings": embeddings}, "quick")
    full = model_of(tiny)
    small = quantized(full, settings)
    assert small.bits_per_weight == pytest.approx(float(f"{bits:.3f}"), abs=1e-3)
    rest = full.weight_bytes - 2 * full.linears
    vocabulary = 2 * 128 * 64 * 2
    if embeddings == "8bit":  # codes of 64, one scale byte a block, a second scale for 64 blocks
        rest += -vocabulary + 2 * (128 * 64 + 128 + 2 * 2 + 4)
    assert small.weight_bytes == pytest.approx(rest + small.bits_per_weight * full.linears / 8, abs=64)


@given(share=st.floats(0.45, 0.9))
def test_a_budget_in_bytes_is_kept_by_the_file(share: float) -> None:
    """Of a model large enough that headers do not decide."""
    full = PlannedModel(name="original", input=_made_up(layers=4, hidden=1024, channels=2816))
    budget = share * full.weight_bytes
    small = quantized(full, resolve(QuantizeSettings, {"budget": f"{budget / 1e6:.4f}MB"}, "quick"))
    assert budget - 200_000 <= small.file_bytes <= budget + 1


def _made_up(*, layers: int, hidden: int, channels: int) -> ModelInput:
    from compress.model.layout import expected_shapes

    arch = architecture(
        layers=layers,
        hidden=hidden,
        heads=16,
        kv_heads=4,
        head_dim=hidden // 16,
        channels=channels,
        vocab=2000,
    )
    shapes = expected_shapes(arch)
    config = {"model_type": "llama"}
    place = Path("made-up")
    checkpoint = PlannedCheckpoint(
        place, config=config, shapes=shapes, dtypes=dict.fromkeys(shapes, torch.bfloat16)
    )
    return ModelInput(name="made up", path=place, id="", checkpoint=checkpoint, architecture=arch)


def test_moments_on_disk_are_counted_as_they_are_written(tiny: Path, tmp_path: Path) -> None:
    full = model_of(tiny)
    arch = full.arch
    store = GramStore(tmp_path)
    for layer in range(arch.layers):
        specs = [spec for spec in arch.linears if spec.role in OUTPUTS]
        store.put(layer, {spec: torch.zeros([arch.linear_shape(spec)[1]] * 2) for spec in specs})
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    with_refit, without = (
        prune_footprint(
            full, full, resolve(PruneSettings, {"repair": repair, "repair_steps": 0}, "quick"), GROUND
        )
        for repair in ("refit", "none")
    )
    curvature = 8 * arch.layers * arch.hidden**2
    assert without.disk_peak == pytest.approx(2 * full.file_bytes + curvature)
    assert with_refit.disk_peak - without.disk_peak == pytest.approx(written, rel=0.02)


def test_merging_is_planned_where_it_is_asked_for(tiny: Path) -> None:
    model = model_of(tiny)
    plain, merged = (
        planned_chain(model.input, PlanSettings(merge=merge), "quick", torch.float32).stages[-2][0]
        for merge in (False, True)
    )
    assert plain.verb == "recover"
    assert merged.disk_kept - plain.disk_kept == model.file_bytes
    assert merged.disk_peak - plain.disk_peak >= model.file_bytes
    assert merged.phases[-1].name == "merge"


def test_operations_of_a_forward_pass_are_counted_by_torch(tiny: Path) -> None:
    """Against torch's own counter of products, with attention that computes all of its square."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager")
    arch, length = model_of(tiny).arch, 64
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(3, length, dtype=torch.long))
    square = 3 * 2 * length * length * arch.layers * arch.heads * arch.head_dim  # the half above the diagonal
    assert forward(arch, 3 * length, length) + square == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_recomputation_is_planned_wherever_is_trained(tiny: Path) -> None:
    """Less memory, and operations of a forward pass of the layers more for every token of a backward pass."""
    asked = {"ratio": 0.4, "align": True, "loram": True, "ratios": "0.5", "skip_first": 0, "skip_last": 0}
    plain, again = (planned(tiny, **asked, recompute=recompute) for recompute in (False, True))
    assert [again["settings"][verb]["recompute"] for verb in ("prune", "align", "train")] == [True] * 3
    stages = {stage["verb"]: stage for stage in again["stages"]}
    for before in plain["stages"]:
        after = stages[before["verb"]]
        assert after["process_bytes"] <= before["process_bytes"]
        more = after["operations"]["products"] - before["operations"]["products"]
        assert (more > 0) is (before["verb"] in ("prune", "align", "train"))
    trained = again["settings"]["train"]
    tokens = trained["steps"] * trained["micro_batch"] * trained["accumulation"] * trained["sequence"]
    small = pruned_architecture(tiny, again)
    before = next(stage for stage in plain["stages"] if stage["verb"] == "train")
    more = stages["train"]["operations"]["products"] - before["operations"]["products"]
    assert more == pytest.approx(forward(small, tokens, trained["sequence"], head=False))
    for left, right in zip(plain["rows"], again["rows"], strict=True):
        for label, parts in left["training"].items():
            assert right["training"][label]["activations"] < parts["activations"]


def test_a_verdict_names_the_limit_and_what_to_change() -> None:
    stage = Footprint(
        verb="train",
        phases=(
            Phase(name="load", device={"weights": 4e9}, staging=4e9, pages=3e9),
            Phase(name="train", device={"weights": 4e9, "activations": 9e9}, host={"text": 1e9}),
            Phase(name="reopen", beside=5e9),
        ),
        disk_peak=2e9,
        disk_kept=1e9,
    )
    work = Work(verb="train", products=6e12, doubles=2e12, written=4e9)
    speed = Speed(products=2e12, singles=1.0, doubles=1e12, write=2e9, read=1.0, seconds=1.0)
    apart = verdict(stage, work, Limits(device=int(12e9), host=int(64e9), disk=int(1e12)), speed)
    device, host, disk = apart["resources"]
    assert (device["needs"], device["phase"], device["fits"]) == (13e9, "train", False)
    assert host["needs"] == 5e9 + 2 * PROCESS  # the second process; pages are given back
    assert (disk["needs"], apart["limit"], apart["fits"]) == (2e9, "device memory", False)
    assert "--micro-batch" in apart["change"]
    assert apart["change"].startswith("--recompute")
    given = replace(stage, phases=(replace(stage.phases[1], name=f"train{AGAIN}"),))
    again = verdict(given, work, Limits(device=int(12e9), host=int(64e9), disk=int(1e12)), speed)
    assert "--recompute" not in again["change"]  # it is on
    assert again["change"] in apart["change"]
    alone = verdict(given, work, Limits(device=None, host=int(64e9), disk=int(1e12)), None)
    assert alone["resources"][0]["needs"] == 4e9 + 9e9 + 1e9 + PROCESS  # what is freed goes back
    assert apart["at_least_seconds"] == pytest.approx(3 + 2 + 2)
    together = verdict(stage, work, Limits(device=None, host=int(64e9), disk=int(1e9)), None)
    host, disk = together["resources"]
    kept = RETAINED * 9e9  # activations are gone when the second process is there, their memory is not
    assert host["needs"] == kept + 5e9 + 2 * PROCESS
    assert together["process_bytes"] == kept + 4e9 + 3e9 + PROCESS  # loading: mapped pages count
    assert (host["phase"], together["process_phase"]) == ("reopen", "load")
    assert sum(host["terms"].values()) == pytest.approx(host["needs"])
    assert (disk["fits"], together["fits"], together["limit"]) == (False, False, "disk")
    assert "--run" in together["change"]
    assert together["at_least_seconds"] is None
    unknown = verdict(stage, work, Limits(device=None, host=None, disk=int(1e12)), None)
    assert (unknown["resources"][0]["fits"], unknown["fits"]) == (None, True)


def test_the_machine_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    machine = capacity(tmp_path / "not" / "there", "cpu")
    assert machine.disk_free > 0
    assert machine.device_total is None
    assert 0 < machine.host_free <= machine.host_total
    speed = measure_speed(tmp_path / "not-there", "cpu", torch.float32, budget=0.01)
    assert min(speed.products, speed.singles, speed.doubles, speed.write, speed.read) > 0
    assert list(tmp_path.iterdir()) == []


def test_tables_fit_into_eighty_columns(tiny: Path, tmp_path: Path) -> None:
    command = ["plan", str(tiny), "--ratio", "0.3", "--budget", "3bit", "--memory", "100MB"]
    ran = CliRunner().invoke(app, command, env={"COLUMNS": "80", "COMPRESS_RUN": str(tmp_path)})
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("full + recovered", "small + adapter", "quantize", "recover"):
        assert any(line.startswith(name) for line in lines), name  # whole, not folded
    assert "does not fit" not in ran.stdout
    little = CliRunner().invoke(app, [*command[:-1], "10kB"], env={"COLUMNS": "80"})
    assert "train does not fit" in little.stdout


def test_json_has_everything(tiny: Path) -> None:
    ran = CliRunner().invoke(
        app, ["plan", str(tiny), "--json", "--effort", "standard", "--dtype", "bfloat16"]
    )
    assert ran.exit_code == 0, ran.output
    plan = json.loads(ran.stdout)
    assert (plan["effort"], plan["dtype"]) == ("standard", "bfloat16")
    assert {"sizes", "rounding", "stages", "machine", "speed", "settings", "rows"} <= plan.keys()
    assert plan["settings"]["train"]["steps"] == 400
    for stage in plan["stages"]:
        for resource in stage["resources"]:
            if resource["phase"] is not None:
                assert resource["needs"] == pytest.approx(sum(resource["terms"].values()))
        assert stage["at_least_seconds"] >= 0


def test_eval_holds_the_reference_beside_the_model_that_it_is_compared_with(tiny: Path) -> None:
    full = model_of(tiny)
    adapted = replace(full, name="small")
    entries = [(full, 0), (adapted, 1000)]
    arch, length = full.arch, 64
    alone = eval_footprint(entries, GROUND, length=length, windows=2)
    assert [phase.name for phase in alone.phases] == [
        "load original",
        "original",
        "load small + adapter",
        "small + adapter",
    ]
    both = eval_footprint(entries, GROUND, length=length, windows=2, reference=(full, 0))
    assert both.phases[:4] == alone.phases
    name = "small + adapter beside original"
    load, compare = both.phases[4:]
    assert (load.name, compare.name) == (f"load {name}", name)
    weights = 4 * full.parameters
    assert load.device == {"weights": weights, "reference": weights}
    logits = length * arch.vocab
    assert logits < CHUNK_ELEMENTS
    assert sum(compare.device.values()) == pytest.approx(
        2 * weights + 4 * 1000 + (2 * 4 + 20) * logits + 4 * length * (3 * arch.channels + 4 * arch.hidden)
    )
    test = {"length": length, "windows": 2}
    more = eval_work(entries, GROUND, **test, reference=(full, 0), kl_windows=1)
    less = eval_work(entries, GROUND, **test, reference=(full, 0))
    passes = (
        2 * forward(arch, length, length) + 2 * 1000 * length
    )  # of the model and of the reference, a window each
    assert more.products - less.products == pytest.approx(passes)


def test_a_plan_of_eval_that_has_no_room_for_two_models_says_what_to_leave_out(tmp_path: Path) -> None:
    plan = planned(config_alone(LLAMA_2_7B, tmp_path / "7b"), budget="4bit", memory="16GiB")
    found = next(stage for stage in plan["stages"] if stage["verb"] == "eval")
    device = next(each for each in found["resources"] if each["resource"] == "device memory")
    full = 2 * plan["parameters"]
    assert device["phase"] == "original + adapter beside original"
    assert device["needs"] > 2 * full
    assert found["fits"] is False
    assert found["change"].startswith("--kl-windows 0")


def test_a_check_fails_where_a_step_has_no_room(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ran(*options: str) -> tuple[int, dict[str, Any]]:
        found = CliRunner().invoke(app, ["plan", str(tiny), "--no-time", "--json", *options])
        return found.exit_code, json.loads(found.stdout)

    code, plan = ran("--check", "--memory-limit", "64GiB")
    assert (code, plan["ok"], plan["refused"]) == (0, True, [])
    code, plan = ran("--check", "--memory-limit", "64MiB")
    assert (code, plan["ok"]) == (1, False)
    assert plan["refused"] == [stage["verb"] for stage in plan["stages"]]
    assert ran("--memory-limit", "64MiB")[0] == 0  # not asked
    free = capacity(tmp_path, "cpu")
    monkeypatch.setattr("compress.pipelines.plan.capacity", lambda *_: replace(free, disk_free=10))
    code, plan = ran("--check")
    assert (code, plan["memory_limit"]) == (1, free.host_free)
    assert {"prune", "quantize"} <= set(plan["refused"])
    table = CliRunner().invoke(app, ["plan", str(tiny), "--no-time", "--check"])
    assert f"No room here for: {', '.join(plan['refused'])}." in " ".join(table.stdout.split())


def test_the_disk_is_that_of_the_workspace(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Path] = []

    def looked(place: Path, device: str) -> Any:
        seen.append(place)
        return capacity(place, device)

    monkeypatch.setattr("compress.pipelines.plan.capacity", looked)
    command = ["plan", str(tiny), "--no-time"]
    assert CliRunner().invoke(app, [*command, "--run", str(tmp_path / "a")]).exit_code == 0
    assert CliRunner().invoke(app, command, env={"COMPRESS_RUN": str(tmp_path / "b")}).exit_code == 0
    assert seen == [tmp_path / "a", tmp_path / "b"]
    assert list(tmp_path.iterdir()) == []
