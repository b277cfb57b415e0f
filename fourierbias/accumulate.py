"""Streaming moments over images: float64 sums and counts that merge, so work can be split and resumed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .errors import FourierBiasError


class Moments:
    """Mean and covariance over images of a vector of ``size`` numbers per image, from sums alone.

    Only sums are kept (count, Σv, Σvvᵀ), so two accumulators merge exactly, whatever their sizes, and
    memory does not grow with the number of images.  A row with a NaN or an infinity is left out of the
    sums and counted in ``rejected``.

    ``covariance=False`` keeps Σv² instead of Σvvᵀ, for vectors too long for a square matrix.

    >>> import numpy as np
    >>> moments = Moments(2)
    >>> moments.update(np.array([[1.0, 2.0], [3.0, 2.0], [np.nan, 0.0]]))
    >>> moments.mean.tolist(), moments.count, moments.rejected
    ([2.0, 2.0], 2, 1)
    >>> moments.standard_error.tolist()
    [1.0, 0.0]
    """

    def __init__(self, size: int, *, covariance: bool = True) -> None:
        self.count = 0
        self.rejected = 0
        self.total = np.zeros(size)
        self.products = np.zeros((size, size) if covariance else size)

    @property
    def size(self) -> int:
        """Length of the vector accumulated per image."""
        return len(self.total)

    def update(self, values: np.ndarray) -> None:
        """Add the rows of ``values``, shape (B, size)."""
        values = np.asarray(values, dtype=np.float64).reshape(-1, self.size)
        products = self._products(values)
        if not np.isfinite(products).all():
            finite = np.isfinite(values).all(axis=1)
            self.rejected += int((~finite).sum())
            values = values[finite]
            products = self._products(values)
        self.count += len(values)
        self.total += values.sum(axis=0)
        self.products += products

    def _products(self, values: np.ndarray) -> np.ndarray:
        return values.T @ values if self.products.ndim == 2 else (values**2).sum(axis=0)

    def merge(self, other: Moments) -> None:
        """Add what ``other`` has seen; `FourierBiasError` when it holds vectors of another size."""
        if self.products.shape != other.products.shape:
            raise FourierBiasError(
                f"cannot merge accumulators of {self.size} and {other.size} values: made from different grids"
            )
        self.count += other.count
        self.rejected += other.rejected
        self.total += other.total
        self.products += other.products

    def columns(self, kept: slice) -> Moments:
        """The accumulator of some of the numbers alone, of the same images."""
        part = Moments(len(self.total[kept]), covariance=self.products.ndim == 2)
        part.count, part.rejected = self.count, self.rejected
        part.total[...] = self.total[kept]
        part.products[...] = self.products[kept, kept] if self.products.ndim == 2 else self.products[kept]
        return part

    @property
    def mean(self) -> np.ndarray:
        """Mean over images, shape (size,); NaN before the first image."""
        return self.total / self.count if self.count else np.full(self.size, np.nan)

    @property
    def covariance(self) -> np.ndarray | None:
        """Sample covariance over images, shape (size, size); None when only squares are kept."""
        if self.products.ndim == 1:
            return None
        if self.count < 2:
            return np.full(self.products.shape, np.nan)
        return (self.products - np.outer(self.total, self.mean)) / (self.count - 1)

    @property
    def variance(self) -> np.ndarray:
        """Sample variance over images (unbiased), shape (size,); NaN below two images."""
        if self.count < 2:
            return np.full(self.size, np.nan)
        squares = self.products if self.products.ndim == 1 else np.diagonal(self.products)
        return np.maximum(squares - self.total * self.mean, 0.0) / (self.count - 1)

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of the mean over images, shape (size,); NaN below two images."""
        return np.sqrt(self.variance / self.count) if self.count else np.full(self.size, np.nan)

    def state(self) -> dict[str, np.ndarray]:
        """The sums as arrays, from which `from_state` makes an equal accumulator."""
        return {
            "count": np.asarray(self.count),
            "rejected": np.asarray(self.rejected),
            "total": self.total,
            "products": self.products,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Moments:
        """The accumulator whose `state` this is."""
        moments = cls(len(state["total"]), covariance=np.ndim(state["products"]) == 2)
        moments.count, moments.rejected = int(state["count"]), int(state["rejected"])
        moments.total[...] = state["total"]
        moments.products[...] = state["products"]
        return moments
