"""Products in all digits of fp32, for what is measured or drawn."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def whole_fp32() -> Iterator[None]:
    """Products of fp32 numbers in all their digits, where torch may be set to round its inputs (TF32, bf16), as it is
    for convolutions on GPUs: that changes tokens, and likelihoods whose scale is finer."""
    backends: Any = torch.backends
    places = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
