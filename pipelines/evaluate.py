"""``compress eval``: one table over the original, every stage of the chain, and full + recovered."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compress.adapters.attach import load_adapter
from compress.data.sources import default_source
from compress.data.windows import Windows, token_windows
from compress.evaluate.latency import throughput
from compress.evaluate.memory import PeakMemory, file_bytes
from compress.evaluate.perplexity import mean_loss, perplexity
from compress.evaluate.protocol import protocol_line
from compress.model.load import load_model, load_tokenizer
from compress.pipelines.measure import WINDOWS, check_length, validation_windows
from compress.pipelines.model_input import ModelInput, device_and_dtype, open_model, original
from compress.pipelines.reporter import human_bytes, human_count
from compress.pipelines.settings import EvalSettings
from compress.pipelines.stage import Context, Outcome, run_stage, settings_dict
from compress.pipelines.text import read_text
from compress.pipelines.verify_model import weights_of
from compress.pipelines.workspace import FORMAT_VERSION, read_json, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row to measure: a model, with or without an adapter."""

    name: str
    model: Path
    adapter: Path | None
    parameters: int
    id: str


def evaluate(context: Context, settings: EvalSettings) -> Outcome:
    """Measure everything the chain has made; see ``compress eval --help``.

    Raises:
        UsageError: ``--sequence`` is above the model's positions.
    """
    full = original(context)
    check_length(full.path, settings.sequence)
    entries = list_entries(context, full)
    device, dtype = device_and_dtype(context.common)
    source = context.common.data or default_source()
    trained = context.workspace.find("train")
    training_source = str(trained.record["config"]["data"]) if trained is not None else source
    config = settings_dict(settings) | {
        "data": source,
        "held_out": training_source,
        "held_out_windows": WINDOWS[context.common.effort or "quick"],
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
    }

    def work(folder: Path) -> Mapping[str, Any]:
        tokenizer = load_tokenizer(full.path)
        text = read_text(context, source, "test", full.path)
        windows = token_windows(text, tokenizer, length=settings.sequence, count=settings.windows)
        held_out = validation_windows(context, full.path, training_source, length=settings.sequence)
        rows, protocol = [], {}
        finished = folder / "rows"
        finished.mkdir(exist_ok=True)
        for entry in entries:
            done = finished / f"{entry.id[:16]}.json"
            if not done.is_file():
                write_json(done, measure(context, entry, windows, held_out, device, dtype))
            row = read_json(done)
            protocol = row.pop("protocol")
            rows.append(row)
        shutil.rmtree(finished)
        return {
            "rows": rows,
            "protocol": protocol,
            "protocol_line": protocol_line(protocol),
            "held_out_protocol": dict(held_out.protocol),
        }

    outcome = run_stage(
        context, "eval", config=config, inputs={entry.name: entry.id for entry in entries}, work=work
    )
    if outcome.stage is not None:
        show(context, outcome.stage.record["metrics"])
    return outcome


def list_entries(context: Context, full: ModelInput) -> list[Entry]:
    """Original, each model stage, trained small model, and full + recovered, as far as they exist."""
    workspace = context.workspace
    parameters = weights_of(full.checkpoint)
    entries = [Entry(name="original", model=full.path, adapter=None, parameters=parameters, id=full.id)]
    names = {"prune": "pruned", "align": "aligned", "quantize": "quantized"}
    for stage in workspace.stages:
        metrics = stage.record["metrics"]
        last = entries[-1]
        if stage.verb in names:
            parameters = metrics["after"]["parameters"]
            entries.append(
                Entry(
                    name=names[stage.verb], model=stage.path, adapter=None, parameters=parameters, id=stage.id
                )
            )
        elif stage.verb == "train":
            small = workspace.model_before("train")
            entries.append(
                Entry(
                    name="small + adapter",
                    model=small.path if small is not None else full.path,
                    adapter=stage.path,
                    parameters=last.parameters,
                    id=stage.id,
                )
            )
        elif stage.verb == "recover":
            onto = stage.record["config"].get("onto")
            whole = full if onto is None else open_model(context, str(onto))
            entries.append(
                Entry(
                    name="full + recovered",
                    model=whole.path,
                    adapter=stage.path,
                    parameters=weights_of(whole.checkpoint),
                    id=stage.id,
                )
            )
    return entries


def measure(
    context: Context, entry: Entry, windows: Windows, held_out: Windows, device: str, dtype: Any
) -> dict[str, Any]:
    """Everything about one row, as JSON values."""
    with PeakMemory(device) as peak:
        network: PreTrainedModel = load_model(entry.model, dtype=dtype, device=device)
        if entry.adapter is not None:
            network = load_adapter(network, entry.adapter).eval()
        with context.reporter.bar(f"eval {entry.name}") as progress:
            result = perplexity(network, windows, batch_size=4, progress=progress)
        loss = mean_loss(network, held_out, batch_size=4)
        speed = throughput(network, windows.ids[:1], decode_tokens=8, repeats=2)
    size = file_bytes(entry.model) + (file_bytes(entry.adapter) if entry.adapter is not None else 0)
    return {
        "format_version": FORMAT_VERSION,
        "name": entry.name,
        "parameters": entry.parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / entry.parameters,
        "perplexity": result.value,
        "standard_error": result.standard_error,
        "held_out_loss": loss,
        "tokens_per_second": speed.prefill_tokens_per_second,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "peak_memory_bytes": peak.device_bytes or peak.host_bytes,
        "protocol": dict(result.protocol),
    }


def show(context: Context, metrics: Mapping[str, Any]) -> None:
    """Print the table and its protocol."""
    rows = metrics["rows"]
    context.reporter.table(
        "quality and size",
        ("model", "parameters", "bytes", "bits/param", "perplexity", "held-out loss"),
        [
            (
                row["name"],
                human_count(row["parameters"]),
                human_bytes(row["bytes"]),
                f"{row['bits_per_weight']:.2f}",
                f"{row['perplexity']:.2f}",
                f"{row['held_out_loss']:.4f}",
            )
            for row in rows
        ],
    )
    context.reporter.table(
        "speed and memory",
        ("model", "prefill tokens/s", "decode tokens/s", "peak memory"),
        [
            (
                row["name"],
                f"{row['tokens_per_second']:.0f}",
                f"{row['decode_tokens_per_second']:.1f}",
                human_bytes(row["peak_memory_bytes"]),
            )
            for row in rows
        ],
    )
    context.reporter.out.print(f"perplexity: {metrics['protocol_line']}", markup=False)
