"""What lm-eval asks of a model, as what our scorers take, and what it answers, as what we record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.data.chat import tokenise
from compress.errors import CompressError
from compress.evaluate.continuation import Pair, begun, encode_pair

NEW_TOKENS = 256
"""Tokens that an answer may have where the task does not say."""
UNVERSIONED = "Yaml"
"""What lm-eval gives as the version of a task file that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A request for text.

    Args:
        prompt: Token ids; only the end of a long one, so that the answer has room.
        until: Strings that end the answer and are not part of it.
        new_tokens: Most tokens of the answer.
    """

    prompt: tuple[int, ...]
    until: tuple[str, ...]
    new_tokens: int

    def cut(self, text: str) -> str:
        """An answer up to the first of its end strings."""
        found = [text.find(end) for end in self.until if end]
        return text[: min((place for place in found if place >= 0), default=len(text))]


def pair_of(arguments: tuple[str, str], tokenizer: Any, positions: int | None, *, bos: bool = False) -> Pair:
    """A request ``(context, continuation)`` for a log-likelihood; ``bos``: the context begins with BOS."""
    context, continuation = arguments
    return encode_pair(context, continuation, tokenizer, positions=positions, bos=bos)


def rolling_pairs(text: str, tokenizer: Any, positions: int | None) -> list[Pair]:
    """A request ``(text,)`` for the log-likelihood of a whole text: pairs that score each of its tokens once.

    Pieces of at most ``positions`` tokens follow each other. The first is scored after the beginning-of-text token (or
    the end-of-text token), every other one after the last token of the piece before it; the last piece has as much
    context as fits.

    Raises:
        CompressError: The text is empty, or nothing can stand before its first token.
    """
    ids = tokenise(text, tokenizer)
    if not ids:
        raise CompressError("A text to score is empty.", "Leave empty documents out of the task.")
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if start is None:
        raise CompressError(
            "The tokenizer has neither a BOS nor an EOS token to begin a text with.", "Use another task."
        )
    size = positions or len(ids)
    whole = [start, *ids]
    pairs = []
    for begin in range(1, len(whole), size):
        end = min(begin + size, len(whole))
        first = min(begin - 1, max(0, end - 1 - size))
        pairs.append(Pair(context=tuple(whole[first:begin]), continuation=tuple(whole[begin:end])))
    return pairs


def generation_of(
    arguments: tuple[str, Mapping[str, Any]], tokenizer: Any, positions: int | None, *, bos: bool = False
) -> Generation:
    """A request ``(context, options)`` for greedily decoded text; ``bos``: the prompt begins with BOS.

    Raises:
        CompressError: The options ask for sampling or beams, or leave the prompt no room.
    """
    context, options = arguments
    if (
        options.get("do_sample")
        or float(options.get("temperature") or 0) > 0
        or options.get("num_beams", 1) != 1
    ):
        raise CompressError(
            "The task asks for sampled text or beam search, and compress eval decodes greedily.",
            "Choose a task that decodes greedily, or run lm-eval itself.",
        )
    until = options.get("until") or ()
    wanted = int(options.get("max_gen_toks") or options.get("max_new_tokens") or NEW_TOKENS)
    ids = tokenise(context, tokenizer)
    if not ids:
        start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        ids = [] if start is None else [start]
    elif bos:
        ids = begun(ids, tokenizer)
    room = len(ids) if positions is None else positions - wanted
    if room < 1 or not ids:
        raise CompressError(
            f"An answer of {wanted} tokens leaves no room for its prompt in {positions} positions.",
            "Choose a task with shorter answers, or a model with more positions.",
        )
    prompt = ids[-room:]
    if bos:
        prompt[0] = ids[0]
    return Generation(
        prompt=tuple(prompt),
        until=(until,) if isinstance(until, str) else tuple(until),
        new_tokens=wanted,
    )


def harness_rows(
    answer: Mapping[str, Any], *, version: str, bos: bool, computed: str
) -> list[dict[str, Any]]:
    """The metrics of all tasks in lm-eval's answer: one record for each task, metric and filter.

    Keys of its ``results`` are ``metric,filter`` with a ``metric_stderr,filter`` beside them, which is text where there
    is none.

    Args:
        answer: What ``simple_evaluate`` returns.
        version: Of lm-eval.
        bos: Whether contexts began with BOS.
        computed: Dtype and device, as in a protocol line.
    """
    rows: list[dict[str, Any]] = []
    for task, metrics in answer["results"].items():
        line = f"{_measured(answer, str(task))}, {'BOS' if bos else 'no BOS'}, lm-eval {version}, {computed}"
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or isinstance(value, bool | str) or value is None:
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            rows.append(
                {
                    "task": str(task),
                    "metric": metric if chosen == "none" else f"{metric}, {chosen}",
                    "value": float(value),
                    "standard_error": float(error) if isinstance(error, int | float) else None,
                    "protocol_line": line,
                }
            )
    return rows


def _measured(answer: Mapping[str, Any], task: str) -> str:
    """A task with its version, examples and rows, as far as lm-eval says them: of a group it does not."""
    parts = [task]
    version = answer.get("versions", {}).get(task)
    if version not in (None, UNVERSIONED):
        parts[0] += f" version {version}"
    if isinstance(rows := answer.get("n-samples", {}).get(task), Mapping):
        parts.append(f"{rows.get('effective')} of {rows.get('original')} rows")
    if (shots := answer.get("n-shot", {}).get(task)) is not None:
        parts.append("1 example" if shots == 1 else f"{shots or 'no'} examples")
    return ", ".join(parts)


def task_names(text: str) -> list[str]:
    """``"arc_easy,piqa"`` as a list without repetitions."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def scored(likelihoods: Sequence[Any]) -> float:
    """The log-likelihood of a text from those of its pieces."""
    return float(sum(each.log_likelihood for each in likelihoods))
