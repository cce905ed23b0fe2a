"""Accuracy on a local task: choices by their likelihood, or a continuation by greedy decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.errors import CompressError
from compress.evaluate.continuation import BATCH_TOKENS, Likelihood, Pair, encode_pair, log_likelihoods
from compress.evaluate.interval import exponential
from compress.evaluate.perplexity import computed_in
from compress.evaluate.task_file import Task, TaskRow
from compress.progress import Progress

DELIMITER = " "
"""What stands between a context and what follows it, unless one of them has white space there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """What a model scored on a task.

    Args:
        task: Its name.
        kind: "choices" or "continuation".
        rows: Rows scored.
        accuracy: Choices: share of rows whose gold choice has the highest log-likelihood. Continuation: share of rows
            whose continuation greedy decoding would write.
        accuracy_error: Its standard error over rows; None for a single row.
        accuracy_norm: Choices: the same with the log-likelihood divided by the choice's bytes in UTF-8 (without the
            delimiter). None for continuations.
        accuracy_norm_error: Its standard error over rows.
        perplexity: Continuation: ``exp`` of the mean over rows of the continuation's negative log-likelihood, which is
            per continuation and not per token. None for choices.
        truncated: Sequences whose context lost its start.
        protocol_line: How it was measured.
    """

    task: str
    kind: str
    rows: int
    accuracy: float
    accuracy_error: float | None
    accuracy_norm: float | None
    accuracy_norm_error: float | None
    perplexity: float | None
    truncated: int
    protocol_line: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def score_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    delimiter: str = DELIMITER,
    bos: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> TaskScore:
    """Score a task: no examples in front, no chat template, no special tokens but a BOS where that is asked.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        task: From ``read_task``.
        delimiter: Between context and what follows.
        bos: Begin every context with BOS.
        batch_tokens: Padded tokens of a forward pass.
        progress: Called with inputs done.

    Raises:
        CompressError: A row that cannot be tokenised, named with its line, or what ``log_likelihoods`` raises.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    pairs = [pair for row in task.rows for pair in _pairs(task, row, tokenizer, delimiter, positions, bos)]
    scored = iter(log_likelihoods(model, pairs, batch_tokens=batch_tokens, progress=progress))
    found = [[next(scored) for _ in row.choices] for row in task.rows]
    plain = [_right(row, likelihoods) for row, likelihoods in zip(task.rows, found, strict=True)]
    choices = task.kind == "choices"
    norm = (
        [_right_for_bytes(row, each) for row, each in zip(task.rows, found, strict=True)] if choices else None
    )
    nll = [-each[0].log_likelihood for each in found]
    return TaskScore(
        task=task.name,
        kind=task.kind,
        rows=len(task.rows),
        accuracy=sum(plain) / len(plain),
        accuracy_error=share_error(plain),
        accuracy_norm=None if norm is None else sum(norm) / len(norm),
        accuracy_norm_error=None if norm is None else share_error(norm),
        perplexity=None if choices else exponential(math.fsum(nll) / len(nll)),
        truncated=sum(pair.truncated for pair in pairs),
        protocol_line=_protocol_line(task, delimiter, bos=bos) + f", {computed_in(model)}",
    )


def share_error(right: Sequence[bool]) -> float | None:
    """Standard error of a share: the sample standard deviation over the root of the rows; None for one row."""
    n = len(right)
    share = sum(right) / n
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None


def joined(context: str, continuation: str, delimiter: str) -> str:
    """The context with the delimiter, which is left out where there is white space already."""
    there = context[-1:].isspace() or continuation[:1].isspace() or not context
    return context if there else context + delimiter


def _pairs(
    task: Task, row: TaskRow, tokenizer: Any, delimiter: str, positions: int | None, bos: bool
) -> Iterator[Pair]:
    for choice in row.choices:
        try:
            context = joined(row.context, choice, delimiter)
            yield encode_pair(context, choice, tokenizer, positions=positions, bos=bos)
        except CompressError as error:
            raise CompressError(
                f"Task {task.name}, line {row.line}: {error.cause[0].lower()}{error.cause[1:]}", error.remedy
            ) from error


def _right(row: TaskRow, likelihoods: Sequence[Likelihood]) -> bool:
    if len(likelihoods) == 1:
        return likelihoods[0].greedy
    return _best([each.log_likelihood for each in likelihoods]) == row.gold


def _right_for_bytes(row: TaskRow, likelihoods: Sequence[Likelihood]) -> bool:
    sizes = [len(choice.encode("utf-8")) for choice in row.choices]
    return _best([e.log_likelihood / s for e, s in zip(likelihoods, sizes, strict=True)]) == row.gold


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)  # the first of equal ones


def _protocol_line(task: Task, delimiter: str, *, bos: bool) -> str:
    escaped = delimiter.encode("unicode_escape").decode("ascii")
    return (
        f"{task.name}, sha256 {task.sha256[:12]}, {len(task.rows)} of {task.file_rows} rows, "
        f'delimiter "{escaped}", no examples, {"BOS" if bos else "no BOS"}'
    )
