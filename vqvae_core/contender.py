"""The models of the paper's likelihood table by name, with the same encoder and decoder and the same training loop."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from vqvae_core.artifacts import Artifact
from vqvae_core.bound_training import BoundTraining, measure
from vqvae_core.checkpoint import config_from_json, load_trained
from vqvae_core.errors import InputError
from vqvae_core.latent_model import decodings_in
from vqvae_core.likelihood import bits_per_dim, make_likelihood
from vqvae_core.round_trip import decoded, encoded
from vqvae_core.train import Trainable, Worker, autocast
from vqvae_core.train_config import Precision
from vqvae_core.vae import VAE
from vqvae_core.vimco import CategoricalVIMCO, GaussianVIMCO
from vqvae_core.vqvae import VQVAE, VQVAEConfig
from vqvae_core.vqvae_training import VQVAETraining, uniform_bits_per_dim

KIND = "BaselineModel"
VQ_VAE = "vqvae"
_BASELINES = {"vae": VAE, "vimco": CategoricalVIMCO, "vimco_gaussian": GaussianVIMCO}
NAMES = ("vae", VQ_VAE, "vimco", "vimco_gaussian")
TITLES = {"vae": "VAE", VQ_VAE: "VQ-VAE", "vimco": "VIMCO, categorical", "vimco_gaussian": "VIMCO, Gaussian"}
Contender = VQVAE | VAE | CategoricalVIMCO | GaussianVIMCO


def make_model(name: str, config: VQVAEConfig) -> Contender:
    """The untrained model of a name out of NAMES."""
    return VQVAE(config) if name == VQ_VAE else _BASELINES[name](config)


def check_has_bits(config: VQVAEConfig) -> None:
    """Raises `InputError` where p(x | z) is no probability, so that no bits/dim can be made of it."""
    if not make_likelihood(config.likelihood, config.sigma).has_bits:
        raise InputError(
            f"expected a likelihood with bits for the table, found a {config.likelihood.kind}; set "
            "vqvae.likelihood.kind to logistic, gaussian or categorical"
        )


def make_task(
    name: str,
    model: Any,
    *,
    steps: int,
    steps_per_epoch: int,
    num_samples: int,
    seed: int,
    precision: Precision,
    worker: Worker,
    validation: torch.Tensor,
    mebibytes: int,
) -> Trainable:
    """Its training. num_samples: S of VIMCO; the others take one draw, or none. mebibytes: see `BoundTraining`. Raises
    `InputError` where the model's likelihood has no bits."""
    check_has_bits(model.config)
    if name == VQ_VAE:
        return VQVAETraining(
            model, steps=steps, steps_per_epoch=steps_per_epoch, seed=seed, precision=precision, worker=worker,
            validation=validation,
        )  # fmt: skip
    return BoundTraining(
        model, num_samples=samples_of(name, num_samples), seed=seed, precision=precision, worker=worker,
        validation=validation, mebibytes=mebibytes,
    )  # fmt: skip


def samples_of(name: str, num_samples: int) -> int:
    """S of a training: of VIMCO alone it is more than 1."""
    return num_samples if name.startswith("vimco") else 1


def figures(
    name: str,
    model: Any,
    pixels: torch.Tensor,
    samples: Sequence[int],
    precision: Precision,
    device: str,
    mebibytes: int,
    first: int = 0,
) -> dict[str, float]:
    """Bits/dim of uint8 (N, H, W, 3), means over images: `total_bits_per_dim`, a bound on -log2 p(x), with its parts
    `reconstruction_bits_per_dim` and `latents_bits_per_dim` where it has two; of VIMCO `bound_<S>_bits_per_dim` for
    each number of samples, the first of which is its total. first: place of the first image in its split, by which
    latents are drawn."""
    if name == VQ_VAE:
        with autocast(device, precision):
            _, nats = decoded(model, encoded(model, pixels), pixels)
        assert nats is not None, "the likelihood has bits"
        return vqvae_figures(model.config, nats, pixels.shape[1:3])
    at_once = decodings_in(mebibytes, model.config, *pixels.shape[1:3])
    if name == "vae":
        found = measure(model, pixels, (1,), precision, device, at_once, first)
        assert found.reconstruction_bits_per_dim is not None and found.kl_bits_per_dim is not None, "a VAE has both"
        return {
            "reconstruction_bits_per_dim": found.reconstruction_bits_per_dim,
            "latents_bits_per_dim": found.kl_bits_per_dim,
            "total_bits_per_dim": found.bits_per_dim[1],
        }
    found = measure(model, pixels, samples, precision, device, at_once, first)
    bounds = {f"bound_{number}_bits_per_dim": value for number, value in found.bits_per_dim.items()}
    return {"total_bits_per_dim": found.bits_per_dim[samples[0]], **bounds}


def vqvae_figures(config: VQVAEConfig, nll_nats: torch.Tensor, size: Sequence[int]) -> dict[str, float]:
    """The same of a VQ-VAE, from -log p(x | z) of each image (N,), for images of size (H, W)."""
    height, width = size
    reconstruction = bits_per_dim(float(nll_nats.mean()), 3 * height * width)
    latents = uniform_bits_per_dim(config, height, width)
    return {
        "reconstruction_bits_per_dim": reconstruction,
        "latents_bits_per_dim": latents,
        "total_bits_per_dim": reconstruction + latents,
    }


def baseline_config(name: str, model: dict[str, Any], num_samples: int) -> bytes:
    """What an artifact's config.json holds of a model that is no VQ-VAE."""
    return json.dumps({"name": name, "model": model, "num_samples": num_samples}, indent=1).encode()


def load_contender(name: str, artifact: Artifact) -> Contender:
    """The trained model of an artifact, in eval mode."""
    if name == VQ_VAE:
        return VQVAE.of(artifact)
    return load_trained(
        artifact, lambda facts: make_model(facts["name"], config_from_json(VQVAEConfig, facts["model"]))
    )
