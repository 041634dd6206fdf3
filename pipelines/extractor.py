"""Networks that judge pictures, out of a user's ONNX file: features for FID, distances for LPIPS. The only file that
knows onnxruntime.

A file is never fetched from anywhere but where the user says it lies. TorchScript and other pickles are not taken: to
read one is to run it. An ONNX file is a graph of known operations, with its weights inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vqvae_core.artifacts import hash_bytes
from vqvae_core.errors import InputError
from vqvae_core.round_trip import filled
from vqvae_core.storage import Folder

_BATCH = 32  # where the network takes any number
_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}
_HOW = "export the network to ONNX, docs/evaluation.md shows how"


@dataclass(frozen=True)
class NamedFile:
    """A file that a user named: its content, and its sha256, which stands for it in a recipe. place: where it lies."""

    place: str
    data: bytes

    @classmethod
    def read(cls, location: str, option: str) -> "NamedFile":
        """Raises `InputError` that names the option where there is no such file."""
        uri = Folder.of(location).uri
        folder, _, name = uri.rpartition("/")
        try:
            return cls(uri, Folder(folder).read(name))
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"one that cannot be read ({error})"
            raise InputError(
                f"expected a file at {uri} ({option}), found {reason}; nothing is downloaded: name a file that you "
                "have, or leave the option out"
            ) from error

    @property
    def name(self) -> str:
        return self.place.rsplit("/", 1)[-1]

    @cached_property
    def sha256(self) -> str:
        return hash_bytes(self.data)


class Network:
    """An ONNX graph with num_inputs batches of pictures, NCHW with 3 channels, and one output. Inputs of type uint8 get
    pixels, of type float32 images in [-1, 1]."""

    def __init__(self, file: NamedFile, num_inputs: int, *, threads: int = 0, use_gpu: bool = False) -> None:
        """threads: 0 for all CPUs. Raises `InputError` where the file is no such graph or a package is missing."""
        self.file = file
        self._session = _session(file, threads, use_gpu)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        found = [f"{one.type} {_shown(one.shape)}" for one in inputs]
        if len(inputs) != num_inputs or len(outputs) != 1 or len(set(found)) != 1:
            raise InputError(
                f"expected {num_inputs} {'inputs alike' if num_inputs > 1 else 'input'} and 1 output in {file.place}, "
                f"found {len(inputs)} ({', '.join(found) or 'none'}) and {len(outputs)}; {_HOW}"
            )
        shape = inputs[0].shape
        if inputs[0].type not in _TYPES or len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
            raise InputError(
                f"expected pictures (N, 3, H, W) of type uint8 or float32 as input of {file.place}, found {found[0]}; "
                f"{_HOW}"
            )
        self._names, self._type = [one.name for one in inputs], _TYPES[inputs[0].type]
        self._batch, self._height, self._width = (shape[axis] if _is_fixed(shape[axis]) else None for axis in (0, 2, 3))
        self.output_shape: list[Any] = outputs[0].shape
        if outputs[0].type != "tensor(float)":
            raise InputError(f"expected an output of type float32 of {file.place}, found {outputs[0].type}; {_HOW}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which it sees pictures of some size: its own, where it has one."""
        return self._height or height, self._width or width

    def resize(self, size: int) -> str:
        """What becomes of pictures of some size, in words."""
        height, width = self.size(size, size)
        if (height, width) == (size, size):
            return "none"
        return f"{size} x {size} to {height} x {width}, bicubic, antialiased, in fp32"

    def __call__(self, *pictures: Tensor) -> np.ndarray:
        """The output, float32 (N, ...), for uint8 (N, H, W, 3), one for each input. Every batch has the same size, the
        last one is filled up: a picture's output does not depend on how many others there are."""
        batch = self._batch or _BATCH
        found = []
        for start in range(0, len(pictures[0]), batch):
            parts = [each[start : start + batch] for each in pictures]
            count = len(parts[0])
            inputs = zip(self._names, parts, strict=True)
            values = {name: self._input(filled(part, batch)) for name, part in inputs}
            found.append(self._run(values, batch)[:count])
        return np.concatenate(found)

    def _input(self, pixels: Tensor) -> np.ndarray:
        planes = pixels.movedim(-1, 1).to(torch.float32)
        size = self.size(planes.shape[2], planes.shape[3])
        if tuple(planes.shape[2:]) != size:
            planes = functional.interpolate(planes, size, mode="bicubic", antialias=True).clamp(0, 255)
        if self._type is np.uint8:
            return planes.round().to(torch.uint8).numpy()
        return (planes / 127.5 - 1).numpy()

    def _run(self, values: dict[str, np.ndarray], batch: int) -> np.ndarray:
        try:
            (output,) = self._session.run(None, values)
        except Exception as error:  # the runtime's own classes, all below Exception
            raise InputError(
                f"expected {self.file.place} to take {_shown(next(iter(values.values())).shape)}, but it failed: "
                f"{_first_line(error)}"
            ) from error
        output = np.asarray(output)
        if not len(output.shape) or len(output) != batch:
            raise InputError(
                f"expected a row of output of {self.file.place} for each of {batch} pictures, found the shape "
                f"{_shown(output.shape)}; {_HOW}"
            )
        if not np.isfinite(output).all():
            raise InputError(f"expected finite numbers of {self.file.place}, found others; does it take this input?")
        return output


class Extractor:
    """Features of pictures."""

    def __init__(self, file: NamedFile, *, threads: int = 0, use_gpu: bool = False) -> None:
        self.network = Network(file, 1, threads=threads, use_gpu=use_gpu)
        shape = self.network.output_shape
        if shape and len(shape) != 2:
            raise InputError(f"expected an output (N, F) of {file.place}, found {_shown(shape)}; {_HOW}")

    @property
    def num_features(self) -> int | None:
        """F, where the file says so."""
        shape = self.network.output_shape
        return shape[1] if len(shape) == 2 and _is_fixed(shape[1]) else None

    def features(self, pixels: Tensor) -> np.ndarray:
        """float32 (N, F) of uint8 (N, H, W, 3)."""
        found = self.network(pixels)
        if found.ndim != 2:
            raise InputError(f"expected an output (N, F) of {self.network.file.place}, found {_shown(found.shape)}")
        return found


class PerceptualDistance:
    """A distance of two pictures, such as LPIPS (arXiv:1801.03924)."""

    def __init__(self, file: NamedFile, *, threads: int = 0, use_gpu: bool = False) -> None:
        self.network = Network(file, 2, threads=threads, use_gpu=use_gpu)

    def __call__(self, pixels: Tensor, reference: Tensor) -> np.ndarray:
        """float64 (N,) of two uint8 tensors (N, H, W, 3)."""
        found = self.network(pixels, reference)
        if found.size != len(found):
            raise InputError(
                f"expected one distance for each pair, (N,) or (N, 1, 1, 1), of {self.network.file.place}, found "
                f"{_shown(found.shape)}; {_HOW}"
            )
        return found.reshape(len(found)).astype(np.float64)


def _session(file: NamedFile, threads: int, use_gpu: bool) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"expected the packages that read {file.place}, {error.name} is missing; in the checkout: "
            "python -m pip install -c constraints.txt -e '.[evaluation]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what is wrong is raised
    wanted = ["CUDAExecutionProvider"] if use_gpu else []
    there = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:  # from bytes: a graph that points to files beside it finds none
        return onnxruntime.InferenceSession(file.data, options, providers=[*there, "CPUExecutionProvider"])
    except Exception as error:  # the runtime's own classes, all below Exception
        kind = "a TorchScript or other archive" if file.data[:2] == b"PK" else f"something else ({_first_line(error)})"
        raise InputError(
            f"expected an ONNX file with its weights inside at {file.place}, found {kind}; {_HOW}"
        ) from error


def _is_fixed(side: Any) -> bool:
    return isinstance(side, int) and side > 0


def _shown(shape: Sequence[Any]) -> str:
    return f"({', '.join(str(side) if side is not None else '?' for side in shape)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
