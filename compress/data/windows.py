"""Fixed-length token windows of a text, with labels and the protocol that describes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.data.chat import IGNORE, encode_conversation, tokenise
from compress.data.text import Text
from compress.errors import CompressError, UsageError

SEGMENT_CHARACTERS = 1 << 18
"""Longest stretch that a seeded draw tokenises at once; a text up to four of them is tokenised whole."""

_SEAM_CHARACTERS = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Token windows, ready for a model.

    Args:
        ids: Token ids, int64 [windows, length].
        labels: The same ids where they are scored or trained on, -100 elsewhere, int64 [windows, length].
            Not shifted: the label at position t is predicted from the positions before t.
        protocol: source, split, sha256, join, bos, length, stride, layout, windows, requested_windows,
            tokens (labels that count), text_tokens (of the whole text; None when not all was tokenised),
            seed.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    protocol: dict[str, Any]

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.labels.shape:
            raise ValueError(
                f"ids {tuple(self.ids.shape)} and labels {tuple(self.labels.shape)} must be [n, L]"
            )

    def __len__(self) -> int:
        return int(self.ids.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Windows drawn under ``seed``, ``count`` of them, of a length that goes without saying."""

    seed: int
    count: int


def token_windows(
    text: Text,
    tokenizer: Any,
    *,
    length: int,
    count: int | None = None,
    bos: bool = False,
    seed: int | None = None,
    apart: Draw | None = None,
    option: str | None = None,
) -> Windows:
    """Cut a text into windows of ``length`` tokens that do not overlap.

    Plain text, no seed (evaluation): the joined text is tokenised once, windows are consecutive from its
    start, the short rest is dropped. With a seed (training): windows are drawn without replacement, in
    random order. A text longer than four segments is then cut into segments at line ends, the segments
    are tokenised in an order drawn from the seed until they hold ``count`` windows, and no window crosses a
    segment's end; the same text, tokenizer, length, count and seed always give the same windows.

    Conversations, no seed: one per window in order, padded at the right. With a seed: in random order, as
    many whole conversations packed into a window as fit, padded at the right (they see each other). Only
    answers carry labels. A conversation longer than the window loses its end, and is dropped when no answer
    is left. Padding has label -100 and comes last, so causal attention never sees it.

    With ``apart`` the windows (or conversations) of that other draw are passed over. Where too few are left, the rest
    are windows of that draw after all, and the protocol says how many of them there are: ``shared_windows``.

    Args:
        text: What to cut.
        tokenizer: Its special tokens are not added, whatever its settings; see ``bos``.
        length: Tokens per window, a BOS included.
        count: Windows wanted; None or more than there are gives all there are.
        bos: Begin every window of plain text with BOS. Conversations follow the chat template instead.
        seed: Seed of the draw; None for evaluation order.
        apart: Another draw of this text and length to keep away from; needs ``seed`` and ``count``.
        option: The option that sets ``length``, for messages; None: nobody can change it.

    Raises:
        UsageError: ``length`` below 2 or ``count`` below 1.
        CompressError: The text is shorter than one window, or the tokenizer lacks a BOS that was asked for.
    """
    if length < 2:
        raise UsageError(
            f"A window of {length} token(s) has nothing to predict.", "Give a length of 2 or more."
        )
    if count is not None and count < 1:
        raise UsageError(f"{count} windows were asked for.", "Ask for 1 or more.")
    if apart is not None and (seed is None or count is None):
        raise ValueError("windows apart from others need a seed and a count")
    if text.conversations:
        ids, labels, known, shared = _chat_windows(text, tokenizer, length, count, seed, apart, option)
    else:
        ids, labels, known, shared = _plain_windows(text, tokenizer, length, count, bos, seed, apart, option)
    chat = bool(text.conversations)
    return Windows(
        ids=ids,
        labels=labels,
        protocol=window_protocol(
            text,
            labels,
            bos="template" if chat else bos,
            stride=length - 1 if bos and not chat else length,
            layout=("padded" if seed is None else "packed") if chat else "text",
            requested=count,
            known=known,
            seed=seed,
            shared=None if apart is None else shared,
        ),
    )


def window_protocol(
    text: Text,
    labels: torch.Tensor,
    *,
    bos: bool | str,
    stride: int,
    layout: str,
    requested: int | None,
    known: int | None,
    seed: int | None,
    shared: int | None,
) -> dict[str, Any]:
    """What `Windows.protocol` says of windows with these labels [windows, length].

    Args:
        text: What was cut.
        labels: Of the windows.
        bos: Whether windows begin with BOS; "template": as the chat template has it.
        stride: Tokens from one window to the next.
        layout: "text", "padded", "packed" or "stream".
        requested: Windows that were asked for.
        known: Tokens of the whole text; None: not all was tokenised.
        seed: Of the draw.
        shared: Windows of another draw among them; None: none was to be kept away from.
    """
    return {
        "source": text.source,
        "split": text.split,
        "sha256": text.sha256,
        "join": None if text.conversations else text.join,
        "bos": bos,
        "length": labels.shape[1],
        "stride": stride,
        "layout": layout,
        "windows": labels.shape[0],
        "requested_windows": requested,
        "tokens": int((labels[:, 1:] != IGNORE).sum()),
        "text_tokens": known,
        "seed": seed,
        **({} if shared is None else {"shared_windows": shared}),
    }


def _plain_windows(
    text: Text,
    tokenizer: Any,
    length: int,
    count: int | None,
    bos: bool,
    seed: int | None,
    apart: Draw | None,
    option: str | None,
) -> tuple[torch.Tensor, torch.Tensor, int | None, int]:
    if bos and tokenizer.bos_token_id is None:
        raise CompressError("The tokenizer has no BOS token to begin windows with.", "Do without --bos.")
    stride = length - 1 if bos else length
    joined = text.joined
    known: int | None
    shared = 0
    if seed is None:
        windows, known = _cut(joined, tokenizer, stride)
        windows = windows[:count]
    else:
        windows, known, shared = _draw(joined, tokenizer, stride, count, seed, apart)
    if len(windows) == 0:
        raise CompressError(
            f"The {text.split} split of {text.source} has {known} tokens, fewer than one window of {length}.",
            "Give a longer text."
            if option is None
            else f"Give a longer text, or shorter windows ({option}).",
        )
    if bos:
        windows = torch.cat((torch.full((len(windows), 1), tokenizer.bos_token_id), windows), dim=1)
    labels = windows.clone()
    labels[:, 0] = IGNORE  # nothing comes before it
    return windows, labels, known, shared


def _cut(joined: str, tokenizer: Any, stride: int) -> tuple[torch.Tensor, int]:
    ids = torch.tensor(tokenise(joined, tokenizer), dtype=torch.long)
    return ids[: len(ids) // stride * stride].view(-1, stride), len(ids)


def _draw(
    joined: str, tokenizer: Any, stride: int, count: int | None, seed: int, apart: Draw | None
) -> tuple[torch.Tensor, int | None, int]:
    """The windows [n, stride], tokens of the whole text when all was tokenised, and how many are of ``apart``."""
    segments = list(_segments(joined, stride))
    cut: dict[int, tuple[torch.Tensor, int]] = {}

    def places(
        count: int | None, seed: int, passed: frozenset[tuple[int, int]] = frozenset()
    ) -> list[tuple[int, int]]:
        """(segment, window in it) in the order drawn."""
        generator = torch.Generator().manual_seed(seed)
        pool: list[tuple[int, int]] = []
        for index in torch.randperm(len(segments), generator=generator).tolist():
            if count is not None and len(pool) >= count:
                break
            if index not in cut:
                cut[index] = _cut(joined[slice(*segments[index])], tokenizer, stride)
            rows = range(len(cut[index][0]))
            pool += [(index, row) for row in rows if (index, row) not in passed]
        return [pool[at] for at in torch.randperm(len(pool), generator=generator)[:count].tolist()]

    others = frozenset[tuple[int, int]]() if apart is None else frozenset(places(apart.count, apart.seed))
    found, shared = places(count, seed, others), 0
    if count is not None and len(found) < count and others:
        found += [place for place in places(None, seed) if place in others][: count - len(found)]
        shared = sum(place in others for place in found)
    known = sum(tokens for _, tokens in cut.values()) if len(cut) == len(segments) else None
    if not found:
        return torch.empty(0, stride, dtype=torch.long), known, 0
    return torch.stack([cut[index][0][row] for index, row in found]), known, shared


def _segments(joined: str, stride: int) -> Iterator[tuple[int, int]]:
    # 64 windows of about 4 characters a token: little is lost at the ends of segments.
    size = max(SEGMENT_CHARACTERS, 256 * stride)
    if len(joined) <= 4 * size:
        yield 0, len(joined)
        return
    start = 0
    while start < len(joined):
        stop = min(start + size, len(joined))
        if stop < len(joined):
            seam = joined.find("\n", stop, stop + _SEAM_CHARACTERS)
            stop = seam + 1 if seam >= 0 else stop
        yield start, stop
        start = stop


def _chat_windows(
    text: Text,
    tokenizer: Any,
    length: int,
    count: int | None,
    seed: int | None,
    apart: Draw | None,
    option: str | None,
) -> tuple[torch.Tensor, torch.Tensor, None, int]:
    total = len(text.conversations)
    order: Sequence[int] = range(total)
    others: frozenset[int] = frozenset()
    if seed is not None:
        order = _permuted(total, seed)
        if apart is not None:
            rows = _chat_rows(text, tokenizer, length, apart.count, _permuted(total, apart.seed), packed=True)
            others = frozenset(index for row in rows for index in row.conversations)
            order = [index for index in order if index not in others] + [i for i in order if i in others]
    rows = _chat_rows(text, tokenizer, length, count, order, packed=seed is not None)
    if not rows:
        raise CompressError(
            f"No conversation of {text.source} has its answer within {length} tokens.",
            "Give shorter conversations."
            if option is None
            else f"Give longer windows ({option}), or shorter conversations.",
        )
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    ids_NL = torch.full((len(rows), length), pad, dtype=torch.long)
    labels_NL = torch.full((len(rows), length), IGNORE, dtype=torch.long)
    for n, row in enumerate(rows):
        ids_NL[n, : len(row.ids)] = torch.tensor(row.ids)
        labels_NL[n, : len(row.labels)] = torch.tensor(row.labels)
    return ids_NL, labels_NL, None, sum(not others.isdisjoint(row.conversations) for row in rows)


def _permuted(total: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


@dataclass(slots=True)
class _Row:
    """A window of conversations, without its padding."""

    ids: list[int]
    labels: list[int]
    conversations: list[int]


def _chat_rows(
    text: Text, tokenizer: Any, length: int, count: int | None, order: Sequence[int], *, packed: bool
) -> list[_Row]:
    rows: list[_Row] = []
    for index in order:
        ids, labels = encode_conversation(text.conversations[index], tokenizer)
        ids, labels = ids[:length], [IGNORE, *labels[1:length]]
        if all(label == IGNORE for label in labels):
            continue
        if packed and rows and len(rows[-1].ids) + len(ids) <= length:
            rows[-1].ids.extend(ids)
            rows[-1].labels.extend(labels)
            rows[-1].conversations.append(index)
        elif count is not None and len(rows) == count:
            break
        else:
            rows.append(_Row(ids, labels, [index]))
    return rows
