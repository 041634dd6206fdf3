"""A second VQ-VAE, over the tokens of the first: section 4.3 of arXiv:1711.00937.

A grid of tokens becomes a few latents of the whole image, each with a table of its own; the decoder is a PixelCNN over
the grid that is told them from every site. Two others have the same decoder: a VAE, whose posterior tends to collapse
beside a decoder that can do without, and the network that is told nothing.
"""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae_core.artifacts import Artifact
from vqvae_core.checkpoint import config_from_json, load_trained, read_config, save_model
from vqvae_core.errors import InputError
from vqvae_core.gaussian import Gaussian
from vqvae_core.pixelcnn import Condition, PixelCNN, PixelCNNConfig
from vqvae_core.quantizer import Quantized, QuantizerConfig, make_quantizer
from vqvae_core.sampler import AS_IT_IS, Draw, Drawn, Sampler
from vqvae_core.shapes import Float, Int, Integer
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape
from vqvae_core.vqvae import ResidualBlock

KIND = "SecondStageModel"
LatentKind = Literal["codes", "none", "gaussian"]
KINDS: tuple[LatentKind, ...] = ("codes", "none", "gaussian")
_BATCH = 16


def _three_tables() -> QuantizerConfig:
    return QuantizerConfig(num_groups=3, code_dim=16, learn_by="moving_average", decay=0.98, revive_every=50)


@dataclass(frozen=True, kw_only=True)
class SecondStageConfig:
    """Encoder, latents and decoder of the second stage. The tokens' shape comes from the tokens."""

    latents: LatentKind = "codes"
    """What an image becomes: codes, a Gaussian posterior of as many numbers (a VAE), or nothing (zeros). The program
    trains one of each."""
    channels: int = 64
    """Channels of the encoder."""
    residual_channels: int = 64
    """Channels of the 3x3 convolution inside its residual blocks."""
    num_strided: int = 2
    """Its convolutions of stride 2; each halves height and width, rounded up."""
    num_residual_blocks: int = 2
    """Residual blocks after them."""
    pooling: Literal["mean", "flatten"] = "flatten"
    """What is left of the sites before the latents: their mean, or all of them side by side."""
    quantizer: QuantizerConfig = field(default_factory=_three_tables)
    """The tables: num_groups latents an image, each one of num_codes codes with code_dim numbers."""
    commitment_cost: float = 0.25
    """beta of eq. 3, for a commitment that is a sum over D and a mean over the latents, beside nats an image."""
    decoder: PixelCNNConfig = field(default_factory=PixelCNNConfig)
    """p(tokens | z)."""

    def __post_init__(self) -> None:
        for name in ("channels", "residual_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        for name in ("num_strided", "num_residual_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, was {getattr(self, name)}")
        if not 0 <= self.commitment_cost < math.inf:
            raise ValueError(f"commitment_cost must be a number, 0 or more, was {self.commitment_cost}")
        if self.decoder.label_dropout:
            raise ValueError(
                f"label_dropout must be 0 in a decoder that is told no label, was {self.decoder.label_dropout}"
            )

    def with_latents(self, latents: LatentKind) -> "SecondStageConfig":
        """The same with other latents, and the defaults of all that such a model does not have: what it doesn't depend
        on is no part of its recipe."""
        if latents == "codes":
            return replace(self, latents=latents)
        sizes = QuantizerConfig(num_groups=self.quantizer.num_groups, code_dim=self.quantizer.code_dim)
        if latents == "none":
            return SecondStageConfig(latents=latents, quantizer=sizes, decoder=self.decoder)
        beta = SecondStageConfig().commitment_cost
        return replace(self, latents=latents, quantizer=sizes, commitment_cost=beta)


class TokenEncoder(nn.Module):
    """Tokens (B, H, W, G) to so many features (B, F): strided convolutions and residual blocks over embedded tokens."""

    def __init__(self, config: SecondStageConfig, shape: TokenShape, features: int) -> None:
        super().__init__()
        channels, height, width = config.channels, shape.height, shape.width
        self.shape, self.pooling = shape, config.pooling
        self.embed = nn.Embedding(shape.num_groups * shape.num_codes, channels)
        self.strided = nn.ModuleList()
        for _ in range(config.num_strided):
            self.strided.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
            height, width = -(-height // 2), -(-width // 2)
        self.blocks = nn.Sequential(
            *(ResidualBlock(channels, config.residual_channels) for _ in range(config.num_residual_blocks))
        )
        sites = 1 if config.pooling == "mean" else height * width
        self.project = nn.Linear(channels * sites, features)

    def forward(self, tokens: Tensor) -> Tensor:
        offsets = torch.arange(self.shape.num_groups, device=tokens.device) * self.shape.num_codes
        x = self.embed(tokens + offsets).sum(dim=3).permute(0, 3, 1, 2)
        for convolution in self.strided:
            x = F.relu(convolution(x))
        x = F.relu(self.blocks(x))
        return self.project(x.mean(dim=(2, 3)) if self.pooling == "mean" else x.flatten(1))


@dataclass(frozen=True)
class Latent:
    """vector: z of each image (B, F), with the gradient for the encoder; quantized: its codes, where it has some;
    kl_nats: of its posterior (B,), where it has one."""

    vector: Tensor
    quantized: Quantized | None = None
    kl_nats: Tensor | None = None


@dataclass(frozen=True)
class SecondStageOutput:
    """latent: of each image. -log p(tokens | z) and the loss, in nats an image, means over images."""

    latent: Latent
    nll_nats: Tensor
    loss_nats: Tensor


class SecondStageNetwork(nn.Module):
    """Encoder, tables and decoder. Knows no device, rank or framework. The decoder's initial weights and their number
    do not depend on the kind of latents."""

    def __init__(self, config: SecondStageConfig, shape: TokenShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        features = config.quantizer.channels
        self.decoder = PixelCNN(config.decoder, shape, vector_features=features)
        is_gaussian = config.latents == "gaussian"
        self.encoder = (
            None if config.latents == "none" else TokenEncoder(config, shape, features * (2 if is_gaussian else 1))
        )
        self.quantizer = make_quantizer(config.quantizer) if config.latents == "codes" else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.decoder.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.decoder.embed.weight.device

    def latent(self, tokens: Int[Tensor, "b h w g"], noise: Float[Tensor, "b f"] | None = None) -> Latent:
        """z of tokens (B, H, W, G). noise: standard normal (B, F), for a draw from a Gaussian posterior."""
        if self.encoder is None:
            shape = len(tokens), self.decoder.vector_features
            return Latent(torch.zeros(shape, dtype=self.dtype, device=tokens.device))
        found = self.encoder(tokens)
        if self.quantizer is not None:
            quantized = self.quantizer(found[:, :, None, None])
            return Latent(quantized.codes.flatten(1), quantized=quantized)
        assert noise is not None, "a Gaussian posterior is drawn from"
        posterior = Gaussian.of(found)
        return Latent(posterior.draw(noise), kl_nats=posterior.kl_nats())

    def nll_nats(self, tokens: Int[Tensor, "b h w g"], vector: Float[Tensor, "b f"]) -> Float[Tensor, "b"]:
        """-log p(tokens | z) of each image in nats, the sum over its codes."""
        return self.decoder.nll_nats(tokens, Condition(vector=vector)).flatten(1).sum(dim=1)

    def forward(self, tokens: Int[Tensor, "b h w g"], noise: Float[Tensor, "b f"] | None = None) -> SecondStageOutput:
        """The loss of eq. 3 for codes. Scale: -log p(tokens | z) summed over sites + the table's and beta times the
        commitment's squared distance, each summed over D and averaged over the latents; then the mean over images. For
        a Gaussian posterior: the negative ELBO."""
        latent = self.latent(tokens, noise)
        nll = loss = self.nll_nats(tokens, latent.vector).mean()
        if latent.kl_nats is not None:
            loss = nll + latent.kl_nats.mean()
        if latent.quantized is not None:
            loss = nll + self.config.commitment_cost * latent.quantized.commitment
            if self.config.quantizer.learn_by == "loss":
                loss = loss + latent.quantized.table_loss
        return SecondStageOutput(latent, nll, loss)


class SecondStage:
    """A trained second stage as a small API. network: the model; vqvae: fingerprint of the model whose tokens it
    knows; encodes_in_bf16: `encode` runs the encoder under bf16 autocast, as it was trained, for the same codes."""

    def __init__(self, network: SecondStageNetwork, vqvae: str, *, encodes_in_bf16: bool = False) -> None:
        self.network, self.vqvae, self.encodes_in_bf16 = network, vqvae, encodes_in_bf16

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> "SecondStage":
        """The trained model of an artifact's folder, local or s3://. Raises `ArtifactError` where there is none or a
        file is not what the manifest says."""
        found = cls.of(Artifact.open(Folder.of(path), KIND))
        found.network.to(device)
        return found

    @classmethod
    def of(cls, artifact: Artifact) -> "SecondStage":
        """The trained model of an artifact, in eval mode."""
        network = load_trained(
            artifact,
            lambda facts: SecondStageNetwork(
                config_from_json(SecondStageConfig, facts["model"]), TokenShape(**facts["shape"])
            ),
        )
        vqvae = read_config(artifact).get("vqvae", "")
        return cls(network, vqvae, encodes_in_bf16=artifact.facts.get("precision") == "bf16")

    def files(self, model: dict[str, Any]) -> dict[str, bytes]:
        """What an artifact holds of it. model: the network's config as JSON values."""
        facts = {"model": model, "shape": vars(self.network.shape), "vqvae": self.vqvae}
        return {"model.safetensors": save_model(self.network), "config.json": json.dumps(facts, indent=1).encode()}

    @torch.no_grad()
    def encode(self, tokens: Integer[Tensor, "b h w *g"]) -> Int[Tensor, "b n"]:
        """Codes (B, N) of tokens (B, H, W), or (B, H, W, G): one out of each of the N tables. Raises `InputError` where
        tokens do not fit, or the latents are no codes."""
        shape = self.network.shape
        grid = (shape.height, shape.width, shape.num_groups)
        if tuple(tokens.shape[1:]) not in ((grid[:2], grid) if shape.num_groups == 1 else (grid,)):
            raise InputError(f"expected tokens of shape (B, {', '.join(map(str, grid))}), found {tuple(tokens.shape)}")
        tokens = tokens.long().reshape(len(tokens), *grid)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < shape.num_codes:
            raise InputError(
                f"expected tokens from 0 to {shape.num_codes - 1}, found {int(tokens.min())} to {int(tokens.max())}"
            )
        self._check_codes()
        device = self.network.device
        bf16 = torch.autocast(device.type, torch.bfloat16) if self.encodes_in_bf16 else contextlib.nullcontext()
        with bf16:
            quantized = self.network.latent(tokens.to(device)).quantized
        assert quantized is not None, "the latents are codes"
        return quantized.tokens.reshape(len(tokens), -1)

    @torch.no_grad()
    def vectors(self, codes: Integer[Tensor, "b n"]) -> Float[Tensor, "b f"]:
        """What the decoder is told of codes (B, N): z (B, F). Raises `InputError` for codes that are not in the
        tables."""
        self._check_codes()
        assert self.network.quantizer is not None, "the latents are codes"
        groups = self.network.config.quantizer.num_groups
        if codes.shape[1] != groups:
            raise InputError(f"expected {groups} codes an image, found {codes.shape[1]}")
        grid = codes.long().to(self.network.device)[:, None, None, :]
        return self.network.quantizer.lookup(grid if groups > 1 else grid[..., 0]).flatten(1)

    def sample(
        self, codes: Integer[Tensor, "b n"], seeds: Sequence[int], *, draw: Draw = AS_IT_IS, batch_size: int = _BATCH
    ) -> Drawn:
        """A grid of tokens for each row of codes (B, N) and its seed: it depends on these two only. Raises `InputError`
        where something does not fit."""
        if len(seeds) != len(codes) or not len(codes) or batch_size < 1:
            raise InputError(
                f"expected at least 1 row of codes, a seed for each and a batch of at least 1, found {len(codes)}, "
                f"{len(seeds)} seeds and {batch_size}"
            )
        vectors = self.vectors(codes)
        sampler = Sampler(self.network.decoder, min(batch_size, len(codes)), draw)
        found = []
        for start in range(0, len(codes), sampler.batch_size):  # the last batch is filled up: all have one size
            rows = [min(start + place, len(codes) - 1) for place in range(sampler.batch_size)]
            found.append(sampler.sample([seeds[row] for row in rows], Condition(vector=vectors[rows])))
        tokens, nll_nats = torch.cat([one.tokens for one in found]), torch.cat([one.nll_nats for one in found])
        return Drawn(tokens[: len(codes)], nll_nats[: len(codes)])

    def _check_codes(self) -> None:
        if self.network.quantizer is None:
            raise InputError(
                f"expected a second stage whose latents are codes, found {self.network.config.latents}; load the one "
                "of train_second_stage_codes"
            )
