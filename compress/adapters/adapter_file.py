"""Adapter folders as PEFT writes them: factors by module, scaling, and the initial factors beside them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from compress.adapters.initial_factors import INITIAL_FILE, PREFIX, InitialFactors
from compress.errors import CompressError
from compress.model.inside import read_json_inside, require_inside
from compress.model.tensor_file import TensorEntry, read_header
from compress.structure import StructureMap

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STARTED_KEY = "initial_factors"
"""Entry of the config's ``auto_mapping``: in how many modules a part of the base was the start.

PEFT keeps that field as it is and looks into it where a config names no task. So the two files that PEFT knows are
enough to tell that the third one is missing.
"""

ORIGIN_FILE = "trained_on.json"
BASE_KEY, STRUCTURE_KEY = "base_fingerprint", "structure"
"""Entries of the origin file: the fingerprint of the full model behind the small one, and a hash of what that keeps."""

TRAINED_TOKENS = "token_adapter.trainable_tokens_delta"
"""Kind of whole trained rows of an embedding (``trainable_token_indices``)."""
_KINDS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "lora_embedding_B",
    TRAINED_TOKENS,
    "weight",
    "bias",
)
_UNSUPPORTED = {
    "layer_replication": "it replicates layers",
    "target_parameters": "it adapts bare parameters",
    "use_qalora": "it pools the inputs (QA-LoRA)",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "it routes between adapters (Arrow)",
    "kasa_config": "it changes the base weights (KaSA)",
    "velora_config": "it is a VeLoRA",
    "monteclora_config": "it is random (MonteCLoRA)",
    "alora_invocation_tokens": "it acts on part of the tokens (aLoRA)",
}
"""Truthy config keys under which the delta is not ``scaling * B A`` -> why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Rank, alpha and the resulting factor of one module's delta ``scaling * B A``."""

    rank: int
    alpha: float
    rank_stabilized: bool

    @property
    def value(self) -> float:
        """Alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def with_rank(self, rank: int) -> Scaling:
        """The scaling of the same value at another rank."""
        ratio = rank / self.rank
        alpha = self.alpha * (math.sqrt(ratio) if self.rank_stabilized else ratio)
        nearest = round(alpha)
        exact = nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha
        return Scaling(rank=rank, alpha=exact, rank_stabilized=self.rank_stabilized)


def owner(name: str) -> tuple[str, str]:
    """(module, kind) of a tensor in an adapter file; "weight" and "bias" are trained base tensors."""
    inner = name.removeprefix(PREFIX)
    kind = next((k for k in _KINDS if inner.endswith(f".{k}")), "")
    module = inner.removesuffix(f".{kind}") if kind else inner
    return module.removesuffix(".base_layer"), kind


class AdapterFile:
    """A LoRA adapter folder, read tensor by tensor. A context manager.

    Args:
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CompressError: It is no such folder, has a file that is a link out of it, is not a LoRA whose delta is
            ``scaling * B A``, or names ranks that its factors have not; or it started from a part of its base, and the
            initial factors beside it are not those of all the modules that did.
    """

    def __init__(self, path: Path) -> None:
        remedy = "Give the folder of a LoRA adapter that PEFT or this program saved."
        config_path, weights_path = path / CONFIG_FILE, path / WEIGHTS_FILE
        for needed in (config_path, weights_path):
            if not needed.is_file():
                raise CompressError(f"{path} is not an adapter: it has no {needed.name}.", remedy)
        self.path = path
        config = read_json_inside(config_path, remedy)
        self.config: dict[str, Any] = config
        if config.get("peft_type") != "LORA":
            raise CompressError(f"The adapter {path} is a {config.get('peft_type')}, not a LoRA.", remedy)
        for key, reason in _UNSUPPORTED.items():
            if config.get(key):
                raise CompressError(f"The adapter {path} is not supported: {reason}.", "Train a plain LoRA.")
        self._weights = _header(weights_path)
        self.names: tuple[str, ...] = tuple(sorted(self._weights))
        self.origin: dict[str, Any] = _read_origin(path / ORIGIN_FILE)
        initial = path / INITIAL_FILE
        self._initial = InitialFactors(initial, _header(initial)) if initial.is_file() else None
        if self._initial is not None:
            self._initial.require_match(self._weights)
        self._check_ranks()
        self._require_start()

    def _require_start(self) -> None:
        mapping = self.config.get("auto_mapping")
        expected = mapping.get(STARTED_KEY, 0) if isinstance(mapping, dict) else 0
        if not isinstance(expected, int):
            raise CompressError(
                f"{STARTED_KEY} in {self.path / CONFIG_FILE} is no number.", "Save the adapter again."
            )
        found = len(self.initial_modules)
        if found < expected:
            raise CompressError(
                f"The adapter {self.path} started from a part of its base in {expected} modules, and no initial "
                f"factors were kept for {expected - found} of them.",
                f"Copy {INITIAL_FILE} too from where the adapter was saved, or train it again.",
            )

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing stays open between two readings."""

    def _check_ranks(self) -> None:
        """Refuse ranks that no stored factor has: PEFT makes factors of whatever rank the config names."""
        kinds = ("lora_A.weight", "lora_embedding_A")
        stored = [self.spec(name)[0][0] for name in self.names if owner(name)[1] in kinds]
        named = [self.config.get("r"), *(self.config.get("rank_pattern") or {}).values()]
        wrong = [
            rank for rank in named if type(rank) is not int or not 1 <= rank <= max(stored, default=rank)
        ]
        if wrong:
            raise CompressError(
                f"The config of the adapter {self.path} names the rank {wrong[0]!r}, and no factor in it has that one.",
                "Save the adapter again.",
            )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules with a factor pair, as in the model ("model.layers.0.self_attn.q_proj")."""
        suffix = ".lora_A.weight"
        return tuple(
            name.removeprefix(PREFIX).removesuffix(suffix) for name in self.names if name.endswith(suffix)
        )

    def read(self, name: str) -> Tensor:
        """One stored tensor, in memory of its own."""
        return self._weights[name].read()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a stored tensor, from the header alone.

        Raises:
            CompressError: There is none of that name.
        """
        if name not in self._weights:
            raise CompressError(f"The adapter {self.path} has no {name}.", "Save the adapter again.")
        return self._weights[name].shape, self._weights[name].dtype

    def initial_rank(self, module: str) -> int | None:
        """Rank of ``B0 A0``, from the header alone; None where it was zero."""
        return None if self._initial is None else self._initial.rank(module)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]) of ``module``, in their stored dtype.

        Raises:
            CompressError: B is missing.
        """
        needed = f"{PREFIX}{module}.lora_B.weight"
        if needed not in self.names:
            raise CompressError(f"The adapter {self.path} has no {needed}.", "Save the adapter again.")
        return self.read(f"{PREFIX}{module}.lora_A.weight"), self.read(f"{PREFIX}{module}.lora_B.weight")

    def initial_factors(self, module: str) -> tuple[Tensor, Tensor] | None:
        """(A0, B0) that training started from, or None where ``B0 A0`` was zero."""
        return None if self._initial is None else self._initial.read(module)

    @property
    def initial_modules(self) -> tuple[str, ...]:
        """Modules whose initial factors were kept."""
        return () if self._initial is None else self._initial.modules

    @property
    def has_initial_factors(self) -> bool:
        """Whether training started from non-zero factors that were kept."""
        return self._initial is not None

    @property
    def transposed(self) -> bool:
        """Whether the adapted linears store their weights [in, out] (Conv1D); an lm_head never does."""
        return bool(self.config.get("fan_in_fan_out"))

    def scaling(self, module: str) -> Scaling:
        """Rank and scaling of ``module``, with PEFT's per-module patterns applied."""
        ranks: dict[str, int] = self.config.get("rank_pattern") or {}
        alphas: dict[str, float] = self.config.get("alpha_pattern") or {}
        return Scaling(
            rank=ranks.get(get_pattern_key(list(ranks), module), self.config["r"]),
            alpha=alphas.get(get_pattern_key(list(alphas), module), self.config["lora_alpha"]),
            rank_stabilized=bool(self.config.get("use_rslora")),
        )


def origin_of(base: StructureMap | str) -> dict[str, Any]:
    """The origin of an adapter that was trained on a model with this structure, or on all of a full model.

    Args:
        base: What pruning kept, or the fingerprint of a full model, quantized since or not.
    """
    if isinstance(base, str):
        return {"format_version": 1, BASE_KEY: base}
    return {"format_version": 1, BASE_KEY: base.base_fingerprint, STRUCTURE_KEY: base.digest()}


def _read_origin(path: Path) -> dict[str, Any]:
    """The content of an origin file; empty where there is none, as in adapters that PEFT alone saved."""
    if not path.is_file():
        return {}
    return read_json_inside(path, "Restore or remove the file.")


def scaling_entries(scalings: Mapping[str, Scaling]) -> dict[str, Any]:
    """The adapter_config entries that give every module its rank and alpha.

    The most common pair becomes ``r`` and ``lora_alpha``; other modules are named in the patterns.
    """
    pairs = Counter((s.rank, s.alpha) for s in scalings.values())
    # the most common, then the smallest: the same answer whatever the order of the modules
    (rank, alpha), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: s.rank for name, s in sorted(scalings.items()) if s.rank != rank},
        "alpha_pattern": {name: s.alpha for name, s in sorted(scalings.items()) if s.alpha != alpha},
    }


def write_adapter(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    initial: Mapping[str, Tensor] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter folder that stock PEFT loads; returns ``out``. Sets become sorted lists.

    ``origin`` says what the adapter was trained on, in a file that PEFT does not look at.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_config(out, config)
    _save(tensors, out / WEIGHTS_FILE)
    if initial:
        _save(initial, out / INITIAL_FILE)
    if origin:
        text = json.dumps(dict(origin), indent=2, sort_keys=True) + "\n"
        (out / ORIGIN_FILE).write_text(text, encoding="utf-8")
    return out


def write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Write ``adapter_config.json``. Sets become sorted lists."""
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (out / CONFIG_FILE).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, str(path), metadata={"format": "pt"})


def _header(path: Path) -> dict[str, TensorEntry]:
    require_inside(path.parent, path)
    try:
        return read_header(path)[0]
    except CompressError as error:
        raise CompressError(
            f"{path} is not a safetensors file: {error.cause}", "Save the adapter again."
        ) from error
