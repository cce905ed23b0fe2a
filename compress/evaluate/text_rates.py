"""A loss for each word and each byte of the text, which tokenizers of every kind can be compared by."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from compress.data.extent import Extent
from compress.evaluate.interval import exponential
from compress.evaluate.perplexity import Perplexity


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRates:
    """The summed loss of a measurement over units of text instead of tokens.

    Args:
        word_perplexity: ``exp`` of the loss in nats for each whitespace-separated word. Not the (token-level)
            perplexity: a word has several tokens.
        bits_per_byte: Loss in bits for each byte of the text in UTF-8.
        words: Words that were scored.
        bytes: Bytes that were scored.
    """

    word_perplexity: float
    bits_per_byte: float
    words: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def text_rates(measured: Perplexity, extent: Extent) -> TextRates | None:
    """The rates of a perplexity over windows with this extent; None where no word or byte was scored."""
    if extent.words == 0 or extent.bytes == 0:
        return None
    nats = measured.mean_nll * measured.tokens
    return TextRates(
        word_perplexity=exponential(nats / extent.words),
        bits_per_byte=nats / math.log(2) / extent.bytes,
        words=extent.words,
        bytes=extent.bytes,
    )
