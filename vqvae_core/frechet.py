"""Frechet distance between two Gaussians, fitted to features of images: FID, section 3 of arXiv:1706.08500.

Statistics are files of `mu` (F,) and `sigma` (F, F), as .npz: the names that other programs for FID write.
"""

import io
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqvae_core.errors import InputError
from vqvae_core.shapes import Float

_SYMMETRIC = 1e-6  # a covariance may be as far from it, relative to its largest value: some files are in fp32
_NEGATIVE = 1e-6  # the same for its smallest eigenvalue


@dataclass(frozen=True)
class Gaussian:
    """mean: float64 (F,); covariance: float64 (F, F)."""

    mean: Tensor
    covariance: Tensor

    @property
    def num_features(self) -> int:
        return len(self.mean)

    def dump(self) -> bytes:
        """A .npz of `mu` and `sigma`. Same values, same bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mean.numpy(), sigma=self.covariance.numpy())
        return buffer.getvalue()

    @classmethod
    def load(cls, data: bytes, where: str) -> "Gaussian":
        """Raises `InputError` where the file holds no mean and covariance. Nothing is unpickled."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in ("mu", "sigma") if name in arrays}
                names = ", ".join(arrays) or "none"
        except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise InputError(f"expected a .npz with mu and sigma at {where}, but it cannot be read: {error}") from error
        if len(found) != 2:
            raise InputError(f"expected the arrays mu (F,) and sigma (F, F) in {where}, found {names}")
        mean, covariance = found["mu"], found["sigma"]
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise InputError(
                f"expected mu (F,) and sigma (F, F) in {where}, found the shapes {mean.shape} and {covariance.shape}"
            )
        if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in (mean, covariance)):
            raise InputError(f"expected finite floating-point numbers in {where}, found others; make that file again")
        gaussian = cls(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)))
        gaussian._check(where)
        return gaussian

    def _check(self, where: str) -> None:
        covariance = self.covariance
        scale = float(covariance.abs().max())
        if float((covariance - covariance.T).abs().max()) > _SYMMETRIC * scale:
            raise InputError(f"expected a symmetric sigma in {where}, found another matrix; is it a covariance?")
        least = float(torch.linalg.eigvalsh(covariance)[0])
        if least < -_NEGATIVE * scale:
            raise InputError(f"expected a covariance without negative eigenvalues in {where}, found {least:.3g}")


class RunningGaussian:
    """Mean and covariance of features that come in parts, in float64: parts in any cut and order make the same, up to
    rounding."""

    def __init__(self, num_features: int) -> None:
        self.count, self.num_features = 0, num_features
        self._mean = torch.zeros(num_features, dtype=torch.float64)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)  # sum of squares about the mean

    def add(self, features: Float[Tensor, "n f"]) -> None:
        """Features (N, F)."""
        if not len(features):
            return
        values = features.to("cpu", torch.float64)
        mean = values.mean(dim=0)
        # Chan, Golub and LeVeque 1979: sums of squares about two means, put together.
        total, gap = self.count + len(values), mean - self._mean
        scatter = (values - mean).T @ (values - mean) + torch.outer(gap, gap) * (self.count * len(values) / total)
        self._scatter = self._scatter + scatter
        self._mean = self._mean + gap * (len(values) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The mean and the covariance with N - 1 below, as numpy.cov and the paper's code. Raises `InputError` for less
        than two samples."""
        if self.count < 2:
            raise InputError(f"expected features of at least 2 images for their covariance, found {self.count}")
        return Gaussian(self._mean.clone(), self._scatter / (self.count - 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), squared as FID is: eq. 6 of arXiv:1706.08500. Not below 0.

    The root's trace is that of (C1^(1/2) C2 C1^(1/2))^(1/2), a symmetric matrix with the same eigenvalues, which are
    the squares of the singular values of C1^(1/2) C2^(1/2). Taken as singular values they keep all their digits where
    they are small, so that covariances without full rank need no offset on the diagonal.
    """
    if one.num_features != other.num_features:
        raise InputError(
            f"expected statistics of the same features, found {one.num_features} and {other.num_features} of them; "
            "were they made by the same extractor?"
        )
    overlap = torch.linalg.svdvals(_root(one.covariance) @ _root(other.covariance)).sum()
    spread = one.covariance.trace() + other.covariance.trace() - 2 * overlap
    return max(0.0, float((one.mean - other.mean).square().sum() + spread))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root. Eigenvalues within rounding of 0 are 0: the root of 1e-16 would be 1e-8."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > noise, values, 0).sqrt()
    return (vectors * roots) @ vectors.T
