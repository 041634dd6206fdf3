"""FID's arithmetic: against scipy and closed forms, for any cut of the features, without full rank."""

import io
import pickle

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from vqvae_core.errors import InputError
from vqvae_core.frechet import Gaussian, RunningGaussian, frechet_distance


def features(count: int, size: int, seed: int, rank: int | None = None) -> np.ndarray:
    """Correlated features with a mean far from 0, in a subspace where a rank is named."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(rank or size, size)) + np.eye(rank or size, size)
    return generator.normal(size=(count, rank or size)) @ mixed + generator.normal(size=size) * 5


def fitted(*parts: np.ndarray) -> Gaussian:
    running = RunningGaussian(parts[0].shape[1])
    for part in parts:
        running.add(torch.from_numpy(part))
    return running.gaussian()


def by_scipy(one: np.ndarray, other: np.ndarray) -> float:
    """The formula as it stands, on numpy's own mean and covariance."""
    covariances = [np.cov(each, rowvar=False) for each in (one, other)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    gap = one.mean(axis=0) - other.mean(axis=0)
    return float(gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_as_scipy(size: int) -> None:
    one, other = features(300, size, 0), features(200, size, 1)
    if size == 1:  # numpy makes a number of one feature's covariance
        expected = (one.mean() - other.mean()) ** 2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2
    else:
        expected = by_scipy(one, other)
    assert frechet_distance(fitted(one), fitted(other)) == pytest.approx(expected, rel=1e-9)


def test_mean_and_covariance_are_numpys() -> None:
    values = features(50, 6, 3)
    gaussian = fitted(values)
    np.testing.assert_allclose(gaussian.mean.numpy(), values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance.numpy(), np.cov(values, rowvar=False), rtol=1e-10, atol=1e-10)


def test_closed_forms() -> None:
    """Of independent features: the squared distance of the means and of the deviations. Of one covariance and its
    multiple: Tr(C) (1 - sqrt(a))^2."""
    mean, deviation = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.5, 4.0]).double()
    one = Gaussian(mean, torch.diag(deviation**2))
    other = Gaussian(
        mean + torch.tensor([3.0, 0.0, -4.0]).double(), torch.diag(torch.tensor([4.0, 0.25, 1.0]).double())
    )
    assert frechet_distance(one, other) == pytest.approx(25 + 1 + 0 + 9, rel=1e-12)
    covariance = fitted(features(100, 5, 4)).covariance
    zero = torch.zeros(5).double()
    found = frechet_distance(Gaussian(zero, covariance), Gaussian(zero, 9 * covariance))
    assert found == pytest.approx(4 * float(covariance.trace()), rel=1e-10)


def test_any_cut_and_order_is_the_same() -> None:
    values = features(101, 9, 5)
    whole = fitted(values)
    parts = RunningGaussian(9)
    for part in (values[60:], values[:1], values[:0], values[1:60]):
        for few in np.array_split(part, 3):
            parts.add(torch.from_numpy(few))
    assert parts.count == 101
    torch.testing.assert_close(parts.gaussian().mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.gaussian().covariance, whole.covariance, rtol=1e-10, atol=1e-10)


def test_a_large_mean_costs_no_digits() -> None:
    values = features(40, 3, 6)
    far = fitted(values + 1e6)
    torch.testing.assert_close(far.covariance, fitted(values).covariance, rtol=1e-8, atol=1e-8)


def test_without_full_rank() -> None:
    """Fewer images than features. Against themselves exactly 0 but for rounding; against others scipy's value, on the
    few directions that there are."""
    one, other = features(8, 60, 7), features(12, 60, 8)
    scale = float(fitted(one).covariance.trace())
    assert frechet_distance(fitted(one), fitted(one)) <= 1e-12 * scale
    assert frechet_distance(fitted(one), fitted(one + 3)) == pytest.approx(9 * 60, rel=1e-9)
    # Nuclear norm of the product of two thin factors: the trace of the root without any root of a singular matrix.
    thin = [(each - each.mean(axis=0)) / (len(each) - 1) ** 0.5 for each in (one, other)]
    overlap = np.linalg.svd(thin[0] @ thin[1].T, compute_uv=False).sum()
    gap = one.mean(axis=0) - other.mean(axis=0)
    expected = gap @ gap + (thin[0] ** 2).sum() + (thin[1] ** 2).sum() - 2 * overlap
    assert frechet_distance(fitted(one), fitted(other)) == pytest.approx(expected, rel=1e-9)
    constant = fitted(np.ones((5, 60)))
    assert frechet_distance(constant, constant) == 0.0


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(InputError, match="at least 2 images for their covariance, found 1"):
        fitted(features(1, 3, 0))


def test_other_features_are_refused() -> None:
    with pytest.raises(InputError, match="found 3 and 4 of them; were they made by the same extractor"):
        frechet_distance(fitted(features(9, 3, 0)), fitted(features(9, 4, 0)))


def test_a_file_and_back() -> None:
    gaussian = fitted(features(20, 4, 9))
    data = gaussian.dump()
    assert gaussian.dump() == data
    again = Gaussian.load(data, "here")
    assert torch.equal(again.mean, gaussian.mean)
    assert torch.equal(again.covariance, gaussian.covariance)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"nothing", "expected a .npz with mu and sigma at here, but it cannot be read"),
        (b"", "cannot be read"),
        (pickle.dumps({"mu": 1}), "cannot be read"),
        (npz(mu=np.zeros(2))[:-9], "cannot be read"),
        (npz(mu=np.zeros(2), sigma=np.array([{}, 1], object)), "cannot be read.*allow_pickle"),
        (npz(mean=np.zeros(2)), r"expected the arrays mu \(F,\) and sigma \(F, F\) in here, found mean"),
        (npz(mu=np.zeros(2), sigma=np.zeros((2, 3))), r"found the shapes \(2,\) and \(2, 3\)"),
        (npz(mu=np.zeros(2), sigma=np.full((2, 2), np.nan)), "expected finite floating-point numbers in here"),
        (npz(mu=np.zeros(2), sigma=np.eye(2, dtype=int)), "expected finite floating-point numbers in here"),
        (npz(mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]])), "expected a symmetric sigma in here"),
        (npz(mu=np.zeros(2), sigma=np.diag([1.0, -1.0])), "without negative eigenvalues in here, found -1"),
    ],
)
def test_files_that_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Gaussian.load(data, "here")
