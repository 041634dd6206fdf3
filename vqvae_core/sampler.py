"""Samples of a prior at about the cost of one forward pass: what a site needs of others is computed once and kept.

After arXiv:1704.06001. The vertical stack is computed a row at a time, when the row is known, from its last rows; the
horizontal stack a site at a time, from what its row has to the left. Each sample depends on its own seed only: neither
its batch nor its worker changes a draw, but where two codes are equally likely to the last digits.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae_core.errors import InputError
from vqvae_core.fp32 import whole_fp32
from vqvae_core.noise import gumbel_noise
from vqvae_core.pixelcnn import NO_LABEL, NOTHING, Condition, GatedLayer, PixelCNN


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How codes are drawn from the logits of a prior."""

    temperature: float = 1.0
    """Divides the logits: below 1 samples are more typical, above 1 more varied."""
    top_k: int | None = None
    """Draw from the k likeliest codes only; None: from all."""
    top_p: float | None = None
    """Draw from the fewest codes that have this much probability together (nucleus sampling); None: from all."""
    guidance: float = 1.0
    """How far logits go from those without a label to those with it, and beyond: 1 is the prior as it is. Needs a prior
    that was trained with label_dropout."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a number above 0, was {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all codes, was {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or None for all codes, was {self.top_p}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be a number, 0 or more, was {self.guidance}")


AS_IT_IS = Draw()


def chosen(logits: Tensor, noise: Tensor, draw: Draw) -> Tensor:
    """int64 (B,): a draw from logits (B, K), by noise (B, K) of a Gumbel distribution."""
    if draw.top_k is not None or draw.top_p not in (None, 1):
        return (_restricted(logits / draw.temperature, draw) + noise).argmax(dim=1)
    return torch.add(noise, logits, alpha=1 / draw.temperature).argmax(dim=1)


def _restricted(logits: Tensor, draw: Draw) -> Tensor:
    """-inf for codes that are not drawn. Of equals at an edge the first ones are."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    ranked = logits.gather(1, order)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if draw.top_k is not None:
        keep[:, draw.top_k :] = False
    if draw.top_p not in (None, 1):
        probability = ranked.double().masked_fill(~keep, -math.inf).softmax(dim=1)
        keep &= probability.cumsum(dim=1) - probability < draw.top_p
    return logits.masked_fill(~keep.gather(1, order.argsort(dim=1)), -math.inf)


def check_guidance(prior: PixelCNN, draw: Draw) -> None:
    """Raises `InputError` for guidance that a prior was not trained for."""
    if draw.guidance != 1 and not prior.num_classes:
        raise InputError("expected a prior with classes for guidance, found one without")
    if draw.guidance != 1 and not prior.knows_no_label:
        raise InputError(
            "expected a prior that was trained with label_dropout for guidance, found one without; leave guidance at "
            "1, or train the prior with --prior.label-dropout 0.1"
        )


@dataclass(frozen=True)
class Given:
    """Codes that are there before any is drawn. tokens: (B, H, W) or (B, H, W, G); where: bool (B, H, W), in each
    sample the first sites in raster order, as many as there may be, such as its upper half."""

    tokens: Tensor
    where: Tensor

    @classmethod
    def rows(cls, tokens: Tensor, count: int) -> "Given":
        """The first rows of tokens (B, H, W) or (B, H, W, G). Raises `InputError` where there are not so many."""
        if not 0 <= count <= tokens.shape[1]:
            raise InputError(f"expected to keep 0 to {tokens.shape[1]} rows, found {count}")
        where = torch.zeros(tokens.shape[:3], dtype=torch.bool)
        where[:, :count] = True
        return cls(tokens, where)


@dataclass(frozen=True)
class Drawn:
    """tokens: int64 (B, H, W), or (B, H, W, G). nll_nats: (B, H, W), -log p of each site's codes given all before
    them, by the prior at temperature 1 without guidance; 0 at sites that were given."""

    tokens: Tensor
    nll_nats: Tensor


def sample(
    prior: PixelCNN,
    seeds: Sequence[int],
    condition: Condition = NOTHING,
    draw: Draw = AS_IT_IS,
    given: Given | None = None,
    dtype: torch.dtype | None = None,
) -> Drawn:
    """One sample for each seed. dtype: of weights and caches, such as bfloat16; None: the prior's own.

    Raises `InputError` where the condition or what is given does not fit the prior.
    """
    return Sampler(prior, len(seeds), draw, dtype).sample(seeds, condition, given)


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None, "all convolutions of a prior but those of conditions have one"
    return convolution.bias.detach().clone()


@dataclass(frozen=True)
class _Gate:
    """tanh(a) sigmoid(b), for the halves a and b of a row, by one function of the whole row: the powers of two that the
    weights before it multiply a and b by, and what the weights after it divide by."""

    value: float
    switch: float
    output: float

    def __call__(self, before: Tensor, out: Tensor) -> None:
        """before: (..., 2C), which is written over; out: (..., C), `output` times the gate."""
        if self == _BY_SIGMOID:
            value, switch = before.sigmoid_().chunk(2, dim=-1)
            torch.addcmul(switch, value, switch, value=-2, out=out)
        else:
            value, switch = before.tanh_().chunk(2, dim=-1)
            torch.addcmul(value, value, switch, out=out)


# tanh(a) = 2 sigmoid(2 a) - 1: on a CPU 4 to 6 times as fast as tanh. It loses digits near 0, which bf16 has not.
_BY_SIGMOID = _Gate(value=2.0, switch=1.0, output=-1.0)
# sigmoid(b) = (1 + tanh(b / 2)) / 2.
_BY_TANH = _Gate(value=1.0, switch=0.5, output=2.0)


class _VerticalInput:
    """Where the vertical stack's input at a row is put, and what kernels of a width see of it at each site. Layers
    share it: one has read it before the input of the next is written."""

    def __init__(self, batch: int, width: int, channels: int, columns: int, like: dict[str, Any]) -> None:
        reach = columns // 2
        padded = torch.zeros(batch, width + 2 * reach, channels, **like)
        self.row = padded[:, reach : reach + width]
        self._windows = padded.as_strided((batch, width, columns * channels), (padded.stride(0), channels, 1))
        self._seen = torch.zeros(batch, width, columns * channels, **like)
        self.num_bytes = padded.nbytes + self._seen.nbytes

    def seen(self) -> Tensor:
        """(B * W, columns * C)"""
        return self._seen.copy_(self._windows).flatten(0, 1)


class _Layer:
    """A layer's weights as matrices, and what is kept of it for a batch.

    row: (B, reach + W, C), the input of its horizontal stack at the row so far, with room to the left. left:
    (B, W, 2C), what rows above and the condition add before the gate of each site of the row.
    """

    def __init__(
        self, layer: GatedLayer, row: Tensor, left: Tensor, inputs: dict[int, _VerticalInput], like: dict[str, Any]
    ) -> None:
        channels, rows, columns = layer.residual.in_channels, *layer.vertical.conv.kernel_size
        batch, width, _ = left.shape
        self.row, self.left = row, left
        taps = layer.horizontal.conv.kernel_size[1]
        self.reach, self.taps, self.condition_bias = columns // 2, taps, copy.deepcopy(layer.bias)
        self.gate = _BY_TANH if like["dtype"] in (torch.bfloat16, torch.float16) else _BY_SIGMOID
        self.scale = torch.tensor([self.gate.value, self.gate.switch]).repeat_interleave(channels).to(**like)
        horizontal = layer.horizontal.conv.weight.detach().to(**like)[:, :, 0]  # (2C, C, taps)
        self.horizontal = (horizontal * self.scale[:, None, None]).permute(2, 1, 0).flatten(0, 1).contiguous()
        self.residual = (layer.residual.weight.detach().to(**like)[:, :, 0, 0].T / self.gate.output).contiguous()
        self.skip = layer.skip.weight.detach().to(**like)[:, :, 0, 0].T / self.gate.output
        # A matrix for each row of the vertical kernel, the lowest first: of the row itself, of the one above, ...
        vertical = layer.vertical.conv.weight.detach().to(**like) * self.scale[:, None, None, None]
        vertical = vertical if layer.first else vertical / self.gate.output
        self.vertical = list(vertical.permute(2, 3, 1, 0).flatten(1, 2).flip(0).contiguous())  # (columns * C, 2C)
        self.vertical_bias = _bias(layer.vertical.conv).to(**like) * self.scale
        across = layer.vertical_to_horizontal
        weight = across.weight.detach().to(**like)[:, :, 0, 0]
        self.across = ((weight * self.scale[:, None]).T / self.scale[:, None]).contiguous()
        # What the gates of the horizontal stack start from, in the first row and below others.
        self.base = (_bias(across) + _bias(layer.horizontal.conv)).to(**like) * self.scale
        self.base_below = self.base + self.vertical_bias @ self.across
        if columns not in inputs:
            inputs[columns] = _VerticalInput(batch, width, channels, columns, like)
        self.input = inputs[columns]
        # What the rows so far give to the vertical stack at the next row, at the one after it, ...
        self.ahead = torch.zeros(rows - 1, batch, width, 2 * channels, **like)
        # What biases and conditions add: before the gates of the vertical stack, and before those of the next row.
        sites = width if layer.bias.spatial is not None else 1
        self.vertical_told = torch.zeros(batch, sites, 2 * channels, **like)
        self.left_told = torch.zeros(batch, sites, 2 * channels, **like)
        self.offset = torch.zeros(channels, **like)

    def leave_out(self, offset: Tensor) -> None:
        """Let the input of the horizontal stack be kept without what the biases before it have added, (C,): it stands
        in what its gates start from, and beside the picture, where the input is 0."""
        given = offset.repeat(self.taps) @ self.horizontal
        self.base, self.base_below, self.offset = self.base + given, self.base_below + given, offset

    def begin(self, told: list[Condition]) -> None:
        """Nothing is above the first row."""
        self.ahead.zero_()
        self.row.copy_(-self.offset.expand_as(self.row))
        self.left.copy_((self.base + self.bias_of(told, 0)[1]).expand_as(self.left))

    def tell(self, told: list[Condition], row: int) -> None:
        """Put biases and conditions where the computation of a row that has one below it reads them."""
        self.vertical_told.copy_(self.vertical_bias + self.bias_of(told, row)[0])
        self.left_told.copy_(self.base_below + self.bias_of(told, row + 1)[1])

    def bias_of(self, told: list[Condition], row: int) -> tuple[Tensor, Tensor]:
        """What conditions add before the gates of a row's sites, of the vertical stack and of the horizontal one: each
        (copies * B, 1 or W, 2C)."""
        parts = []
        for condition in told:
            spatial = None if condition.spatial is None else condition.spatial[:, :, row : row + 1]
            parts.append(self.condition_bias(dataclasses.replace(condition, spatial=spatial)))
        if parts[0] is None:
            none = torch.zeros_like(self.base)
            return none, none
        bias = torch.cat(parts).to(self.base).permute(0, 2, 3, 1)[:, 0]
        vertical, horizontal = bias.chunk(2, dim=2)
        return vertical * self.scale, horizontal * self.scale

    def take_above(self, following: "_Layer | None") -> None:
        """The vertical stack at the row whose input is there: what it adds to the sites of the next row, what it gives
        to the rows after it, and the input of the following layer."""
        seen, above, left = self.input.seen(), self.ahead[0], self.left
        above.flatten(0, 1).addmm_(seen, self.vertical[0])
        left.copy_(self.left_told.expand_as(left))
        left.flatten(0, 1).addmm_(above.flatten(0, 1), self.across)
        if following is not None:
            above += self.vertical_told
            self.gate(above, out=following.input.row)
        for number, weight in enumerate(self.vertical[1:-1]):
            more = self.ahead[number + 1].flatten(0, 1)
            torch.addmm(more, seen, weight, out=self.ahead[number].flatten(0, 1))
        torch.mm(seen, self.vertical[-1], out=self.ahead[-1].flatten(0, 1))


@dataclass(frozen=True)
class _Step:
    """Views of what a layer reads and writes at a column: what its gate starts from, what is multiplied and by which
    matrix, its place among the gates, and, where a layer follows, the place of its input."""

    start: Tensor
    seen: Tensor
    weight: Tensor
    gates: Tensor
    following: Tensor | None


@dataclass(frozen=True)
class _Site:
    """Views of the buffers at a column. In the middle: one a group."""

    left: Tensor
    seen_left: Tensor
    steps: list[_Step]
    logits: list[Tensor]
    noise: list[Tensor]
    tokens: list[Tensor]
    given: list[Tensor]
    free: Tensor
    embedded: list[Tensor]


class Sampler:
    """Draws batches of one size from a prior, with buffers that are made once, and the weights that the prior has then.
    Computes where they lie; on a GPU what a row needs is recorded once as a CUDA graph (graphs=False: is not). Not for
    two threads at once. Raises `InputError` for guidance that the prior was not trained for."""

    @torch.inference_mode()  # what is made in it costs less to call
    def __init__(
        self,
        prior: PixelCNN,
        batch_size: int,
        draw: Draw = AS_IT_IS,
        dtype: torch.dtype | None = None,
        *,
        graphs: bool = True,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"expected at least 1 seed, found {batch_size}")
        check_guidance(prior, draw)
        self.prior, self.batch_size, self.draw = prior, batch_size, draw
        shape, weight = prior.shape, prior.embed.weight
        like: dict[str, Any] = {"dtype": dtype or weight.dtype, "device": weight.device}
        self._like = like
        self._copies = 1 if draw.guidance == 1 else 2  # with the label, and without
        batch = self._copies * batch_size
        layers: list[Any] = list(prior.layers)
        self._inputs: dict[int, _VerticalInput] = {}
        channels, reach, others = prior.config.channels, prior.config.kernel_size // 2, len(layers) - 1
        first_row = torch.zeros(batch, layers[0].horizontal.conv.kernel_size[1] + shape.width, channels, **like)
        first_left = torch.zeros(batch, shape.width, 2 * channels, **like)
        self._rows = torch.zeros(others, batch, reach + shape.width, channels, **like)
        self._left = torch.zeros(others, batch, shape.width, 2 * channels, **like)
        rows, lefts = [first_row, *self._rows], [first_left, *self._left]
        self._layers = [
            _Layer(layer, row, left, self._inputs, like) for layer, row, left in zip(layers, rows, lefts, strict=True)
        ]
        for number, (layer, following) in enumerate(itertools.pairwise(self._layers)):  # to add them takes time
            following.leave_out(layer.offset + _bias(layers[number].residual).to(**like))
        # What the kernels of all layers but the first see left of a site is known before it: one product of them all.
        self._weights_left = torch.zeros(others, reach * channels, 2 * channels, **like)
        for weight, layer in zip(self._weights_left, self._layers[1:], strict=True):
            weight.copy_(layer.horizontal[: reach * channels])
        self._start = torch.zeros(others, batch, 2 * channels, **like)
        self._embed = prior.embed.weight.detach().to(**like, copy=True).view(shape.num_groups, shape.num_codes, -1)
        self._skip = torch.cat([layer.skip for layer in self._layers]).contiguous()
        self._skip_bias = torch.stack([_bias(layer.skip) for layer in layers]).sum(dim=0).to(**like)
        self._read_head(like)
        self._gates = torch.zeros(batch, len(self._layers) * channels, **like)
        self._before = torch.zeros(batch, 2 * channels, **like)
        sites = (batch_size, shape.width, shape.num_groups)
        device = like["device"]
        self._noise = torch.zeros(*sites, shape.num_codes, dtype=torch.float32, device=device)
        self._logits = torch.zeros(batch, *sites[1:], shape.num_codes, dtype=torch.float32, device=device)
        self._tokens = torch.zeros(sites, dtype=torch.int64, device=device)
        self._given = torch.zeros(sites, dtype=torch.int64, device=device)
        self._free = torch.ones(batch_size, shape.width, dtype=torch.bool, device=device)
        self._sites = [self._site(column) for column in range(shape.width)]
        self._graphs = graphs and device.type == "cuda"
        self._graph: Any = None

    def _read_head(self, like: dict[str, Any]) -> None:
        head, groups = self.prior.head, self.prior.shape.num_groups
        self._hidden = head.hidden.weight.detach().to(**like)[:, :, 0, 0].T.contiguous()
        self._hidden_bias = _bias(head.hidden).to(**like)
        weights = head.logits.weight.detach().to(**like)[:, :, 0, 0].chunk(groups)
        self._last = [weight.T.contiguous() for weight in weights]
        self._last_bias = [bias.contiguous() for bias in _bias(head.logits).to(**like).chunk(groups)]
        earlier = None if head.earlier is None else head.earlier.weight.detach().to(**like, copy=True)
        self._earlier = [] if earlier is None else list(earlier.chunk(groups - 1))

    def _site(self, column: int) -> _Site:
        channels, layers, steps = self.prior.config.channels, self._layers, []
        for number, layer in enumerate(layers):
            if number == 0:  # which sees no input of its own site
                start, weight = layer.left[:, column], layer.horizontal
                seen = layer.row[:, column : column + layer.taps].flatten(1)
                assert seen.data_ptr() == layer.row[:, column].data_ptr(), "a view, not a copy"
            else:
                start, weight = self._start[number - 1], layer.horizontal[layer.reach * channels :]
                seen = layer.row[:, layer.reach + column]
            gates = self._gates[:, number * channels : (number + 1) * channels]
            last = number + 1 == len(layers)
            following = None if last else layers[number + 1].row[:, layers[number + 1].reach + column]
            steps.append(_Step(start, seen, weight, gates, following))
        reach = self._rows.shape[2] - self.prior.shape.width
        groups = range(self.prior.shape.num_groups)
        return _Site(
            left=self._left[:, :, column],
            seen_left=self._rows[:, :, column : column + reach].flatten(2),
            steps=steps,
            logits=[self._logits[:, column, group] for group in groups],
            noise=[self._noise[:, column, group] for group in groups],
            tokens=[self._tokens[:, column, group] for group in groups],
            given=[self._given[:, column, group] for group in groups],
            free=self._free[:, column],
            embedded=list(layers[0].row[:, layers[0].reach + column].chunk(self._copies)),
        )

    def __reduce__(self) -> Any:
        raise TypeError("a Sampler's buffers share memory and cannot be copied; make another one from its prior")

    @property
    def cache_bytes(self) -> int:
        """What is kept between sites: it grows with the batch and with the width, not with the rows. A GPU's graph
        keeps some more."""
        kept = [tensor for layer in self._layers for tensor in (layer.ahead, layer.row, layer.left)]
        kept += [tensor for layer in self._layers for tensor in (layer.vertical_told, layer.left_told)]
        kept += [
            self._start,
            self._gates,
            self._before,
            self._noise,
            self._logits,
            self._tokens,
            self._given,
            self._free,
        ]
        return sum(tensor.nbytes for tensor in kept) + sum(one.num_bytes for one in self._inputs.values())

    def sample(self, seeds: Sequence[int], condition: Condition = NOTHING, given: Given | None = None) -> Drawn:
        """One sample for each of `batch_size` seeds. Raises `InputError` where something does not fit the prior."""
        drawn = self._sample(seeds, condition, given)
        return Drawn(drawn.tokens.clone(), drawn.nll_nats.clone())  # outside of inference mode, for any use

    @torch.inference_mode()
    @whole_fp32()
    def _sample(self, seeds: Sequence[int], condition: Condition, given: Given | None) -> Drawn:
        shape, device = self.prior.shape, self._like["device"]
        if len(seeds) != self.batch_size:
            raise InputError(f"expected {self.batch_size} seeds, found {len(seeds)}")
        if not -(2**63) <= min(seeds) <= max(seeds) < 2**63:
            raise InputError(f"expected seeds of 64 bits, found {min(seeds)} to {max(seeds)}")
        sites = (self.batch_size, shape.height, shape.width, shape.num_groups)
        tokens = torch.zeros(sites, dtype=torch.int64, device=device)
        free = torch.ones(sites[:3], dtype=torch.bool, device=device)
        labels = condition.labels
        # On the CPU, where a look at them does not wait for a GPU.
        self.prior.check(tokens, dataclasses.replace(condition, labels=None if labels is None else labels.cpu()))
        parts = vars(condition).items()
        condition = Condition(**{name: None if part is None else part.to(device) for name, part in parts})
        if given is not None:
            _check_given(given, sites, shape.num_codes)
            tokens.copy_(given.tokens.reshape(sites))
            free = ~given.where.to(device)
        nll_nats = torch.zeros(sites[:3], dtype=torch.float32, device=device)
        seed = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        told = self._told(condition)
        for layer in self._layers:
            layer.begin(told)
        for row in range(shape.height):
            is_given = not bool(free[:, row].any())
            self._given.copy_(tokens[:, row])
            is_last = row + 1 == shape.height
            if not is_last and (row == 0 or condition.spatial is not None):
                for layer in self._layers:
                    layer.tell(told, row)
            if is_given:
                self._take_row()
            else:
                self._free.copy_(free[:, row])
                first, count = row * shape.width * shape.num_groups, shape.width * shape.num_groups
                self._noise.copy_(gumbel_noise(seed, first, count, shape.num_codes).view_as(self._noise))
                self._run_row(last=is_last)
                nll = F.cross_entropy(self._logits[: self.batch_size].movedim(-1, 1), self._tokens, reduction="none")
                nll_nats[:, row] = nll.sum(dim=2) * free[:, row]
            tokens[:, row] = self._tokens
        return Drawn(tokens if shape.num_groups > 1 else tokens[..., 0], nll_nats)

    def _told(self, condition: Condition) -> list[Condition]:
        """The condition of each copy of the batch."""
        if self._copies == 1:
            return [condition]
        assert condition.labels is not None, "guidance is for priors with classes"
        return [condition, dataclasses.replace(condition, labels=torch.full_like(condition.labels, NO_LABEL))]

    def _run_row(self, *, last: bool) -> None:
        """Draw the sites of a row and, where others follow, take it into the vertical stack: recorded once where there
        are graphs."""
        if not self._graphs:
            self._draw_row(last=last)
            return
        with torch.cuda.device(self._like["device"]):
            if self._graph is None:
                self._graph = self._recorded()
            self._graph.replay()

    def _recorded(self) -> Any:
        """A row as a CUDA graph. What a row changes that the next one needs is put back."""
        kept = [layer.ahead.clone() for layer in self._layers], [layer.left.clone() for layer in self._layers]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once before it is recorded: libraries make their workspaces
            self._draw_row()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._draw_row()
        for layer, ahead, left in zip(self._layers, *kept, strict=True):
            layer.ahead.copy_(ahead)
            layer.left.copy_(left)
        return graph

    def _draw_row(self, *, last: bool = False) -> None:
        for site in self._sites:
            self._draw_site(site)
        if not last:
            self._take_above()

    def _take_row(self) -> None:
        """A row that is given: its sites need not be drawn, only known to the rows below."""
        first = self._layers[0]
        self._tokens.copy_(self._given)
        embedded = sum(table[self._tokens[:, :, group]] for group, table in enumerate(self._embed))
        for row in first.row.chunk(self._copies):
            row[:, first.reach :] = embedded
        self._take_above()

    def _draw_site(self, site: _Site) -> None:
        before = self._before
        torch.baddbmm(site.left, site.seen_left, self._weights_left, out=self._start)
        for number, (layer, step) in enumerate(zip(self._layers, site.steps, strict=True)):
            torch.addmm(step.start, step.seen, step.weight, out=before)
            layer.gate(before, out=step.gates)
            if step.following is not None and number == 0:  # the first layer has no residual
                torch.mm(step.gates, layer.residual, out=step.following)
            elif step.following is not None:
                torch.addmm(step.seen, step.gates, layer.residual, out=step.following)
        total = torch.addmm(self._skip_bias, self._gates, self._skip)
        self._draw_codes(site, torch.addmm(self._hidden_bias, total.relu_(), self._hidden))

    def _draw_codes(self, site: _Site, hidden: Tensor) -> None:
        """The codes of a site, one group after the other, from the head's hidden features (copies * B, F)."""
        parts = []
        for group, logits in enumerate(site.logits):
            active = hidden.relu() if self._earlier else hidden.relu_()
            logits.copy_(torch.addmm(self._last_bias[group], active, self._last[group]))
            if self._copies == 2:
                label, none = logits.chunk(2)
                logits = none + self.draw.guidance * (label - none)
            drawn = chosen(logits, site.noise[group], self.draw)
            codes = torch.where(site.free, drawn, site.given[group], out=site.tokens[group])
            if group + 1 < len(site.logits):
                hidden = hidden + self._earlier[group][codes].repeat(self._copies, 1)
            parts.append(self._embed[group].index_select(0, codes))
        embedded = sum(parts[1:], parts[0])
        for place in site.embedded:
            place.copy_(embedded)

    def _take_above(self) -> None:
        """The vertical stack of the row that is now known, and what it adds to the sites of the next one."""
        first = self._layers[0]
        first.input.row.copy_(first.row[:, first.reach :])
        for layer, following in itertools.pairwise([*self._layers, None]):
            assert layer is not None, "None stands for what follows the last one"
            layer.take_above(following)


def _check_given(given: Given, sites: tuple[int, int, int, int], num_codes: int) -> None:
    batch, height, width, groups = sites
    allowed = [(batch, height, width, groups)] + ([(batch, height, width)] if groups == 1 else [])
    if tuple(given.tokens.shape) not in allowed:
        raise InputError(f"expected given tokens of shape {allowed[-1]}, found {tuple(given.tokens.shape)}")
    if given.where.dtype != torch.bool or tuple(given.where.shape) != sites[:3]:
        raise InputError(
            f"expected a bool mask of shape {sites[:3]} of what is given, found {given.where.dtype} of shape "
            f"{tuple(given.where.shape)}"
        )
    if given.tokens.is_floating_point():
        raise InputError(f"expected given tokens to be integers, found {given.tokens.dtype}")
    flat = given.where.flatten(1).int()
    if bool((flat.diff(dim=1) > 0).any()):
        raise InputError(
            "expected the given sites to be the first ones in raster order, found one after a site that is not given: "
            "a prior draws each code from those before it, and cannot look ahead"
        )
    known = given.tokens.cpu().long().reshape(sites)[given.where.cpu()]
    if len(known) and not 0 <= int(known.min()) <= int(known.max()) < num_codes:
        raise InputError(
            f"expected given tokens from 0 to {num_codes - 1}, found {int(known.min())} to {int(known.max())}"
        )
