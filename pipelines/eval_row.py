"""One model of an evaluation, measured alone; then its predictions beside those of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.adapters.attach import load_adapter
from compress.data.windows import Windows
from compress.errors import CompressError
from compress.evaluate.divergence import divergence
from compress.evaluate.harness import run_harness
from compress.evaluate.latency import throughput
from compress.evaluate.memory import PeakMemory, file_bytes, resident_bytes
from compress.evaluate.perplexity import mean_loss, perplexity
from compress.evaluate.protocol import protocol_line, speed_line
from compress.evaluate.saturation import saturation
from compress.evaluate.task_file import Task
from compress.evaluate.tasks import score_task
from compress.evaluate.text_rates import text_rates
from compress.model.load import load_model
from compress.pipelines.eval_entries import Entry
from compress.pipelines.eval_text import Reading
from compress.pipelines.measure import positions
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import EvalSettings
from compress.pipelines.workspace import FORMAT_VERSION

DECODE_TOKENS = 8
"""Tokens decoded after a window at batch 1."""

SATURATION_PROMPT = 32
"""Prompt tokens of every sequence while the batch grows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """How every model of an evaluation is measured.

    Attributes:
        reporter: Shows progress.
        settings: Of the verb.
        device: Torch device.
        dtype: Compute dtype.
        tasks: Local task files, with ``--task-delimiter`` between context and choice.
    """

    reporter: Reporter
    settings: EvalSettings
    device: str
    dtype: torch.dtype
    tasks: Sequence[Task]

    def load(self, entry: Entry) -> Any:
        """The model of an entry with its adapter, in evaluation mode.

        Raises:
            CompressError: The checkpoint cannot be loaded here, or the adapter does not fit it.
        """
        try:
            network: Any = load_model(entry.model, dtype=self.dtype, device=self.device)
        except ImportError as error:
            raise CompressError(
                f"{entry.name} needs a library that is not installed: {' '.join(str(error).split())}",
                "Install it, or leave this model out.",
            ) from error
        if entry.adapter is None:
            return network
        return load_adapter(network, entry.adapter)


def measure(bench: Bench, entry: Entry, reading: Reading, held_out: Windows | None) -> dict[str, Any]:
    """Everything about one model but its distance from the reference, as JSON values."""
    settings, reporter, windows = bench.settings, bench.reporter, reading.windows
    row: dict[str, Any] = {"format_version": FORMAT_VERSION, "name": entry.name}
    with PeakMemory(bench.device) as peak:
        network = bench.load(entry)
        resident = resident_bytes(network)
        with reporter.bar(f"eval {entry.name}") as progress:
            result = perplexity(network, windows, progress=progress)
        if held_out is not None:
            row["held_out_loss"] = mean_loss(network, held_out)
        if settings.speed != "none":
            repeats = 2 if settings.speed == "quick" else 5
            prompt = windows.ids[:1, : max(1, positions(entry.model) - DECODE_TOKENS)]
            speed = throughput(network, prompt, decode_tokens=DECODE_TOKENS, repeats=repeats)
            row["tokens_per_second"] = speed.prefill_tokens_per_second
            row["decode_tokens_per_second"] = speed.decode_tokens_per_second
            row["speed_protocol"] = speed.to_dict()
            row["speed_protocol_line"] = speed_line(row["speed_protocol"])
    if settings.speed == "full":
        with reporter.bar(f"saturate {entry.name}") as progress:
            row["saturation"] = saturation(
                network, windows.ids[0, :SATURATION_PROMPT], progress=progress
            ).to_dict()
    if bench.tasks:
        row["tasks"] = [_scored(bench, network, reading, task, entry.name) for task in bench.tasks]
    if settings.lm_eval is not None:
        with reporter.bar(f"lm-eval {entry.name}") as progress:
            row["lm_eval"] = run_harness(
                network,
                reading.tokenizer,
                settings.lm_eval,
                include=settings.lm_eval_tasks,
                rows=settings.task_rows,
                bos=settings.bos,
                progress=progress,
            )
    size = file_bytes(entry.model) + (file_bytes(entry.adapter) if entry.adapter is not None else 0)
    rates = None if reading.extent is None else text_rates(result, reading.extent)
    protocol = dict(result.protocol)
    return row | {
        "parameters": entry.parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / entry.parameters,
        "resident_bytes": resident,
        "peak_memory_bytes": peak.device_bytes or peak.host_bytes,
        "peak_memory_of": "device" if peak.device_bytes else "host",
        "perplexity": result.value,
        "standard_error": result.standard_error,
        "perplexity_interval": None if result.interval is None else list(result.interval),
        "word_perplexity": None if rates is None else rates.word_perplexity,
        "bits_per_byte": None if rates is None else rates.bits_per_byte,
        "words_scored": None if rates is None else rates.words,
        "bytes_scored": None if rates is None else rates.bytes,
        "protocol": protocol,
        "protocol_line": protocol_line(protocol),
    }


def _scored(bench: Bench, network: Any, reading: Reading, task: Task, name: str) -> dict[str, Any]:
    with bench.reporter.bar(f"{task.name} {name}") as progress:
        return score_task(
            network,
            reading.tokenizer,
            task,
            delimiter=delimiter_of(bench.settings),
            bos=bench.settings.bos,
            progress=progress,
        ).to_dict()


def delimiter_of(settings: EvalSettings) -> str:
    r"""``--task-delimiter`` with its ``\n`` and ``\t`` as the characters they stand for."""
    return settings.task_delimiter.replace("\\n", "\n").replace("\\t", "\t")


def compare(
    bench: Bench, entry: Entry, network: Any, reading: Reading, reference: Any, reference_reading: Reading
) -> dict[str, Any]:
    """KL divergence and top-1 agreement with the reference as JSON values, or a note that says why there are none."""
    count = min(bench.settings.kl_windows, len(reading.windows), len(reference_reading.windows))
    blank = {"format_version": FORMAT_VERSION, "divergence": None}
    if not reading.same_tokens(reference_reading, count):
        return blank | {"note": f"{entry.name} is not compared with the reference: their tokenizers differ."}
    windows = Windows(
        ids=reading.windows.ids[:count],
        labels=reading.windows.labels[:count],
        protocol=reading.windows.protocol,
    )
    vocabularies = [int(m.config.get_text_config().vocab_size) for m in (network, reference)]
    if vocabularies[0] != vocabularies[1]:
        return blank | {
            "note": f"{entry.name} is not compared with the reference: it predicts {vocabularies[0]} tokens, "
            f"the reference {vocabularies[1]}."
        }
    with bench.reporter.bar(f"compare {entry.name}") as progress:
        found = divergence(network, reference, windows, progress=progress)
    return blank | {"divergence": found.to_dict(), "note": None}
