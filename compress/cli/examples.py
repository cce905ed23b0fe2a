"""The commands that end the help of every verb; a contract test gives each of them to the real command line."""

from __future__ import annotations

import textwrap

EXAMPLES: dict[str, tuple[str, ...]] = {
    "plan": (
        "compress plan",
        "compress plan meta-llama/Llama-2-13b-hf --loram",
        "compress plan ./my-model --ratio 0.5 --budget 2.75bit --memory 24GiB",
        "compress plan ./my-model --budget 3bit --no-time --json",
        "compress plan ./my-model --recompute --micro-batch 8",
        "compress plan ./my-model --check --memory-limit 12GiB",
    ),
    "init": (
        "compress init",
        "compress init ./my-model --effort quick --out my.yaml",
        "compress init Qwen/Qwen3-0.6B --out -",
    ),
    "prune": (
        "compress prune --ratio 0.5",
        "compress prune --model ./my-model --size 0.5GiB",
        "compress prune --ratio 0.3 --shape allocated",
        "compress prune --criterion taylor --recompute",
        "compress prune --ratio 0.65 --shape local --ratio-of parts --skip-first 4 --skip-last 2",
        "compress prune --criterion wanda --dry-run",
    ),
    "align": (
        "compress align --steps 200 --data c4",
        "compress align --loss distill",
        "compress align --recompute --micro-batch 8",
    ),
    "quantize": (
        "compress quantize --budget 2.75bit",
        "compress quantize --budget 90MB --embeddings menu",
        "compress quantize --budget 4.5bit --runtime vllm",
    ),
    "train": (
        "compress train --data my_instructions.jsonl",
        "compress train --method lq --steps 200",
        "compress train --adapter-targets all,lm_head",
        "compress train --recompute --sequence 1024",
    ),
    "recover": (
        "compress recover",
        "compress recover --merge",
        "compress recover --onto ./full --run mine",
    ),
    "generate": (
        'compress generate "What is a prime number?"',
        'compress generate "Once upon a time" --no-chat',
        "compress generate - --models all --json < question.txt",
    ),
    "eval": (
        "compress eval",
        "compress eval --data wikitext2 --windows 50",
        "compress eval ./my-model ./smaller --task questions.jsonl --out eval.json",
        "compress eval --json > eval.json",
    ),
    "report": (
        "compress report",
        "compress report --output ../report.html",
        "compress report ../two-bits ../three-bits",
    ),
    "export": (
        "compress export",
        "compress export quantized --out my-model --push your-name/my-model",
        "compress export recovered --format dense",
        "compress export trained --format packed",
    ),
    "verify": (
        "compress verify",
        "compress verify compress-run/02-quantize --json",
        "compress verify --calibration",
    ),
    "bench": (
        "compress bench --list",
        "compress bench --quick",
        "compress bench solver error_table --quick --out results",
        "compress bench --finished work --baselines baselines",
    ),
    "doctor": (
        "compress doctor",
        "compress doctor --json",
    ),
    "run": (
        "compress run chain",
        "compress run my.yaml --run work",
        "compress run loram --data my_instructions.jsonl",
    ),
}


def examples(verb: str, width: int) -> str:
    """What ends the help of ``verb``, in lines of at most ``width`` cells."""
    lines = [" Examples:"]
    for command in EXAMPLES.get(verb, ()):
        lines += textwrap.wrap(
            command, width, initial_indent="   ", subsequent_indent="     ", break_on_hyphens=False
        )
    return "\n".join(lines) + "\n"
