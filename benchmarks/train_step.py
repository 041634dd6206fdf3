"""One step of training the VQ-VAE: the loop against the same model in a plain loop.

    python -m benchmarks.train_step            # 5 rounds
    python -m benchmarks.train_step --quick

The paper's model (256 channels, 128x128 images, K=512), batch 16 on a CPU. Rivals: a loop as one writes it by hand, in
fp32 with plain (contiguous) and with channels_last tensors. The project's loop runs as training does, in the precision
that the machine is best at. Bars: on a CPU with AMX at least 4 times plain fp32, elsewhere at least the speed of fp32
with channels_last; at most 5 % of the time outside forward, backward and optimizer.

On a GPU: images/s, share of the measured rate of a bf16 matrix product, and memory for batches of 128 to 1,024,
compiled and not, and the quantizer's share of a step. Bar: at least 35 % of that rate at the best batch.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Bar, interleaved, median_ratio, report
from vqvae_core.images import pixels_to_images
from vqvae_core.quantizer import QuantizerConfig
from vqvae_core.train import Worker, train
from vqvae_core.train_config import TrainConfig, best_precision
from vqvae_core.vqvae import VQVAE, VQVAEConfig
from vqvae_core.vqvae_training import VQVAETraining

SIZE, BATCH = 128, 16
CONFIG = VQVAEConfig(quantizer=QuantizerConfig(num_codes=512, code_dim=64, learn_by="moving_average"))
GPU_BATCHES = (128, 256, 512, 1024)


class SameBatch:
    """One batch again and again: reading is measured elsewhere."""

    def __init__(self, batch_size: int, device: str = "cpu") -> None:
        self.pixels = torch.randint(0, 256, (batch_size, SIZE, SIZE, 3), dtype=torch.uint8, device=device)

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        for _ in range(start, stop):
            yield self.pixels


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if torch.cuda.is_available():
        return _gpu(options.quick)
    return _cpu(options.quick)


def _cpu(quick: bool) -> int:
    steps, rounds = (2, 1) if quick else (6, 5)
    precision = best_precision("cpu")
    inside = {"inside": 0.0, "all": 0.0}
    rivals: dict[str, Callable[[], float]] = {
        "loop": lambda: _loop_rate(2 * steps, precision, inside),
        "fp32_plain": lambda: _plain_rate(steps, torch.contiguous_format),
        "fp32_channels_last": lambda: _plain_rate(steps, torch.channels_last),
    }
    rates = interleaved(rivals, rounds)
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    amx = "amx_bf16" in flags
    plain, channels_last = (median_ratio(rates["loop"], rates[name]) for name in ("fp32_plain", "fp32_channels_last"))
    bars = [
        Bar("times_fp32_plain", plain, 4.0) if amx else Bar("times_fp32_channels_last", channels_last, 1.0),
        Bar("share_outside", 1 - inside["inside"] / inside["all"], 0.05, at_most=True),
    ]
    settings = {"batch": BATCH, "size": SIZE, "precision": precision, "threads": torch.get_num_threads(), "amx": amx}
    figures = {
        "images_per_second": {name: [round(rate, 2) for rate in values] for name, values in rates.items()},
        "times_fp32_plain": round(plain, 2),
        "times_fp32_channels_last": round(channels_last, 2),
    }
    return report("train_step", settings, bars, figures)


def _model() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(CONFIG)


def _plain_rate(steps: int, memory_format: torch.memory_format) -> float:
    """Images/s of a hand-written loop in fp32."""
    model = _model().to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    pixels = SameBatch(BATCH).pixels
    begin = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first one warms up
            begin = time.perf_counter()
        images = pixels_to_images(pixels).contiguous(memory_format=memory_format)
        optimizer.zero_grad()
        output = model(images)
        (output.loss_nats / images[0].numel()).backward()
        optimizer.step()
        model.quantizer.learn(model.quantizer.statistics(output.quantized))
    return steps * BATCH / (time.perf_counter() - begin)


class _Timed:
    """Adds up the seconds that calls of a function take."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._function(*arguments, **named)
        finally:
            self.seconds += time.perf_counter() - begin


def _loop_rate(steps: int, precision: Any, inside: dict[str, float]) -> float:
    """Images/s of the project's loop; what it spends in forward, backward and optimizer is added to `inside`."""
    config = TrainConfig(
        steps=steps + 1, batch_size=BATCH, num_lanes=1, precision=precision, log_every=1, validate_every=steps + 2
    )
    task = _task(config, Worker())
    forward, backward, optimize = _Timed(task._forward), _Timed(Tensor.backward), _Timed(torch.optim.Adam.step)
    task._forward = forward  # type: ignore[assignment]
    whole = Tensor.backward, torch.optim.Adam.step
    marks: list[tuple[float, float]] = []

    def mark(step: int, metrics: dict[str, float]) -> None:
        marks.append((time.perf_counter(), forward.seconds + backward.seconds + optimize.seconds))

    Tensor.backward = lambda self, *a, **k: backward(self, *a, **k)  # type: ignore[method-assign]
    torch.optim.Adam.step = lambda self, *a, **k: optimize(self, *a, **k)  # type: ignore[method-assign]
    try:
        train(task, SameBatch(BATCH), config, Worker(log=mark), "run")
    finally:
        Tensor.backward, torch.optim.Adam.step = whole  # type: ignore[method-assign]
    seconds = marks[steps - 1][0] - marks[0][0]
    inside["inside"] += marks[steps - 1][1] - marks[0][1]
    inside["all"] += seconds
    return (steps - 1) * BATCH / seconds


def _task(config: TrainConfig, worker: Worker) -> VQVAETraining:
    validation = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)
    return VQVAETraining(
        _model(), steps=config.steps, steps_per_epoch=10**9, seed=0, precision=config.precision, worker=worker,
        validation=validation,
    )  # fmt: skip


def _gpu(quick: bool) -> int:
    peak = _matmul_flops()
    rows = []
    for batch in GPU_BATCHES[:1] if quick else GPU_BATCHES:
        for compiled in (False, True):
            rows.append(_gpu_row(batch, compiled, peak))
            print(rows[-1], flush=True)
    best = max(row["share_of_matmul"] for row in rows)
    settings = {"gpu": torch.cuda.get_device_name(), "size": SIZE, "matmul_tflops": round(peak / 1e12, 1)}
    return report("train_step", settings, [Bar("share_of_matmul", best, 0.35)], {"rows": rows})


def _matmul_flops() -> float:
    """Operations/s of a bf16 product of 8,192 x 8,192 matrices."""
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / statistics.median(seconds)


def _flops_an_image() -> float:
    """Multiply-adds count for two; forward and backward for three forwards. The quantizer is left out."""
    from torch.utils.flop_counter import FlopCounterMode

    model, images = _model(), torch.zeros(1, 3, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter:
        model.decoder(model.encoder(images)).sum().backward()
    return float(counter.get_total_flops())


def _gpu_row(batch: int, compiled: bool, peak: float) -> dict[str, Any]:
    steps = 40
    config = TrainConfig(
        steps=steps, batch_size=batch, num_lanes=1, precision="bf16", log_every=10, validate_every=steps + 1
    )
    marks: list[float] = []

    def mark(step: int, metrics: dict[str, float]) -> None:
        torch.cuda.synchronize()
        marks.append(time.perf_counter())

    worker = Worker(device="cuda", compile=compiled, log=mark)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    task = _task(config, worker)
    train(task, SameBatch(batch, "cuda"), replace(config), worker, "run")
    rate = 20 * batch / (marks[2] - marks[0])
    return {
        "batch": batch,
        "compiled": compiled,
        "images_per_second": round(rate, 1),
        "share_of_matmul": round(rate * _flops_an_image() / peak, 4),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "quantizer_share": round(_quantizer_share(task, batch, batch / rate), 4),
    }


@torch.no_grad()
def _quantizer_share(task: VQVAETraining, batch: int, step_seconds: float) -> float:
    quantizer = task.model.quantizer
    latents = torch.randn(batch, 64, SIZE // 4, SIZE // 4, device="cuda").contiguous(memory_format=torch.channels_last)
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        quantizer.learn(quantizer.statistics(quantizer(latents)))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) / step_seconds


if __name__ == "__main__":
    sys.exit(main())
