"""``recover`` and ``export`` hand the products of factors to the device they are given; here to simulated ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.adapters import merge, recover
from compress.adapters.adapter_file import AdapterFile
from compress.export import dense
from compress.model.checkpoint import Checkpoint
from compress.pipelines import export as export_verb
from compress.pipelines import recover as recover_verb
from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from tests.integration.common import TRAINING, run
from tests.integration.test_train_options import SHORT
from tests.tiny import tiny_checkpoint
from tests.unit.adapters.simulated import SimulatedLanes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_reopen")]


def test_products_go_to_the_device(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full", dtype=torch.bfloat16)
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    run("prune", common, **SHORT)
    run("train", common, **TRAINING, method="pissa", adapter_targets="q,v,down")
    made: list[tuple[str, str, SimulatedLanes]] = []

    def lanes(who: str, device: str) -> SimulatedLanes:
        made.append((who, device, SimulatedLanes(len(made))))
        return made[-1][2]

    for name, module in (("recover", recover), ("merge", merge), ("dense", dense)):
        monkeypatch.setattr(module, "device_lanes", lambda device, name=name: lanes(name, device))
    for verb in (recover_verb, export_verb):
        monkeypatch.setattr(verb, "device_and_dtype", lambda common: ("cuda:3", torch.float32))
    folder = Path(run("recover", common, merge=True, compress_rank=3)["path"])
    verified = run_verb("verify", common, {}, quiet=True)
    assert verified["ok"], [check for check in verified["checks"] if check["result"] == "differs"]
    exported = Checkpoint(Path(run("export", common, what="recovered", format="dense")["path"]))
    assert [(who, device) for who, device, _ in made] == [
        ("recover", "cuda:3"),
        ("merge", "cuda:3"),
        ("dense", "cuda:3"),
    ]
    assert all(lanes.events.count(("done", "compute")) > 0 for _, _, lanes in made)
    original, merged = Checkpoint(full), Checkpoint(folder / "merged")
    with AdapterFile(folder) as file:
        adapted = {f"{module}.weight": module for module in file.modules}
        assert {file.scaling(module).rank for module in file.modules} == {3}
        for name in original.names:
            if name not in adapted:
                assert torch.equal(merged.read(name), original.read(name))
                continue
            factor_a, factor_b = file.factors(adapted[name])
            exact = original.read(name).double()
            exact += file.scaling(adapted[name]).value * (factor_b.double() @ factor_a.double())
            for found in (merged.read(name), exported.read(name)):
                torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)
