"""Training states: safetensors and JSON, written beside training, checked by hash when one is read.

A folder of states has one folder a step, `step-000000250`, with `state.safetensors` and, written after it, `state.json`
with its hash. A state without the second is none.
"""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vqvae_core.artifacts import Artifact, ArtifactError, hash_bytes
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder

M = TypeVar("M", bound=nn.Module)
STATE_VERSION = 3
History = list[dict[str, int | float]]  # the curves: "step" and the metrics of each logged step
_STATE, _INDEX, _PREFIX = "state.safetensors", "state.json", "step-"


class CheckpointError(InputError):
    """A training state is torn, altered, or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run needs to go on: steps done, tensors of the model, its average and the optimizer, the curves so far,
    and the metrics of each step since their last point.

    The order of samples and all random numbers are functions of the step, so they need no state of their own.
    """

    step: int
    identity: str
    tensors: dict[str, Tensor]
    history: History = field(default_factory=list)
    pending: list[dict[str, float]] = field(default_factory=list)


class StateFolder:
    """The states of one run. keep: how many of the newest stay, beside the best by validation.

    identity: a hash of what is trained on what; a state of another is refused. warn: called with a line where a state
    had to be passed over. Writing happens in a thread, one state at a time.
    """

    def __init__(self, folder: Folder, identity: str, *, keep: int = 2, warn: Callable[[str], None] = print) -> None:
        self.folder, self.identity, self._keep, self._warn = folder, identity, keep, warn
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def steps(self) -> list[int]:
        """Steps of which there is a folder, the newest first. Some may be torn."""
        names = (name.removeprefix(_PREFIX) for name in self.folder.folders() if name.startswith(_PREFIX))
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def finished(self) -> list[int]:
        """Steps whose state was written to its end, the newest first. What is altered is found by `load`."""
        return [step for step in self.steps() if self.folder.exists(f"{_name(step)}/{_INDEX}")]

    def newest(self) -> TrainingState | None:
        """The newest whole state. What is torn or altered is passed over with a warning that names it and the one that
        is used. Raises `CheckpointError` for a state of another run or version, OSError where a file cannot be read."""
        torn: list[str] = []
        for step in self.steps():
            try:
                state = self.load(step)
            except TornStateError as error:
                torn.append(str(error))
                continue
            if torn:
                self._warn(f"{'; '.join(torn)}; going on from {self.folder.path(_name(step))}")
            return state
        if torn:
            self._warn(f"{'; '.join(torn)}; there is no other, starting from step 0")
        return None

    def load(self, step: int) -> TrainingState:
        """Raises `TornStateError` where the state is incomplete or altered, `CheckpointError` where it is of another
        run."""
        where = self.folder.path(_name(step))
        try:
            index = json.loads(self.folder.read(f"{_name(step)}/{_INDEX}"))
            version = index["version"]
        except (FileNotFoundError, NotADirectoryError):
            raise TornStateError(f"expected a whole training state at {where}, found no {_INDEX}") from None
        except (ValueError, KeyError, TypeError):
            raise TornStateError(f"expected the index of a state in {where}/{_INDEX}, found something else") from None
        if version != STATE_VERSION:
            raise CheckpointError(
                f"expected training state version {STATE_VERSION} at {where}, found {version!r}; use the release that "
                "wrote it, or move that folder away"
            )
        digest = index.pop("digest", None)
        if digest != _digest(index) or index["step"] != step:
            raise TornStateError(f"expected {where}/{_INDEX} as it was written, found it altered")
        if index["identity"] != self.identity:
            raise CheckpointError(
                f"expected the training state of run {self.identity} at {where}, found one of run "
                f"{index['identity']}: it has another config or other data; move that folder away"
            )
        try:
            data = self.folder.read(f"{_name(step)}/{_STATE}")
        except (FileNotFoundError, NotADirectoryError):
            raise TornStateError(f"expected {_STATE} at {where}, found nothing") from None
        found = hash_bytes(data)
        if found != index["sha256"]:
            raise TornStateError(f"expected sha256 {index['sha256'][:12]} for {where}/{_STATE}, found {found[:12]}")
        rest = {name: index[name] for name in ("step", "identity", "history", "pending")}
        return TrainingState(tensors=load(data), **rest)

    def save(self, state: TrainingState, best_step: int | None = None) -> None:
        """Write a state in a thread, after the one before; then delete those that are neither among the newest nor the
        best. Raises here, or in the next `save` or `wait`, what an earlier one failed with."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(state, best_step), name="states", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last state is written. Raises what writing it failed with: the states before it are kept."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, state: TrainingState, best_step: int | None) -> None:
        try:
            self.write(state)
            # Of what is torn nothing can go on: it does not count.
            whole = [step for step in self.finished() if step <= state.step]
            kept = {*whole[: self._keep], best_step}
            for step in self.steps():
                if step not in kept:
                    # The index first: what is left of a deletion that is cut short is no state.
                    self.folder.delete(f"{_name(step)}/{_INDEX}")
                    self.folder.delete_folder(_name(step))
        except BaseException as error:
            self._failure = error

    def write(self, state: TrainingState) -> None:
        """Write a state now. Its index, with the hash, comes last."""
        name = _name(state.step)
        data = save({name: tensor.contiguous() for name, tensor in state.tensors.items()})
        index = {
            "version": STATE_VERSION,
            "step": state.step,
            "identity": state.identity,
            "sha256": hash_bytes(data),
            "history": state.history,
            "pending": state.pending,
        }
        self.folder.delete(f"{name}/{_INDEX}")  # of a torn state of the same step
        try:
            self.folder.write(f"{name}/{_STATE}", data)
            self.folder.write(f"{name}/{_INDEX}", json.dumps({**index, "digest": _digest(index)}).encode())
        except (OSError, InputError):  # such as a full disk: nothing half written takes room
            with contextlib.suppress(OSError):
                self.folder.delete_folder(name)
            raise


class TornStateError(CheckpointError):
    """A training state is incomplete or altered: the one before it may be whole."""


def _digest(index: dict[str, Any]) -> str:
    return hash_bytes(json.dumps(index, sort_keys=True).encode())


def _name(step: int) -> str:
    return f"{_PREFIX}{step:09d}"


def collect_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The model's state and the optimizer's, by name, copied to the CPU."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


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
            else:  # the count of steps, which a fused optimizer reads where the parameter is
                tensor = tensor.to(parameter.device, copy=True)
            optimizer.state[parameter][key] = tensor


def _layout(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def save_model(model: nn.Module) -> bytes:
    """The weights and buffers as safetensors."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})


def read_config(artifact: Artifact) -> dict[str, Any]:
    """A model's config.json. Raises `ArtifactError` where it is none."""
    try:
        facts = json.loads(artifact.read("config.json"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        facts = None
    if not isinstance(facts, dict):
        raise ArtifactError(f"expected a JSON object in {artifact.folder.path('config.json')}, found something else")
    return facts


class _NoDraws(TorchFunctionMode):
    """Initial values are not drawn. On the meta device they would be nothing, and PyTorch imports its compiler for
    them, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        named = kwargs or {}
        if getattr(func, "__name__", "") in {"normal_", "uniform_", "kaiming_uniform_"}:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def load_trained(artifact: Artifact, make: Callable[[dict[str, Any]], M]) -> M:
    """The model that `make` builds from an artifact's config.json, with the weights beside it, in eval mode.

    It is built for its shapes alone first: a config that does not belong to the weights costs no memory, however large
    its numbers are. Raises `ArtifactError` where the two are not what this version makes of each other.
    """
    facts = read_config(artifact)
    try:
        weights = load(artifact.read("model.safetensors"))
        with torch.device("meta"), _NoDraws():
            plan = {name: tuple(tensor.shape) for name, tensor in make(facts).state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if plan != found:
            name = min(name for name in plan.keys() | found.keys() if plan.get(name) != found.get(name))
            asked, has = plan.get(name, "none"), found.get(name, "none")
            raise ValueError(f"its config asks for {name} of shape {asked}, the weights have {has}")
        model = make(facts)
        model.load_state_dict(weights)
        return model.eval()
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"expected a model that this version can load at {artifact.folder.uri}, but: {reason}; load it with the "
            "version that made it, or train it again with the command that made it"
        ) from error


def config_from_json(kind: type, values: dict[str, Any]) -> Any:
    """A config dataclass, nested ones included, from its JSON. Raises TypeError for a field it does not have."""
    fields: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(kind)}
    return kind(**{name: _from_json(fields.get(name), value) for name, value in values.items()})


def _from_json(kind: Any, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return config_from_json(kind, value) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else value
