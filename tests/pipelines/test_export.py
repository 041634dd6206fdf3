import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.pipelines.test_cli import ROOT
from tests.pipelines.test_sample import models
from vqvae_core.errors import InputError
from vqvae_core.images import pixels_to_images
from vqvae_core.onnx_export import export
from vqvae_core.quantizer import QuantizerConfig, VectorQuantizer
from vqvae_core.vqvae import VQVAE, VQVAEConfig

HALVES = ("encoder", "decoder")
QUANTIZERS = {
    "table": QuantizerConfig(num_codes=40, code_dim=6),
    "sphere": QuantizerConfig(num_codes=40, code_dim=6, normalize=True),
    "fsq": QuantizerConfig(levels=(5, 4, 3)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_both_halves_are_those_of_torch(name: str) -> None:
    """Any batch and size, H unlike W. Of tokens and pixels, rounding may move a few by one place."""
    torch.manual_seed(0)
    config = VQVAEConfig(hidden_channels=16, residual_channels=8, num_residual_blocks=1, quantizer=QUANTIZERS[name])
    model = VQVAE(config).eval()
    model.encoder.project.weight.data *= 30
    if isinstance(model.quantizer, VectorQuantizer):  # codes among the latents, so that many are used
        noise = pixels_to_images(torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8))
        model.quantizer.table.data.copy_(model.quantizer.compared(model.encoder(noise))[:40])
    encoder, decoder = (onnxruntime.InferenceSession(data) for data in export(model).values())
    for shape in ((1, 32, 24, 3), (3, 16, 40, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        tokens = model.encode(torch.from_numpy(pixels))
        (found,) = encoder.run(["tokens"], {"pixels": pixels})
        assert (found == tokens.numpy()).mean() > 0.99
        assert len(np.unique(found)) > 4
        (pictures,) = decoder.run(["pixels"], {"tokens": tokens.numpy()})
        assert pictures.dtype == np.uint8
        assert np.abs(pictures.astype(int) - model.decode(tokens).numpy()).max() <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_program(tmp_path: Path) -> None:
    _, folder = models(tmp_path)
    command = [sys.executable, str(ROOT / "pipelines" / "export.py"), str(folder), "--out", str(tmp_path / "onnx")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    encoder, decoder = (onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx") for name in HALVES)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    (tokens,) = encoder.run(None, {"pixels": pixels})
    assert (tokens == VQVAE.load(str(folder)).encode(torch.from_numpy(pixels)).numpy()).mean() > 0.9
    assert decoder.run(None, {"tokens": tokens})[0].shape == pixels.shape


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        InputError, match=r"expected the packages that write ONNX, onnxscript is missing; .*-e '.\[onnx\]'"
    ):
        export(VQVAE(VQVAEConfig(hidden_channels=4, residual_channels=4, quantizer=QUANTIZERS["table"])))
