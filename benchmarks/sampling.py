"""Sampling a prior: the cached sampler against full passes and the plain sampler; training against masked kernels.

    python -m benchmarks.sampling            # 5 rounds
    python -m benchmarks.sampling --quick
    python -m benchmarks.sampling --gpu-only

A gated PixelCNN of 15 layers with 128 channels, K=512, kernels 2x3 (vertical) and 1x2 (horizontal), fp32. On a CPU:
32x32 sites in batches of 1, 16 and 64, and 21x21 in a batch of 16, on two cores. One full pass is the forward pass
of that batch without gradients, the faster of contiguous and channels_last. The plain sampler makes one such pass a
site; its cost is measured on some of the sites and extrapolated. That both draw the same tokens is checked by one full
pass over what the cached one drew, with the same noise: each code must be the likeliest under it, with weights as torch
begins with. With larger ones, whose logits are as wide as a trained prior's, roundings are larger too, and a code that
differs must be as likely as the other to 1e-4 nats. Training is forward
and backward of the same network with cropped kernels and with masked 3x3 and 1x3 ones, whose outputs are equal. The
tensors that live are counted after the second row and after the last one. The sampler's buffers and matrices are made
before: their time is printed, and not part of a batch's. On a GPU: grids a second, with CUDA graphs and without.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers import Bar, pin, report
from vqvae_core.fp32 import whole_fp32
from vqvae_core.noise import gumbel_noise
from vqvae_core.pixelcnn import PixelCNN, PixelCNNConfig
from vqvae_core.sampler import AS_IT_IS, Sampler, chosen
from vqvae_core.token_shards import TokenShape

CONFIG = PixelCNNConfig(channels=128, num_layers=15, kernel_size=3, first_kernel_size=3, head_channels=256)
CODES, CHECKED = 512, 10  # batches whose tokens are checked
SITES = {1: 8, 16: 8, 64: 2}  # of the plain sampler in a round, by batch
CPUS = 2
GPU_BATCHES, GPU_GRIDS_A_SECOND = (64, 256, 512, 1024), 1000.0
Seconds = dict[str, list[float]]


def prior(height: int, width: int, device: str = "cpu", *, wide: bool = False) -> PixelCNN:
    """Random weights; wide: with logits as wide as those of a trained prior."""
    torch.manual_seed(0)
    model = PixelCNN(CONFIG, TokenShape(height=height, width=width, num_groups=1, num_codes=CODES)).to(device)
    for parameter in model.parameters():
        if wide and parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.4 / parameter[0].numel() ** 0.5)
    return model.eval()


def layouts(model: PixelCNN) -> dict[str, PixelCNN]:
    """A model in both layouts of memory."""
    other = PixelCNN(model.config, model.shape)
    other.load_state_dict(model.state_dict())
    other.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return {"contiguous": model, "channels_last": other.eval()}


def timed(actions: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Seconds of each action in each round, one after the other; each is done once before."""
    found: Seconds = {name: [] for name in actions}
    for number in range(-1, rounds):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            if number >= 0:
                found[name].append(time.perf_counter() - begin)
    return found


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def fastest(seconds: Seconds, names: list[str]) -> list[float]:
    """Of the one that is faster in the middle."""
    return seconds[min(names, key=lambda name: statistics.median(seconds[name]))]


@torch.no_grad()
def compare(height: int, width: int, batch: int, rounds: int) -> dict[str, Any]:
    """The cached sampler, a full pass, and the plain sampler, which makes one for each site."""
    model = prior(height, width)
    begin = time.perf_counter()
    sampler = Sampler(model, batch)
    made, passes = time.perf_counter() - begin, layouts(model)
    tokens = torch.randint(CODES, (batch, height, width))
    noise = torch.zeros(batch, CODES)

    def plainly(network: PixelCNN) -> None:
        for site in range(SITES[batch]):
            logits = network(tokens)[:, :, site // width, site % width]
            tokens[:, site // width, site % width] = chosen(logits, noise, AS_IT_IS)

    seconds = timed(
        {
            **{f"pass {name}": (lambda network=network: network(tokens)) for name, network in passes.items()},
            "cached": lambda: sampler.sample(range(batch)),
            **{f"plain {name}": (lambda network=network: plainly(network)) for name, network in passes.items()},
        },
        rounds,
    )
    full = fastest(seconds, [f"pass {name}" for name in passes])
    plain = [one * height * width / SITES[batch] for one in fastest(seconds, [f"plain {name}" for name in passes])]
    return {
        "passes": ratio(seconds["cached"], full),
        "times_plain": ratio(plain, seconds["cached"]),
        "seconds_of_a_batch": statistics.median(seconds["cached"]),
        "seconds_of_a_pass": statistics.median(full),
        "seconds_of_the_plain_sampler_extrapolated": statistics.median(plain),
        "cache_mib": round(sampler.cache_bytes / 2**20, 2),
        "seconds_to_make_a_sampler": made,
    }


def live_bytes() -> int:
    """Of all tensors that live, each place in memory once."""
    gc.collect()
    kinds = (torch.Tensor, nn.Parameter)  # no others, which may have no memory
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) in kinds]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def growth_bytes(height: int, width: int, batch: int) -> int:
    """How many more bytes of tensors live after the last row was drawn than after the second one."""
    sampler, alive = Sampler(prior(height, width), batch), []
    draw_row = sampler._run_row

    def watched(*, last: bool) -> None:
        draw_row(last=last)
        alive.append(live_bytes())

    sampler._run_row = watched  # type: ignore[method-assign]
    sampler.sample(range(batch))
    return alive[-1] - alive[1]


@torch.no_grad()
@whole_fp32()
def different_tokens(model: PixelCNN, batch: int, batches: int, dtype: torch.dtype | None = None) -> tuple[int, float]:
    """How many codes a full pass in fp32, with the same noise, would draw otherwise; and how far from the likeliest one
    the furthest of them is, in nats."""
    shape, device = model.shape, model.embed.weight.device
    sampler, different, furthest = Sampler(model, batch, dtype=dtype), 0, 0.0
    for number in range(batches):
        seeds = range(number * batch, (number + 1) * batch)
        tokens = sampler.sample(seeds).tokens
        noise = gumbel_noise(torch.tensor(list(seeds), device=device), 0, shape.num_tokens, CODES)  # (B, N, K)
        scores = model(tokens).flatten(2).transpose(1, 2) + noise
        drawn = tokens.flatten(1)
        different += int((scores.argmax(dim=2) != drawn).sum())
        short = scores.max(dim=2).values - scores.gather(2, drawn[..., None])[..., 0]
        furthest = max(furthest, float(short.max()))
    return different, furthest


class Masked(nn.Module):
    """The same network by whole kernels times masks: 3x3 of which the lower row is 0, 1x3 of which the right is."""

    def __init__(self, cropped: PixelCNN) -> None:
        super().__init__()
        self.cropped = cropped
        self.parts: list[Any] = list(cropped.layers)
        self.vertical, self.horizontal = nn.ParameterList(), nn.ParameterList()
        for layer in self.parts:
            vertical = layer.vertical.conv.weight.detach()
            self.vertical.append(nn.Parameter(F.pad(vertical, (0, 0, 0, 1))))
            horizontal = layer.horizontal.conv.weight.detach()
            self.horizontal.append(nn.Parameter(F.pad(horizontal, (0, 3 - horizontal.shape[3]))))
        self.register_buffer("rows", torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 3, 1))
        self.register_buffer("columns", torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 1, 3))
        self.register_buffer("earlier", torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 1, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        v = h = self.cropped.embedded(tokens[..., None])
        total = None
        for layer, vertical, horizontal in zip(self.parts, self.vertical, self.horizontal, strict=True):
            above = F.conv2d(v, vertical * self.rows, layer.vertical.conv.bias, padding=1)
            mask = self.earlier if layer.first else self.columns
            left = F.conv2d(h, horizontal * mask, layer.horizontal.conv.bias, padding=(0, 1))
            left = left + layer.vertical_to_horizontal(F.pad(above[:, :, :-1], (0, 0, 1, 0)))
            gated = _gate(left)
            residual = layer.residual(gated)
            v, h = _gate(above), residual if layer.first else h + residual
            skip = layer.skip(gated)
            total = skip if total is None else total + skip
        return self.cropped.head(total, tokens[..., None])[..., 0]


def _gate(x: torch.Tensor) -> torch.Tensor:
    value, switch = x.chunk(2, dim=1)
    return value.tanh() * switch.sigmoid()


def compare_training(side: int, batch: int, rounds: int) -> tuple[float, float]:
    """Speed of cropped kernels relative to masked ones, forward and backward, each in its faster layout; and the
    largest difference of their outputs."""
    tokens = torch.randint(CODES, (batch, side, side))
    cropped = layouts(prior(side, side))
    masked = {name: Masked(model) for name, model in layouts(prior(side, side)).items()}
    masked["channels_last"].to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        difference = float((cropped["contiguous"](tokens) - masked["contiguous"](tokens)).abs().max())

    def step(model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(tokens), tokens).backward()

    actions = {f"cropped {name}": (lambda model=model: step(model)) for name, model in cropped.items()}
    actions |= {f"masked {name}": (lambda model=model: step(model)) for name, model in masked.items()}
    seconds = timed(actions, rounds)
    ours = fastest(seconds, [name for name in seconds if name.startswith("cropped")])
    theirs = fastest(seconds, [name for name in seconds if name.startswith("masked")])
    return ratio(theirs, ours), difference


def on_cpu(quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    rounds = 2 if quick else 5
    sizes = {"32x32_batch_16": (32, 32, 16), "32x32_batch_1": (32, 32, 1)}
    if not quick:
        sizes |= {"32x32_batch_64": (32, 32, 64), "21x21_batch_16": (21, 21, 16)}
    found: dict[str, Any] = {}
    for name, size in sizes.items():
        found[name] = compare(*size, rounds)
        print(name, found[name], flush=True)
    checked = 2 if quick else CHECKED
    different, _ = different_tokens(prior(32, 32), 16, checked)
    wide, furthest = different_tokens(prior(32, 32, wide=True), 16, checked)
    in_bf16, _ = different_tokens(prior(32, 32, wide=True), 16, 1, torch.bfloat16)
    speed, difference = compare_training(32, 4 if quick else 16, rounds)
    bars = [
        Bar("passes_of_batch_16", found["32x32_batch_16"]["passes"], 1.5, at_most=True),
        Bar("times_plain_of_batch_16", found["32x32_batch_16"]["times_plain"], 600.0),
        Bar("passes_of_batch_1", found["32x32_batch_1"]["passes"], 8.0, at_most=True),
        Bar("different_tokens", different, 0.0, at_most=True),
        Bar("nats_between_different_tokens_of_wide_logits", furthest, 1e-4, at_most=True),
        Bar("bytes_that_rows_add", growth_bytes(32, 32, 16), 0.0, at_most=True),
        Bar("training_times_masked", speed, 1.15),
        Bar("difference_from_masked", difference, 1e-3, at_most=True),
    ]
    figures = {
        **found,
        "batches_checked": checked,
        "tokens_checked": checked * 16 * 32 * 32,
        "different_tokens_of_wide_logits": wide,
        "share_of_tokens_that_bf16_draws_otherwise": in_bf16 / (16 * 32 * 32),
    }
    return bars, figures


def on_gpu(quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    best, smallest = {"fp32": 0.0, "bf16": 0.0}, {}
    for batch in GPU_BATCHES[:1] if quick else GPU_BATCHES:
        for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
            tokens = []
            for graphs in (True, False):
                sampler = Sampler(prior(32, 32, "cuda"), batch, dtype=dtype, graphs=graphs)

                def draw(sampler: Sampler = sampler, batch: int = batch) -> None:
                    sampler.sample(range(batch))
                    torch.cuda.synchronize()

                rate = batch / statistics.median(timed({"draw": draw}, 3)["draw"])
                name = f"batch_{batch}_{precision}_{'graphs' if graphs else 'eager'}"
                figures[name] = {"grids_a_second": round(rate, 1), "cache_mib": round(sampler.cache_bytes / 2**20, 1)}
                print(name, figures[name], flush=True)
                best[precision] = max(best[precision], rate)
                tokens.append(sampler.sample(range(batch)).tokens)
            figures[f"batch_{batch}_{precision}_that_graphs_draw_otherwise"] = int((tokens[0] != tokens[1]).sum())
            first = smallest.setdefault(precision, tokens[0])
            unlike = int((first != tokens[0][: len(first)]).sum())
            figures[f"batch_{batch}_{precision}_tokens_unlike_those_of_batch_{len(first)}"] = unlike
    figures["best"] = best
    otherwise = sum(value for name, value in figures.items() if name.endswith("that_graphs_draw_otherwise"))
    different, _ = different_tokens(prior(32, 32, "cuda"), 64, 1 if quick else CHECKED)
    return [
        Bar("grids_a_second_at_best_of_fp32_and_bf16", max(best.values()), GPU_GRIDS_A_SECOND),
        Bar("tokens_that_graphs_draw_otherwise", otherwise, 0.0, at_most=True),
        Bar("different_tokens_on_gpu", different, 0.0, at_most=True),
    ], figures


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu-only", action="store_true")
    options = parser.parse_args()
    bars: list[Bar] = []
    figures: dict[str, Any] = {}
    if not options.gpu_only:
        pin(CPUS)
        torch.set_num_threads(min(CPUS, torch.get_num_threads()))
        bars, figures = on_cpu(options.quick)
    if torch.cuda.is_available():
        more, figures["on_gpu"] = on_gpu(options.quick)
        bars += more
    if not bars:
        parser.error("expected a GPU for --gpu-only, found none")
    settings = {
        "layers": CONFIG.num_layers,
        "channels": CONFIG.channels,
        "K": CODES,
        "threads": torch.get_num_threads(),
    }
    return report("sampling", settings, bars, figures)


if __name__ == "__main__":
    sys.exit(main())
