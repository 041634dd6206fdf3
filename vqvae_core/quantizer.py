"""Vector quantization: a table of codes, its gradients, and the ways to learn it; and a grid that needs none (FSQ).

arXiv:1711.00937, section 3. An fp32 island: autocast is off in here, so that training and tokenizing find the same
codes whatever the precision around it.

Where a site has several codes, each has a table of its own: the latent is cut into as many equal parts.

All quantizers have one interface, `Quantizer`. A step of training is: `forward` on each rank, which changes nothing;
`statistics` of what it found; their sum over all ranks; `learn` from that sum, the same on every rank.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae_core.errors import InputError
from vqvae_core.nearest import kmeans_plus_plus, nearest_codes
from vqvae_core.shapes import Float, Int

_LAPLACE = 1e-5
_TINY = 1e-12  # a length below which a direction means nothing
_MARGIN = 1e-3  # of FSQ: its outermost values are reached before the bound is


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The table of codes and how it learns; or, with `levels`, a fixed grid."""

    num_codes: int = 512
    """K, the size of the table. With levels it follows from them."""
    code_dim: int = 64
    """D, the length of a code. With levels it follows from them."""
    num_groups: int = 1
    """G, the codes of a site, each with a table of its own and D channels of the latent."""
    levels: tuple[int, ...] = ()
    """FSQ (arXiv:2309.15505) instead of a table: how many values each channel of a code takes, such as 8 8 8."""
    learn_by: Literal["loss", "moving_average"] = "loss"
    """The paper trains the table by its loss; moving averages are the alternative that it names."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """What the encoder gets of the decoder's gradient: a copy, as in the paper, or turned and scaled as the latent has
    to be to become its code (arXiv:2410.06424)."""
    normalize: bool = False
    """Codes and latents on the unit sphere (arXiv:2110.04627): the nearest code is that of the smallest angle."""
    decay: float = 0.99
    """Of the moving averages."""
    init: Literal["kmeans++", "data", "uniform"] = "kmeans++"
    """Where codes start: at latents of the first batch, spread (kmeans++) or drawn evenly (data), or at random."""
    revive_every: int = 0
    """Steps between two revivals of codes that no latent chose since the last; 0 for never."""
    revive_until: float = 0.8
    """Revivals stop after this share of the steps, so that the table settles."""

    def __post_init__(self) -> None:
        if self.levels:
            self._follow_levels()
        if self.num_codes < 1 or self.num_codes > 65536:
            raise ValueError(f"num_codes must be 1 to 65536 (tokens are stored as uint16), was {self.num_codes}")
        if self.code_dim < 1:
            raise ValueError(f"code_dim must be at least 1, was {self.code_dim}")
        if self.num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, was {self.num_groups}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, was {self.decay}")
        if self.revive_every < 0:
            raise ValueError(f"revive_every must be 0 (never) or a number of steps, was {self.revive_every}")
        if not 0 <= self.revive_until <= 1:
            raise ValueError(f"revive_until must be a share of the steps from 0 to 1, was {self.revive_until}")

    def _follow_levels(self) -> None:
        if min(self.levels) < 2:
            raise ValueError(f"levels must be 2 or more in each channel, were {' '.join(map(str, self.levels))}")
        if max(self.levels) * _MARGIN > 1:  # the margin would reach the next whole number
            raise ValueError(f"levels must be at most {round(1 / _MARGIN)}, were {' '.join(map(str, self.levels))}")
        if self.normalize or self.gradient != "straight_through" or self.revive_every or self.learn_by != "loss":
            raise ValueError(
                "levels (FSQ) leave no table to learn: leave out learn_by, gradient, normalize and revive_every"
            )
        if self.num_groups != 1:
            raise ValueError(f"levels (FSQ) make one code a site: num_groups must be 1, was {self.num_groups}")
        object.__setattr__(self, "num_codes", math.prod(self.levels))
        object.__setattr__(self, "code_dim", len(self.levels))

    @property
    def channels(self) -> int:
        """Of a latent: G times D."""
        return self.num_groups * self.code_dim


@dataclass(frozen=True)
class Quantized:
    """codes: z_q with the gradient for the encoder, (B, G*D, H, W); tokens: (B, H, W), or (B, H, W, G) where a site has
    several; rows: the latents as they were compared with the codes, (B*H*W, G*D), without gradient; the two squared
    distances are sums over D, means over the B*H*W*G latents: the second and the third term of eq. 3 (beta not yet
    applied)."""

    codes: Tensor
    tokens: Tensor
    rows: Tensor
    table_loss: Tensor
    commitment: Tensor


class Quantizer(nn.Module, ABC):
    """Latents to codes out of K, and how often each is used. Counters are buffers: part of every checkpoint."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, latents: Float[Tensor, "b d h w"]) -> Quantized:
        """latents: z_e (B, G*D, H, W). It changes nothing: `learn` does."""

    def lookup(self, tokens: Int[Tensor, "b h w *g"]) -> Float[Tensor, "b d h w"]:
        """Codes (B, G*D, H, W) of tokens (B, H, W), or (B, H, W, G). Raises `InputError` for a token that is not in the
        table."""
        self._check(tokens)
        return self.codes_of(tokens)

    @abstractmethod
    def codes_of(self, tokens: Int[Tensor, "b h w *g"]) -> Float[Tensor, "b d h w"]:
        """The same, without a look at the tokens."""

    @abstractmethod
    def tables(self) -> "list[VectorQuantizer]":
        """The tables that learn, one a group; none where the codes are a fixed grid."""

    @property
    def started(self) -> bool:
        """The codes have their first places."""
        return all(bool(table.placed) for table in self.tables())

    @abstractmethod
    def statistics(self, quantized: Quantized) -> list[Tensor]:
        """What one rank adds to the sum over ranks."""

    @abstractmethod
    def learn(self, statistics: list[Tensor]) -> None:
        """One step, from statistics that are already summed over all ranks. In eval it does nothing."""

    @abstractmethod
    def end_epoch(self) -> None:
        """Keep the epoch's counts, and begin to count another."""

    @abstractmethod
    def epoch_counts(self) -> Int[Tensor, "g k"]:
        """How often each code was chosen in the last whole epoch, (G, K)."""

    def _check(self, tokens: Tensor) -> None:
        groups = self.config.num_groups
        if (tokens.shape[3:] or (1,)) != (groups,) or (tokens.dim() == 4) == (groups == 1):
            shape = f"(B, H, W{f', {groups}' if groups > 1 else ''})"
            raise InputError(
                f"expected {groups} codes a site, tokens of shape {shape}, found {tuple(tokens.shape)}; were they made "
                "by another model?"
            )
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.config.num_codes):
            raise InputError(
                f"expected tokens from 0 to {self.config.num_codes - 1}, found {int(tokens.min())} to "
                f"{int(tokens.max())}; were they made by another model?"
            )


class _Counted(Quantizer):
    """A quantizer with one code a site, which counts its choices."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.hits = nn.Buffer(torch.zeros(config.num_codes, dtype=torch.int64))  # since the last revival
        self.epoch_hits = nn.Buffer(torch.zeros(config.num_codes, dtype=torch.int64))  # since the epoch began
        self.last_epoch_hits = nn.Buffer(torch.zeros(config.num_codes, dtype=torch.int64))

    def statistics(self, quantized: Quantized) -> list[Tensor]:
        """First of all counts (K,) of the latents that chose each code."""
        counts = torch.bincount(quantized.tokens.reshape(-1), minlength=self.config.num_codes)
        return [counts.to(quantized.rows.dtype)]

    @torch.no_grad()
    def learn(self, statistics: list[Tensor]) -> None:
        if self.training:
            counts = statistics[0].round().to(torch.int64)
            self.hits += counts
            self.epoch_hits += counts

    @torch.no_grad()
    def end_epoch(self) -> None:
        self.last_epoch_hits.copy_(self.epoch_hits)
        self.epoch_hits.zero_()

    def epoch_counts(self) -> Int[Tensor, "g k"]:
        return self.last_epoch_hits[None]


def make_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer of a config."""
    if config.levels:
        return FiniteScalarQuantizer(config)
    return VectorQuantizer(config) if config.num_groups == 1 else GroupedQuantizer(config)


class VectorQuantizer(_Counted):
    """A table of codes, with its statistics as buffers."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        table = torch.empty(config.num_codes, config.code_dim).uniform_(-1 / config.num_codes, 1 / config.num_codes)
        if config.normalize:
            table = F.normalize(table, dim=1)
        self.table = nn.Parameter(table, requires_grad=config.learn_by == "loss")
        self.counts = nn.Buffer(torch.ones(config.num_codes))  # moving averages start at one latent a code,
        self.sums = nn.Buffer(table.clone())  # which lies on the code: no debias is needed
        self.placed = nn.Buffer(torch.tensor(config.init == "uniform"))

    def tables(self) -> "list[VectorQuantizer]":
        return [self]

    def forward(self, latents: Float[Tensor, "b d h w"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            batch, dim, height, width = latents.shape
            rows, table = self.compared(latents), self.codes()
            tokens = nearest_codes(rows.detach(), table.detach())
            codes = F.embedding(tokens, table)
            if torch.is_grad_enabled():
                table_loss = (rows.detach() - codes).square().sum(dim=1).mean()
                commitment = (rows - codes.detach()).square().sum(dim=1).mean()
            else:  # both are this number
                table_loss = commitment = (rows - codes).square_().sum(dim=1).mean()
            codes = codes.detach()
            if rows.requires_grad:
                carried = rotated(rows, codes) if self.config.gradient == "rotation" else rows
                codes = codes + (carried - carried.detach())
            passed = codes.view(batch, height, width, dim).permute(0, 3, 1, 2)
            return Quantized(passed, tokens.view(batch, height, width), rows.detach(), table_loss, commitment)

    def compared(self, latents: Tensor) -> Tensor:
        """Latents (B, D, H, W) as rows (B*H*W, D) in the place where codes are: on the sphere, where they are."""
        rows = at_least_fp32(latents).permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        return F.normalize(rows, dim=1) if self.config.normalize else rows

    def codes(self) -> Float[Tensor, "k d"]:
        """The table (K, D), on the sphere where codes are."""
        return F.normalize(self.table, dim=1) if self.config.normalize else self.table

    def codes_of(self, tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        return self.codes().detach()[tokens].permute(0, 3, 1, 2)

    def statistics(self, quantized: Quantized) -> list[Tensor]:
        """Counts (K,) and, for moving averages, sums (K, D) of the latents that chose each code."""
        counts = super().statistics(quantized)
        if self.config.learn_by == "loss":
            return counts
        return [*counts, sums_by_code(quantized.rows, quantized.tokens.reshape(-1), self.config.num_codes)]

    @torch.no_grad()
    def learn(self, statistics: list[Tensor]) -> None:
        """Moving averages: eq. 6 to 8 of appendix A.1. The smoothed counts are a copy; what is stored is never
        smoothed."""
        super().learn(statistics)
        if not self.training or self.config.learn_by == "loss":
            return
        counts, sums = statistics
        self.counts.lerp_(counts, 1 - self.config.decay)
        self.sums.lerp_(sums, 1 - self.config.decay)
        total = self.counts.sum()
        smooth = (self.counts + _LAPLACE) / (total + self.config.num_codes * _LAPLACE) * total
        table = self.sums / smooth[:, None]
        self.table.copy_(F.normalize(table, dim=1) if self.config.normalize else table)

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
        points = points.cpu()  # a GPU has no deterministic running sum
        if self.config.init == "kmeans++":
            vectors = kmeans_plus_plus(points, self.config.num_codes, generator)
        else:
            order = torch.randperm(len(points), generator=generator)[: self.config.num_codes]
            vectors = points[order.repeat(-(-self.config.num_codes // len(order)))[: self.config.num_codes]]
        self.place(torch.arange(self.config.num_codes, device=self.table.device), vectors.to(self.table.device))
        self.placed.fill_(True)


class GroupedQuantizer(Quantizer):
    """G codes a site, each out of a table of its own that sees its D channels of the latent."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        one = replace(config, num_groups=1)
        self.groups = nn.ModuleList(VectorQuantizer(one) for _ in range(config.num_groups))

    def tables(self) -> list[VectorQuantizer]:
        return list(self.groups)  # type: ignore[arg-type]

    def forward(self, latents: Float[Tensor, "b d h w"]) -> Quantized:
        parts = latents.chunk(self.config.num_groups, dim=1)
        found = [table(part) for table, part in zip(self.tables(), parts, strict=True)]
        return Quantized(
            torch.cat([one.codes for one in found], dim=1),
            torch.stack([one.tokens for one in found], dim=3),
            torch.cat([one.rows for one in found], dim=1),
            torch.stack([one.table_loss for one in found]).mean(),
            torch.stack([one.commitment for one in found]).mean(),
        )

    def codes_of(self, tokens: Int[Tensor, "b h w *g"]) -> Float[Tensor, "b d h w"]:
        groups = zip(self.tables(), tokens.unbind(dim=3), strict=True)
        return torch.cat([table.codes_of(chosen) for table, chosen in groups], dim=1)

    def statistics(self, quantized: Quantized) -> list[Tensor]:
        rows, tokens = quantized.rows.chunk(self.config.num_groups, dim=1), quantized.tokens.unbind(dim=3)
        parts = zip(self.tables(), rows, tokens, strict=True)
        return [value for table, row, token in parts
                for value in table.statistics(replace(quantized, rows=row, tokens=token))]  # fmt: skip

    def learn(self, statistics: list[Tensor]) -> None:
        each = len(statistics) // self.config.num_groups
        for number, table in enumerate(self.tables()):
            table.learn(statistics[number * each : (number + 1) * each])

    def end_epoch(self) -> None:
        for table in self.tables():
            table.end_epoch()

    def epoch_counts(self) -> Int[Tensor, "g k"]:
        return torch.cat([table.epoch_counts() for table in self.tables()])


def sums_by_code(rows: Float[Tensor, "n d"], tokens: Int[Tensor, "n"], num_codes: int) -> Float[Tensor, "k d"]:
    """Sums (K, D) of the latents (N, D) that chose each code; the same bits each time with deterministic algorithms."""
    if rows.device.type == "cpu":
        return rows.new_zeros(num_codes, rows.shape[1]).index_add_(0, tokens, rows)
    return sums_by_gradient(rows, tokens, num_codes)


def sums_by_gradient(rows: Tensor, tokens: Tensor, num_codes: int) -> Tensor:
    """The same as the gradient of a lookup, which sorts first. A GPU's deterministic index_add_ takes one latent after
    the other, which was five sixths of a step of training."""
    return torch.ops.aten.embedding_dense_backward(rows, tokens, num_codes, -1, False)


def rotated(rows: Float[Tensor, "n d"], codes: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows z, turned and scaled to their codes q: eq. 4 and 5 of arXiv:2410.06424. The turn and the scale are constants
    for the gradient, which is therefore turned and scaled back on its way to z.

    The turn is two reflections, I - 2 r r' + 2 q z', with z, q of unit length and r along their sum. Where one of them
    has no direction, or they are opposite, the gradient is copied.
    """
    constant = rows.detach()
    lengths, code_lengths = constant.norm(dim=1, keepdim=True), codes.norm(dim=1, keepdim=True)
    z, q = constant / lengths.clamp_min(_TINY), codes / code_lengths.clamp_min(_TINY)
    middle = z + q
    middle_lengths = middle.norm(dim=1, keepdim=True)
    r = middle / middle_lengths.clamp_min(_TINY)
    along_r, along_z = (rows * r).sum(dim=1, keepdim=True), (rows * z).sum(dim=1, keepdim=True)
    turned = (rows - 2 * along_r * r + 2 * along_z * q) * (code_lengths / lengths.clamp_min(_TINY))
    defined = (lengths > _TINY) & (code_lengths > _TINY) & (middle_lengths > 1e-6)
    return torch.where(defined, turned, rows)


class FiniteScalarQuantizer(_Counted):
    """FSQ (arXiv:2309.15505): each channel is bounded and rounded to one of its levels. Nothing is learned.

    A code has its values in [-1, 1]; its token counts through them, the first channel fastest.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        levels = torch.tensor(config.levels, dtype=torch.get_default_dtype())
        steps = torch.tensor([math.prod(config.levels[:channel]) for channel in range(len(config.levels))])
        self._levels = nn.Buffer(levels, persistent=False)
        self._steps = nn.Buffer(steps, persistent=False)

    def tables(self) -> list[VectorQuantizer]:
        return []

    def forward(self, latents: Float[Tensor, "b d h w"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            batch, dim, height, width = latents.shape
            rows = at_least_fp32(latents).permute(0, 2, 3, 1).reshape(-1, dim)
            bounded = self._bounded(rows)
            digits = bounded.detach().round() + (self._levels // 2).to(rows.dtype)
            tokens = (digits.to(torch.int64) * self._steps).sum(dim=1)
            codes = self._values(digits)
            if rows.requires_grad:
                scaled = bounded / (self._levels // 2).to(rows.dtype)
                codes = codes + (scaled - scaled.detach())
            passed = codes.view(batch, height, width, dim).permute(0, 3, 1, 2)
            none = rows.new_zeros(())
            return Quantized(passed, tokens.view(batch, height, width), rows.detach(), none, none)

    def _bounded(self, rows: Tensor) -> Tensor:
        """Section 3.1: values whose rounding gives as many whole numbers as there are levels, around 0. An even number
        of them is not symmetric, so the bound is moved by half a step, and its argument such that 0 stays at 0."""
        half = (self._levels - 1) * (1 + _MARGIN) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0).to(half.dtype)
        shift = (offset / half).atanh()
        half, offset, shift = (value.to(rows.dtype) for value in (half, offset, shift))
        return (rows + shift).tanh() * half - offset

    def _values(self, digits: Tensor) -> Tensor:
        half = (self._levels // 2).to(digits.dtype)
        return (digits - half) / half

    def codes_of(self, tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        digits = tokens[..., None] // self._steps % self._levels.to(torch.int64)
        return self._values(digits.to(self._levels.dtype)).permute(0, 3, 1, 2)


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32 of a half-precision tensor, any other as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
