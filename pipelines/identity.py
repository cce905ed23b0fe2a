"""What makes two runs of a stage the same: the verb, its settings, its inputs, and for unfinished work the code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

TEXT, HELD_OUT = "text of --data", "held-out text"
"""The inputs that stand for the content of a text: the one that is named, and the one that an evaluation adds."""


FORMATS: Mapping[str, int] = {"prune": 1, "align": 1, "quantize": 1, "train": 1, "recover": 1, "eval": 1}
"""By verb, the form of what its unfinished work keeps, or how it is computed: raised whenever an interrupted run of
the code before cannot be continued by the code after."""


def digest(value: Any) -> str:
    """Sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def record_digest(record: Mapping[str, Any]) -> str:
    """Sha256 of a stage's record as it reads from disk, but for ``record_sha256``, which holds the result."""
    plain = json.loads(json.dumps(record, default=str))
    return digest({key: value for key, value in plain.items() if key != "record_sha256"})


def stage_id(verb: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The identity of the stage that ``verb`` would make of these inputs."""
    return digest({"verb": verb, "config": config, "inputs": inputs})


def code_version(verb: str) -> str:
    """The code that makes a stage: this package's version, and the form of the verb's unfinished work."""
    return f"{importlib.metadata.version('compress-llm')}/{FORMATS.get(verb, 1)}"


def same_request(
    record: Mapping[str, Any], verb: str, config: Mapping[str, Any], inputs: Mapping[str, str]
) -> bool:
    """Whether a finished stage is what this request would make.

    Where the content of its text was not recorded (by an earlier version, or since it is not known beforehand) or is
    not there any more, that is left out.
    """
    known = record["inputs"]
    left_out = {name for name in (TEXT, HELD_OUT) if name not in known or name not in inputs}
    old, new = ({k: v for k, v in found.items() if k not in left_out} for found in (known, inputs))
    return stage_id(verb, record["config"], old) == stage_id(verb, config, new)


def changed_inputs(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Which inputs are others than they were, for a message."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return "the content of its text changed" if {*names} <= {TEXT, HELD_OUT} else "its input changed"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings that differ, as ``name: old -> new`` joined by commas."""
    keys = sorted({*old, *new})
    absent = "unset"
    return ", ".join(
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in keys
        if old.get(key) != new.get(key)
    )
