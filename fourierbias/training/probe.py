"""Spectra through training: a capture of the network on fixed images every so many epochs, in one file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..capturing import capture
from ..errors import FourierBiasError
from ..models.loading import load_model
from ..store import append_series


class SpectrumProbe:
    """What `train` calls at the end of an epoch to capture the main network into ``path``, an HDF5 series.

    Every ``every`` epochs, before the first and after the last (of ``epochs``); the images are ``images``
    crops of the photographs unless ``data`` names others, the same at every epoch, of ``image_size`` pixels
    or the network's own size.  Capturing an epoch again replaces it, so that a resumed training leaves one
    capture per epoch.  Raises `FourierBiasError` for an interval below 1.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        epochs: int,
        *,
        data: str = "photos",
        images: int = 64,
        layers: str = "blocks",
        image_size: int | None = None,
    ) -> None:
        if every < 1:
            raise FourierBiasError(f"probe must be at least 1 epoch apart, got {every}")
        self.path, self.every, self.epochs = Path(path), every, epochs
        self.data, self.images, self.layers = data, images, layers
        self.image_size = image_size

    def __call__(self, epoch: int, networks: dict[str, nn.Module]) -> None:
        """Capture, if ``epoch`` (the number of epochs done) is one of those to look at."""
        if epoch % self.every and epoch != self.epochs:
            return
        network = load_model(networks[""], image_size=self.image_size)
        result = capture(network, self.data, layers=self.layers, limit=self.images)
        append_series(self.path, epoch, result)
