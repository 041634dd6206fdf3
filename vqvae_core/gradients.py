"""Gradients of all parameters in one flat tensor, with all else that ranks sum: one reduction in one order.

A reduction in parts whose cut changes, such as that of DistributedDataParallel after its first step, rounds differently
in the first step after a restart than in any other. This one is the same in each.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_ALIGNMENT = 16  # elements: vector instructions want each gradient to begin at a multiple of their width


class FlatGradients:
    """The gradients of some parameters, each a view with the parameter's own layout of one flat tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._count = sum(_padded(parameter.numel()) for parameter in self._parameters)
        self._flat = self._parameters[0].new_zeros(self._count)
        self._bind()

    def _bind(self) -> None:
        start = 0
        for parameter in self._parameters:
            parameter.grad = self._flat.as_strided(parameter.shape, parameter.stride(), start)
            start += _padded(parameter.numel())

    def clear(self, num_extra: int) -> None:
        """Zero gradients, and room for so many numbers beside them."""
        if self._count + num_extra > len(self._flat):
            self._flat = self._flat.new_zeros(self._count + num_extra)
            self._bind()
        else:
            self._flat[: self._count].zero_()

    def reduce(self, all_reduce: Callable[[Tensor], None], world_size: int, extra: Sequence[Tensor]) -> list[Tensor]:
        """Gradients become their mean over ranks, `extra` their sums: one call of all_reduce, which sums in place.

        The sums are copies: the next step overwrites what was reduced.
        """
        if world_size == 1:
            return list(extra)
        stop = self._count + sum(part.numel() for part in extra)
        rest = self._flat[self._count : stop]
        torch.cat([part.reshape(-1).to(rest.dtype) for part in extra], out=rest)
        all_reduce(self._flat[:stop])
        self._flat[: self._count].div_(world_size)
        parts = rest.clone().split([part.numel() for part in extra])
        return [part.view(shape.shape) for part, shape in zip(parts, extra, strict=True)]

    def norm(self) -> Tensor:
        """Euclidean length over all parameters, a scalar."""
        return torch.linalg.vector_norm(self._flat[: self._count])

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale them down to a length of at most `limit`."""
        self._flat[: self._count].mul_((limit / norm).clamp(max=1.0))


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
