"""What a user names, as captures: an HDF5 file is read, a checkpoint is captured on the fly and cached."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    checkpoint and of everything it was captured with; ``say`` is told which were made and which were there.
    """
    return [
        load(file)
        if _is_hdf5(file)
        else _captured(file, layers=layers, data=data, images=images, measure=measure, say=say)
        for file in files
    ]


def _is_hdf5(file: str) -> bool:
    return Path(file).suffix in (".h5", ".hdf5", ".nxs")


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
    from .models.loading import load_model

    loaded = load_model(file)
    measures = [measure] if measure in MEASURES else []
    key = repr(
        (__version__, loaded.arch, loaded.weights_sha256, loaded.weights, layers, data, images, measures)
    )
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    cached = cache_folder() / f"{re.sub(r'[^0-9A-Za-z._-]', '_', loaded.arch)}-{digest}.h5"
    if cached.is_file():
        say(f"{file}: captured before, read from {cached}")
        return load(cached)
    say(f"{file}: capturing {images or 'the'} images of {data} on the fly")
    cached.parent.mkdir(parents=True, exist_ok=True)
    return capture(
        loaded,
        data,
        layers=layers,
        limit=images,
        measures=measures,
        output=cached,
        resume=True,
        progress=True,
    )


def in_words(captures: Sequence[Capture], names: Sequence[str], at: float = 1.0) -> str:
    """Two sentences on the high-frequency response of captures: where it ends, and how it got there.

    ``at`` is the frequency in units of π; numbers are Δ log amplitude, ± one standard error over images.

    >>> import torch, timm, fourierbias
    >>> c = fourierbias.capture(timm.create_model("test_vit"), torch.ones(2, 3, 160, 160))
    >>> print(in_words([c], ["test_vit"]))  # doctest: +ELLIPSIS
    Δ log amplitude at 1π in the last layer: test_vit ... ± 0.00. From the first layer to the last: ...
    """
    ends, courses = [], []
    for name, capture in zip(names, captures, strict=True):
        first, last = (list(capture.values())[index] for index in (0, -1))
        start, end = first.at(at), last.at(at)
        ends.append(f"{name} {end:.2f} ± {last.standard_error_at(at):.2f}")
        courses.append(
            f"{name} {'rises' if end > start else 'falls'} from {start:.2f} by {abs(end - start):.2f}"
        )
    return (
        f"Δ log amplitude at {at:g}π in the last layer: {', '.join(ends)}. "
        f"From the first layer to the last: {', '.join(courses)}."
    )


def cache_folder() -> Path:
    """Where captures made on the fly are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fourierbias"
