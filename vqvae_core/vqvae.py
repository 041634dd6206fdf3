"""The VQ-VAE of arXiv:1711.00937: two strided convolutions and two residual blocks on each side of a table of codes."""

import contextlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae_core.artifacts import Artifact
from vqvae_core.checkpoint import config_from_json, load_trained
from vqvae_core.images import images_on, images_to_pixels
from vqvae_core.likelihood import LikelihoodConfig, make_likelihood, no_autocast
from vqvae_core.quantizer import Quantized, QuantizerConfig, at_least_fp32, make_quantizer
from vqvae_core.shapes import Float, Int, UInt8
from vqvae_core.storage import Folder

STRIDE = 4  # two convolutions of stride 2
KIND = "VQVAEModel"


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """Encoder, decoder and table. Defaults are the paper's."""

    hidden_channels: int = 256
    """Channels at 1/4 of the resolution."""
    stem_channels: int | None = None
    """Channels at 1/2 of the resolution; None: as many as hidden_channels."""
    residual_channels: int = 256
    """Channels of the 3x3 convolution inside a residual block."""
    num_residual_blocks: int = 2
    """Residual blocks on each side."""
    commitment_cost: float = 0.25
    """beta of eq. 3, for a commitment that is a sum over D and a mean over the latents."""
    sigma: float = 1.0
    """Width of a Gaussian likelihood, for images in [-1, 1]; the log-likelihood is a sum over pixels."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """p(x | z)."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """The table of codes."""

    def __post_init__(self) -> None:
        for name in ("hidden_channels", "residual_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if self.stem_channels is not None and self.stem_channels < 1:
            raise ValueError(f"stem_channels must be at least 1, was {self.stem_channels}")
        if self.num_residual_blocks < 0:
            raise ValueError(f"num_residual_blocks must be 0 or more, was {self.num_residual_blocks}")
        if not 0 <= self.commitment_cost < math.inf:
            raise ValueError(f"commitment_cost must be a number, 0 or more, was {self.commitment_cost}")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be a number above 0, was {self.sigma}")


class ResidualBlock(nn.Module):
    """ReLU, 3x3 convolution, ReLU, 1x1 convolution, added to the input."""

    def __init__(self, channels: int, inner_channels: int) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(channels, inner_channels, 3, padding=1)
        self.conv1 = nn.Conv2d(inner_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(F.relu(self.conv3(F.relu(x))))


class Encoder(nn.Module):
    """Images (B, 3, H, W) to latents z_e (B, G*D, H/4, W/4), or to so many channels of another latent."""

    def __init__(self, config: VQVAEConfig, latent_channels: int | None = None) -> None:
        super().__init__()
        hidden = config.hidden_channels
        stem = config.stem_channels or hidden
        self.conv_in = nn.Conv2d(3, stem, 4, stride=2, padding=1)
        self.conv_down = nn.Conv2d(stem, hidden, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(*_blocks(config))
        self.project = nn.Conv2d(hidden, latent_channels or config.quantizer.channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_down(F.relu(self.conv_in(images)))
        return self.project(F.relu(self.blocks(x)))


class Decoder(nn.Module):
    """Codes z_q (B, G*D, H/4, W/4), or another latent of so many channels, to what the likelihood of images takes,
    (B, C, H, W)."""

    def __init__(self, config: VQVAEConfig, latent_channels: int | None = None) -> None:
        super().__init__()
        hidden = config.hidden_channels
        stem = config.stem_channels or hidden
        likelihood = make_likelihood(config.likelihood, config.sigma)
        self._needs_fp32 = likelihood.needs_fp32
        self.expand = nn.Conv2d(latent_channels or config.quantizer.channels, hidden, 3, padding=1)
        self.blocks = nn.Sequential(*_blocks(config))
        self.conv_up = nn.ConvTranspose2d(hidden, stem, 4, stride=2, padding=1)
        self.conv_out = nn.ConvTranspose2d(stem, likelihood.num_channels, 4, stride=2, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = F.relu(self.conv_up(F.relu(self.blocks(self.expand(codes)))))
        if not self._needs_fp32:
            return self.conv_out(x)
        with no_autocast(x):
            return self.conv_out(at_least_fp32(x))


def _blocks(config: VQVAEConfig) -> list[ResidualBlock]:
    return [ResidualBlock(config.hidden_channels, config.residual_channels) for _ in range(config.num_residual_blocks)]


@dataclass(frozen=True)
class VQVAEOutput:
    """mean: the expected images (B, 3, H, W), None where they are not cheap to have (`Likelihood.mean_is_cheap`);
    quantized: codes, tokens and their two losses; the loss and its parts in nats an image."""

    mean: Tensor | None
    quantized: Quantized
    nll_nats: Tensor
    loss_nats: Tensor


class VQVAE(nn.Module):
    """Encoder, table and decoder. Knows no device, rank or framework."""

    def __init__(self, config: VQVAEConfig, *, encodes_in_bf16: bool = False) -> None:
        """encodes_in_bf16: `encode` runs the encoder under bf16 autocast, as it was trained, for the same tokens."""
        super().__init__()
        self.config = config
        self.encodes_in_bf16 = encodes_in_bf16
        self.encoder = Encoder(config)
        self.quantizer = make_quantizer(config.quantizer)
        self.decoder = Decoder(config)
        self.likelihood = make_likelihood(config.likelihood, config.sigma)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> VQVAEOutput:
        """The loss of eq. 3. Scale: -log p(x|z) summed over pixels + the table's and beta times the commitment's
        squared distance, each summed over D and averaged over the latents; then the mean over images.

        The second term moves the table only and the third the encoder only. With moving averages the second is not
        part of the loss; with levels (FSQ) both are 0.
        """
        quantized = self.quantizer(self.encoder(images))
        decoded = self.decoder(quantized.codes)
        nll = self.likelihood.nll_nats(decoded, images).mean()
        loss = nll + self.config.commitment_cost * quantized.commitment
        if self.config.quantizer.learn_by == "loss":
            loss = loss + quantized.table_loss
        mean = self.likelihood.mean(decoded.detach()) if self.likelihood.mean_is_cheap else None
        return VQVAEOutput(mean, quantized, nll, loss)

    @torch.no_grad()
    def nll_nats(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b"]:
        """-log p(x | z_q(x)) of images (B, 3, H, W), in nats, (B,): what remains to be said beside the codes. Of a
        density no bits can be made (`likelihood.has_bits`)."""
        return self.likelihood.nll_nats(self.decoder(self.quantizer(self.encoder(images)).codes), images)

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> "VQVAE":
        """The trained model of an artifact's folder, local or s3://, in eval mode. Raises `ArtifactError` where there
        is none or a file is not what the manifest says."""
        return cls.of(Artifact.open(Folder.of(path), KIND)).to(device)

    @classmethod
    def of(cls, artifact: Artifact) -> "VQVAE":
        """The trained model of an artifact, in eval mode, which encodes in the precision that it was trained in."""
        in_bf16 = artifact.facts.get("precision") == "bf16"
        return load_trained(artifact, lambda facts: cls(config_from_json(VQVAEConfig, facts), encodes_in_bf16=in_bf16))

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.encoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the images that it takes."""
        return self.encoder.conv_in.weight.dtype

    @torch.no_grad()
    def encode(self, pixels: UInt8[Tensor, "b h w 3"]) -> Int[Tensor, "b h4 w4 *g"]:
        """Tokens (B, H/4, W/4), or (B, H/4, W/4, G) where a site has several, of pixels, uint8 (B, H, W, 3)."""
        images = images_on(self.device, self.dtype, pixels)
        bf16 = torch.autocast(self.device.type, torch.bfloat16) if self.encodes_in_bf16 else contextlib.nullcontext()
        with bf16:
            return self.quantizer(self.encoder(images)).tokens

    @torch.no_grad()
    def decode(self, tokens: Int[Tensor, "b h4 w4 *g"]) -> UInt8[Tensor, "b h w 3"]:
        """Pixels, uint8 (B, H, W, 3), of tokens (B, H/4, W/4) or (B, H/4, W/4, G): the expected ones."""
        codes = self.quantizer.lookup(tokens.to(self.device))
        return images_to_pixels(self.likelihood.mean(self.decoder(codes)))
