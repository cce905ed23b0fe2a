"""What criteria that look at activations share: statistics of every decoder linear's inputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from compress.errors import CompressError
from compress.importance.base import Criterion, CriterionConfig, Needs
from compress.importance.modules import decoder_linear
from compress.importance.reduce import group_scores
from compress.model.architecture import Architecture, LinearSpec, Role

# T: tokens, I: input features


class Moments:
    """Mean and spread of the features of a stream of tokens; products in float32, sums in float64.

    Each batch is centred on its own mean before it is squared, and batches are joined by the parallel
    form of the variance, so that features with a large mean lose no digits.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._mean_I = torch.zeros(())
        self._squares_I = torch.zeros(())

    def add(self, x_TI: torch.Tensor) -> None:
        """Take in tokens, [T, I] of any float dtype."""
        x_TI = x_TI.detach().float()
        count = len(x_TI)
        mean_I = x_TI.sum(dim=0, dtype=torch.float64) / count
        squares_I = (x_TI - mean_I.float()).square_().sum(dim=0, dtype=torch.float64)
        if self.tokens == 0:
            self._mean_I, self._squares_I = mean_I, squares_I
        else:
            total, step_I = self.tokens + count, mean_I - self._mean_I
            self._squares_I = self._squares_I + squares_I + step_I**2 * (self.tokens * count / total)
            self._mean_I = self._mean_I + step_I * (count / total)
        self.tokens += count

    @property
    def norm(self) -> torch.Tensor:
        """L2 norm of each feature over all tokens, float64 [I]."""
        return (self._squares_I + self.tokens * self._mean_I**2).sqrt()

    @property
    def variance(self) -> torch.Tensor:
        """Sample variance of each feature, float64 [I]; zero for a single token."""
        return self._squares_I / max(1, self.tokens - 1)


class ActivationCriterion(Criterion):
    """A criterion of weights and of the inputs they meet.

    Run forward passes inside ``with criterion.watching(model):``, then call ``observe(model)``, which scores
    and forgets the statistics. They are not part of ``state_dict``: calibration is repeated, not resumed.
    """

    needs: ClassVar[Needs] = "activations"
    roles: frozenset[Role]
    """The linears that count."""

    def __init__(self, arch: Architecture, config: CriterionConfig | None = None) -> None:
        super().__init__(arch, config)
        self._moments: dict[str, Moments] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Gather the inputs of ``model`` (plain or PEFT) while the block runs; several blocks add up."""
        handles = []
        try:
            for layer in range(self.arch.layers):
                for spec in self.arch.linears_at(layer):
                    if spec.role in self.roles:
                        hook = self._hook(self.arch.module_name(layer, spec))
                        module = decoder_linear(model, self.arch, layer, spec)
                        handles.append(module.register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def observe(self, model: nn.Module) -> None:
        """Score the present weights with the inputs gathered; a later observation replaces an earlier one.

        Raises:
            CompressError: No inputs were gathered.
        """
        with torch.no_grad():
            found = group_scores(model, self.arch, self._sums, normalize=self.config.normalize)
        self._moments = {}
        if self._counted(found):
            self._scores = found

    @abstractmethod
    def linear_sums(self, module: nn.Module, spec: LinearSpec, name: str, inputs: Moments) -> torch.Tensor:
        """Importance of a linear summed over each output row [out], or each input column [in] of o and down."""

    def _sums(self, module: nn.Module, spec: LinearSpec, name: str) -> torch.Tensor | None:
        if spec.role not in self.roles:
            return None
        if name not in self._moments:
            raise CompressError(
                f"No inputs of {name} were gathered.", "Run forward passes inside watching() before scoring."
            )
        return self.linear_sums(module, spec, name, self._moments[name])

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._moments.setdefault(name, Moments()).add(inputs[0].flatten(0, -2))

        return add
