"""Tensors of a model as an adapter makes them: one after the other on the host, or batched on a device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.adapters.adapter_file import AdapterFile, owner
from compress.adapters.batched import LIMIT, Job, Spec, run_batched
from compress.adapters.factors import add_rounded, factor_product
from compress.adapters.initial_factors import PREFIX
from compress.adapters.lanes import Lanes
from compress.adapters.stacked import AddProduct
from compress.errors import CompressError


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A tensor of a model that an adapter changes.

    Attributes:
        change: The adapter tensor that changes it, one of the values of ``adapter_changes``.
        shape: As it is read.
        dtype: As it is read.
        read: Reads it, into memory of its own. It is what the adapter's base computes with; initial factors, where
            there are any, are in it.
        read_into: Reads it into memory that is there; None: by ``read``.
        transposed: It lies [in, out].
        mask: Bool [out, in], False where the base's weight was removed and stays removed; None: it is whole.
        stored: The dtype of the result; None: its own.
    """

    change: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_into: Callable[[Tensor], None] | None = None
    transposed: bool = False
    mask: Callable[[], Tensor] | None = None
    stored: torch.dtype | None = None


def merged_tensors(
    requests: Sequence[Request], file: AdapterFile, lanes: Lanes | None = None, *, limit: int = LIMIT
) -> Generator[Tensor]:
    """Each tensor with its change, in the order of the requests; valid until the next is asked for.

    Sums are taken in float32 and rounded once. Without lanes one tensor is in memory at a time, and the float32 change
    beside it. With lanes the products are computed there, those of equal shapes together (`compress.adapters.batched`);
    their results differ from the others by what float32 sums in another order do.

    Args:
        requests: What to change.
        file: The adapter.
        lanes: Those of a device; None: the host, tensor by tensor.
        limit: Bytes of a window of products on lanes.

    Raises:
        CompressError: Shapes differ, or the device has no room for one product.
    """
    if lanes is None:
        for request in requests:
            yield merged(request, file)
        return
    jobs = [product_job(request, file) for request in requests]
    with closing(run_batched([job for job in jobs if job is not None], lanes, limit=limit)) as results:
        for request, job in zip(requests, jobs, strict=True):
            yield merged(request, file) if job is None else next(results)[0]


def merged(request: Request, file: AdapterFile) -> Tensor:
    """One tensor with its change, computed on the host.

    Raises:
        CompressError: The shapes differ.
    """
    module, kind = owner(request.change)
    stored = request.dtype if request.stored is None else request.stored
    if kind in ("weight", "bias"):
        replaced = file.read(request.change)
        _require_shape(module, tuple(replaced.shape), request.shape)
        return replaced.to(request.dtype).to(stored)
    change = _change(file, module, kind)
    if request.mask is not None and (mask := request.mask()).shape == change.shape:
        change.mul_(mask)
    if request.transposed:
        change = change.T
    _require_shape(module, tuple(change.shape), request.shape)
    return add_rounded(request.read(), change).to(stored)


def product_job(request: Request, file: AdapterFile) -> Job | None:
    """The batched form of a change that is a product of factors; None for any other.

    Raises:
        CompressError: The shapes differ.
    """
    module, kind = owner(request.change)
    if kind not in ("lora_B.weight", "lora_embedding_B"):
        return None
    pair = (request.change.removesuffix(kind) + kind.replace("_B", "_A"), request.change)
    (shape_a, dtype_a), (shape_b, dtype_b) = (file.spec(name) for name in pair)
    ranks = (shape_a[0], shape_b[1])
    started = file.initial_rank(module) if kind == "lora_B.weight" else None
    if ranks[0] != ranks[1]:
        raise CompressError(f"The factors of {module} differ in rank.", "Save the adapter again.")
    rank, made_for = ranks[0], (shape_b[0], shape_a[1])
    if started is not None:
        rank, dtype_a, dtype_b = rank + started, torch.float32, torch.float32
    # an embedding's delta is the transpose of B A, and so is that of a weight [in, out]
    flipped = (kind == "lora_embedding_B") != request.transposed
    made_for = made_for[::-1] if flipped else made_for
    _require_shape(module, made_for, request.shape)
    left, right = (dtype_a, dtype_b) if flipped else (dtype_b, dtype_a)
    weight = Spec(request.shape, request.dtype)
    masks = () if request.mask is None else (Spec(request.shape, torch.bool),)
    stored = request.dtype if request.stored is None else request.stored

    def fill(targets: Sequence[Tensor]) -> None:
        if request.read_into is None:
            targets[0].copy_(request.read())
        else:
            request.read_into(targets[0])
        into_a, into_b = (targets[1].T, targets[2].T) if flipped else (targets[2], targets[1])
        own = ranks[0]
        into_a[:own].copy_(file.read(pair[0]))
        into_b[:, :own].copy_(file.read(pair[1]))
        if started is not None:
            initial = file.initial_factors(module)
            assert initial is not None
            into_a[own:].copy_(initial[0])
            into_b[:, own:].copy_(initial[1].neg())
        if request.mask is not None:
            mask = request.mask()
            mask = mask.T if request.transposed else mask
            targets[3].copy_(mask) if mask.shape == request.shape else targets[3].fill_(True)

    return Job(
        operation=AddProduct(
            scaling=file.scaling(module).value, stored=stored, in_place=stored == request.dtype
        ),
        inputs=(
            weight,
            Spec((request.shape[0], rank), left),
            Spec((rank, request.shape[1]), right),
            *masks,
        ),
        outputs=(Spec(request.shape, stored),),
        fill=fill,
    )


def _require_shape(module: str, made_for: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if made_for != shape:
        raise CompressError(
            f"The adapter of {module} is made for {made_for}, not for {shape}.",
            "Give the model the adapter was made for.",
        )


def _change(file: AdapterFile, module: str, kind: str) -> Tensor:
    """The float32 summand of a weight or bias."""
    scaling = file.scaling(module).value
    if kind == "lora_B.bias":
        return file.read(f"{PREFIX}{module}.{kind}").float() * scaling
    if kind == "lora_embedding_B":  # A [r, vocab], B [hidden, r]
        factor_a, factor_b = (file.read(f"{PREFIX}{module}.lora_embedding_{side}") for side in "AB")
        return factor_product(factor_a, factor_b, scaling).T
    delta, start = factor_product(*file.factors(module), scaling), file.initial_factors(module)
    return delta if start is None else delta.sub_(factor_product(*start, scaling))
