"""Nothing private is written down or printed, and whoever only looks may look while a stage works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from compress.pipelines.workspace import Workspace, write_json
from tests.commands import cli
from tests.faults.scene import PRUNE, QUANTIZE, TRAIN
from tests.sources import ROOT
from tests.tiny import tiny_checkpoint

TOKEN = "hf_" + "Zq7" * 11
WORD = "xylophonist"
PROMPT = "platypus"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, fork_server: object) -> Path:
    """A pruned, quantized and trained model, made of a text with a telling word, with a token about."""
    folder = tmp_path_factory.mktemp("safety")
    tiny_checkpoint("llama_gqa", folder / "model")
    documents = [" ".join(f"The {WORD} {i} meets {j}." for j in range(40)) for i in range(90)]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)  # type: ignore[attr-defined]
        patch.setenv("HF_TOKEN", TOKEN)
        for command in (PRUNE, QUANTIZE, TRAIN):
            ran = cli(*command, *common(folder))
            assert ran.code == 0, ran.err
            said.append(ran.out + ran.err)
    (folder / "said").write_text("".join(said), encoding="utf-8")
    return folder


def common(folder: Path) -> tuple[str, ...]:
    given = {"--run": folder / "run", "--model": folder / "model", "--data": folder / "text.txt"}
    return (*(str(part) for pair in given.items() for part in pair), "--dtype", "float32")


def written(folder: Path) -> str:
    """All text that lies in a workspace, and all that was said."""
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    return "".join(
        p.read_bytes().decode("latin-1") for p in [*files, folder / "said"] if p.name not in tokenizer
    )


def test_neither_text_nor_token_is_written_or_printed(chain: Path) -> None:
    found = written(chain)
    assert "data_protocol" in found
    assert WORD not in found
    assert TOKEN not in found


def test_a_prompt_is_answered_and_forgotten(chain: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (chain / "run").rglob("*")}
    ran = cli(
        "generate",
        PROMPT,
        "--tokens",
        "2",
        "--models",
        "pruned",
        "--run",
        chain / "run",
        "--dtype",
        "float32",
    )
    assert ran.code == 0, ran.err
    assert PROMPT not in written(chain)
    assert {p: p.stat().st_mtime_ns for p in (chain / "run").rglob("*")} == before


@pytest.mark.parametrize("arguments", [("doctor",), ("plan", "nobody/nothing-of-this-name", "--no-time")])
def test_a_hub_token_is_never_printed(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    ran = cli(*arguments)
    assert ran.out + ran.err
    assert TOKEN not in ran.out + ran.err


def test_whoever_looks_need_not_wait(chain: Path, tmp_path: Path) -> None:
    """A stage is at work, half of it done: verify and report tell of what is finished; eval would write, and waits."""
    run = tmp_path / "run"
    shutil.copytree(chain / "run", run)
    workspace = Workspace(run)
    with workspace.locked():
        workspace.drop_from("train")
        partial = workspace.open_partial("train", {"steps": 9}, {"model": "x"}, redo=False)
        (partial / "training").mkdir()
        (partial / "training" / "half").write_bytes(b"x")
        verified = cli("verify", "--run", run)
        assert verified.code == 0, verified.err
        assert "03-train" not in verified.out
        reported = cli("report", "--run", run, "--output", tmp_path / "page.html")
        assert reported.code == 0, reported.err
        assert (tmp_path / "page.html").stat().st_size > 1000
        for command in (("eval",), ("quantize", "--redo")):
            refused = cli(*command, "--run", run)
            assert refused.code == 1
            assert refused.complaint[0] == f"Another compress command is working in {run}."
    assert (partial / "training" / "half").read_bytes() == b"x"


def test_what_a_killed_command_had_begun_to_replace_is_not_shown(chain: Path, tmp_path: Path) -> None:
    """Killed while ``--redo`` drops the old stage: readers see the stages before it, the next command ends the work."""
    run = tmp_path / "run"
    shutil.copytree(chain / "run", run)
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    shutil.copytree(run / "02-quantize", run / "02-quantize.partial")
    (run / "02-quantize" / "model.safetensors").unlink()
    pending = {
        "from": "02-quantize.partial",
        "to": "02-quantize",
        "drop": ["02-quantize", "03-train"],
        "scratch": [],
    }
    write_json(run / "run.json", manifest | {"stages": ["01-prune"], "pending": pending})
    assert cli("verify", "--run", run).code == 0
    with Workspace(run).locked():
        pass
    assert [stage.path.name for stage in Workspace(run).stages] == ["01-prune", "02-quantize"]
    assert sorted(p.name for p in run.iterdir()) == [".lock", "01-prune", "02-quantize", "run.json"]
    assert cli("verify", "--run", run).code == 0


def test_no_archive_is_opened() -> None:
    wanted = re.compile(r"^\s*(?:import|from) (?:zipfile|tarfile|lzma|py7zr)\b|unpack_archive", re.MULTILINE)
    sources = [file for part in ("compress", "pipelines", "solvers") for file in (ROOT / part).rglob("*.py")]
    assert len(sources) > 100
    assert [file.name for file in sources if wanted.search(file.read_text(encoding="utf-8"))] == []


def test_every_rule_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for rule, _, tests in rows:
        for test in tests.replace("`", "").split(","):
            file, _, name = test.strip().partition("::")
            assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), f"{rule}: {test}"
