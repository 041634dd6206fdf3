"""A trained prior as a small API: load it, draw from it, ask it for likelihoods."""

import json
import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from vqvae_core.artifacts import Artifact, ArtifactError
from vqvae_core.checkpoint import config_from_json, load_trained, read_config, save_model
from vqvae_core.errors import InputError
from vqvae_core.fp32 import whole_fp32
from vqvae_core.pixelcnn import NO_LABEL, NOTHING, Condition, PixelCNN, PixelCNNConfig
from vqvae_core.sampler import AS_IT_IS, Draw, Drawn, Given, Sampler
from vqvae_core.shapes import Float, Integer
from vqvae_core.storage import Folder
from vqvae_core.token_shards import TokenShape

KIND = "PriorModel"
_BATCH = 16
Labels = str | SupportsIndex | Iterable[str | SupportsIndex] | None


class Prior:
    """p(tokens | label). network: the model; label_map: names of labels and their numbers, None where it has none;
    vqvae: fingerprint of the model whose tokens it knows."""

    def __init__(self, network: PixelCNN, label_map: dict[str, int] | None, vqvae: str) -> None:
        self.network, self.label_map, self.vqvae = network, label_map, vqvae

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> "Prior":
        """The trained prior of an artifact's folder, local or s3://. Raises `ArtifactError` where there is none or a
        file is not what the manifest says."""
        prior = cls.of(Artifact.open(Folder.of(path), KIND))
        prior.network.to(device)
        return prior

    @classmethod
    def of(cls, artifact: Artifact) -> "Prior":
        """The trained prior of an artifact, in eval mode."""
        facts = read_config(artifact)
        if "label_map" not in facts or "vqvae" not in facts:
            raise ArtifactError(
                f"expected a prior with its label map and its VQ-VAE's fingerprint at {artifact.folder.uri}, found one "
                "of an earlier version; train it again, with the command that made it"
            )
        network = load_trained(
            artifact,
            lambda facts: PixelCNN(
                config_from_json(PixelCNNConfig, facts["model"]), TokenShape(**facts["shape"]), facts["num_classes"]
            ),
        )
        return cls(network, facts["label_map"], facts["vqvae"])

    def files(self, model: dict[str, Any]) -> dict[str, bytes]:
        """What an artifact holds of it. model: the network's config as JSON values."""
        facts = {
            "model": model,
            "shape": vars(self.network.shape),
            "num_classes": self.network.num_classes,
            "label_map": self.label_map,
            "vqvae": self.vqvae,
        }
        return {"model.safetensors": save_model(self.network), "config.json": json.dumps(facts, indent=1).encode()}

    @property
    def shape(self) -> TokenShape:
        return self.network.shape

    def label(self, name: str | SupportsIndex) -> int:
        """The number of a label, by its name or number; -1 for none. Raises `InputError` where there is no such label,
        and for -1 where no image without a label was trained on."""
        numbers, classes = self.label_map or {}, self.network.num_classes
        if not classes:
            raise InputError(f"expected no label for a prior without labels, found {name!r}")
        if isinstance(name, str) and name in numbers:
            return numbers[name]
        try:
            number = int(name) if isinstance(name, str) else operator.index(name)
        except (TypeError, ValueError):
            number = None
        if number is None or not NO_LABEL <= number < classes:
            shown = ", ".join(list(numbers)[:10]) + (", ..." if len(numbers) > 10 else "")
            raise InputError(f"expected a label out of {shown}, or its number from 0 to {classes - 1}, found {name!r}")
        if number == NO_LABEL and not self.network.knows_no_label:
            raise InputError(
                "expected a label, found none (-1): this prior was trained on images with labels only; name one, or "
                "train the prior with --prior.label-dropout 0.1"
            )
        return number

    def sample(
        self,
        num_images: int = 1,
        *,
        labels: Labels = None,
        seed: int = 0,
        draw: Draw = AS_IT_IS,
        given: Given | None = None,
        batch_size: int = _BATCH,
        dtype: torch.dtype | None = None,
    ) -> Drawn:
        """num_images samples, the first by `seed`, each next one by the next number: a sample depends on its own seed,
        label and what is given, not on others.

        labels: one for all, or one each; None: without a label. given: codes of each sample that are there before.
        dtype: to compute in, such as bfloat16; None: the weights' own. Raises `InputError` where something does not
        fit.
        """
        if num_images < 1 or batch_size < 1:
            raise InputError(f"expected at least 1 sample and batch, found {num_images} and {batch_size}")
        if given is not None and not len(given.tokens) == len(given.where) == num_images:
            raise InputError(
                f"expected given codes for {num_images} samples, found them for {len(given.tokens)}, and places of "
                f"{len(given.where)}"
            )
        numbers = self._numbers(labels, num_images)
        sampler = Sampler(self.network, min(batch_size, num_images), draw, dtype)
        tokens, nll_nats = [], []
        for start in range(0, num_images, sampler.batch_size):
            # The last batch is filled up, so that it has the size of the others.
            rows = [min(start + place, num_images - 1) for place in range(sampler.batch_size)]
            part = None if given is None else Given(given.tokens[rows], given.where[rows])
            told = NOTHING if numbers is None else Condition(labels=numbers[rows])
            drawn = sampler.sample([seed + row for row in rows], told, part)
            tokens.append(drawn.tokens)
            nll_nats.append(drawn.nll_nats)
        return Drawn(torch.cat(tokens)[:num_images], torch.cat(nll_nats)[:num_images])

    @torch.no_grad()
    @whole_fp32()
    def log_prob(
        self, tokens: Integer[Tensor, "b h w *g"], labels: Labels = None, *, batch_size: int = _BATCH
    ) -> Float[Tensor, "b"]:
        """log p(tokens | label) of each grid, in nats, of integers (B, H, W) or (B, H, W, G); labels as for `sample`.
        Raises `InputError` where tokens or labels do not fit the prior."""
        if batch_size < 1:
            raise InputError(f"expected a batch of at least 1, found {batch_size}")
        shape, device = self.shape, self.network.embed.weight.device
        grid = (shape.height, shape.width) + ((shape.num_groups,) if shape.num_groups > 1 else ())
        if tuple(tokens.shape[1:]) not in (grid, (shape.height, shape.width, shape.num_groups)):
            raise InputError(f"expected tokens of shape (B, {', '.join(map(str, grid))}), found {tuple(tokens.shape)}")
        tokens = tokens.long()  # torch does not compare the uint16 of token files
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < shape.num_codes:
            raise InputError(
                f"expected tokens from 0 to {shape.num_codes - 1}, found {int(tokens.min())} to {int(tokens.max())}"
            )
        numbers = self._numbers(labels, len(tokens))
        found = [torch.zeros(0, dtype=self.network.embed.weight.dtype, device=device)]
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            told = NOTHING if numbers is None else Condition(labels=numbers[rows])
            nll_nats = self.network.nll_nats(tokens[rows].to(device).long(), told)
            found.append(-nll_nats.flatten(1).sum(dim=1))
        return torch.cat(found)

    def _numbers(self, labels: Labels, count: int) -> Tensor | None:
        if not self.network.num_classes:
            if labels is not None:
                raise InputError(f"expected no label for a prior without labels, found {labels!r}")
            return None
        if labels is None:
            labels = NO_LABEL
        if isinstance(labels, str) or not isinstance(labels, Iterable):
            labels = [labels] * count
        numbers = [self.label(label) for label in labels]
        if len(numbers) != count:
            raise InputError(f"expected {count} labels, found {len(numbers)}")
        return torch.tensor(numbers, dtype=torch.int64, device=self.network.embed.weight.device)
