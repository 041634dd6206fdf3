"""Gated PixelCNN over a grid of tokens: arXiv:1606.05328, with both stacks, so that there is no blind spot.

The vertical stack sees all rows above, the horizontal stack the sites to the left in its row and, through the vertical
stack, the rows above. Kernels are cropped to what they may see and inputs are padded: nothing is multiplied by a mask.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from vqvae_core.errors import InputError
from vqvae_core.shapes import Float, Int
from vqvae_core.token_shards import TokenShape


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig:
    """The network of the prior. Height, width and K come from the tokens, the number of classes from their labels."""

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

    def __post_init__(self) -> None:
        for name in ("channels", "num_layers", "head_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        for name in ("kernel_size", "first_kernel_size"):
            if getattr(self, name) < 3 or getattr(self, name) % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 3, was {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, was {self.dropout}")


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


class GatedLayer(nn.Module):
    """One layer of both stacks: figure 2 of the paper, with a skip connection out of the horizontal stack."""

    def __init__(self, config: PixelCNNConfig, num_classes: int, *, first: bool) -> None:
        super().__init__()
        channels = config.channels
        kernel_size = config.first_kernel_size if first else config.kernel_size
        self.first = first
        self.vertical = VerticalConv(channels, 2 * channels, kernel_size)
        self.horizontal = HorizontalConv(channels, 2 * channels, kernel_size, exclusive=first)
        self.vertical_to_horizontal = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.residual = nn.Conv2d(channels, channels, 1)
        self.skip = nn.Conv2d(channels, channels, 1)
        self.class_bias = nn.Embedding(num_classes, 4 * channels) if num_classes else None
        if self.class_bias is not None:
            nn.init.zeros_(self.class_bias.weight)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, v: Tensor, h: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """v, h: (B, C, H, W). Returns the next v and h, and what this layer adds to the output."""
        above = self.vertical(v)
        left = self.horizontal(h) + self.vertical_to_horizontal(shift_down(above))
        if self.class_bias is not None:
            bias_v, bias_h = self.class_bias(labels)[:, :, None, None].to(above.dtype).chunk(2, dim=1)
            above, left = above + bias_v, left + bias_h
        gated = self.dropout(gate(left))
        residual = self.residual(gated)
        # The first layer's h would carry the site itself around the exclusive kernel.
        return gate(above), residual if self.first else h + residual, self.skip(gated)


def gate(x: Tensor) -> Tensor:
    """tanh of the first half of the channels times the sigmoid of the second: eq. 2."""
    value, switch = x.chunk(2, dim=1)
    return value.tanh() * switch.sigmoid()


class PixelCNN(nn.Module):
    """p(tokens | label) as a product over sites in raster order. num_classes 0: unconditional."""

    def __init__(self, config: PixelCNNConfig, shape: TokenShape, num_classes: int = 0) -> None:
        super().__init__()
        if shape.num_groups != 1:
            raise InputError(f"expected one code a site for this prior, found {shape.num_groups} groups")
        self.config, self.shape, self.num_classes = config, shape, num_classes
        self.embed = nn.Embedding(shape.num_codes, config.channels)
        self.layers = nn.ModuleList(
            GatedLayer(config, num_classes, first=number == 0) for number in range(config.num_layers)
        )
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(config.channels, config.head_channels, 1),
            nn.ReLU(),
            nn.Conv2d(config.head_channels, shape.num_codes, 1),
        )

    def forward(self, tokens: Int[Tensor, "b h w"], labels: Int[Tensor, "b"] | None = None) -> Float[Tensor, "b k h w"]:
        """Logits (B, K, H, W) for tokens (B, H, W): those of a site depend on earlier sites only.

        labels: (B,), needed where the prior has classes. Raises ValueError where they are missing.
        """
        if self.num_classes and labels is None:
            raise ValueError(f"this prior has {self.num_classes} classes: labels (B,) are needed")
        return self.logits(self.embed(tokens).permute(0, 3, 1, 2), labels)

    def logits(self, embedded: Tensor, labels: Tensor | None) -> Tensor:
        """Logits (B, K, H, W) from embedded tokens (B, C, H, W), where gradients to each site can be taken."""
        v = h = embedded
        total: Tensor | None = None
        for layer in self.layers:
            v, h, skip = layer(v, h, labels)
            total = skip if total is None else total + skip
        return self.head(total)

    def nll_nats(self, tokens: Int[Tensor, "b h w"], labels: Int[Tensor, "b"] | None = None) -> Float[Tensor, "b h w"]:
        """-log p(tokens | label) of each site, (B, H, W)."""
        return F.cross_entropy(self(tokens, labels).float(), tokens.long(), reduction="none")
