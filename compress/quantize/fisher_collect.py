"""Gather the diagonal Fisher information of decoder linears, one example at a time (LQ-LoRA §3.4).

The gradient of a linear's weight for one example is ``G^T X``, with X its inputs and G the gradients at its outputs.
It is made where backward passes by, some rows at a time, squared, added up and forgotten: no weight holds a
gradient, and what stays between examples is the sums.

Shapes: N windows, S tokens, T tokens of one window, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.importance.base import Loss
from compress.importance.modules import decoder_linear
from compress.model.architecture import Architecture
from compress.progress import Progress
from compress.quantize.fisher import Fisher

CHUNK = 1 << 22
"""Elements of a weight's gradient that exist at once."""


def gather_fisher(
    model: nn.Module,
    arch: Architecture,
    ids_NS: Tensor,
    *,
    loss: Loss,
    layers: Iterable[int] | None = None,
    full: bool = False,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> dict[str, Fisher]:
    """Module name -> Fisher information of its weight [out, in], however that is stored; on the CPU.

    Every window is one example. The model runs in evaluation mode with frozen parameters; both are restored, and
    no parameter gets a gradient. Backward goes no deeper than the first of ``layers``.

    Args:
        model: A causal language model, plain or PEFT; a LoRA counts as part of the weight.
        arch: Its architecture.
        ids_NS: Calibration tokens, int64 [N, S].
        loss: Summed next-token loss of a batch.
        layers: Whose linears; None: every layer's.
        full: Keep the whole F, 4 bytes for every weight.
        chunk: Elements of a weight's gradient held at once, at least one row.
        progress: Called after every window.

    Raises:
        CompressError: There is no text, or a gradient is not finite.
    """
    if ids_NS.numel() == 0 or ids_NS.shape[1] < 2:
        windows, tokens = ids_NS.shape
        raise CompressError(
            f"Calibration got {windows} windows of {tokens} tokens.", "Give a longer text, or longer windows."
        )
    device = next(model.parameters()).device
    sums: dict[str, _Sums] = {}
    modules: list[tuple[nn.Module, _Sums]] = []
    for layer in range(arch.layers) if layers is None else layers:
        for spec in arch.linears_at(layer):
            shape = arch.at(layer).linear_shape(spec)
            found = sums[arch.module_name(layer, spec)] = _Sums(shape, device, full=full, chunk=chunk)
            modules.append((decoder_linear(model, arch, layer, spec), found))
    if not sums:  # layers that have lost both branches
        return {}
    with _frozen(model), _watching(modules), torch.enable_grad():
        for done, ids_S in enumerate(ids_NS, start=1):
            loss(model, ids_S[None].to(device)).backward()
            if progress is not None:
                progress(done, len(ids_NS), "Fisher information")
    return {name: found.finish(name, len(ids_NS)) for name, found in sums.items()}


def layer_rounds(arch: Architecture, limit: int) -> list[range]:
    """Consecutive layers whose whole Fisher matrices together take at most ``limit`` bytes, or one layer alone."""
    rounds: list[range] = []
    size, first = 0, 0
    for layer in range(arch.layers):
        own = 0
        for spec in arch.linears_at(layer):
            out, into = arch.at(layer).linear_shape(spec)
            own += 4 * out * into
        if layer > first and size + own > limit:
            rounds.append(range(first, layer))
            size, first = 0, layer
        size += own
    return [*rounds, range(first, arch.layers)]


class _Sums:
    """Squared gradients of one weight, summed over examples."""

    def __init__(self, shape: tuple[int, int], device: torch.device, *, full: bool, chunk: int) -> None:
        self.rows = torch.zeros(shape[0], dtype=torch.float64, device=device)
        self.columns = torch.zeros(shape[1], dtype=torch.float64, device=device)
        self.full = torch.zeros(shape, device=device) if full else None
        self._step = max(1, chunk // shape[1])

    @torch.no_grad()
    def add(self, gradient_TO: Tensor, input_TI: Tensor) -> None:
        """One example's."""
        gradient_OT, wide_TI = gradient_TO.float().T, input_TI.float()
        for start in range(0, len(self.rows), self._step):
            part = slice(start, start + self._step)
            squares = (gradient_OT[part] @ wide_TI).square_()
            self.rows[part] += squares.sum(1)
            self.columns += squares.sum(0)
            if self.full is not None:
                self.full[part] += squares

    def finish(self, name: str, examples: int) -> Fisher:
        """The sums as float32 on the CPU."""
        if not bool(self.rows.isfinite().all()):
            raise CompressError(
                f"The gradients of {name} are not finite on the calibration text.",
                "Use --dtype float32 or bfloat16, or another text.",
            )
        return Fisher(
            rows=self.rows.float().cpu(),
            columns=self.columns.float().cpu(),
            examples=examples,
            full=None if self.full is None else self.full.cpu(),
        )


@contextmanager
def _watching(modules: list[tuple[nn.Module, _Sums]]) -> Iterator[None]:
    """Add every watched linear's squared gradients to its sums during backward passes over one window."""

    def hook(sums: _Sums) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            if not output.requires_grad:  # nothing below is watched: the graph begins here
                output.requires_grad_(True)
            input_TI = args[0].detach().flatten(0, -2)
            output.register_hook(lambda gradient: sums.add(gradient.flatten(0, -2), input_TI))

        return watch

    handles = [module.register_forward_hook(hook(sums)) for module, sums in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no trainable parameter, then every mode and flag as before."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
