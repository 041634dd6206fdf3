"""Model files and training states: safetensors and JSON, no pickle. A state that is torn or altered is told by hash."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from vqvae_core.artifacts import hash_bytes
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder

STATE_VERSION = 1
History = list[dict[str, int | float]]  # the curves: "step" and the metrics of each logged step
_STATE, _INDEX = "state.safetensors", "state.json"


class CheckpointError(InputError):
    """A training state is torn, altered, or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run needs to go on: steps done, tensors of the model and the optimizer, and the curves so far.

    The order of samples and all random numbers are functions of the step, so they need no state of their own.
    """

    step: int
    identity: str
    tensors: dict[str, Tensor]
    history: History = field(default_factory=list)


def save_state(folder: Path, state: TrainingState) -> None:
    """Write a state into an empty local folder. The index with the hash comes last."""
    data = save({name: tensor.detach().contiguous() for name, tensor in state.tensors.items()})
    index = {
        "version": STATE_VERSION,
        "step": state.step,
        "identity": state.identity,
        "sha256": hash_bytes(data),
        "history": state.history,
    }
    out = Folder.of(folder)
    out.write(_STATE, data)
    out.write(_INDEX, json.dumps(index).encode())


def load_state(folder: Path, identity: str) -> TrainingState:
    """Raises `CheckpointError` where the state is incomplete, altered, or of a run with another identity."""
    source = Folder.of(folder)
    try:
        index = json.loads(source.read(_INDEX))
        data = source.read(_STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"expected a training state at {folder}, it is incomplete: {error}") from error
    if index.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"expected training state version {STATE_VERSION} at {folder}, found {index.get('version')!r}"
        )
    if index["identity"] != identity:
        raise CheckpointError(
            f"expected the training state of run {identity} at {folder}, found one of run {index['identity']}"
        )
    if hash_bytes(data) != index["sha256"]:
        raise CheckpointError(f"expected sha256 {index['sha256'][:12]} for {folder / _STATE}, found another")
    return TrainingState(step=index["step"], identity=identity, tensors=load(data), history=index["history"])


def collect_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The model's state and the optimizer's, by name, on the CPU."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def restore_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The reverse of `collect_tensors`. Raises RuntimeError where names or shapes differ."""
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            parameter_name, _, key = name[len("optimizer.") :].rpartition(".")
            parameter = parameters[parameter_name]
            if tensor.shape == parameter.shape:
                tensor = tensor.to(parameter.device, copy=True).contiguous(memory_format=_layout(parameter))
            else:
                tensor = tensor.clone()
            optimizer.state[parameter][key] = tensor


def _layout(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def save_model(model: nn.Module) -> bytes:
    """The weights and buffers as safetensors."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})


def load_model(model: nn.Module, data: bytes) -> None:
    """Raises RuntimeError where names or shapes differ."""
    model.load_state_dict(load(data))


def config_from_json(kind: type, values: dict[str, Any]) -> Any:
    """A config dataclass, nested ones included, from its JSON. Raises TypeError for a field it does not have."""
    fields: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(kind)}
    return kind(
        **{
            name: config_from_json(fields[name], value) if dataclasses.is_dataclass(fields.get(name)) else value
            for name, value in values.items()
        }
    )
