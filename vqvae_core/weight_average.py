"""A moving average of weights, for validation and for what is kept (Polyak averaging with exponential decay)."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

MODEL, AVERAGE = "model.", "average."  # how names in a training state begin


class WeightAverage:
    """The average of what a model is trained in. The decay of step t is at most (1 + t) / (10 + t), so that the first
    weights are soon forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names, self._decay = list(trained), decay
        self._parameters: list[Tensor] = list(trained.values())
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The average stands in the parameters, as long as this lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU, by name, for a training state."""
        pairs = zip(self._names, self._average, strict=True)
        return {f"{AVERAGE}{name}": average.to("cpu", copy=True) for name, average in pairs}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(tensors[f"{AVERAGE}{name}"])


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The weights of a training state, averaged where it has an average. Raises RuntimeError where names differ."""
    model.load_state_dict(
        {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
    )
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith(AVERAGE):
            parameters[name.removeprefix(AVERAGE)].copy_(tensor)
