"""What the training loop needs to know of a second stage: its loss, its tables' statistics, its validation."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vqvae_core.metrics import perplexity, usage
from vqvae_core.noise import drawn_by, place_seeds
from vqvae_core.order import mix
from vqvae_core.second_stage import SecondStageNetwork
from vqvae_core.table_upkeep import TableUpkeep
from vqvae_core.train import Piece, StepOutput, Worker, autocast, to_device
from vqvae_core.train_config import Precision
from vqvae_core.vqvae_training import counts_of

Batch = tuple[Tensor, Tensor]  # tokens (B, H, W, G) and labels (B,), which are not used
_CHUNK = 64


class SecondStageTraining:
    """The `Trainable` of a second stage. steps: of the whole run, and of an epoch. validation: tokens (N, H, W, G), a
    fixed set.

    pool: training tokens (N, H, W, G), the same on all ranks. An image has one latent of a table, not hundreds, so that
    a batch has fewer of them than the table has codes: codes start, and are revived, at latents of the pool.
    """

    def __init__(
        self,
        model: SecondStageNetwork,
        *,
        steps: int,
        steps_per_epoch: int,
        seed: int,
        precision: Precision,
        worker: Worker,
        pool: Tensor,
        validation: Tensor,
    ) -> None:
        to_device(model, worker.device)
        self.model = model
        self._precision: Precision = precision
        self._seed, self._worker, self._pool, self._validation = seed, worker, pool, validation
        quantizer = model.quantizer
        self._upkeep = None if quantizer is None else TableUpkeep(quantizer, steps, steps_per_epoch, seed)

    def before_training(self, pieces: Sequence[tuple[Batch, Piece]], worker: Worker) -> None:
        """Put the codes at latents of the pool."""
        upkeep, quantizer = self._upkeep, self.model.quantizer
        if upkeep is None or quantizer is None or quantizer.started:
            return
        count, is_first = upkeep.num_start_points, pieces[0][1].first == 0
        upkeep.start(self._candidates(count, mix(self._seed, 1), here=is_first), worker.all_reduce)

    @torch.no_grad()
    def _candidates(self, count: int, seed: int, *, here: bool) -> Tensor:
        """Latents (M, F) of up to `count` images of the pool, drawn by the seed; zeros where another piece has them, so
        that their sum over pieces and ranks is the same however the batch is cut."""
        generator = torch.Generator().manual_seed(seed & (2**63 - 1))
        chosen = torch.randperm(len(self._pool), generator=generator)[:count]
        if not here:
            shape = len(chosen), self.model.decoder.vector_features
            return torch.zeros(shape, dtype=self.model.dtype, device=self._worker.device)
        found = []
        for part in chosen.split(_CHUNK):
            with autocast(self._worker.device, self._precision):
                quantized = self.model.latent(self._pool[part].to(self._worker.device)).quantized
            assert quantized is not None, "the latents are codes"
            found.append(quantized.rows)
        return torch.cat(found)

    def step(self, batch: Batch, piece: Piece, step: int) -> StepOutput:
        tokens = batch[0].to(self._worker.device)
        noise = self._noise(place_seeds(piece.first, len(tokens), self._seed, 5, step))
        with autocast(self._worker.device, self._precision):
            output = self.model(tokens, noise)
        quantized, kl_nats = output.latent.quantized, output.latent.kl_nats
        metrics = {"nll_nats": output.nll_nats, "loss_nats": output.loss_nats}
        statistics: list[Tensor] = []
        if kl_nats is not None:
            metrics["kl_nats"] = kl_nats.mean()
        if quantized is not None and self.model.quantizer is not None and self._upkeep is not None:
            metrics["commitment"] = quantized.commitment
            statistics = self.model.quantizer.statistics(quantized)
            if self._upkeep.revives(step):
                count = self.model.config.quantizer.num_codes
                statistics.append(self._candidates(count, mix(self._seed, 2, step), here=piece.first == 0))
        return StepOutput(output.loss_nats / self.model.shape.num_tokens, metrics, statistics)

    def _noise(self, seeds: list[int]) -> Tensor | None:
        """Of a Gaussian posterior: a function of a sample's place in the global batch."""
        if self.model.config.latents != "gaussian":
            return None
        return drawn_by(seeds, (self.model.decoder.vector_features,)).to(self._worker.device, self.model.dtype)

    def after_step(self, statistics: list[Tensor], step: int, optimizer: torch.optim.Optimizer) -> None:
        if self._upkeep is not None:
            self._upkeep.after_step(statistics, step, optimizer)

    def figures(self, since: int, done: int) -> dict[str, float]:
        return {} if self._upkeep is None else self._upkeep.figures(since, done)

    def pictures(self) -> dict[str, bytes]:
        return {}

    def score(self, metrics: Mapping[str, int | float]) -> float:
        """-log p of an image; for a Gaussian posterior the bound."""
        return metrics["validation_nll_nats"] + metrics.get("validation_kl_nats", 0.0)

    def validate(self) -> dict[str, float]:
        self.model.eval()
        try:
            found = evaluate(self.model, self._validation, self._precision, self._worker.device, seed=self._seed)
        finally:
            self.model.train()
        return {f"validation_{name}": value for name, value in found.items()}


def derangement(count: int, seed: int) -> Tensor:
    """int64 (count,): a permutation that leaves nothing in its place: one cycle through all, drawn by the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed & (2**63 - 1)))
    found = torch.empty_like(order)
    found[order] = order.roll(-1)
    return found


@torch.no_grad()
def evaluate(
    model: SecondStageNetwork, tokens: Tensor, precision: Precision, device: str = "cpu", *, seed: int = 0
) -> dict[str, float]:
    """Figures over tokens (N, H, W, G), means over images.

    nll_nats: -log p(tokens | z). total_nats: with what z costs: log K for each code, as under a uniform prior, or the
    KL. shuffled_nll_nats: each image with the z of another one. bits_per_token: of nll_nats. kl_nats: of a Gaussian
    posterior, whose z is a draw by the seed. perplexity_i, usage_i: of the codes of latent i = 1, 2, ...
    """
    noise = drawn_by(place_seeds(0, len(tokens), seed, 6), (model.decoder.vector_features,))
    latents = []
    for part, drawn in zip(tokens.split(_CHUNK), noise.split(_CHUNK), strict=True):
        with autocast(device, precision):
            latents.append(model.latent(part.to(device), drawn.to(device, model.dtype)))
    vectors = torch.cat([latent.vector for latent in latents])
    nll = _nll_nats(model, tokens, vectors, precision, device)
    found = {"nll_nats": nll, "total_nats": nll, "bits_per_token": nll / model.shape.num_tokens / math.log(2)}
    if model.config.latents == "none":
        return found
    if len(tokens) > 1:
        others = vectors[derangement(len(tokens), 0).to(vectors.device)]
        found["shuffled_nll_nats"] = _nll_nats(model, tokens, others, precision, device)
    divergences = [latent.kl_nats for latent in latents if latent.kl_nats is not None]
    if divergences:
        found["kl_nats"] = float(torch.cat(divergences).double().mean())
        found["total_nats"] += found["kl_nats"]
    codes = [latent.quantized.tokens.cpu() for latent in latents if latent.quantized is not None]
    if codes:
        config = model.config.quantizer
        found["total_nats"] += config.num_groups * math.log(config.num_codes)
        for number, counts in enumerate(counts_of(torch.cat(codes), config), 1):
            found |= {f"perplexity_{number}": perplexity(counts), f"usage_{number}": usage(counts)}
    return found


def _nll_nats(model: SecondStageNetwork, tokens: Tensor, vectors: Tensor, precision: Precision, device: str) -> float:
    total = 0.0
    for part, told in zip(tokens.split(_CHUNK), vectors.split(_CHUNK), strict=True):
        with autocast(device, precision):
            total += float(model.nll_nats(part.to(device), told).double().sum())
    return total / len(tokens)
