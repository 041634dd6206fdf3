"""Networks out of ONNX files: what they are given, what is refused, and with which message."""

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from pipelines.extractor import Extractor, NamedFile, PerceptualDistance
from vqvae_core.errors import InputError

UINT8, FLOAT = TensorProto.UINT8, TensorProto.FLOAT


def graph(nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], output: list[Any], **weights: Any) -> bytes:
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    made = helper.make_graph(
        nodes, "g", values, [helper.make_tensor_value_info("out", FLOAT, output)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def extractor(batch: Any = "n", side: Any = "s", kind: int = UINT8, num_features: int = 6) -> bytes:
    """A convolution with fixed weights, ReLU, and the mean over sites: (N, F)."""
    weights = np.random.default_rng(0).normal(size=(num_features, 3, 4, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["x"], to=FLOAT),
        helper.make_node("Mul", ["x", "scale"], ["y"]),
        helper.make_node("Conv", ["y", "w"], ["z"], strides=[4, 4]),
        helper.make_node("Relu", ["z"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["out"], axes=[2, 3], keepdims=0),
    ]
    return graph(nodes, {"pixels": (kind, [batch, 3, side, side])}, [batch, num_features], w=weights,
                 scale=np.float32(1 / 255 if kind == UINT8 else 0.5))  # fmt: skip


def distance(batch: Any = "n", side: Any = "s", keepdims: int = 1, axes: tuple[int, ...] = (1, 2, 3)) -> bytes:
    """The mean squared difference of two images."""
    nodes = [
        helper.make_node("Sub", ["one", "other"], ["d"]),
        helper.make_node("Mul", ["d", "d"], ["q"]),
        helper.make_node("ReduceMean", ["q"], ["out"], axes=list(axes), keepdims=keepdims),
    ]
    shape = [batch, *[1] * 3] if keepdims else [batch, *["k"] * (3 - len(axes))]
    return graph(nodes, {name: (FLOAT, [batch, 3, side, side]) for name in ("one", "other")}, shape)


def pixels(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8))


def named(data: bytes) -> NamedFile:
    return NamedFile("/here/net.onnx", data)


def expected(planes: torch.Tensor) -> np.ndarray:
    """The features of planes, as torch computes them: float (N, 3, H, W), after the graph's scale."""
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3, 4, 4)).astype(np.float32))
    return functional.conv2d(planes, weights, stride=4).relu().mean(dim=(2, 3)).numpy()


def test_pixels_or_images_by_the_type_of_the_input() -> None:
    found = pixels(5)
    planes = found.movedim(-1, 1).float()
    np.testing.assert_allclose(Extractor(named(extractor())).features(found), expected(planes / 255), atol=1e-5)
    images = Extractor(named(extractor(kind=FLOAT))).features(found)
    np.testing.assert_allclose(images, expected((planes / 127.5 - 1) * 0.5), atol=1e-5)


def test_a_fixed_size_is_resized_to() -> None:
    network = Extractor(named(extractor(side=24)))
    assert network.network.resize(16) == "16 x 16 to 24 x 24, bicubic, antialiased, in fp32"
    assert network.network.resize(24) == Extractor(named(extractor())).network.resize(16) == "none"
    found = pixels(3)
    large = functional.interpolate(found.movedim(-1, 1).float(), (24, 24), mode="bicubic", antialias=True)
    wanted = expected(large.clamp(0, 255).round() / 255)
    np.testing.assert_allclose(network.features(found), wanted, atol=1e-5)


@pytest.mark.parametrize("batch", ["n", 1, 4])
def test_features_do_not_depend_on_the_batch(batch: Any) -> None:
    network, found = Extractor(named(extractor(batch))), pixels(37)
    whole = network.features(found)
    assert whole.shape == (37, 6)
    parts = np.concatenate([network.features(part) for part in found.split([1, 30, 6])])
    assert (parts == whole).all()


@pytest.mark.parametrize(("keepdims", "batch"), [(0, "n"), (1, 4)])
def test_a_distance_of_each_pair(keepdims: int, batch: Any) -> None:
    network = PerceptualDistance(named(distance(batch, keepdims=keepdims)))
    one, other = pixels(9, seed=1), pixels(9, seed=2)
    error = ((one.double() - other.double()) / 127.5).square().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(network(one, other), error.numpy(), rtol=1e-5)
    assert (network(one, one) == 0).all()


def archive(tmp_path: Path) -> bytes:
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as file:
        file.writestr("net/data.pkl", b"")
    return (tmp_path / "net.pt").read_bytes()


def two_outputs() -> bytes:
    model = onnx.load_model_from_string(extractor())
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    return model.SerializeToString()


def outside_weights() -> bytes:
    model = onnx.load_model_from_string(extractor())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda _: b"text", ["expected an ONNX file with its weights inside at /here/net.onnx", "something else"]),
        (archive, ["found a TorchScript or other archive; export the network to ONNX, docs/evaluation.md"]),
        (lambda _: outside_weights(), ["expected an ONNX file with its weights inside"]),
        (lambda _: two_outputs(), ["expected 1 input and 1 output", "found 1 (tensor(uint8) (n, 3, s, s)) and 2"]),
        (lambda _: distance(), ["expected 1 input and 1 output", "found 2 (tensor(float)"]),
        (lambda _: extractor(kind=TensorProto.INT64), ["of type uint8 or float32", "found tensor(int64)"]),
        (lambda _: distance_of_one([1, 3, 8], keepdims=0), ["expected pictures (N, 3, H, W)", "(1, 3, 8)"]),
        (lambda _: distance_of_one(["n", 3, "s", "s"], keepdims=1), ["expected an output (N, F)", "(n, 1, 1, 1)"]),
    ],
)
def test_files_that_are_no_extractor(tmp_path: Path, make: Any, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Extractor(named(make(tmp_path)))
    for part in parts:
        assert part in str(caught.value)


def distance_of_one(shape: list[Any], keepdims: int) -> bytes:
    axes = list(range(1, len(shape)))
    nodes = [helper.make_node("ReduceMean", ["one"], ["out"], axes=axes, keepdims=keepdims)]
    return graph(nodes, {"one": (FLOAT, shape)}, [shape[0], *[1] * (len(axes) * keepdims)])


def test_outputs_that_turn_out_wrong() -> None:
    with pytest.raises(InputError, match=r"one distance for each pair, \(N,\) or .*, found \(2, 3\)"):
        PerceptualDistance(named(distance(keepdims=0, axes=(2, 3))))(pixels(2), pixels(2))
    with pytest.raises(InputError, match=r"to take \(32, 3, 3, 3\), but it failed"):
        Extractor(named(extractor())).features(pixels(2, size=3))
    nodes = [helper.make_node("ReduceMean", ["one"], ["m"], axes=[2, 3], keepdims=0),
             helper.make_node("Sub", ["m", "m"], ["z"]), helper.make_node("Div", ["m", "z"], ["out"])]  # fmt: skip
    endless = graph(nodes, {"one": (FLOAT, ["n", 3, "s", "s"])}, ["n", 3])
    with pytest.raises(InputError, match="expected finite numbers of /here/net.onnx"):
        Extractor(named(endless)).features(pixels(2))


def test_a_missing_file_is_told_and_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"expected a file at .*/inception.onnx \(--evaluate.extractor\), found no such"
    ):
        NamedFile.read(str(tmp_path / "inception.onnx"), "--evaluate.extractor")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"expected the packages that read /here/net.onnx, .*-e '.\[evaluation\]'"):
        Extractor(named(extractor()))


def test_a_file_on_s3(s3_bucket: str) -> None:
    from vqvae_core.storage import Folder

    Folder.of(f"{s3_bucket}/nets").write("net.onnx", extractor())
    file = NamedFile.read(f"{s3_bucket}/nets/net.onnx", "--evaluate.extractor")
    assert (file.name, file.sha256) == ("net.onnx", named(extractor()).sha256)
