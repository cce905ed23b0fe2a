"""A text with its provenance: what was read, which split, and the hash that identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.errors import CompressError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PARAGRAPH = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Args:
        role: "system", "user" or "assistant", as chat templates spell them.
        content: What was said.
    """

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Plain documents, or instruction conversations, of one split of one source.

    Args:
        source: Name of the source ("wikitext2", "pydoc", a file name).
        split: Which of the three disjoint parts this is.
        documents: The documents, in order; empty when there are conversations.
        conversations: Instruction conversations, in order; empty when there are documents.
        join: The string put between documents.
        sha256: Hash of ``join.join(documents)`` in UTF-8, or of the conversations as canonical JSON.
    """

    source: str
    split: Split
    documents: tuple[str, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    join: str = PARAGRAPH
    sha256: str

    @property
    def joined(self) -> str:
        """The documents as one string, the one that ``sha256`` identifies."""
        return self.join.join(self.documents)


def plain_text(source: str, split: Split, documents: Iterable[str], join: str = PARAGRAPH) -> Text:
    """Build a `Text` of documents and hash it.

    Raises:
        CompressError: Nothing but white space, or characters that UTF-8 cannot hold.
    """
    documents = tuple(documents)
    joined = join.join(documents)
    if not joined.strip():
        raise _empty(source, split)
    return Text(source=source, split=split, documents=documents, join=join, sha256=_sha256(source, joined))


def chat_text(source: str, split: Split, conversations: Iterable[Conversation]) -> Text:
    """Build a `Text` of conversations and hash its canonical JSON.

    Raises:
        CompressError: No conversation, or characters that UTF-8 cannot hold.
    """
    conversations = tuple(conversations)
    if not conversations:
        raise _empty(source, split)
    rows = [[[m.role, m.content] for m in conversation] for conversation in conversations]
    canonical = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    return Text(
        source=source,
        split=split,
        conversations=conversations,
        join="",
        sha256=_sha256(source, canonical),
    )


def conversation_key(conversation: Sequence[Message]) -> str:
    """What makes two conversations the same for splitting: the prompt, so no question is in two splits."""
    return next((m.content for m in conversation if m.role == "user"), conversation[0].content)


def _sha256(source: str, text: str) -> str:
    try:
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise CompressError(
            f"The text {source} holds an unpaired surrogate at character {error.start}.",
            "Write the file again as valid UTF-8.",
        ) from error


def _empty(source: str, split: str) -> CompressError:
    return CompressError(
        f"The text {source} has nothing to read in its {split} split.",
        "Give a source with text in it: --data pydoc, or another file.",
    )
