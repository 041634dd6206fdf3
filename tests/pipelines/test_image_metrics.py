import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from pipelines.image_metrics import ms_ssim, num_scales, scale_weights, ssim


def pictures(size: int, count: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth pictures that fill a part of the range only."""
    generator = np.random.default_rng(seed)
    rough = torch.from_numpy(generator.uniform(60, 150, (count, 3, 6, 6)))
    smooth = torch.nn.functional.interpolate(rough, (size, size), mode="bicubic")
    return smooth.clamp(0, 255).to(torch.uint8).movedim(1, -1)


def noisy(pixels: torch.Tensor, amount: int) -> torch.Tensor:
    noise = torch.randint(-amount, amount + 1, pixels.shape, generator=torch.Generator().manual_seed(1))
    return (pixels.to(torch.int32) + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("size", "count"), [(4, 0), (10, 0), (11, 1), (21, 1), (22, 2), (84, 3), (98, 3), (99, 4), (175, 4), (176, 5)]
)
def test_as_many_scales_as_fit(size: int, count: int) -> None:
    assert num_scales(size) == count
    pixels = pictures(size)
    other = noisy(pixels, 20)
    for measure, least in ((ssim, 1), (ms_ssim, 2)):
        found = measure(other, pixels)
        if count < least:
            assert found is None
            continue
        assert found is not None and found.shape == (3,)
        assert bool((found > 0).all() and (found < 1).all())
        same = measure(pixels, pixels)
        assert same is not None
        torch.testing.assert_close(same, torch.ones(3), rtol=0, atol=1e-5)


def test_weights_of_scales() -> None:
    assert scale_weights(5) == (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for count in range(1, 6):
        weights = scale_weights(count)
        assert len(weights) == count
        assert sum(weights) == pytest.approx(1.0001)
        assert weights[0] * 0.2856 == pytest.approx(weights[min(1, count - 1)] * 0.0448) or count == 1


def test_ssim_against_its_formula() -> None:
    """Eq. 13 of Wang et al. 2004, written out in numpy with its Gaussian window, on pixels in [0, 255] that are
    reflected at their edges."""
    pixels = pictures(24, 1)
    other = noisy(pixels, 30)
    edge = [(5, 5), (5, 5), (0, 0)]
    x, y = (np.pad(each[0].numpy().astype(np.float64), edge, mode="reflect") for each in (other, pixels))
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    views = [np.lib.stride_tricks.sliding_window_view(each, (11, 11), axis=(0, 1)) for each in (x, y)]
    mean_x, mean_y = ((view * window).sum(axis=(-1, -2)) for view in views)
    var_x = (views[0] ** 2 * window).sum(axis=(-1, -2)) - mean_x**2
    var_y = (views[1] ** 2 * window).sum(axis=(-1, -2)) - mean_y**2
    both = (views[0] * views[1] * window).sum(axis=(-1, -2)) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    found = ssim(other, pixels)
    assert found is not None
    assert float(found[0]) == pytest.approx(expected.mean(), abs=1e-5)


def test_the_data_range_matters() -> None:
    """The range of uint8, not the range that these pictures happen to fill, and not that of [-1, 1]."""
    pixels = pictures(32)
    other = noisy(pixels, 20)
    right = ssim(other, pixels)
    assert right is not None
    planes = [each.movedim(-1, 1).float() / 255 for each in (other, pixels)]
    for wrong in (None, 2.0, 255.0):
        found = structural_similarity_index_measure(*planes, data_range=wrong, reduction="none")
        assert float((found - right).abs().min()) > 0.01  # type: ignore[operator]
