"""Tasks through lm-eval, where it is installed: the same numbers as the built-in scorer's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.pipelines.dispatch import run_verb
from compress.pipelines.identity import TEXT
from compress.pipelines.settings import Common
from tests.tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # another project's warnings are not ours to fail on

CHOICES = [
    {"query": f"Question {n}: which of these?", "choices": ["one", "two words", "a third"], "gold": n % 3}
    for n in range(6)
]
TEXTS = [{"text": "A short text."}, {"text": "Another one, a little longer than the first."}]
SHARED = "test_split: test\ndataset_path: json\n"


def _task(folder: Path, name: str, rows: list[Any], body: str) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    head = f"task: {name}\n{SHARED}dataset_kwargs:\n  data_files:\n    test: {data}\n"
    (folder / f"{name}.yaml").write_text(head + body)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    _task(
        folder, "mine_choices", CHOICES,
        'output_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_target: "{{gold}}"\n'
        'doc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n',
    )  # fmt: skip
    _task(
        folder, "mine_rolling", TEXTS,
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n",
    )  # fmt: skip
    _task(
        folder, "mine_answers", TEXTS,
        'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "none"\n'
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 6\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n",
    )  # fmt: skip
    return folder


def test_local_tasks(tmp_path: Path, tasks: Path, text_file: Path) -> None:
    model = tiny_checkpoint("llama_gqa", tmp_path / "tiny")
    common = Common(run=tmp_path / "run", data=str(text_file), dtype="float32", effort="quick")
    given = {
        "models": [str(model)],
        "sequence": 32,
        "windows": 2,
        "speed": "none",
        "task": [str(tasks / "mine_choices.jsonl")],
        "lm_eval": "mine_choices,mine_rolling,mine_answers",
        "lm_eval_tasks": str(tasks),
    }
    record = run_verb("eval", common, given, quiet=True)
    (row,) = record["metrics"]["rows"]
    found = {(each["task"], each["metric"]): each for each in row["lm_eval"]}
    ours = row["tasks"][0]
    assert found["mine_choices", "acc"]["value"] == ours["accuracy"]
    assert found["mine_choices", "acc"]["standard_error"] == pytest.approx(ours["accuracy_error"])
    assert found["mine_choices", "acc_norm"]["value"] == ours["accuracy_norm"]
    assert found["mine_answers", "exact_match"]["value"] == 0.0

    network, tokenizer, nats, size = tiny_model("llama_gqa").double(), tiny_tokenizer(), 0.0, 0
    for each in TEXTS:
        ids = torch.tensor([[1, *tokenizer(each["text"], add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            log_p = network(input_ids=ids).logits[0].log_softmax(-1)
        nats -= float(log_p[:-1].gather(1, ids[0, 1:, None]).sum())
        size += len(each["text"].encode())
    assert found["mine_rolling", "bits_per_byte"]["value"] == pytest.approx(
        nats / size / math.log(2), rel=1e-5
    )
    assert set(record["inputs"]) == {"tiny", "lm-eval", "lm-eval tasks", "task mine_choices", TEXT}
