"""Records as the verbs write them, filled with plausible numbers."""

from __future__ import annotations

import math
import random
from typing import Any

KINDS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
PROTOCOL = (
    'wikitext2 test, sha256 696cca6b65a1, join "\\n\\n", no BOS, length 512, 40 windows, float32 on cpu'
)


def sample_run(layers: int = 30, steps: int = 60) -> dict[str, Any]:
    """A whole chain: prune, quantize, train, recover, eval."""
    g = random.Random(0)
    shared = {
        "format_version": 1,
        "seed": 0,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "compress": "0.1.0"},
        "host": {"system": "Linux", "machine": "x86_64", "threads": 2, "device": "cpu"},
    }

    def stage(number: int, verb: str, command: list[str], took: float, **rest: Any) -> dict[str, Any]:
        return {
            **shared,
            "verb": verb,
            "id": f"{number:x}" * 64,
            "command": ["compress", verb, *command],
            "folder": f"{number:02d}-{verb}",
            "inputs": {"model": f"{number - 1:x}" * 64},
            "effort": "quick",
            "seconds": took,
            "peak_memory_bytes": 1_900_000_000 + 1e8 * number,
            "memory_timeline": {
                "interval_seconds": 1.0,
                "host_bytes": [int(g.uniform(0.6e9, 1.9e9)) for _ in range(int(took))],
            },
            **rest,
        }

    def losses(start: float, end: float) -> list[float]:
        return [
            round(end + (start - end) * math.exp(-4 * n / steps) + g.gauss(0, 0.08), 5) for n in range(steps)
        ]

    pruned = {"parameters": 81_402_048, "bytes": 162_804_096, "decoder_parameters": 53_084_160}
    matrices = [
        {
            "name": f"model.layers.{layer}.{kind}_proj",
            "bits": (bits := g.choice([2, 2, 3, 3, 3, 4])),
            "block_size": g.choice([32, 64]),
            "rank": (rank := g.choice([0, 0, 0, 4, 8])),
            "bits_per_weight": bits + 0.128 + 0.02 * rank + g.random() * 0.2,
            "relative_error": g.uniform(0.05, 0.3),
            "relative_output_error": g.uniform(0.01, 0.2),
        }
        for layer in range(layers)
        for kind in KINDS
    ]
    rows = [
        ("original", 134_515_008, 269_060_552, 16.0, 29.19, 3.11, 812, 21.4),
        ("pruned", 81_402_048, 162_804_096, 16.0, 61.84, 3.74, 1304, 33.0),
        ("quantized", 81_402_048, 75_102_208, 7.38, 74.51, 3.93, 930, 24.2),
        ("small + adapter", 81_402_048, 78_300_160, 7.7, 55.27, 3.52, 790, 19.9),
        ("full + recovered", 134_515_008, 273_900_000, 16.29, 28.02, 2.98, 741, 18.8),
    ]
    return {
        "title": "SmolLM2-135M-Instruct",
        "created": "2026-05-04T12:00:00+00:00",
        "stages": [
            stage(
                1,
                "prune",
                ["--ratio", "0.5"],
                141.2,
                config={"ratio": 0.5, "criterion": "lora", "steps": steps, "targets": "heads,mlp"},
                metrics={
                    "before": {
                        "parameters": 134_515_008,
                        "bytes": 269_030_016,
                        "decoder_parameters": 106_168_320,
                        "perplexity": 30.2,
                        "standard_error": 0.02,
                        "protocol_line": PROTOCOL,
                    },
                    "after": {
                        **pruned,
                        "perplexity": 61.8,
                        "standard_error": 0.02,
                        "protocol_line": PROTOCOL,
                    },
                    "requested_ratio": 0.5,
                    "achieved_ratio": 0.4986,
                    "reason": "Nearest to 50.0%: 2 of 3 KV groups and 704 of 1536 channels stay.",
                    "criterion": "lora",
                    "shape": {"kv_heads": 2, "queries": 3, "channels": 704},
                    "original": {"kv_heads": 3, "queries": 3, "channels": 1536, "layers": layers},
                    "certificate": None,
                    "losses": losses(3.4, 3.9),
                    "trials": [
                        {
                            "kv_heads": groups,
                            "queries": 3,
                            "channels": channels,
                            "loss": 3.5 + rise,
                            "rise": rise,
                            "predicted": 0.8 * rise,
                        }
                        for groups, channels, rise in ((2, 704, 0.412), (1, 944, 0.655), (3, 464, 0.538))
                    ],
                    "kept": {
                        "kv_groups": [sorted(g.sample(range(3), 2)) for _ in range(layers)],
                        "queries_per_layer": [3] * layers,
                        "channels_kept_per_layer": [704] * layers,
                    },
                },
            ),
            stage(
                2,
                "quantize",
                ["--budget", "2.75bit"],
                88.0,
                config={"budget": "2.75bit", "rank": "auto", "solver": "highs"},
                metrics={
                    "before": {
                        **pruned,
                        "bits_per_weight": 16.0,
                        "perplexity": 61.8,
                        "protocol_line": PROTOCOL,
                    },
                    "after": {
                        "parameters": 81_402_048,
                        "bytes": 75_102_208,
                        "bits_per_weight": 2.71,
                        "stored_bits_per_weight_with_factors": 2.7499,
                        "perplexity": 74.5,
                        "protocol_line": PROTOCOL,
                    },
                    "budget": {"text": "2.75bit", "kind": "bits", "value": 2.75},
                    "allocation": {
                        "solver": "highs",
                        "objective": 5132.1,
                        "lower_bound": 5132.1,
                        "gap": 0.0,
                        "seconds": 0.41,
                    },
                    "stored_bits_per_weight": 2.7499,
                    "tradeoff": {
                        "cost": "squared error",
                        "points": [
                            {"bits_per_weight": 2 + n / 4, "cost": 5132.1 * 4.0 ** (0.75 - n / 4)}
                            for n in range(9)
                        ],
                    },
                    "plain_rounding": {"squared_error": 6021.4, "stored_bits": 145_000_000},
                    "matrices": matrices,
                },
            ),
            stage(
                3,
                "train",
                ["--steps", str(steps)],
                95.3,
                config={"steps": steps, "method": "lora", "rank": 8},
                metrics={
                    "losses": losses(4.1, 3.5),
                    "validation_loss_before": 3.93,
                    "validation_loss_after": 3.52,
                    "tokens": 122_880,
                    "trainable_parameters": 1_597_440,
                    "method": "lora",
                },
            ),
            stage(
                4,
                "recover",
                [],
                12.0,
                config={"merge": False},
                metrics={
                    "modules": 7 * layers,
                    "rank": 8,
                    "truncation_error": 0.0,
                    "adapter_parameters": 2_442_240,
                    "onto": "HuggingFaceTB/SmolLM2-135M-Instruct",
                },
            ),
            stage(
                5,
                "eval",
                [],
                74.9,
                config={"sequence": 512},
                metrics={
                    "rows": [
                        {
                            "name": name,
                            "parameters": parameters,
                            "bytes": stored,
                            "bits_per_weight": bits,
                            "perplexity": value,
                            "standard_error": 0.0123,
                            "held_out_loss": loss,
                            "tokens_per_second": speed,
                            "decode_tokens_per_second": decode,
                            "peak_memory_bytes": 1_200_000_000,
                        }
                        for name, parameters, stored, bits, value, loss, speed, decode in rows
                    ],
                    "protocol": {"source": "wikitext2", "length": 512},
                    "protocol_line": PROTOCOL,
                },
            ),
        ],
    }


def sample_curve() -> dict[str, Any]:
    """Rows of a pruning benchmark: two methods over four ratios, one of them trained too, and the dense model."""
    rows: dict[str, Any] = {"dense": {"perplexity": 29.19, "protocol_line": PROTOCOL}}
    for ratio in (0.1, 0.2, 0.4, 0.6):
        for method, steepness in (("magnitude", 12.0), ("obs + refit", 4.0)):
            rows[f"{ratio} {method} 0"] = {
                "perplexity": 29.19 * math.exp(steepness * ratio**2),
                "achieved_ratio": ratio + 0.003,
                "protocol_line": PROTOCOL,
            }
    rows["0.6 obs + refit 100352"] = {
        "perplexity": 40.0, "achieved_ratio": 0.603, "protocol_line": PROTOCOL
    }  # fmt: skip
    return rows


def evaluated_run(layers: int = 2) -> dict[str, Any]:
    """The sample run, evaluated with intervals, distances, tasks, saturation and other tokenizers' notes."""
    run = sample_run(layers=layers, steps=5)
    metrics = run["stages"][-1]["metrics"]
    for n, row in enumerate(metrics["rows"]):
        row |= {
            "perplexity_interval": [row["perplexity"] - 0.75, row["perplexity"] + 0.8],
            "word_perplexity": 60.5 + n,
            "bits_per_byte": 0.8765,
            "resident_bytes": 541_000_000,
            "saturation": {"tokens_per_second": 210.4, "batch": 16, "stopped_by": "throughput"},
            "tasks": [
                {
                    "task": "quiz", "kind": "choices", "accuracy": 0.625, "accuracy_error": 0.05,
                    "accuracy_norm": 0.5, "accuracy_norm_error": None, "perplexity": None,
                    "protocol_line": "quiz, sha256 0123456789ab, 100 of 100 rows",
                },
                {
                    "task": "cloze", "kind": "continuation", "accuracy": 0.25, "accuracy_error": 0.04,
                    "perplexity": 33.21, "protocol_line": "cloze, sha256 ba9876543210, 50 of 50 rows",
                },
            ],
            "lm_eval": [{"task": "arc", "metric": "acc", "value": 0.3125, "standard_error": 0.0211}],
        }  # fmt: skip
        if n:
            row["divergence"] = {
                "kl": 0.1234 * n, "kl_interval": [0.1 * n, 0.15 * n], "agreement": 0.765,
                "agreement_standard_error": 0.012, "tokens": 2044, "windows": 4,
            }  # fmt: skip
    metrics |= {"reference": "original", "notes": ["The tokenizers differ (a; b)."]}
    return run


def sample_others() -> list[dict[str, Any]]:
    """Two runs to compare the sample with: fewer bits, and less pruning without an evaluation."""
    tight, mild = sample_run(layers=2, steps=5), sample_run(layers=2, steps=5)
    for side in (tight["stages"][1]["metrics"]["after"],):
        side |= {"bytes": 61_000_000, "stored_bits_per_weight_with_factors": 2.0}
    for row in tight["stages"][-1]["metrics"]["rows"][2:4]:
        row |= {"bytes": 61_000_000, "perplexity": row["perplexity"] * 1.4}
    mild["stages"] = mild["stages"][:2]
    mild["stages"][0]["metrics"]["achieved_ratio"] = 0.25
    return [{"name": "two-bits", "stages": tight["stages"]}, {"name": "mild", "stages": mild["stages"]}]
