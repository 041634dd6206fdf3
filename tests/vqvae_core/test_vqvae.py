import pytest
import torch

from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.vqvae import VQVAE, VQVAEConfig

SMALL = {"hidden_channels": 8, "residual_channels": 4, "num_residual_blocks": 1}


def model(learn_by: str = "loss") -> VQVAE:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(num_codes=16, code_dim=4, learn_by=learn_by, init="uniform")
    return VQVAE(VQVAEConfig(**SMALL, quantizer=quantizer))


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> dict[str, bool]:
    """Which parts get a gradient from a term of the loss."""
    module.zero_grad()
    loss.backward(retain_graph=True)
    parts = {"encoder": module.encoder, "decoder": module.decoder, "table": module.quantizer}
    return {
        name: any(p.grad is not None and bool(p.grad.any()) for p in part.parameters()) for name, part in parts.items()
    }


def test_each_term_moves_what_it_should() -> None:
    """The decoder gets term 1 only, the encoder 1 and 3, the table 2 only."""
    module = model()
    output = module(torch.rand(2, 3, 16, 12) * 2 - 1)
    assert gradients(module, output.nll_nats) == {"encoder": True, "decoder": True, "table": False}
    table_loss, commitment = output.quantized.table_loss, output.quantized.commitment
    assert gradients(module, table_loss) == {"encoder": False, "decoder": False, "table": True}
    assert gradients(module, commitment) == {"encoder": True, "decoder": False, "table": False}


def test_the_loss_is_the_sum_of_the_terms() -> None:
    module = model()
    out = module(torch.rand(2, 3, 16, 12) * 2 - 1)
    expected = out.nll_nats + out.quantized.table_loss + 0.25 * out.quantized.commitment
    torch.testing.assert_close(out.loss_nats, expected)


def test_moving_averages_leave_the_table_out_of_the_loss() -> None:
    module = model("moving_average")
    output = module(torch.rand(2, 3, 16, 12) * 2 - 1)
    assert gradients(module, output.loss_nats) == {"encoder": True, "decoder": True, "table": False}


def test_shapes_with_height_unlike_width() -> None:
    module = model()
    pixels = torch.randint(0, 256, (2, 24, 16, 3), dtype=torch.uint8)
    tokens = module.encode(pixels)
    assert tokens.shape == (2, 6, 4)
    assert module.decode(tokens).shape == pixels.shape


def test_training_and_tokenizing_find_the_same_codes() -> None:
    module = model()
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    images = pixels.movedim(-1, 1).float() / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16):
        trained = module(images.contiguous(memory_format=torch.channels_last)).quantized.tokens
        encoded = module.eval().encode(pixels)
    assert torch.equal(trained, encoded)


def test_the_defaults_are_the_papers() -> None:
    module = VQVAE(VQVAEConfig())
    assert module.encoder.conv_in.weight.shape == (256, 3, 4, 4)
    assert module.encoder.conv_down.weight.shape == (256, 256, 4, 4)
    assert len(module.encoder.blocks) == len(module.decoder.blocks) == 2
    assert module.config.commitment_cost == 0.25
    assert module.config.quantizer.num_codes == 512


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="sigma must be a number above 0, was 0"):
        VQVAEConfig(sigma=0.0)
    with pytest.raises(ValueError, match="hidden_channels must be at least 1"):
        VQVAEConfig(hidden_channels=0)
