import numpy as np
import pytest

from tests.vqvae_core.shards import picture
from vqvae_core.augment import AugmentConfig, centre_crop
from vqvae_core.errors import InputError


def test_nothing_is_done_by_default() -> None:
    pixels = picture(0)
    assert AugmentConfig().apply(pixels, key="a", seed=0, epoch=0) is pixels


def test_it_is_a_function_of_seed_epoch_and_key() -> None:
    config, pixels = AugmentConfig(flip=True, crop_size=5), picture(0, 16)

    def apply(key: str, seed: int, epoch: int) -> bytes:
        return config.apply(pixels, key=key, seed=seed, epoch=epoch).tobytes()

    assert apply("a", 0, 0) == apply("a", 0, 0)
    assert len({apply(key, seed, epoch) for key in "abc" for seed in range(3) for epoch in range(3)}) > 20


def test_a_flip_mirrors_half_of_the_images() -> None:
    pixels = picture(0)
    made = [AugmentConfig(flip=True).apply(pixels, key=f"k{n}", seed=1, epoch=2) for n in range(400)]
    flipped = sum(np.array_equal(one, pixels[:, ::-1]) for one in made)
    assert flipped + sum(np.array_equal(one, pixels) for one in made) == 400
    assert 160 < flipped < 240


def test_crops_reach_every_place() -> None:
    places = np.stack(np.meshgrid(np.arange(8), np.arange(8), [0], indexing="ij"), -1)[:, :, 0].astype(np.uint8)
    config = AugmentConfig(crop_size=6)
    corners = {tuple(config.apply(places, key=f"k{n}", seed=0, epoch=0)[0, 0, :2].tolist()) for n in range(300)}
    assert corners == {(top, left) for top in range(3) for left in range(3)}


def test_the_centre() -> None:
    pixels = picture(0, 9)
    assert np.array_equal(centre_crop(pixels, 5), pixels[2:7, 2:7])
    assert centre_crop(np.stack([pixels, pixels]), 3).shape == (2, 3, 3, 3)


def test_messages() -> None:
    with pytest.raises(ValueError, match="crop_size must be at least 1 or None, was 0"):
        AugmentConfig(crop_size=0)
    with pytest.raises(InputError, match="expected a crop_size of at most 8, the size of the stored images, was 9"):
        AugmentConfig(crop_size=9).size(8)
