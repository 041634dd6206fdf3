"""Which decoder: Pillow, simplejpeg or OpenCV, one thread each, on photographs.

    python -m benchmarks.decoders --photographs FOLDER   # with ILSVRC2012_img_val.tar; else synthetic ones
    python -m benchmarks.decoders --quick

Needs opencv-python-headless beside this project. Each makes 128x128 JPEGs of quality 95 of the centre squares: the
pipeline's own functions (decoded by simplejpeg, resized by torch, encoded by Pillow, with all their checks); the same
calls by hand, without a check; Pillow for all of it; OpenCV with its box filter (INTER_AREA), the only antialiased one
that it has. Bars: the pipeline takes at most 0.8 times as long as Pillow alone, and 1.1 times as long as the same calls
by hand. OpenCV's figures are printed without a bar: it filters otherwise.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.nn import functional

from benchmarks.peers import Bar, decode_resize_encode, median_ratio, pin, report
from benchmarks.shard import QUALITY, SIZE, photographs
from vqvae_core.decoding import load
from vqvae_core.images import encode, resize_and_crop


def _square(width: int, height: int) -> tuple[int, int, int]:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def by_the_pipeline(data: bytes) -> bytes:
    return encode(resize_and_crop(load(data).pixels, SIZE), "jpg")


def with_pillow(data: bytes) -> bytes:
    return decode_resize_encode(data, SIZE, "JPEG", QUALITY)


def with_simplejpeg(data: bytes) -> bytes:
    pixels = simplejpeg.decode_jpeg(data)
    left, top, side = _square(pixels.shape[1], pixels.shape[0])
    planes = torch.from_numpy(pixels[top : top + side, left : left + side]).permute(2, 0, 1)[None]
    small = functional.interpolate(planes, (SIZE, SIZE), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return encode(small.contiguous().numpy(), "jpg")


def with_opencv(data: bytes) -> bytes:
    import cv2  # pyright: ignore[reportMissingImports]

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    left, top, side = _square(pixels.shape[1], pixels.shape[0])
    small = cv2.resize(pixels[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY["quality"]])[1].tobytes()


def decoded_by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoded_by_simplejpeg(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data)


def decoded_by_opencv(data: bytes) -> np.ndarray:
    import cv2  # pyright: ignore[reportMissingImports]

    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


RIVALS: dict[str, Callable[[bytes], object]] = {
    "pipeline": by_the_pipeline,
    "pillow": with_pillow,
    "simplejpeg": with_simplejpeg,
    "opencv": with_opencv,
    "pillow_decode_to_array": decoded_by_pillow,
    "simplejpeg_decode_to_array": decoded_by_simplejpeg,
    "opencv_decode_to_array": decoded_by_opencv,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round; its ratios mean little")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--photographs", type=Path, help="folder with ILSVRC2012_img_val.tar")
    options = parser.parse_args()
    pin(1)
    import cv2  # pyright: ignore[reportMissingImports]

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    pictures, what = photographs(options.photographs)
    seconds: dict[str, list[float]] = {name: [] for name in RIVALS}
    for _ in range(1 if options.quick else options.rounds):
        for name, make in RIVALS.items():
            begin = time.perf_counter()
            for data in pictures:
                make(data)
            seconds[name].append((time.perf_counter() - begin) / len(pictures))
    bars = [
        Bar(f"pipeline_times_{name}", median_ratio(seconds["pipeline"], seconds[name]), bar, at_most=True)
        for name, bar in (("pillow", 0.8), ("simplejpeg", 1.1))
    ]
    milliseconds = {name: round(1e3 * statistics.median(values), 3) for name, values in seconds.items()}
    return report("decoders", {"what": what, "size": SIZE}, bars, {"milliseconds_an_image": milliseconds})


if __name__ == "__main__":
    sys.exit(main())
