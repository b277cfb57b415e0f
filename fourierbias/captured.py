"""What a user names, as captures: an HDF5 file is read, a checkpoint is captured on the fly and cached."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py

from ._version import __version__
from .errors import FourierBiasError
from .store import Capture, load

_PACKAGE = Path(__file__).parent


def shipped_checkpoints() -> list[Path]:
    """The checkpoints that come with the project, in the wheel or in the repository."""
    for folder in (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints"):
        found = sorted(path for path in folder.glob("*.ckpt") if not path.name.endswith(".best.ckpt"))
        if found:
            return found
    raise FourierBiasError(
        "no checkpoints ship with this installation: name captures or checkpoints to compare"
    )


def open_captures(
    files: Sequence[str],
    *,
    layers: str | Sequence[str] = "blocks",
    data: str = "photos",
    images: int | None = None,
    measure: str | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> list[Capture]:
    """The captures that ``files`` stand for: HDF5 files as they are, anything else captured on the fly.

    A capture made here is kept in the user's cache folder (``XDG_CACHE_HOME``), under the hash of the
    checkpoint and of everything it was captured with, of image files their path, size and time of change;
    ``say`` is told which were made and which were there.
    """
    return [
        load(file)
        if is_hdf5(file)
        else _captured(file, layers=layers, data=data, images=images, measure=measure, say=say)
        for file in files
    ]


def is_hdf5(file: str) -> bool:
    """Whether a file is to be read as HDF5: by its suffix, so that one that is missing or damaged is too."""
    return Path(file).suffix in (".h5", ".hdf5", ".nxs") or h5py.is_hdf5(file)


def _captured(
    file: str,
    *,
    layers: str | Sequence[str],
    data: str,
    images: int | None,
    measure: str | None,
    say: Callable[[str], Any],
) -> Capture:
    from .capturing import MEASURES, capture
    from .images import open_images
    from .models.loading import load_model

    loaded = load_model(file)
    source = open_images(data, loaded.preprocessing, images=images)
    measures = [measure] if measure in MEASURES else []
    model = (loaded.arch, loaded.weights_sha256, loaded.weights)
    seen = (source.description, source.names, source.fingerprint, list(map(_state, source.files)))
    key = repr((__version__, model, layers, seen, measures))
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    cached = cache_folder() / f"{re.sub(r'[^0-9A-Za-z._-]', '_', loaded.arch)}-{digest}.h5"
    if cached.is_file():
        say(f"{file}: captured before, read from {cached}")
        return load(cached)
    say(f"{file}: capturing {images or 'the'} images of {data} on the fly")
    cached.parent.mkdir(parents=True, exist_ok=True)
    return capture(
        loaded,
        source,
        layers=layers,
        measures=measures,
        output=cached,
        resume=True,
        progress=True,
    )


def _state(file: str) -> tuple[str, int, int] | None:
    """What changes when a file does."""
    try:
        status = os.stat(file)
    except OSError:  # unreadable, which the capture counts
        return None
    return os.path.realpath(file), status.st_size, status.st_mtime_ns


def cache_folder() -> Path:
    """Where captures made on the fly are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fourierbias"
