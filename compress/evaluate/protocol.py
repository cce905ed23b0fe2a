"""The protocol of a measurement as one line, printed under every perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def protocol_line(protocol: Mapping[str, Any]) -> str:
    r"""One line that says how a perplexity was measured.

    Example: ``wikitext2 test, sha256 696cca6b65a1, join "\n\n", no BOS, length 2048, stride 2048,
    10 windows, 20470 tokens scored, float32 on cpu``. Keys that are absent or None are left out.
    """
    p = {key: value for key, value in protocol.items() if value is not None}
    parts: list[str] = []
    if "model" in p:
        parts.append(str(p["model"]))
    if "source" in p:
        parts.append(" ".join(str(p[key]) for key in ("source", "split") if key in p))
    if "sha256" in p:
        parts.append(f"sha256 {p['sha256'][:12]}")
    if "join" in p:
        escaped = p["join"].encode("unicode_escape").decode("ascii")
        parts.append(f'join "{escaped}"')
    if "bos" in p:
        parts.append({True: "BOS", False: "no BOS"}.get(p["bos"], f"BOS by {p['bos']}"))
    parts += [f"{key} {p[key]}" for key in ("length", "stride") if key in p]
    if p.get("layout", "text") != "text":
        parts.append(f"{p['layout']} conversations")
    if "characters" in p:
        parts.append(f"the first {p['characters']} characters")
    if "windows" in p:
        parts.append(f"{p['windows']} windows")
    if "tokens_scored" in p:
        parts.append(f"{p['tokens_scored']} tokens scored")
    elif "tokens" in p:
        parts.append(f"{p['tokens']} tokens")
    if "seed" in p:
        parts.append(f"seed {p['seed']}")
    if "dtype" in p:
        parts.append(f"{p['dtype']} on {p['device']}" if "device" in p else str(p["dtype"]))
    return ", ".join(parts)


def speed_line(protocol: Mapping[str, Any]) -> str:
    """One line that says how prefill and decoding were timed, from the fields of a `Throughput`.

    Example: ``batch 1, 504 prompt tokens, 8 decoded, median of 2 runs, 2 threads, float32 on cpu``.
    """
    threads = f"{protocol['threads']} threads, " if protocol["device"] == "cpu" else ""
    return (
        f"batch {protocol['batch']}, {protocol['prompt_tokens']} prompt tokens, {protocol['decode_tokens']} decoded, "
        f"median of {protocol['repeats']} runs, {threads}{protocol['dtype']} on {protocol['device']}"
    )
