"""Processes that train together: what they tell each other, over torch.distributed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress.errors import CompressError


class Broken(CompressError):
    """Another process failed or is gone; which and why, the launcher knows better."""


def broken(size: int, reason: str = "one of them failed") -> Broken:
    """The error of a process that others have left alone; of a long ``reason`` the first line."""
    first = " ".join((reason.strip().splitlines() or [""])[0].split())[:200].rstrip(".")
    return Broken(
        f"Training in {size} processes broke off ({first}).",
        "Give the same command again, with as many processes or fewer: it goes on from the last saved state.",
    )


def was_left(error: Exception) -> bool:
    """Whether an error is about another process, not about this one."""
    if isinstance(error, Broken | dist.DistError):
        return True
    return any(word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset"))


class Ranks:
    """The processes of the default process group, as training uses them; the first (rank 0) decides.

    Every method but the properties is collective: all ranks call it, in the same order.

    Args:
        device: Where this rank computes; tensors travel from there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, measures and says."""
        return self.rank == 0

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise broken(self.size, str(error)) from error

    def sums(self, count: int, compute: Callable[[], Sequence[float]], *, meets: bool = False) -> list[float]:
        """The sums over all ranks of ``count`` numbers, in float64.

        Args:
            count: How many.
            compute: Gives this rank's. What it raises is passed on here, and the others are told.
            meets: The ranks meet while they compute, so that one that fails cannot tell the others here.

        Raises:
            Broken: ``compute`` raised on another rank, or that rank is gone.
        """
        values: Sequence[float] = ()
        failure: Exception | None = None
        try:
            values = compute()
        except Exception as error:
            if meets:
                raise
            failure = error
        sent = [0.0] * count if failure is not None else list(values)
        with self._talking():
            told = torch.tensor([float(failure is not None), *sent], dtype=torch.float64, device=self.device)
            dist.all_reduce(told)
            failed, *found = told.tolist()
        if failure is not None:
            raise failure
        if failed:
            raise broken(self.size)
        return found

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all ranks, in one message for each dtype.

        Every rank ends with the same bits. A parameter without a gradient counts as zeros.
        """
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            same = [p for p in parameters if p.dtype == dtype]
            for p in same:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            flat = torch.cat([p.grad.flatten() for p in same if p.grad is not None])
            with self._talking():
                dist.all_reduce(flat)
            for p, part in zip(same, flat.split([p.numel() for p in same]), strict=True):
                p.grad = part.view_as(p)

    def value(self, value: Any) -> Any:
        """The first rank's JSON value."""
        text = json.dumps(value).encode() if self.first else b""
        with self._talking():
            length = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
            dist.broadcast(length, 0)
            content = torch.empty(int(length), dtype=torch.uint8, device=self.device)
            if self.first:
                content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            dist.broadcast(content, 0)
        return json.loads(bytes(content.cpu().tolist()))

    def tensors(
        self, tensors: Mapping[str, Tensor] | None, kept: Callable[[str, Tensor], Tensor] = lambda _, t: t
    ) -> dict[str, Tensor]:
        """The first rank's tensors, on the CPU; the others' argument is ignored.

        Args:
            tensors: By name.
            kept: Called with each as it arrives; what it returns is kept of it.
        """
        given = tensors or {}
        described = [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in given.items()]
        found = {}
        for name, dtype, shape in self.value(described):
            if self.first:
                whole = given[name].to(self.device).contiguous()
            else:
                whole = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            with self._talking():
                dist.broadcast(whole, 0)
            found[name] = kept(name, whole.cpu())
        return found

    def gathered(self, part: Tensor) -> list[Tensor]:
        """Equally shaped tensors of all ranks, in order, on the CPU of the first; nothing elsewhere."""
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.first else None
        with self._talking():
            dist.gather(part.contiguous(), parts, dst=0)
        return [one.cpu() for one in parts or ()]
