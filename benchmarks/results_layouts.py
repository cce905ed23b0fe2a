"""Which figures of a record go on the results page, by benchmark; `results_page.py` shows any other record as it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        header: What stands above it.
        path: Keys from the row to the figure, outermost first.
        unit: How it is written: ``number``, ``count``, ``bytes``, ``ms`` and ``us`` (from seconds), ``percent`` (from a
            fraction) or ``text``.
    """

    header: str
    path: tuple[str, ...]
    unit: str = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One table of a record.

    Attributes:
        rows: Regular expression that the names of its rows match as a whole.
        columns: What is shown of each.
        of: Key of the record under which the rows are.
        protocol: Key of the record with the protocol of these rows, where they have none of their own.
        note: What a reader needs to understand the table.
    """

    rows: str
    columns: tuple[Column, ...]
    of: str = "rows"
    protocol: str = "protocol_line"
    note: str = ""


def _columns(unit: str, **paths: str) -> tuple[Column, ...]:
    """Columns of one unit; underscores in a header are spaces, slashes in a path part its keys."""
    return tuple(
        Column(header=name.replace("_", " "), path=tuple(path.split("/")), unit=unit)
        for name, path in paths.items()
    )


_PERPLEXITY = (
    *_columns("number", perplexity="perplexity"),
    Column(header="standard error of the loss", path=("standard_error",)),
)
_ON_GPU = (
    *("nf4", "nf4 module", "nf4 by Triton", "nf4 + rank 64", "nf3", "nf2", "nf8"),
    *("dense bfloat16", "bitsandbytes"),
)
_FEW_TOKENS = ("package", "waiting", "older", "cuBLAS bfloat16")
_KERNELS = ("nf4", "nf3", "nf2", "bitsandbytes", "int4pack", "dense bfloat16", "dense float32")

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "smoke": (
        Layout(
            rows=".*",
            columns=(
                *_columns("count", parameters="parameters"),
                *_columns("bytes", weight_files="bytes"),
                *_columns("number", bits_per_parameter="bits_per_weight"),
                *_PERPLEXITY,
                Column(header="held-out loss, nats", path=("held_out_loss",)),
                *_columns(
                    "number",
                    prefill_tokens_per_second="tokens_per_second",
                    decode_tokens_per_second="decode_tokens_per_second",
                ),
                *_columns("bytes", peak_memory="peak_memory_bytes"),
            ),
            note="The section Measured of the [README](../README.md) says which state of the code the record is of.",
        ),
        Layout(
            rows=".*",
            columns=_columns("number", value="value", must_be_below="bound")
            + _columns("text", passed="passed"),
            of="checks",
            protocol="validation_protocol_line",
            note="What the chain must hold: perplexities and losses of validation text.",
        ),
    ),
    "pruning": (
        Layout(
            rows=".*",
            columns=(
                *_columns("percent", removed="achieved_ratio"),
                *_columns(
                    "count",
                    KV_groups="shape/kv_heads",
                    query_heads_each="shape/queries",
                    channels="shape/channels",
                    parameters="parameters",
                ),
                *_columns("bytes", weights="bytes"),
                *_PERPLEXITY,
            ),
            note="A row is named after the asked ratio, the method and the tokens of recovery training; `dense` is the "
            "model as it was. [Pruning](pruning.md#measured) says how the methods are made comparable.",
        ),
    ),
    "pruning curve": (
        Layout(rows=".*", columns=(*_columns("percent", removed="achieved_ratio"), *_PERPLEXITY)),
    ),
    "quantization": (
        Layout(
            rows=".*",
            columns=(
                *_columns("number", stored_bits_per_weight="bits_per_weight"),
                *_PERPLEXITY,
                *_columns("number", seconds_to_quantize="seconds", load_average="load_before"),
                *_columns("bytes", peak_memory="peak_bytes"),
                *_columns(
                    "number",
                    predicted_rise_of_the_loss="loss_rise_predicted",
                    rise_on_validation_text="loss_rise_on_validation",
                ),
                *_columns("text", not_run="not_run"),
            ),
            note="Bits are counted from everybody's files: what the quantized matrices take, over their weights. "
            "Seconds compare only where the load average, which counts what else ran, is about the threads.",
        ),
    ),
    "loram": (
        Layout(
            rows=".*",
            columns=(
                *_columns(
                    "number",
                    small_base="base",
                    small_and_adapter="small",
                    full_and_recovered="recovered",
                    full_and_masked="masked",
                    windows_per_second="windows_per_second",
                ),
                *_columns("bytes", peak_memory_of_training="peak_memory_bytes", weights="bytes"),
            ),
            note="Losses on held-out rows in nats per token of the responses. A row is named after the small model "
            "and the seed; `full` is LoRA on the full model, `untuned` the full model as it was.",
        ),
    ),
    "grids": (
        Layout(
            rows="at .*",
            columns=tuple(
                Column(header=name, path=(name, "error"))
                for name in ("NormalFloat", "learned", "affine", "symmetric", "half steps")
            )
            + _columns("text", best="best")
            + _columns(
                "count",
                affine_best_on="affine/best_on",
                affine_more_than_5_percent_below_both_tables="affine_clearly_best_on",
                matrices="matrices",
            ),
            note="Errors of the outputs at equal stored bits of Q, relative to NormalFloat, geometric means over the "
            "matrices. `affine` has zero points, `symmetric` has none, `half steps` is evenly spaced without a zero.",
        ),
        Layout(
            rows="turns, .*",
            columns=_columns(
                "number",
                rounded_in_turn_1="turn 1/rounded",
                factors_in_turn_1="turn 1/fitted",
                rounded_in_turn_2="turn 2/rounded",
                factors_in_turn_2="turn 2/fitted",
                factors_in_turn_3="turn 3/fitted",
                factors_in_turn_5="turn 5/fitted",
                held_out_in_turn_5="turn 5/held_out",
                share_taken_in_turn_2="turn 2/taken",
                share_it_could_take="turn 2/could_take",
                overlap_of_errors_2_and_1="turn 2/overlap",
                ranges_in_turn_1="turn 1/range",
            ),
            note="Rounding and factors in turns. Errors relative to one pass with feedback, rounding "
            "then factors; `weight error`, in which the inputs do not count, to its own. "
            "`share taken`: of the error after rounding, by new factors; `could take`: by as many that have nothing "
            "else to hold. `ranges`: largest weights of blocks of what is rounded, relative to W's.",
        ),
        Layout(
            rows="order of .*",
            columns=_columns("number", error="fitted", held_out="held_out"),
            note="What `compress quantize` does with these settings, relative to one pass with feedback.",
        ),
        Layout(
            rows="layer .*",
            columns=_columns("count", weights="weights")
            + _columns("percent", moved_off_the_grid_by="moved_by")
            + tuple(
                Column(header=f"{name}, {bits} bits", path=(f"{bits} bits", name, "rank 0"))
                for bits in ("2.25", "3.25", "4.25")
                for name in ("learned", "affine")
            ),
            note="The matrices: errors relative to the outputs, at equal stored bits.",
        ),
    ),
    "grids perplexity": (
        Layout(
            rows=".*",
            columns=(*_PERPLEXITY, *_columns("number", mean_output_error="mean_output_error")),
            note="NF3 and exact factors of rank 16 in every decoder matrix: to compare turns, not to be stored.",
        ),
    ),
    "solver": (
        Layout(
            rows=".*",
            columns=(
                *_columns("count", matrices="matrices", candidates_each="candidates"),
                *_columns("number", seconds="seconds", gap="gap"),
                *_columns("text", status="status"),
                *_columns(
                    "number",
                    HiGHS_alone_seconds="raw/highs/seconds",
                    HiGHS_alone_gap="raw/highs/gap",
                    CBC_alone_seconds="raw/cbc/seconds",
                    CBC_alone_gap="raw/cbc/gap",
                    dynamic_alone_seconds="raw/dynamic/seconds",
                    dynamic_alone_gap="raw/dynamic/gap",
                ),
            ),
            note="`ranks`: ranks are on the menu too; `fused`: what serving runtimes fuse has one format. `seconds` is "
            "the median of five runs; in the columns after it a solver got the same problem with all its candidates.",
        ),
    ),
    "error table": (
        Layout(
            rows="order, .*",
            columns=(
                *_columns("count", rank="rank"),
                *_columns(
                    "number",
                    tau="tau",
                    tau_of_the_undominated="tau_of_the_undominated",
                    tau_sampled="tau_sampled",
                    ratio_of_errors_mean="ratio/mean",
                    ratio_of_errors_spread="ratio/spread",
                ),
            ),
            note="Kendall's tau between the order of the formats in our table and in the paper's decompositions.",
        ),
        Layout(
            rows="allocation",
            columns=tuple(
                Column(
                    header=f"{kind}, {bits} bits",
                    path=(f"excess_cost_{kind}", f"{bits} bits"),
                    unit="percent",
                )
                for kind in ("table", "sampled", "settled")
                for bits in ("2.25", "2.75", "3.25", "4.25")
            ),
            note="28 matrices: how much more the allocation by our table truly costs than the one by the true errors. "
            "settled: by a sampled table, what was chosen computed from all rows and chosen anew, as quantize does.",
        ),
        Layout(
            rows="speed",
            columns=(
                *_columns("count", formats="configurations", rank="rank", threads="threads"),
                *_columns(
                    "number",
                    table_seconds="seconds/table/median",
                    sampled_seconds="seconds/sampled/median",
                    table_against_5_rounds="speedup/table, 5 rounds/median",
                    table_against_10_rounds="speedup/table, 10 rounds/median",
                    sampled_against_5_rounds="speedup/sampled, 5 rounds/median",
                    sampled_against_10_rounds="speedup/sampled, 10 rounds/median",
                ),
            ),
            note="One matrix of 4096 x 4096, processor seconds. Those of the paper's loop are "
            "extrapolated from some of the formats.",
        ),
    ),
    "importance": (
        Layout(
            rows="memory, .*",
            columns=_columns(
                "bytes",
                tensors="tensors",
                resident="resident",
                gradients="gradients",
                reduction="reduction",
                weights="weights",
            )
            + _columns(
                "percent",
                tensors_against_taylor="tensors_of_taylor",
                resident_against_taylor="resident_of_taylor",
            ),
            note="Windows x tokens. What a scoring pass needs beyond the loaded model, in live tensors and resident; "
            "`recomputed`: only the inputs of the layers are kept; `reduction`: what summing the scores takes.",
        ),
        Layout(
            rows="speed, .*",
            columns=(
                *_columns("count", rank="rank"),
                *_columns(
                    "number",
                    seconds="seconds/ours/median",
                    dense_formula_seconds="seconds/dense/median",
                    dense_merged_seconds="seconds/dense, merged/median",
                    times_as_fast_as_dense="speedup/dense/median",
                    times_as_fast_as_merged="speedup/dense, merged/median",
                ),
            ),
            note="Scores of one matrix of 4096 x 11008, medians.",
        ),
    ),
    "kernels on the GPU": (
        Layout(
            rows="linear, .*",
            columns=tuple(
                Column(header=f"{name}, us", path=("contestants", name, "graph_seconds"), unit="us")
                for name in _ON_GPU
            )
            + tuple(
                Column(
                    header=f"{name}, of the floor",
                    path=("contestants", name, "share_of_floor"),
                    unit="percent",
                )
                for name in ("nf4", "nf3", "nf2")
            )
            + _columns("bytes", beside_the_result="extra_bytes"),
            note="Medians of replays of a CUDA graph, everybody in turns. "
            "[GPU kernels](gpu-kernels.md) says what they mean, and what has changed since.",
        ),
        Layout(
            rows="(dequantize|backward|group|merge|cut), .*|group .*",
            columns=tuple(
                Column(header=f"{name}, us", path=("contestants", name, "graph_seconds"), unit="us")
                for name in ("nf4", "nf3", "nf2", "nf8", "dense bfloat16", "one launch", "one by one")
            )
            + tuple(
                Column(header=f"{name}, ms", path=("contestants", name, "eager_seconds"), unit="ms")
                for name in ("host", "batched")
            ),
            note="Weights alone, gradients in the input, matrices with one input, merging and cutting of adapters.",
        ),
    ),
    "few tokens": (
        Layout(
            rows=".* tokens.*|layer, .*",
            columns=_columns("us", floor="floor_seconds")
            + tuple(
                Column(header=name, path=("contestants", name, "queued_seconds"), unit="us")
                for name in _FEW_TOKENS
            )
            + tuple(
                Column(
                    header=f"{name}, of the floor",
                    path=("contestants", name, "share_of_floor"),
                    unit="percent",
                )
                for name in ("package", "older")
            ),
            note="Microseconds, medians of two replays queued behind a busy GPU, everybody in turns. "
            "[GPU kernels](gpu-kernels.md#measured-on-an-h100) says what the variants are.",
        ),
        Layout(
            rows="checks, .*",
            columns=(
                *_columns("count", products="products", passed="passed"),
                Column(header="largest error", path=("largest_error",)),
            ),
            note="Against float64, and whether calls and replays repeat to the bit.",
        ),
    ),
    "kernels on the CPU": (
        Layout(
            rows="linear, .*",
            columns=tuple(
                Column(header=f"{name}, ms", path=("seconds", name, "median"), unit="ms") for name in _KERNELS
            ),
            note="Medians, methods in turns in one process. `nf4`, `nf3` and `nf2` are ours, with blocks of 64. "
            "[Kernels](kernels.md#measured) says what the comparison is worth.",
        ),
    ),
    "loram_recover": (
        Layout(
            rows=".*",
            columns=(
                *_columns("count", modules="modules", rank="rank"),
                *_columns("number", seconds="seconds"),
                *_columns(
                    "bytes", peak_memory="peak_bytes", small_adapter="small_bytes", full_adapter="full_bytes"
                ),
                *_columns("number", truncation_error="truncation"),
            ),
            note="`difference`: an adapter that did not start at zero; `cut`: cut back to the rank.",
        ),
    ),
}
"""Benchmark, as a record names itself (else the module that made it) -> its tables."""
