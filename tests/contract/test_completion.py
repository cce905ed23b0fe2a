"""What the shell completes: through the protocol of the completion scripts, and true to the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from compress.__main__ import app
from compress.cli import complete
from compress.data.files import SUFFIXES
from compress.data.sources import SOURCES
from compress.importance import CRITERIA
from compress.model.load import EMBEDDED
from compress.pipelines.chain_models import TITLES
from compress.pipelines.recipe import shipped
from compress.pipelines.setting_values import EFFORTS
from compress.pipelines.settings import VERBS
from compress.solvers.solve import SOLVERS


def completions(line: str) -> list[str]:
    """What bash gets for a line with the cursor at its end."""
    words = line.split(" ")
    result = CliRunner().invoke(
        app,
        [],
        env={"_COMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        prog_name="compress",
    )
    assert result.exit_code == 0, result.output
    return result.stdout.split()


def verbs() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def test_names_written_down_again_are_those_of_the_code() -> None:
    assert set(complete.SOLVERS) == set(SOLVERS)
    assert set(complete.TEXTS) == set(SOURCES)
    assert set(complete.TEXT_FILES) == set(SUFFIXES)
    assert complete.MODELS == (EMBEDDED,)
    assert (*TITLES, "all") == complete.CHAIN_MODELS
    assert complete.shipped_recipes() == shipped()


def test_verbs_and_options_complete() -> None:
    assert set(completions("compress ")) == set(verbs())
    assert completions("compress pr") == ["prune"]
    assert set(completions("compress prune --ra")) == {"--ratio", "--ratio-of", "--rank"}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_choice_completes(verb: str) -> None:
    found = 0
    for name, annotation in get_type_hints(VERBS[verb]).items():
        if get_origin(annotation) is Literal:
            option = f"--{name.replace('_', '-')}"
            assert completions(f"compress {verb} {option} ") == list(get_args(annotation))
            found += 1
    assert found > 0 or verb in ("recover", "eval")


def test_names_complete() -> None:
    assert completions("compress prune --criterion ") == CRITERIA.names()
    assert completions("compress quantize --solver h") == ["highs"]
    assert completions("compress eval --effort ") == list(EFFORTS)
    assert completions("compress run lo") == ["loram", "loraprune"]
    assert completions("compress generate hello --models qu") == ["quantized"]


def test_files_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine.yaml", "mine.txt", "model.gguf", "model.py"):
        (tmp_path / name).touch()
    (tmp_path / "model-folder").mkdir()
    (tmp_path / "model-folder" / "text.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert completions("compress run m") == ["mine.yaml", "model-folder/"]
    assert completions("compress prune --model m") == ["model-folder/", "model.gguf"]
    assert completions("compress train --data model-folder/") == ["model-folder/text.jsonl"]
    assert completions(f"compress train --data {tmp_path}/mi") == [f"{tmp_path}/mine.txt"]
    assert completions("compress train --data no/such/") == []
