"""Vector quantization: the nearest code, its gradients, and the two ways to learn the table.

arXiv:1711.00937, section 3. An fp32 island: autocast is off in here, so that training and tokenizing find the same
codes whatever the precision around it. Distances are never B x D x H x W x K: they come in chunks of rows.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vqvae_core.errors import InputError
from vqvae_core.shapes import Float, Int

_CHUNK_ELEMENTS = 1 << 23  # 32 MiB of fp32 distances at a time
_LAPLACE = 1e-5


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The table of codes and how it learns."""

    num_codes: int = 512
    """K, the size of the table."""
    code_dim: int = 64
    """D, the length of a code."""
    learn_by: Literal["loss", "moving_average"] = "loss"
    """The paper trains the table by its loss; moving averages are the alternative that it names."""
    decay: float = 0.99
    """Of the moving averages."""
    init: Literal["kmeans++", "data", "uniform"] = "kmeans++"
    """Where codes start: at latents of the first batch, spread (kmeans++) or drawn evenly (data), or at random."""
    revive_every: int = 0
    """Steps between two revivals of codes that no latent chose since the last; 0 for never."""
    revive_until: float = 0.8
    """Revivals stop after this share of the steps, so that the table settles."""

    def __post_init__(self) -> None:
        if self.num_codes < 1 or self.num_codes > 65536:
            raise ValueError(f"num_codes must be 1 to 65536 (tokens are stored as uint16), was {self.num_codes}")
        if self.code_dim < 1:
            raise ValueError(f"code_dim must be at least 1, was {self.code_dim}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, was {self.decay}")
        if self.revive_every < 0:
            raise ValueError(f"revive_every must be 0 (never) or a number of steps, was {self.revive_every}")
        if not 0 <= self.revive_until <= 1:
            raise ValueError(f"revive_until must be a share of the steps from 0 to 1, was {self.revive_until}")


@dataclass(frozen=True)
class Quantized:
    """codes: z_q with the straight-through gradient, (B, D, H, W); tokens: (B, H, W); the two squared distances are
    sums over D, means over the B*H*W latents: the second and the third term of eq. 3 (beta not yet applied)."""

    codes: Tensor
    tokens: Tensor
    table_loss: Tensor
    commitment: Tensor


def nearest_codes(latents: Float[Tensor, "n d"], table: Float[Tensor, "k d"]) -> Int[Tensor, "n"]:
    """Index (N,) of the nearest code (K, D), Euclidean, for each row of latents (N, D): eq. 1.

    |z|^2 is the same for every code and left out. Ties go to the lowest index.
    """
    norms = table.square().sum(dim=1)
    tokens = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    rows = max(1, _CHUNK_ELEMENTS // len(table))
    for start in range(0, len(latents), rows):
        chunk = latents[start : start + rows]
        tokens[start : start + rows] = torch.addmm(norms, chunk, table.T, alpha=-2.0).argmin(dim=1)
    return tokens


def kmeans_plus_plus(points: Float[Tensor, "n d"], num_codes: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Codes (K, D) drawn from points (N, D), each with probability proportional to its squared distance to the
    nearest code so far (Arthur and Vassilvitskii 2007). Where points run out of distinct places, any point is taken."""
    uniform = torch.rand(num_codes, dtype=torch.float64, generator=generator).to(points.device)
    distance = torch.ones(len(points), dtype=torch.float64, device=points.device)
    chosen = torch.empty(num_codes, dtype=torch.int64, device=points.device)
    for number in range(num_codes):
        mass = distance.cumsum(0)
        if mass[-1] <= 0:
            distance = torch.ones_like(distance)
            mass = distance.cumsum(0)
        index = torch.searchsorted(mass, uniform[number] * mass[-1]).clamp(max=len(points) - 1)
        chosen[number] = index
        nearest = (points - points[index]).square().sum(dim=1).to(torch.float64)
        distance = nearest if number == 0 else torch.minimum(distance, nearest)
    return points[chosen].clone()


class VectorQuantizer(nn.Module):
    """A table of codes, with its statistics as buffers, so that they are part of every checkpoint."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        table = torch.empty(config.num_codes, config.code_dim).uniform_(-1 / config.num_codes, 1 / config.num_codes)
        self.table = nn.Parameter(table, requires_grad=config.learn_by == "loss")
        self.counts = nn.Buffer(torch.ones(config.num_codes))  # moving averages start at one latent a code,
        self.sums = nn.Buffer(table.clone())  # which lies on the code: no debias is needed
        self.hits = nn.Buffer(torch.zeros(config.num_codes))  # since the last revival
        self.started = nn.Buffer(torch.tensor(config.init == "uniform"))

    def forward(self, latents: Float[Tensor, "b d h w"]) -> Quantized:
        """latents: z_e (B, D, H, W). It changes nothing: `learn` does."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = at_least_fp32(latents)
            rows = _rows(latents)
            tokens = nearest_codes(rows.detach(), self.table.detach())
            codes = self.table[tokens]
            table_loss = (rows.detach() - codes).square().sum(dim=1).mean()
            commitment = (rows - codes.detach()).square().sum(dim=1).mean()
            batch, dim, height, width = latents.shape
            codes = codes.detach().view(batch, height, width, dim).permute(0, 3, 1, 2)
            passed = latents + (codes - latents).detach()
            return Quantized(passed, tokens.view(batch, height, width), table_loss, commitment)

    def lookup(self, tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """Codes (B, D, H, W) of tokens (B, H, W). Raises `InputError` for a token that is not in the table."""
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.config.num_codes):
            raise InputError(
                f"expected tokens from 0 to {self.config.num_codes - 1}, found {int(tokens.min())} to "
                f"{int(tokens.max())}; were they made by another model?"
            )
        return self.table.detach()[tokens].permute(0, 3, 1, 2)

    def statistics(self, latents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What one rank adds to the averages: counts (K,) and sums (K, D) of the latents that chose each code."""
        rows = _rows(at_least_fp32(latents.detach()))
        flat = tokens.reshape(-1)
        counts = torch.bincount(flat, minlength=self.config.num_codes).to(rows.dtype)
        return counts, torch.zeros_like(self.table).index_add_(0, flat, rows)

    @torch.no_grad()
    def learn(self, counts: Float[Tensor, "k"], sums: Float[Tensor, "k d"]) -> None:
        """One step of the table from statistics that are already summed over all ranks. In eval it does nothing.

        Moving averages: eq. 6 to 8 of appendix A.1. The smoothed counts are a copy; what is stored is never smoothed.
        """
        if not self.training:
            return
        self.hits += counts
        if self.config.learn_by == "loss":
            return
        self.counts.lerp_(counts, 1 - self.config.decay)
        self.sums.lerp_(sums, 1 - self.config.decay)
        total = self.counts.sum()
        smooth = (self.counts + _LAPLACE) / (total + self.config.num_codes * _LAPLACE) * total
        self.table.copy_(self.sums / smooth[:, None])

    @torch.no_grad()
    def place(self, codes: Int[Tensor, "m"], vectors: Float[Tensor, "m d"]) -> None:
        """Put the codes with these indices (M,) at vectors (M, D), statistics included."""
        self.table[codes] = vectors
        self.sums[codes] = vectors
        self.counts[codes] = 1.0

    @torch.no_grad()
    def revive(self, candidates: Float[Tensor, "n d"]) -> Int[Tensor, "m"]:
        """Put codes that nothing chose since the last revival at candidates (N, D), each at another one.

        Two codes at one place would tie, and rounding would decide between them. Where candidates run out, the rest
        waits for the next revival. Returns the indices of the revived codes; their optimizer state is the caller's to
        reset.
        """
        dead = (self.hits == 0).nonzero()[: len(candidates), 0]
        self.place(dead, candidates[: len(dead)])
        self.hits.zero_()
        return dead

    @torch.no_grad()
    def start(self, points: Tensor, generator: torch.Generator) -> None:
        """Put all codes at points (N, D) of the data, by `init`. Every rank must see the same points and generator."""
        if self.config.init == "kmeans++":
            vectors = kmeans_plus_plus(points, self.config.num_codes, generator)
        else:
            order = torch.randperm(len(points), generator=generator)[: self.config.num_codes]
            vectors = points[order.repeat(-(-self.config.num_codes // len(order)))[: self.config.num_codes]]
        self.place(torch.arange(self.config.num_codes, device=points.device), vectors)
        self.started.fill_(True)


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32 of a half-precision tensor, any other as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _rows(latents: Tensor) -> Tensor:
    """(B, D, H, W) to (B*H*W, D)."""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
