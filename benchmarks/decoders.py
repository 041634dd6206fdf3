"""Which decoder: Pillow, simplejpeg or OpenCV, one thread each, on photographs.

    python -m benchmarks.decoders --photographs FOLDER   # with ILSVRC2012_img_val.tar; else synthetic ones
    python -m benchmarks.decoders --quick

Needs simplejpeg and opencv-python-headless beside this project. Each makes 128x128 JPEGs of quality 95 of the centre
squares: Pillow from its own image, as `pipelines/shard.py` does; simplejpeg with Pillow's antialiased bicubic filter
between; OpenCV with its box filter (INTER_AREA), the only antialiased one that it has. Bar: Pillow takes at most 1.1
times as long as simplejpeg does with the same filter. OpenCV's figures are printed without a bar: it filters otherwise.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.peers import Bar, decode_resize_encode, pin, report
from benchmarks.shard import QUALITY, SIZE, photographs


def _square(width: int, height: int) -> tuple[int, int, int]:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def with_pillow(data: bytes) -> bytes:
    return decode_resize_encode(data, SIZE, "JPEG", QUALITY)


def with_simplejpeg(data: bytes) -> bytes:
    import simplejpeg  # pyright: ignore[reportMissingImports]

    picture = Image.fromarray(simplejpeg.decode_jpeg(data))
    left, top, side = _square(*picture.size)
    small = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return simplejpeg.encode_jpeg(np.asarray(small), quality=QUALITY["quality"], colorsubsampling="444")


def with_opencv(data: bytes) -> bytes:
    import cv2  # pyright: ignore[reportMissingImports]

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    left, top, side = _square(pixels.shape[1], pixels.shape[0])
    small = cv2.resize(pixels[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY["quality"]])[1].tobytes()


def decoded_by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoded_by_simplejpeg(data: bytes) -> np.ndarray:
    import simplejpeg  # pyright: ignore[reportMissingImports]

    return simplejpeg.decode_jpeg(data)


def decoded_by_opencv(data: bytes) -> np.ndarray:
    import cv2  # pyright: ignore[reportMissingImports]

    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


RIVALS: dict[str, Callable[[bytes], object]] = {
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
    pictures, what = photographs(options.photographs)
    seconds: dict[str, list[float]] = {name: [] for name in RIVALS}
    for _ in range(1 if options.quick else options.rounds):
        for name, make in RIVALS.items():
            begin = time.perf_counter()
            for data in pictures:
                make(data)
            seconds[name].append((time.perf_counter() - begin) / len(pictures))
    ratios = [ours / theirs for ours, theirs in zip(seconds["pillow"], seconds["simplejpeg"], strict=True)]
    bars = [Bar("pillow_times_simplejpeg", statistics.median(ratios), 1.1, at_most=True)]
    milliseconds = {name: round(1e3 * statistics.median(values), 3) for name, values in seconds.items()}
    return report("decoders", {"what": what, "size": SIZE}, bars, {"milliseconds_an_image": milliseconds})


if __name__ == "__main__":
    sys.exit(main())
