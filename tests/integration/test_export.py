"""``compress export``: true to the chain's models in every form, self-contained, and nothing of this machine in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.adapters.attach import load_adapter
from compress.adapters.merge import merge_adapter
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model
from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from tests.commands import cli
from tests.fresh import ForkServer
from tests.hub import Hub
from tests.integration.common import PRUNING, TRAINING, logits, run
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("forked_reopen")

CUT: dict[str, Any] = PRUNING | {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "trials": 1}
LEARN: dict[str, Any] = TRAINING | {"lr": 0.05}
"""So much that an adapter that is left out, or scaled wrongly, shows."""
SMALL: dict[str, Any] = {"budget": "4.5bit", "objective": "frobenius"}
IDS = torch.randint(4, 128, (2, 24), generator=torch.Generator().manual_seed(5))


def common_of(kind: str, place: Path, text_file: Path) -> Common:
    full = tiny_checkpoint(kind, place / "full")
    return Common(
        run=place / "run", model=str(full), data=str(text_file), dtype="float32", threads=1, effort="quick"
    )


CHAINS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "lora on quantized": ("llama_gqa", [("prune", CUT), ("quantize", SMALL), ("train", LEARN)]),
    "the factors trained": (
        "qwen2",
        [("quantize", SMALL | {"rank": "4", "budget": "7bit"}), ("train", LEARN | {"method": "lq"})],
    ),
    "pissa": (
        "llama_tied",
        [("prune", CUT), ("train", LEARN | {"method": "pissa", "adapter_targets": "q,v,down"})],
    ),
    "a tied head adapted": (
        "llama_tied",
        [("quantize", SMALL), ("train", LEARN | {"adapter_targets": "all,lm_head", "rslora": True})],
    ),
    "everything in 8 bits": ("llama_tied", [("quantize", SMALL | {"embeddings": "8bit"}), ("train", LEARN)]),
    "the head in 8 bits adapted": (
        "qwen2",
        [
            ("quantize", SMALL | {"embeddings": "8bit"}),
            ("train", LEARN | {"adapter_targets": "all,lm_head"}),
        ],
    ),
    "weights stored transposed": ("gpt2", [("quantize", SMALL), ("train", LEARN)]),
    "transposed, not quantized": ("gpt2", [("prune", CUT), ("train", LEARN)]),
    "single weights removed": (
        "llama_gqa",
        [
            ("prune", {"shape": "semi", "pattern": "2:4", "criterion": "magnitude", "skip_last": 0}),
            ("train", LEARN),
        ],
    ),
    "layers differ": (
        "llama_gqa",
        [("prune", CUT | {"shape": "allocated", "trials": None}), ("quantize", SMALL), ("train", LEARN)],
    ),
}


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[str], Common]:
    """Common options of one of ``CHAINS``, which is made when it is first asked for and must not be changed."""
    made: dict[str, Common] = {}

    def chain(name: str) -> Common:
        if name not in made:
            kind, verbs = CHAINS[name]
            common = common_of(kind, tmp_path_factory.mktemp("chain"), text_file)
            for verb, given in verbs:
                run(verb, common, **{k: v for k, v in given.items() if v is not None})
            made[name] = common
        return made[name]

    return chain


def stages(common: Common) -> dict[str, Path]:
    """Folders of the stages by verb."""
    return {path.name.partition("-")[2]: path for path in common.run.glob("0*-*")}


@pytest.mark.parametrize("name", CHAINS)
def test_dense_is_what_the_chain_computes(name: str, chains: Callable[[str], Common]) -> None:
    common, verbs = chains(name), [verb for verb, _ in CHAINS[name][1]]
    small, adapter = stages(common)[verbs[-2]], stages(common)["train"]
    base = logits(load_model(small, dtype=torch.float32), IDS)
    expected = logits(load_adapter(load_model(small, dtype=torch.float32), adapter).eval(), IDS)
    assert (base - expected).abs().max() > 20 * 1e-4 * expected.abs().max()

    done = run_verb("export", Common(run=common.run), {"format": "dense"}, quiet=True)
    assert (done["what"], done["format"], done["fresh"]) == ("trained", "dense", True)
    folder = Path(done["path"])
    if name == "layers differ":
        network: Any = compress.load_model(folder, dtype=torch.float32)
    else:
        network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
    torch.testing.assert_close(logits(network, IDS), expected, rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    what = {"prune": "pruned", "quantize": "quantized"}[verbs[-2]]
    plain = run_verb("export", Common(run=common.run), {"what": what, "format": "dense"}, quiet=True)
    alone = load_model(Path(plain["path"]), dtype=torch.float32)
    torch.testing.assert_close(logits(alone, IDS), base, rtol=1e-4, atol=1e-4)


PACKED = (
    "lora on quantized",
    "the factors trained",
    "a tied head adapted",
    "everything in 8 bits",
    "weights stored transposed",
    "layers differ",
)


@pytest.mark.parametrize("name", PACKED)
def test_packed_is_quantized_and_computes_what_the_chain_does(
    name: str, chains: Callable[[str], Common]
) -> None:
    common = chains(name)
    small, adapter = stages(common)["quantize"], stages(common)["train"]
    base = logits(load_model(small, dtype=torch.float32), IDS)
    expected = logits(load_adapter(load_model(small, dtype=torch.float32), adapter).eval(), IDS)
    done = run_verb("export", Common(run=common.run), {"format": "packed"}, quiet=True)
    assert (done["what"], done["format"]) == ("trained", "packed")
    folder = Path(done["path"])
    found = logits(compress.load_model(folder, dtype=torch.float32).eval(), IDS)
    assert (found - expected).norm() < 0.1 * (base - expected).norm()
    before, after = (
        json.loads((path / "config.json").read_text())["quantization_config"]["matrices"]
        for path in (small, folder)
    )
    assert before.keys() == after.keys()
    rank, own = TRAINING["rank"], 4 if name == "the factors trained" else None
    for module, record in after.items():
        if module not in ("model.embed_tokens", "lm_head"):
            assert record["config"] == before[module]["config"]
            assert record["rank"] == (own if own is not None else before[module]["rank"] + rank)
            assert record["factor_config"]["bits"] == 8
    assert Checkpoint(folder).bytes < Checkpoint(small).bytes + adapter.stat().st_size + sum(
        path.stat().st_size for path in adapter.glob("*.safetensors")
    )


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("the head in 8 bits adapted", "is quantized and takes no factors"),
        ("transposed, not quantized", "no adapter on a quantized model"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    name: str, cause: str, tmp_path: Path, chains: Callable[[str], Common]
) -> None:
    ran = cli("export", "--run", chains(name).run, "--format", "packed", "--out", tmp_path / "out")
    assert ran.code != 0
    assert cause in ran.complaint[0]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, text_file: Path, fork_server: ForkServer) -> Path:
    """A whole chain in bfloat16 with an evaluation; its model folder has a card with a licence."""
    place = tmp_path_factory.mktemp("export")
    full = tiny_checkpoint("llama_gqa", place / "full", dtype=torch.bfloat16)
    (full / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Full\n", encoding="utf-8")
    common = Common(
        run=place / "run", model=str(full), data=str(text_file), dtype="float32", threads=1, effort="quick"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)
        for verb, given in (("prune", CUT), ("quantize", SMALL), ("train", LEARN), ("recover", {})):
            run(verb, common, **given)
        run("eval", common, sequence=32, windows=2, kl_windows=2, speed="none")
    return place / "run"


@pytest.fixture
def here(chain: Path, tmp_path: Path) -> Path:
    return tmp_path / "out"


def exported(chain: Path, *words: str | Path) -> dict[str, Any]:
    ran = cli("export", *words, "--run", chain, "--json")
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("what", ["pruned", "quantized", "trained", "recovered"])
def test_native_files_are_those_of_the_stage_and_open_as_the_card_says(
    what: str, chain: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(chain, what, "--out", here)
    shipped = files(here)
    stages = {
        "pruned": "01-prune",
        "quantized": "02-quantize",
        "trained": "02-quantize",
        "recovered": "04-recover",
    }
    for name, content in files(chain / stages[what]).items():
        if name in ("stage.json", "logits.safetensors") or name.startswith("merged/"):
            assert name not in shipped
        else:
            assert shipped[name] == content
    text = (here / "README.md").read_text(encoding="utf-8")
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == ("peft" if what == "recovered" else "transformers")
    (snippet,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    snippet = snippet.replace("path/to/this-folder", str(here)).replace(
        '"full"', f'"{chain.parent / "full"}"'
    )
    scope: dict[str, Any] = {}
    exec(compile(snippet, "<card>", "exec"), scope)
    expected = {
        "pruned": lambda: load_model(chain / "01-prune"),
        "quantized": lambda: load_model(chain / "02-quantize"),
        "trained": lambda: load_adapter(load_model(chain / "02-quantize"), chain / "03-train"),
        "recovered": lambda: PeftModel.from_pretrained(
            load_model(chain.parent / "full"), chain / "04-recover"
        ),
    }[what]()
    torch.testing.assert_close(
        logits(scope["model"].eval(), IDS), logits(expected.eval(), IDS), rtol=0.05, atol=0.05
    )


def test_a_dense_recovered_model_is_the_merged_one(chain: Path, here: Path, tmp_path: Path) -> None:
    exported(chain, "recovered", "--format", "dense", "--out", here)
    merge_adapter(Checkpoint(chain.parent / "full"), chain / "04-recover", tmp_path / "merged")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (here, tmp_path / "merged"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_dense_quantized_model_is_rounded_once(chain: Path, here: Path) -> None:
    exported(chain, "quantized", "--format", "dense", "--out", here)
    network: Any = load_model(chain / "02-quantize", dtype=torch.bfloat16)
    dense = load_file(here / "model.safetensors")
    checked = 0
    for name, module in network.named_modules():
        if hasattr(module, "dequantized_weight"):
            expected = module.dequantized_weight(torch.float32).to(torch.bfloat16)
            assert torch.equal(dense[f"{name}.weight"], expected)
            checked += 1
    assert checked == 14
    assert {tensor.dtype for tensor in dense.values()} == {torch.bfloat16}


def test_the_card_says_what_was_measured_and_nothing_of_this_machine(chain: Path, here: Path) -> None:
    exported(chain, "quantized", "--out", here)
    text = (here / "README.md").read_text(encoding="utf-8")
    rows = json.loads((chain / "05-eval" / "stage.json").read_text())["metrics"]["rows"]
    for row in rows:
        shown = f"| {row['name']} | {row['perplexity']:,.2f} |" in text
        assert shown == (row["name"] in ("original", "quantized"))
    assert rows[0]["protocol_line"] in text
    assert "prune" in text
    assert "quantize" in text
    assert "train" not in re.findall(r"\d\. `(\w+)`", text)
    for content in files(here).values():
        assert str(chain.parent).encode() not in content


def test_a_packed_model_does_not_claim_what_was_measured_before_its_factors_were_rounded(
    chain: Path, here: Path
) -> None:
    exported(chain, "trained", "--out", here)
    assert "## Measured" in (here / "README.md").read_text(encoding="utf-8")
    exported(chain, "trained", "--format", "packed", "--out", here, "--force")
    assert "## Measured" not in (here / "README.md").read_text(encoding="utf-8")


def test_what_was_not_measured_has_no_table(tmp_path: Path, text_file: Path) -> None:
    common = common_of("llama_gqa", tmp_path, text_file)
    run("prune", common, **CUT)
    run("eval", common, sequence=32, windows=2, kl_windows=0, speed="none")
    run("quantize", common, **SMALL)
    for what, measured in (("pruned", True), ("quantized", False)):
        out = tmp_path / what
        exported(common.run, what, "--out", out)
        assert ("## Measured" in (out / "README.md").read_text(encoding="utf-8")) == measured


def test_again_does_nothing_and_a_change_is_noticed(chain: Path, here: Path) -> None:
    assert exported(chain, "pruned", "--out", here)["fresh"]
    before = files(here)
    again = exported(chain, "pruned", "--out", here)
    assert not again["fresh"]
    assert files(here) == before
    (here / "config.json").write_text("{}", encoding="utf-8")
    cause, remedy = cli("export", "pruned", "--out", here, "--run", chain).complaint
    assert "changed files" in cause
    assert "--force" in remedy
    cause, _ = cli("export", "quantized", "--out", here, "--run", chain).complaint
    assert "holds another export" in cause
    assert exported(chain, "pruned", "--out", here, "--force")["fresh"]
    assert files(here) == before


def test_a_folder_beside_it_stays(chain: Path, here: Path) -> None:
    beside = here.with_name("out.partial")
    beside.mkdir()
    (beside / "draft.txt").write_text("mine", encoding="utf-8")
    exported(chain, "pruned", "--out", here)
    assert files(beside) == {"draft.txt": b"mine"}


def test_a_folder_of_something_else_is_never_replaced(chain: Path, here: Path) -> None:
    here.mkdir()
    (here / "thesis.txt").write_text("years of work", encoding="utf-8")
    cause, _ = cli("export", "pruned", "--out", here, "--run", chain, "--force").complaint
    assert "is no export" in cause
    assert files(here) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("original",), "is not one model that the chain has made"),
        (("quantised",), "no model 'quantised'"),
        (("aligned",), "has no aligned model"),
        (("all",), "is not one model"),
        (("pruned", "--format", "gguf"), "no format 'gguf'"),
        (("quantized", "--format", "packed"), "quantized is no adapter on a quantized model"),
        (("pruned", "--private"), "--private is about an upload"),
        (("pruned", "--push", "a/b/c"), "no name of a repository"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], cause: str, chain: Path, here: Path) -> None:
    ran = cli("export", *words, "--out", here, "--run", chain)
    assert ran.code == 2
    assert cause in ran.complaint[0]
    assert not here.exists()


def test_no_chain(tmp_path: Path, chain: Path) -> None:
    ran = cli("export", "--run", tmp_path / "nowhere")
    assert ran.code == 2
    assert "nothing to export" in ran.complaint[0]
    assert not (tmp_path / "nowhere").exists()
    near = cli("export", "--run", chain.with_name("runn"))
    assert f"--run {chain}" in near.complaint[1]


@pytest.mark.parametrize("form", ["native", "dense"])
def test_a_damaged_stage_is_not_given_away(form: str, tmp_path: Path, chain: Path) -> None:
    run_ = shutil.copytree(chain, tmp_path / "run")
    stage = run_ / "01-prune"
    tensors = load_file(stage / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})
    ran = cli("export", "pruned", "--run", run_, "--out", tmp_path / "out", "--format", form)
    assert ran.code == 1
    assert "model.safetensors has changed since" in ran.complaint[0]
    assert not list(tmp_path.glob("*out*"))


def test_what_a_stage_links_to_is_not_given_away(tmp_path: Path, chain: Path) -> None:
    run_ = shutil.copytree(chain, tmp_path / "run")
    (tmp_path / "secret").write_text("of nobody's business")
    (run_ / "01-prune" / "notes.txt").symlink_to(tmp_path / "secret")
    ran = cli("export", "pruned", "--run", run_, "--out", tmp_path / "out")
    assert ran.code == 1
    assert "notes.txt is a link that leads out of its folder" in ran.complaint[0]
    assert not list(tmp_path.glob("*out*"))


def test_an_interruption_leaves_nothing_behind(
    chain: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.pipelines.export.card", stop)
    ran = cli("export", "pruned", "--out", here, "--run", chain)
    assert ran.code == 130
    assert not list(here.parent.glob("*out*"))
    before = files(chain)
    monkeypatch.undo()
    assert exported(chain, "pruned", "--out", here)["fresh"]
    assert files(chain) == before


def test_an_adapter_on_the_original_is_exported_merged(tmp_path: Path, text_file: Path) -> None:
    common = common_of("llama_gqa", tmp_path, text_file)
    run("train", common, **LEARN)
    ran = cli("export", "--run", common.run, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "--format dense" in ran.complaint[1]
    done = run_verb("export", Common(run=common.run), {"format": "dense"}, quiet=True)
    expected = load_adapter(
        load_model(tmp_path / "full", dtype=torch.float32), common.run / "01-train"
    ).eval()
    got = AutoModelForCausalLM.from_pretrained(done["path"], dtype=torch.float32)
    torch.testing.assert_close(logits(got, IDS), logits(expected, IDS), rtol=1e-4, atol=1e-4)


def test_it_is_uploaded_with_its_card(chain: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_token")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        done = exported(chain, "quantized", "--out", here, "--push", "someone/model")
    assert done["address"] == f"{hub.address}/someone/model"
    assert hub.files == files(here)
    assert {"README.md", "config.json", "model.safetensors", "allocation.json"} <= hub.files.keys()
    with Hub(refuses=403) as closed:
        monkeypatch.setattr(constants, "ENDPOINT", closed.address)
        ran = cli("export", "quantized", "--out", here, "--push", "someone/model", "--run", chain)
    assert ran.code == 1
    assert "does not let this token write" in ran.complaint[0]
    assert files(here) == hub.files
