import io

import numpy as np
import pytest
from PIL import Image

from vqvae_core.artifacts import ArtifactError
from vqvae_core.augment import AugmentConfig
from vqvae_core.decoder import Decoder, batch_memory
from vqvae_core.decoding import decode
from vqvae_core.image_shards import TarIndex
from vqvae_core.images import encode

SIZE = 32
PIXELS = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


def opened(files: list[bytes], augment: AugmentConfig) -> Decoder:
    decoder = Decoder(augment, augment.size(SIZE), seed=0)
    offsets = np.cumsum([0, *map(len, files)])[:-1].tolist()
    index = TarIndex([f"k{number}" for number in range(len(files))], offsets, [*map(len, files)])
    decoder.open(7, b"".join(files), index, "a.tar")
    return decoder


def grey() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[0, :, :, 0]).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(flip=True), AugmentConfig(crop_size=20)])
def test_pixels_of_every_format_in_their_place(augment: AugmentConfig) -> None:
    files = [encode(PIXELS[0], "jpg"), encode(PIXELS[1], "png"), encode(PIXELS[2], "webp"), grey()]
    decoder, rows = opened(files, augment), [2, 0, 3, 1, 0]
    out = batch_memory(len(rows) * 3 * decoder.size**2).reshape(len(rows), decoder.size, decoder.size, 3)
    decoder.decode(1, [7] * len(rows), rows, out)
    for found, row in zip(out, rows, strict=True):
        expected = augment.apply(decode(files[row]), key=f"k{row}", seed=0, epoch=1)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("side", [SIZE - 8, SIZE + 8])
def test_an_image_of_another_size_is_named_and_its_neighbours_are_not_touched(image_format: str, side: int) -> None:
    picture = np.zeros((side, side, 3), np.uint8)
    files = [encode(PIXELS[0], "jpg"), encode(picture, image_format), encode(PIXELS[1], "jpg")]  # type: ignore[arg-type]
    decoder, out = opened(files, AugmentConfig()), np.full((3, SIZE, SIZE, 3), 9, np.uint8)
    with pytest.raises(ArtifactError, match=f"expected 32 x 32 pixels for k1 in a.tar, found {side} x {side}"):
        decoder.decode(0, [7, 7, 7], [0, 1, 2], out)
    np.testing.assert_array_equal(out[0], decode(files[0]))
    assert (out[2] == 9).all()


def test_broken_bytes_are_named() -> None:
    decoder = opened([encode(PIXELS[0], "png"), b"no picture"], AugmentConfig())
    with pytest.raises(ArtifactError, match="expected an image for k1 in a.tar, but it cannot be decoded"):
        decoder.decode(0, [7, 7], [0, 1], np.empty((2, SIZE, SIZE, 3), np.uint8))
