"""The nearest code: this project's quantizer against one matrix product, and against vector-quantize-pytorch.

    python -m benchmarks.quantizer            # 9 rounds
    python -m benchmarks.quantizer --quick

N = 65,536 latents of length D = 64, tables of K = 512 and 8,192, fp32, eval. The product is that of latents and table
into a tensor that is there already: what every distance is made of. vector-quantize-pytorch (an extra, left out where
it is not installed) runs its whole forward, as ours does. Bars: nearest_codes at most 1.5 times the product; the
forward at least 8 times (K=512) and 4 times (K=8,192) as fast as theirs; at most 64 MiB beyond inputs and outputs. On a
GPU the first does not hold: the search for the least distance takes as long there as the product (2.0 on an H200).
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Bar, report
from vqvae_core.nearest import nearest_codes
from vqvae_core.quantizer import QuantizerConfig, make_quantizer

N, D, SIZES, LEAST = 65_536, 64, (512, 8192), {512: 8.0, 8192: 4.0}
SIDE = 32  # latents come as (N / 32 / 32, D, 32, 32)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bars, figures = [], {}
    for size in SIZES:
        seconds = _times(size, device, 2 if options.quick else 9)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = statistics.median(
            ours / product for ours, product in zip(seconds["nearest_codes"], seconds["product"], strict=True)
        )
        bars.append(Bar(f"times_product_{size}", ratio, 1.5, at_most=True))
        if "peer" in seconds:
            faster = statistics.median(
                peer / ours for peer, ours in zip(seconds["peer"], seconds["forward"], strict=True)
            )
            bars.append(Bar(f"times_faster_than_peer_{size}", faster, LEAST[size]))
        elif device == "cpu":  # a bar that was not measured is not held
            bars.append(Bar(f"times_faster_than_peer_{size}", 0.0, LEAST[size]))
        mebibytes = _extra_mebibytes(size, device)
        bars.append(Bar(f"extra_mebibytes_{size}", mebibytes, 64.0, at_most=True))
        figures[f"milliseconds_{size}"] = {name: round(1e3 * value, 2) for name, value in medians.items()}
    settings = {"N": N, "D": D, "device": _device_name(device), "threads": torch.get_num_threads()}
    return report("quantizer", settings, bars, figures)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _inputs(size: int, device: str) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Latents as rows, the same as an encoder gives them (channels_last), and a quantizer of that size."""
    torch.manual_seed(0)
    quantizer: Any = make_quantizer(QuantizerConfig(num_codes=size, code_dim=D)).to(device).eval()
    with torch.no_grad():
        quantizer.table.copy_(torch.randn(size, D))
    rows = torch.randn(N, D, device=device)
    return rows, rows.view(-1, SIDE, SIDE, D).permute(0, 3, 1, 2), quantizer


@torch.no_grad()
def _times(size: int, device: str, rounds: int) -> dict[str, list[float]]:
    rows, latents, quantizer = _inputs(size, device)
    table = quantizer.table.detach()
    product = torch.empty(N, size, device=device)
    rivals: dict[str, Callable[[], Any]] = {
        "product": lambda: torch.mm(rows, table.T, out=product),
        "nearest_codes": lambda: nearest_codes(rows, table),
        "forward": lambda: quantizer(latents),
    }
    peer = _peer(size, device)
    if peer is not None:
        sequence = rows.view(-1, SIDE * SIDE, D)
        rivals["peer"] = lambda: peer(sequence)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, rival in rivals.items():
            _wait(device)
            begin = time.perf_counter()
            rival()
            _wait(device)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peer(size: int, device: str) -> Any:
    try:
        from vector_quantize_pytorch import VectorQuantize  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("vector-quantize-pytorch is not installed (the extra bench has it): not measured", flush=True)
        return None
    return VectorQuantize(dim=D, codebook_size=size).to(device).eval()


def _extra_mebibytes(size: int, device: str) -> float:
    """Peak memory of nearest_codes beyond its inputs and outputs, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (size, device))


@torch.no_grad()
def _measure(size: int, device: str) -> float:
    rows, _, quantizer = _inputs(size, device)
    table = quantizer.table.detach()
    nearest_codes(rows[:64], table)  # what the libraries keep for themselves
    output_bytes = 8 * N
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nearest_codes(rows, table)
        return (torch.cuda.max_memory_allocated() - before - output_bytes) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak_bytes("VmRSS")
    nearest_codes(rows, table)
    return max(0.0, (_peak_bytes("VmHWM") - before - output_bytes) / 2**20)


def _peak_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
