"""A share of a capture: the sums over some of its images, which are kept, gone on with, and put together.

A capture that was stopped, the ranks of one run, and the shards of a job array are all the same thing: a
`Part` of the whole.  Sums and counts add up, so parts in any number give what one process would have given.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from .accumulate import Moments
from .errors import FourierBiasError
from .measures import ATTENTION_MEASURES
from .probes import Layer
from .spectra import MapReducer, make_spectrum
from .store import Capture, CapturedLayer, Measure, as_text, opened

# What the parts of one capture need not have in common: a batch changes float32 sums in the last digit only.
_FREE = {"batch_size"}


class LayerSums:
    """The accumulators of every layer of one capture; merge with those of other images, then `results`."""

    def __init__(self, reducer: MapReducer) -> None:
        self.reducer = reducer
        self.layers: dict[str, Layer] = {}
        self.moments: dict[str, dict[str, Moments]] = {}

    def update(self, layer: Layer, values: Mapping[str, Tensor]) -> None:
        """Add one batch of per-image values, as `MapReducer` gives them, and any others (B, K)."""
        if layer.name not in self.layers:
            self.layers[layer.name] = layer
            self.moments[layer.name] = self.reducer.moments(layer.height, layer.width)
        moments = self.moments[layer.name]
        for name, rows in values.items():
            if name not in moments:
                moments[name] = Moments(rows.shape[1])
            moments[name].update(rows.cpu().numpy())

    def merge(self, other: LayerSums) -> None:
        """Add what ``other`` accumulated over other images of the same model and layers."""
        if not self.layers:
            self.layers, self.moments = dict(other.layers), {}
            for name, layer in other.layers.items():
                self.moments[name] = self.reducer.moments(layer.height, layer.width)
        if list(self.layers) != list(other.layers):
            raise FourierBiasError("cannot merge captures of different layers")
        for name, moments in other.moments.items():
            for quantity, sums in moments.items():
                self.moments[name].setdefault(quantity, Moments(sums.size)).merge(sums)

    @property
    def images(self) -> int:
        """How many images went through the model, with those whose maps were not finite."""
        return max((m["joint"].count + m["joint"].rejected for m in self.moments.values()), default=0)

    def results(self, about: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, CapturedLayer]:
        """Spectra and measures of each layer, in the order of execution, with its place and shape.

        ``about`` gives for a layer the attributes that belong beside each of its measures.
        """
        last = max(len(self.layers) - 1, 1)
        return {
            name: self._result(layer, {"depth": layer.index / last}, (about or {}).get(name, {}))
            for name, layer in self.layers.items()
        }

    def _result(self, layer: Layer, place: dict[str, Any], about: Mapping[str, Any]) -> CapturedLayer:
        described = asdict(layer)
        attrs = {**described.pop("attrs"), **described, **place}
        grid = (layer.height, layer.width)
        moments = self.reducer.quantities(self.moments[layer.name], *grid)
        spectra = {
            path: make_spectrum(moments, path, grid, eps=self.reducer.eps, attrs=attrs)
            for path in self.reducer.paths
        }
        measures = {"feature_variance": _measure(moments["feature_variance"])}
        if "high_frequency_share" in moments:
            measures["high_frequency_share"] = _measure(
                moments["high_frequency_share"], axis=self.reducer.cutoffs, axis_name="cutoff"
            )
        for name in ATTENTION_MEASURES:
            if name in moments:
                heads = range(moments[name].size) if name != "head_diversity" else None
                measures[name] = _measure(moments[name], heads, "head" if heads else "", about.get(name, {}))
        return CapturedLayer(attrs, spectra, measures)


def _measure(
    moments: Moments,
    axis: Sequence[float] | None = None,
    axis_name: str = "",
    attrs: dict[str, Any] | None = None,
) -> Measure:
    axis = None if axis is None else np.asarray(axis)
    return Measure(moments.mean, moments.standard_error, moments.count, axis, axis_name, attrs or {})


@dataclass
class Part:
    """The images ``start`` … ``stop`` − 1 of a source of ``total``, of which ``done`` have been worked on.

    ``identity`` says what all parts of one capture have in common, as plain values.  ``indices`` are the
    places of the images that went in, ``images`` their names, ``labels`` their labels (None where there are
    none), ``failures`` has (name, reason) of those that could not be read.  ``attrs`` is what a capture
    records beside its counts, ``about`` what belongs beside measures, by layer.  ``maps`` are the files, in
    order, that hold the feature maps, where they are stored.
    """

    identity: dict[str, Any]
    start: int
    stop: int
    total: int
    done: int = 0
    sums: LayerSums = field(init=False)
    indices: list[int] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    labels: list[Any] | None = None
    failures: list[tuple[str, str]] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    maps: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.identity = json.loads(json.dumps(self.identity, default=_plain_value))
        self.sums = LayerSums(reducer_of(self.identity))

    @property
    def place(self) -> str | None:
        """Which images these are, in words; None if they are all."""
        if (self.start, self.stop) == (0, self.total):
            return None
        return f"images {self.start} to {self.stop - 1} of {self.total}"

    def capture(self) -> Capture:
        """The capture of these images."""
        counts = {
            "count": self.sums.images,
            "failed_images": len(self.failures),
            "failures": [f"{name}: {reason}" for name, reason in self.failures[:100]],
        }
        if self.place:
            counts["part"] = self.place
        return Capture(
            {**self.attrs, **counts, "identity": self.identity},
            self.sums.results(self.about),
            images=self.images,
            labels=self.labels,
        )

    def write(self, handle: h5py.Group) -> None:
        """Put into an HDF5 group what `read` needs, all but the names of the images."""
        about = {name: getattr(self, name) for name in _PLAIN}
        about["maps"] = [path.name for path in self.maps]
        about["layers"] = [asdict(layer) for layer in self.sums.layers.values()]
        handle.create_dataset(
            "about", data=json.dumps(about, default=_plain_value), dtype=h5py.string_dtype()
        )
        handle.create_dataset("indices", data=np.asarray(self.indices, dtype=np.int64), compression="gzip")
        for number, moments in enumerate(self.sums.moments.values()):
            for quantity, sums in moments.items():
                group = handle.create_group(f"sums/{number}/{quantity}")
                for key, value in sums.state().items():
                    group.create_dataset(key, data=value)

    @classmethod
    def read(cls, handle: h5py.Group, folder: Path) -> Part:
        """The part that was written; its files of maps are in ``folder``."""
        about = json.loads(as_text(handle["about"][()]))
        part = cls(*(about[name] for name in ("identity", "start", "stop", "total")))
        for name in _PLAIN[4:]:
            setattr(part, name, about[name])
        part.failures = [(name, reason) for name, reason in part.failures]
        part.indices = handle["indices"][()].tolist()
        part.maps = [folder / Path(name).name for name in about["maps"]]
        for number, described in enumerate(about["layers"]):
            layer = Layer(**described)
            part.sums.layers[layer.name] = layer
            part.sums.moments[layer.name] = {
                quantity: Moments.from_state({key: value[()] for key, value in group.items()})
                for quantity, group in handle[f"sums/{number}"].items()
            }
        return part


_PLAIN = ("identity", "start", "stop", "total", "done", "labels", "failures", "attrs", "about")


def reducer_of(identity: Mapping[str, Any]) -> MapReducer:
    """The reducer with the settings that a capture's identity names."""
    return MapReducer(
        identity["paths"],
        eps=identity["eps"],
        dead_channels=identity["dead_channels"],
        high_frequency_share="high_frequency_share" in identity["measures"],
    )


def order_key(names: Sequence[str]) -> str:
    """A checksum of the names of images in their order."""
    return f"{zlib.crc32(chr(10).join(names).encode()):08x}"


def compare(identity: Mapping[str, Any], other: Mapping[str, Any], *, free: set[str] = _FREE) -> str | None:
    """In words, the first thing in which two identities differ, ``free`` ones aside; None if they agree.

    >>> compare({"model": "cnn", "batch_size": 8}, {"model": "vit", "batch_size": 4})
    "model ('cnn', not 'vit')"
    """
    for key in [*other, *(key for key in identity if key not in other)]:
        if key not in free and identity.get(key) != other.get(key):
            return f"{key} ({identity.get(key)!r}, not {other.get(key)!r})"
    return None


def read_part(path: str | Path) -> Part:
    """The part in a file made by ``capture --shard``; `FourierBiasError` for any other."""
    path = Path(path)
    with opened(path) as handle:
        if "part" not in handle or not handle.attrs.get("complete", False):
            raise FourierBiasError(f"{path} is no part of a capture: make parts with capture --shard 1/4, …")
        part = Part.read(handle["part"], path.parent)
        part.images = [as_text(name) for name in handle["images/name"][()]]
        if part.identity["features"] and part.sums.layers:
            part.maps = [path]
    return part


def merge_parts(parts: Sequence[Part], names: Sequence[str] | None = None) -> Part:
    """The parts as one; ``names`` are what to call them in errors.

    Raises `FourierBiasError` if two of them hold the same images, if some are missing between the first and
    the last, or if they differ in anything that a capture depends on.
    """
    called = dict(zip(map(id, parts), names or [f"part {k + 1}" for k in range(len(parts))], strict=True))
    # With more parts than images some are empty, and have no place among the others.
    parts = sorted((p for p in parts if p.start < p.stop), key=lambda part: part.start) or parts[:1]
    if len(parts) == 1:
        return parts[0]
    _check_parts(parts, [called[id(part)] for part in parts])
    first = parts[0]
    whole = Part(first.identity, first.start, parts[-1].stop, first.total)
    for part in parts:
        if part.sums.layers:
            whole.sums.merge(part.sums)
            whole.attrs, whole.about = whole.attrs or part.attrs, whole.about or part.about
        whole.done += part.done
        for name in ("indices", "images", "failures", "maps"):
            getattr(whole, name).extend(getattr(part, name))
    if any(part.labels for part in parts):
        whole.labels = [label for part in parts for label in part.labels or [None] * len(part.indices)]
    return whole


def _check_parts(parts: Sequence[Part], names: Sequence[str]) -> None:
    """`FourierBiasError` unless parts, in the order of images, are of one capture and leave no gap."""
    for part, name in zip(parts[1:], names[1:], strict=True):
        difference = compare(part.identity, parts[0].identity)
        if difference:
            raise FourierBiasError(
                f"{name} and {names[0]} are not of one capture: they differ in {difference}"
            )
    for (part, name), (following, other) in pairwise(zip(parts, names, strict=True)):
        if following.start < part.stop:
            raise FourierBiasError(
                f"{name} and {other} both hold image {following.start}: leave one of them out"
            )
        if following.start > part.stop:
            raise FourierBiasError(missing(part.stop, following.start))


def _plain_value(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def missing(start: int, stop: int) -> str:
    """What to say of images that no part holds."""
    return f"images {start} to {stop - 1} are in none of the parts: capture the shard that holds them"
