from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from compress.benchmarks import protocol
from compress.data.sources import data_root
from compress.errors import CompressError, UsageError
from tests.tiny import tiny_model, tiny_tokenizer

needs_wikitext = pytest.mark.skipif(
    data_root() is None or not (Path(str(data_root())) / "wikitext-2-raw/wiki.test.raw").is_file(),
    reason="the raw WikiText-2 test text is not at hand",
)


@needs_wikitext
def test_the_test_windows_are_those_of_the_published_protocol() -> None:
    tokenizer = tiny_tokenizer()
    windows = protocol.test_windows(tokenizer, length=64, tokens=1000)
    assert windows.ids.shape == (15, 64)
    assert windows.protocol["sha256"] == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
    assert (windows.protocol["split"], windows.protocol["bos"], windows.protocol["stride"]) == (
        "test",
        False,
        64,
    )
    lines = (Path(str(data_root())) / "wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8").split("\n")
    joined = "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines[:60])
    ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
    assert windows.ids.flatten().tolist() == ids[: 15 * 64]
    assert len(protocol.test_windows(tokenizer, length=64, tokens=10)) == 1


def test_a_score_is_the_mean_over_all_predicted_tokens() -> None:
    windows = protocol.calibration(tiny_tokenizer(), "pydoc", 512, seed=3, length=32)
    assert windows.ids.shape == (16, 32)
    assert windows.protocol["split"] == "train"
    again = protocol.calibration(tiny_tokenizer(), "pydoc", 512, seed=3, length=32)
    other = protocol.calibration(tiny_tokenizer(), "pydoc", 512, seed=4, length=32)
    assert torch.equal(windows.ids, again.ids)
    assert not torch.equal(windows.ids, other.ids)
    model = tiny_model("llama_gqa")
    found = protocol.score(model, windows)
    with torch.no_grad():
        logits = model(windows.ids).logits.double()
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), windows.ids[:, 1:].flatten(), reduction="none"
    ).view(16, -1)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    means = losses.mean(dim=1)
    assert found["standard_error"] == pytest.approx(float(means.std() / 4), rel=1e-4)
    assert "pydoc train" in found["protocol_line"]
    assert found["protocol"]["tokens_scored"] == 16 * 31


def test_rows_are_on_disk_at_once_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.json"
    identity = {"benchmark": "pruning", "length": 512}
    rows = protocol.Rows(path, identity)
    assert not rows.has("magnitude 0.5")
    assert not path.exists()
    rows.put("magnitude 0.5", {"perplexity": 12.5})
    again = protocol.Rows(path, identity)
    assert again.has("magnitude 0.5")
    assert again.get("magnitude 0.5") == {"perplexity": 12.5}
    again.put("lora 0.5", {"perplexity": 11.5})
    again.put("magnitude 0.5", {"perplexity": 13.5})
    assert list(protocol.Rows(path, identity).rows.items()) == [
        ("lora 0.5", {"perplexity": 11.5}),
        ("magnitude 0.5", {"perplexity": 13.5}),
    ]
    assert json.loads(path.read_text())["identity"] == identity
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_rows_of_another_identity_or_machine_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    protocol.Rows(path, {"length": 512}).put("a", {})
    with pytest.raises(UsageError, match="length: 512 -> 2048"):
        protocol.Rows(path, {"length": 2048})
    monkeypatch.setattr(protocol, "host", lambda: {"device": "another"})
    with pytest.raises(UsageError, match="device: cpu -> another"):
        protocol.Rows(path, {"length": 512})
    path.write_text("{")
    with pytest.raises(CompressError, match="cannot be read"):
        protocol.Rows(path, {"length": 512})
