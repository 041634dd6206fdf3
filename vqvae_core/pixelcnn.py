"""Gated PixelCNN over a grid of tokens: arXiv:1606.05328, with both stacks, so that there is no blind spot.

The vertical stack sees all rows above, the horizontal stack the sites to the left in its row and, through the vertical
stack, the rows above. Kernels are cropped to what they may see and inputs are padded: nothing is multiplied by a mask.
Where a site has several codes, they follow each other in the order of their groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae_core.errors import InputError
from vqvae_core.quantizer import at_least_fp32
from vqvae_core.shapes import Float, Int
from vqvae_core.token_shards import TokenShape

NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig:
    """The network of the prior. Height, width, K, G and the number of classes come from the tokens."""

    channels: int = 128
    """Channels of each stack."""
    num_layers: int = 15
    """Gated layers."""
    kernel_size: int = 3
    """Of the full kernel that the cropped ones are part of: 3 stands for 2x3 (vertical) and 1x2 (horizontal)."""
    first_kernel_size: int = 7
    """The same for the first layer."""
    head_channels: int = 256
    """Channels between the last layer and the logits."""
    dropout: float = 0.0
    """Share of features dropped after each gate in training."""
    use_labels: bool = True
    """False: labels are not looked at, so that the prior is p(tokens)."""
    label_dropout: float = 0.0
    """Share of labels left out in training, so that samples can be guided (arXiv:2207.12598): 0.1 is usual."""

    def __post_init__(self) -> None:
        for name in ("channels", "num_layers", "head_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        for name in ("kernel_size", "first_kernel_size"):
            if getattr(self, name) < 3 or getattr(self, name) % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 3, was {getattr(self, name)}")
        for name in ("dropout", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, was {getattr(self, name)}")
        if self.label_dropout and not self.use_labels:
            raise ValueError("label_dropout belongs to a prior with labels: leave it out, or use_labels")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a prior is told beside the tokens: labels, integers (B,), -1 where there is none; a vector (B, F) of the
    whole image; a map (B, F, H, W) with features of each site. All three are seen from every site."""

    labels: Tensor | None = None
    vector: Tensor | None = None
    spatial: Tensor | None = None


NOTHING = Condition()


def shift_down(x: Tensor) -> Tensor:
    """Row i of the result is row i - 1 of x (B, C, H, W); row 0 is zero."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


class VerticalConv(nn.Module):
    """Row i sees rows i - k//2 to i and, in each, columns j - k//2 to j + k//2."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int) -> None:
        super().__init__()
        reach = kernel_size // 2
        self.conv = nn.Conv2d(channels_in, channels_out, (reach + 1, kernel_size), padding=(reach, reach))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, :, : x.shape[2]]


class HorizontalConv(nn.Module):
    """Column j sees columns j - k//2 to j of its row (mask B), or to j - 1 where `exclusive` (mask A)."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, *, exclusive: bool) -> None:
        super().__init__()
        reach = kernel_size // 2
        self.conv = nn.Conv2d(channels_in, channels_out, (1, reach if exclusive else reach + 1), padding=(0, reach))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, :, :, : x.shape[3]]


class ConditionBias(nn.Module):
    """What a condition adds before the gates of a layer: section 2.3 of the paper, eq. 3 and the spatial form."""

    def __init__(self, channels: int, num_classes: int, vector_features: int, map_features: int) -> None:
        super().__init__()
        # One row more, for images without a label.
        self.label = nn.Embedding(num_classes + 1, channels) if num_classes else None
        self.vector = nn.Linear(vector_features, channels, bias=False) if vector_features else None
        self.spatial = nn.Conv2d(map_features, channels, 1, bias=False) if map_features else None
        if self.label is not None:
            nn.init.zeros_(self.label.weight)

    def forward(self, condition: Condition) -> Tensor | None:
        """(B, channels, 1 or H, 1 or W), None where the layer takes no condition."""
        found: list[Tensor] = []
        if self.label is not None and condition.labels is not None:
            labels = torch.where(condition.labels < 0, self.label.num_embeddings - 1, condition.labels)
            found.append(self.label(labels)[:, :, None, None])
        if self.vector is not None and condition.vector is not None:
            found.append(self.vector(condition.vector)[:, :, None, None])
        if self.spatial is not None and condition.spatial is not None:
            found.append(self.spatial(condition.spatial))
        return sum(found[1:], found[0]) if found else None


class GatedLayer(nn.Module):
    """One layer of both stacks: figure 2 of the paper, with a skip connection out of the horizontal stack."""

    def __init__(
        self, config: PixelCNNConfig, num_classes: int, vector_features: int, map_features: int, *, first: bool
    ) -> None:
        super().__init__()
        channels = config.channels
        kernel_size = config.first_kernel_size if first else config.kernel_size
        self.first = first
        self.vertical = VerticalConv(channels, 2 * channels, kernel_size)
        self.horizontal = HorizontalConv(channels, 2 * channels, kernel_size, exclusive=first)
        self.vertical_to_horizontal = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.residual = nn.Conv2d(channels, channels, 1)
        self.skip = nn.Conv2d(channels, channels, 1)
        self.bias = ConditionBias(4 * channels, num_classes, vector_features, map_features)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, v: Tensor, h: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """v, h: (B, C, H, W). Returns the next v and h, and what this layer adds to the output."""
        above = self.vertical(v)
        left = self.horizontal(h) + self.vertical_to_horizontal(shift_down(above))
        bias = self.bias(condition)
        if bias is not None:
            bias_v, bias_h = bias.to(above.dtype).chunk(2, dim=1)
            above, left = above + bias_v, left + bias_h
        gated = self.dropout(gate(left))
        residual = self.residual(gated)
        # The first layer's h would carry the site itself around the exclusive kernel.
        return gate(above), residual if self.first else h + residual, self.skip(gated)


def gate(x: Tensor) -> Tensor:
    """tanh of the first half of the channels times the sigmoid of the second: eq. 2."""
    value, switch = x.chunk(2, dim=1)
    return value.tanh() * switch.sigmoid()


class Head(nn.Module):
    """From the sum of the skip connections to logits. A code sees those of earlier groups at its own site."""

    def __init__(self, config: PixelCNNConfig, shape: TokenShape) -> None:
        super().__init__()
        groups, codes, hidden = shape.num_groups, shape.num_codes, config.head_channels
        self.num_groups, self.num_codes = groups, codes
        self.activation = nn.ReLU()
        self.hidden = nn.Conv2d(config.channels, hidden, 1)
        self.earlier = nn.Embedding((groups - 1) * codes, hidden) if groups > 1 else None
        self.logits = nn.Conv2d(groups * hidden, groups * codes, 1, groups=groups)

    def forward(self, total: Tensor, tokens: Tensor) -> Tensor:
        """total: (B, C, H, W); tokens: (B, H, W, G). Returns logits (B, K, H, W, G)."""
        hidden = self.hidden(self.activation(total))
        if self.earlier is not None:
            offsets = torch.arange(self.num_groups - 1, device=tokens.device) * self.num_codes
            added = self.earlier(tokens[..., :-1] + offsets).cumsum(dim=3)  # (B, H, W, G - 1, hidden)
            added = F.pad(added, (0, 0, 1, 0)).permute(0, 3, 4, 1, 2)
            hidden = (hidden[:, None] + added).flatten(1, 2)
        logits = self.logits(self.activation(hidden))
        return logits.unflatten(1, (self.num_groups, self.num_codes)).permute(0, 2, 3, 4, 1)


class PixelCNN(nn.Module):
    """p(tokens | condition) as a product over sites in raster order and, in a site, over groups.

    num_classes, vector_features, map_features: what it is conditioned on; 0: not on that.
    """

    def __init__(
        self,
        config: PixelCNNConfig,
        shape: TokenShape,
        num_classes: int = 0,
        *,
        vector_features: int = 0,
        map_features: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.shape, self.num_classes = config, shape, num_classes
        self.vector_features, self.map_features = vector_features, map_features
        self.embed = nn.Embedding(shape.num_groups * shape.num_codes, config.channels)
        self.layers = nn.ModuleList(
            GatedLayer(config, num_classes, vector_features, map_features, first=number == 0)
            for number in range(config.num_layers)
        )
        self.head = Head(config, shape)

    def forward(self, tokens: Int[Tensor, "b h w *g"], condition: Condition = NOTHING) -> Float[Tensor, "b k h w *g"]:
        """Logits (B, K, H, W) for tokens (B, H, W), or (B, K, H, W, G) for tokens (B, H, W, G): those of a code depend
        on earlier codes only.

        Raises `InputError` where a part of the condition is missing or of another shape.
        """
        grouped = tokens if tokens.dim() == 4 else tokens[..., None]
        self.check(grouped, condition)
        logits = self.logits(self.embedded(grouped), grouped, condition)
        return logits if tokens.dim() == 4 else logits[..., 0]

    @property
    def knows_no_label(self) -> bool:
        """Whether it was trained on images without a label: what stands for none begins at 0 and stays there
        otherwise."""
        rows = [layer.bias.label.weight[-1] for layer in self.layers if layer.bias.label is not None]  # type: ignore[union-attr]
        return any(bool(row.any()) for row in rows)

    def embedded(self, tokens: Tensor) -> Tensor:
        """The sum of the embeddings of a site's codes, (B, C, H, W), of tokens (B, H, W, G)."""
        offsets = torch.arange(self.shape.num_groups, device=tokens.device) * self.shape.num_codes
        return self.embed(tokens + offsets).sum(dim=3).permute(0, 3, 1, 2)

    def logits(self, embedded: Tensor, tokens: Tensor, condition: Condition = NOTHING) -> Tensor:
        """Logits (B, K, H, W, G) from embedded tokens (B, C, H, W), where gradients to each site can be taken. tokens:
        (B, H, W, G), for the order within a site."""
        v = h = embedded
        total: Tensor | None = None
        for layer in self.layers:
            v, h, skip = layer(v, h, condition)
            total = skip if total is None else total + skip
        assert total is not None, "there is at least one layer"
        return self.head(total, tokens)

    def nll_nats(self, tokens: Int[Tensor, "b h w *g"], condition: Condition = NOTHING) -> Float[Tensor, "b h w *g"]:
        """-log p of each code given the earlier ones, in the shape of tokens: (B, H, W) or (B, H, W, G)."""
        return F.cross_entropy(at_least_fp32(self(tokens, condition)), tokens.long(), reduction="none")

    def check(self, tokens: Tensor, condition: Condition) -> None:
        """Raises `InputError` where tokens (B, H, W, G) or a condition do not fit this network."""
        batch, _, _, groups = tokens.shape
        if groups != self.shape.num_groups:
            raise InputError(f"expected {self.shape.num_groups} codes a site, found {groups}")
        for name, wanted, value, shape in (
            ("labels", self.num_classes, condition.labels, (batch,)),
            ("vector", self.vector_features, condition.vector, (batch, self.vector_features)),
            ("map", self.map_features, condition.spatial, (batch, self.map_features, *tokens.shape[1:3])),
        ):
            if bool(wanted) != (value is not None):
                found = "none" if value is None else "some"
                raise InputError(f"expected {'a' if wanted else 'no'} condition of kind {name}, found {found}")
            if value is not None and tuple(value.shape) != shape:
                raise InputError(f"expected a {name} condition of shape {shape}, found {tuple(value.shape)}")
        # On a GPU a look at the values would be waited for in each step.
        if condition.labels is not None and condition.labels.device.type == "cpu" and len(condition.labels):
            low, high = int(condition.labels.min()), int(condition.labels.max())
            if low < NO_LABEL or high >= self.num_classes:
                worst = low if low < NO_LABEL else high
                raise InputError(f"expected labels from {NO_LABEL} to {self.num_classes - 1}, found {worst}")
