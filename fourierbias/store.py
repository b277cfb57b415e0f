"""What a capture holds, in memory and in its HDF5 file: one type, written and read here.

The file carries NeXus attributes and dimension scales, so that h5web, silx and xarray show a curve on
opening it.  It is written beside its final name and renamed when complete: a file under its final name is
always whole.  Behind the end of the HDF5 data stands a line with their hash, so that damage is told before
anything is read; other programs ignore it, and one that changes the file cuts it off.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ._version import __version__
from .errors import FourierBiasError
from .files import write_atomic
from .spectra import LINES, PATHS, Spectrum

FORMAT = "fourierbias"
SERIES_FORMAT = "fourierbias-series"
FORMAT_VERSION = 1
COMPRESSIONS = ("gzip", "lzf", "none")

_SEAL = "\nfourierbias sha256 {}\n"
_SEAL_BYTES = len(_SEAL.format("0" * 64))
# A larger file, which is one of stored maps, is not sealed: hashing it would be felt at each reading.
_SEALED_BYTES = 2**28
_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Measure:
    """A quantity of one layer, averaged over images: ``mean`` and ``standard_error`` (K,), ``count`` images.

    ``axis`` (K,) is what the K values run over (cut-offs, heads), named ``axis_name``; K = 1 without one.
    """

    mean: np.ndarray
    standard_error: np.ndarray
    count: int
    axis: np.ndarray | None = None
    axis_name: str = ""
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass
class CapturedLayer:
    """Everything known of one layer: ``attrs`` (index, depth, kind, …), spectra by path, measures by name."""

    attrs: dict[str, Any]
    spectra: dict[str, Spectrum]
    measures: dict[str, Measure] = field(default_factory=dict)


class Capture(Mapping[str, Spectrum]):
    """Spectra of the layers of one model on one set of images: layer name → `Spectrum`, in order of depth.

    ``attrs`` says what was captured (model, weights, images, preprocessing, …), ``layers`` holds the
    `CapturedLayer` of each name, ``images`` the names of the images that went in.  ``path`` is the line of
    frequencies that the mapping shows; `along` changes it.

    >>> import torch, timm, fourierbias
    >>> c = fourierbias.capture(timm.create_model("test_resnet"), torch.rand(2, 3, 64, 64))
    >>> name, spectrum = next(iter(c.items()))
    >>> name, spectrum.attrs["depth"], spectrum.frequency[-1].item()
    ('layer1.0', 0.0, 1.0)
    """

    def __init__(
        self,
        attrs: Mapping[str, Any],
        layers: Mapping[str, CapturedLayer],
        *,
        images: Sequence[str] = (),
        labels: Sequence[Any] | None = None,
        path: str | None = None,
        file: Path | None = None,
    ) -> None:
        self.attrs = dict(attrs)
        self.layers = dict(layers)
        self.images = list(images)
        self.labels = None if labels is None else list(labels)
        first = next(iter(self.layers.values()), None)
        self.path = path or (next(iter(first.spectra)) if first and first.spectra else "diagonal")
        self.file = file

    def __getitem__(self, name: str) -> Spectrum:
        spectra = self.layers[name].spectra
        if self.path not in spectra:
            raise FourierBiasError(
                f"this capture has no {self.path} spectra (it has {', '.join(spectra)}): capture again with "
                f"--path {self.path}"
            )
        return spectra[self.path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"Capture({self.attrs.get('model')!r}, {len(self)} layers, {self.attrs.get('count')} images)"

    def along(self, path: str) -> Capture:
        """The same capture, its mapping showing the spectra of another path that was captured."""
        if path not in PATHS:
            raise FourierBiasError(f"path={path!r} is not known: choose from {', '.join(PATHS)}")
        view = self._with(self.layers, path)
        if view.layers:
            view[next(iter(view))]  # says what to do when the path was not captured
        return view

    def with_reference(self, reference: str) -> Capture:
        """The same capture, every spectrum relative to ``"dc"`` or ``"first"``."""
        return self._map(lambda spectrum: spectrum.with_reference(reference))

    def park_kim(self) -> Capture:
        """The same capture with the published notebook's values and axis; see `Spectrum.park_kim`."""
        return self._map(lambda spectrum: spectrum.park_kim())

    def measure(self, name: str) -> dict[str, Measure]:
        """The measure ``name`` of every layer that has it; `FourierBiasError` when none has."""
        found = {
            layer: record.measures[name] for layer, record in self.layers.items() if name in record.measures
        }
        if not found:
            known = sorted({m for record in self.layers.values() for m in record.measures})
            raise FourierBiasError(
                f"this capture has no measure {name!r} (it has {', '.join(known) or 'none'}): capture again "
                f"with --measure {name}"
            )
        return found

    def feature_maps(self, name: str) -> np.ndarray:
        """The stored maps of one layer (N, C, H, W), read from the file; needs a capture with features."""
        if name not in self.layers:
            raise FourierBiasError(
                f"no layer {name!r} in this capture: it has {', '.join(list(self)[:3])}, …"
            )
        if self.file is not None:
            with h5py.File(self.file, "r") as handle:
                dataset = handle["layers"][name].get("feature_maps")
                if dataset is not None:
                    _check_references(dataset, self.file)
                    return dataset[()]
        raise FourierBiasError(f"the maps of {name} were not stored: capture with --features and an output")

    def _with(self, layers: Mapping[str, CapturedLayer], path: str) -> Capture:
        return Capture(self.attrs, layers, images=self.images, labels=self.labels, path=path, file=self.file)

    def _map(self, change: Any) -> Capture:
        layers = {
            name: replace(record, spectra={self.path: change(self[name])})
            for name, record in self.layers.items()
        }
        return self._with(layers, self.path)


def _check_references(dataset: h5py.Dataset, file: Path) -> None:
    """`FourierBiasError` if maps are in other files that are gone: HDF5 would read zeros."""
    for source in dataset.virtual_sources() if dataset.is_virtual else ():
        path = file.resolve().parent / source.file_name.replace("%%", "%")
        if not path.is_file():
            raise FourierBiasError(f"{path} is gone, in which {file} has feature maps: put it back there")


def append_series(path: str | os.PathLike[str], epoch: int, capture: Capture) -> None:
    """Add the capture of one epoch to a file of captures through training, or replace it there.

    The file holds one capture per group ``epochs/EPOCH``.  It is copied, added to and renamed, so that under
    its name it is always whole.  Raises `FourierBiasError` when it cannot be written or is something else.
    """
    series = dict(load_series(path)) if Path(path).exists() else {}
    series[int(epoch)] = capture

    def fill(handle: h5py.File) -> None:
        handle.attrs.update({"format": SERIES_FORMAT, "format_version": FORMAT_VERSION})
        for number in sorted(series):
            group = handle.create_group(f"epochs/{number:06d}", track_order=True)
            write_capture(group, series[number])
            group.attrs["complete"] = True

    write_atomic(path, sealed_image(fill))


def load_series(path: str | os.PathLike[str]) -> list[tuple[int, Capture]]:
    """Read a file of captures through training: (epoch, capture) in order; errors as of `load`."""
    with opened(path) as handle:
        if handle.attrs.get("format") != SERIES_FORMAT:
            raise FourierBiasError(f"{path} holds no captures through training: make one with train --probe")
        return [(int(name), _read(group, None, path)) for name, group in sorted(handle["epochs"].items())]


def is_series(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds captures through training; errors as of `load`."""
    with opened(path) as handle:
        return handle.attrs.get("format") == SERIES_FORMAT


def checked_output(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """``path`` if a file can be put there; otherwise `FourierBiasError` with the mend."""
    path = Path(path)
    if path.is_dir():
        raise FourierBiasError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise FourierBiasError(f"{path} exists: choose another name or add --overwrite")
    folder = path.parent
    if not folder.is_dir():
        raise FourierBiasError(f"the folder {folder} does not exist: create it first")
    if not os.access(folder, os.W_OK):
        raise FourierBiasError(f"the folder {folder} cannot be written: choose another output")
    return path


def load(path: str | os.PathLike[str]) -> Capture:
    """Read a capture from its HDF5 file; the same thing that `fourierbias.capture` returned.

    Raises `FourierBiasError` when the file is missing, not HDF5, not ours, or unfinished.
    """
    with opened(path) as handle:
        return _read(handle, Path(path), path)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """The file open for reading; whatever is wrong with it becomes one line."""
    if not Path(path).is_file():
        raise FourierBiasError(f"no file {path}: make one with 'fourierbias capture MODEL -o {path}'")
    try:
        stat = os.stat(path)
        if not _is_intact(os.fspath(path), stat.st_size, stat.st_mtime_ns):
            raise FourierBiasError(f"{path} is damaged: copy it again from where it came, or capture again")
        with h5py.File(path, "r") as handle:
            yield handle
    except FourierBiasError:
        raise
    except _UNREADABLE as error:
        raise FourierBiasError(f"{path} is not a readable fourierbias file: {reason_of(error)}") from None


# What h5py and the reading below raise for contents that are not as they were written.
_UNREADABLE = (
    OSError,
    LookupError,
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)


def sealed_image(fill: Callable[[h5py.File], None]) -> bytes:
    """The bytes of an HDF5 file with what ``fill`` puts into it, and their hash.

    It is made in memory: HDF5 may bring the whole process down when a disk fills up under it.
    """
    with h5py.File("image", "w", driver="core", backing_store=False, track_order=True) as handle:
        fill(handle)
        handle.flush()
        image = handle.id.get_file_image()
    return image + _SEAL.format(hashlib.sha256(image).hexdigest()).encode()


def seal(path: Path) -> None:
    """Append the hash of a file to it, unless it is large."""
    if path.stat().st_size > _SEALED_BYTES:
        return
    with open(path, "r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(_SEAL.format(digest).encode())


@functools.lru_cache(maxsize=64)
def _is_intact(path: str, size: int, modified: int) -> bool:
    """Whether a file is as it was sealed; True also of one without a seal.  ``modified`` keeps it current.

    HDF5 has no checksums of its own here, and may read on for ever in a file with a few wrong bytes.
    """
    if not _SEAL_BYTES < size <= _SEALED_BYTES + _SEAL_BYTES:
        return True
    with open(path, "rb") as file:
        file.seek(-_SEAL_BYTES, os.SEEK_END)
        seal = re.fullmatch(_SEAL.format("([0-9a-f]{64})").encode(), file.read())
        if seal is None:
            return True
        digest = hashlib.sha256()
        file.seek(0)
        for left in range(size - _SEAL_BYTES, 0, -_PIECE_BYTES):
            digest.update(file.read(min(left, _PIECE_BYTES)))
    return digest.hexdigest() == seal[1].decode()


def write_capture(handle: h5py.Group, capture: Capture) -> None:
    """Put all of a capture but its maps into a file or a group."""
    attrs = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fourierbias_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "NX_class": "NXroot",
        "default": "layers",
        **capture.attrs,
    }
    for key, value in attrs.items():
        handle.attrs[key] = _plain(value)
    images = handle.create_group("images")
    images.create_dataset("name", data=[str(name) for name in capture.images], dtype=h5py.string_dtype())
    if capture.labels is not None:
        images.create_dataset("label", data=[str(v) for v in capture.labels], dtype=h5py.string_dtype())
    layers = handle.require_group("layers")
    layers.attrs["NX_class"] = "NXentry"
    for name, record in capture.layers.items():
        _write_layer(layers.require_group(name), record)
    if capture.layers:
        layers.attrs["default"] = list(capture.layers)[-1]


def _write_layer(group: h5py.Group, record: CapturedLayer) -> None:
    for key, value in record.attrs.items():
        group.attrs[key] = _plain(value)
    for path, spectrum in record.spectra.items():
        if path == "2d":
            _write_2d(group, spectrum)
        else:
            _write_curve(group if path == "diagonal" else group.require_group(path), spectrum)
    for name, measure in record.measures.items():
        _write_measure(group, name, measure)


def _write_curve(group: h5py.Group, spectrum: Spectrum) -> None:
    frequency = group.create_dataset("frequency", data=spectrum.frequency)
    frequency.attrs["units"] = "pi rad/sample"
    frequency.make_scale("frequency")
    curves = {"log_amplitude": spectrum.log_amplitude, "standard_error": spectrum.standard_error}
    for name, values in curves.items():
        dataset = group.create_dataset(name, data=values)
        dataset.attrs["units"] = "nepers"
        dataset.dims[0].attach_scale(frequency)
    group.create_dataset("covariance", data=spectrum.covariance)
    group["log_amplitude_errors"] = h5py.SoftLink("standard_error")  # where NeXus readers look for error bars
    group.attrs.update(_counts(spectrum))
    group.attrs.update({"NX_class": "NXdata", "signal": "log_amplitude", "axes": ["frequency"]})


_PLACE = {
    "index": int,
    "depth": float,
    "channels": int,
    "height": int,
    "width": int,
    "stride": float,
    "kind": str,
}
_COUNTS = {"count": int, "rejected": int, "dead_share": float, "eps": float}


def _counts(spectrum: Spectrum) -> dict[str, Any]:
    return {name: getattr(spectrum, name) for name in _COUNTS}


def _read_counts(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kind(attrs[name]) for name, kind in _COUNTS.items()}


def _write_2d(group: h5py.Group, spectrum: Spectrum) -> None:
    for axis, name in enumerate(("frequency_y", "frequency_x")):
        values = spectrum.frequency[:, 0, 0] if axis == 0 else spectrum.frequency[0, :, 1]
        group.create_dataset(name, data=values).make_scale(name)
    for name, values in (
        ("log_amplitude_2d", spectrum.log_amplitude),
        ("standard_error_2d", spectrum.standard_error),
    ):
        dataset = group.create_dataset(name, data=values)
        dataset.dims[0].attach_scale(group["frequency_y"])
        dataset.dims[1].attach_scale(group["frequency_x"])
        dataset.attrs.update(_counts(spectrum))


def _write_measure(group: h5py.Group, name: str, measure: Measure) -> None:
    values = {"": measure.mean, "_standard_error": measure.standard_error}
    for suffix, array in values.items():
        scalar = measure.axis is None and len(array) == 1
        group.create_dataset(name + suffix, data=float(array[0]) if scalar else array)
    dataset = group[name]
    dataset.attrs["count"] = measure.count
    dataset.attrs["measure"] = True
    for key, value in measure.attrs.items():
        dataset.attrs[key] = _plain(value)
    if measure.axis is not None:
        axis = f"{name}_{measure.axis_name}"
        group.create_dataset(axis, data=measure.axis).make_scale(measure.axis_name)
        dataset.dims[0].attach_scale(group[axis])
        dataset.attrs["axis"] = measure.axis_name


def _read(handle: h5py.Group, file: Path | None, path: str | os.PathLike[str]) -> Capture:
    attrs = {key: _from_plain(value) for key, value in handle.attrs.items()}
    if attrs.get("format") == SERIES_FORMAT:
        raise FourierBiasError(
            f"{path} holds captures through training: read it with load_series, or plot it"
        )
    if attrs.get("format") != FORMAT:
        raise FourierBiasError(
            f"{path} is an HDF5 file but not one of fourierbias: give the output of a capture"
        )
    if int(attrs["format_version"]) > FORMAT_VERSION:
        raise FourierBiasError(
            f"{path} is of format {attrs['format_version']}, newer than this program ({FORMAT_VERSION}): "
            "update fourierbias"
        )
    if not attrs.get("complete"):
        raise FourierBiasError(f"{path} is unfinished: capture again, or go on with --resume")
    layers = {name: _read_layer(group) for name, group in layer_groups(handle["layers"])}
    layers = dict(sorted(layers.items(), key=lambda item: item[1].attrs["index"]))
    images = [as_text(name) for name in handle["images/name"][()]]
    labels = None
    if "images/label" in handle:
        labels = [as_text(label) for label in handle["images/label"][()]]
    for key in ("format", "format_version", "NX_class", "default", "complete"):
        attrs.pop(key, None)
    return Capture(attrs, layers, images=images, labels=labels, file=file)


def layer_groups(layers: h5py.Group) -> Iterator[tuple[str, h5py.Group]]:
    """The groups of layers, by name."""
    for name, group in layers.items():
        if isinstance(group, h5py.Group):
            yield name, group


def _read_layer(group: h5py.Group) -> CapturedLayer:
    skip = {"NX_class", "signal", "axes", *_COUNTS}
    attrs = {key: _from_plain(value) for key, value in group.attrs.items() if key not in skip}
    for key, kind in _PLACE.items():
        if key in attrs or key in ("index", "depth"):
            attrs[key] = kind(attrs[key])
    spectra = {}
    for path in (*LINES, "radial"):
        node = group if path == "diagonal" else group.get(path)
        if node is not None and "log_amplitude" in node:
            spectra[path] = _read_curve(node, path, attrs)
    if "log_amplitude_2d" in group:
        spectra["2d"] = _read_2d(group, attrs)
    measures = {
        name: _read_measure(group, name)
        for name, dataset in group.items()
        if isinstance(dataset, h5py.Dataset) and "measure" in dataset.attrs
    }
    return CapturedLayer(attrs, spectra, measures)


def _read_curve(group: h5py.Group, path: str, attrs: dict[str, Any]) -> Spectrum:
    frequency = _numbers(group, "frequency", ndim=1)
    covariance = _numbers(group, "covariance", (len(frequency), len(frequency)))
    return Spectrum(
        frequency=frequency,
        log_amplitude=_numbers(group, "log_amplitude", frequency.shape),
        variance=np.maximum(np.diagonal(covariance), 0.0),
        covariance=covariance,
        path=path,
        attrs=attrs,
        **_read_counts(group.attrs),
    )


def _read_2d(group: h5py.Group, attrs: dict[str, Any]) -> Spectrum:
    counts = _read_counts(group["log_amplitude_2d"].attrs)
    fy, fx = (_numbers(group, name, ndim=1) for name in ("frequency_y", "frequency_x"))
    grid = (len(fy), len(fx))
    return Spectrum(
        frequency=np.stack(np.meshgrid(fy, fx, indexing="ij"), axis=-1),
        log_amplitude=_numbers(group, "log_amplitude_2d", grid),
        variance=_numbers(group, "standard_error_2d", grid) ** 2 * counts["count"],
        covariance=None,
        path="2d",
        attrs=attrs,
        **counts,
    )


def _numbers(
    group: h5py.Group, name: str, shape: tuple[int, ...] | None = None, *, ndim: int | None = None
) -> np.ndarray:
    """A dataset as it must be: numbers, of the given shape or at least one along each of ``ndim`` axes."""
    dataset = group[name]
    fits = dataset.shape == shape if ndim is None else dataset.ndim == ndim and dataset.size > 0
    if dataset.dtype.kind not in "fiu" or not fits:
        raise ValueError(f"{dataset.name} is {dataset.dtype} of shape {dataset.shape}")
    return dataset[()]


def _read_measure(group: h5py.Group, name: str) -> Measure:
    dataset = group[name]
    shape = () if dataset.shape == () else (max(dataset.size, 1),)
    attrs = {key: _from_plain(value) for key, value in dataset.attrs.items()}
    axis_name = attrs.pop("axis", "")
    for key in ("measure", "DIMENSION_LIST"):
        attrs.pop(key, None)
    return Measure(
        mean=np.atleast_1d(_numbers(group, name, shape)),
        standard_error=np.atleast_1d(_numbers(group, f"{name}_standard_error", shape)),
        count=int(attrs.pop("count")),
        axis=_numbers(group, f"{name}_{axis_name}", shape) if axis_name else None,
        axis_name=axis_name,
        attrs=attrs,
    )


def _plain(value: Any) -> Any:
    """A value as an HDF5 attribute: numbers and strings as they are, anything nested as JSON."""
    if isinstance(value, bool | int | float | np.generic):
        return value
    if isinstance(value, str):
        return str(value)  # not a subclass such as torch's version, which h5py cannot place
    return json.dumps(value, default=str)


def as_text(value: bytes) -> str:
    """A string as HDF5 keeps it."""
    return value.decode()


def _from_plain(value: Any) -> Any:
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str) and value[:1] in "[{" and value:
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    if isinstance(value, str) and value == "null":
        return None
    return value.item() if isinstance(value, np.generic) else value


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
