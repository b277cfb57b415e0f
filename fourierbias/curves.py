"""The numbers of a figure: a curve per layer, a trend by depth per capture, and both as rows of a CSV.

`figures` draws exactly what is made here and `rows` holds exactly that, so a figure and its table cannot
differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .errors import FourierBiasError
from .store import Capture, CapturedLayer, Measure

AXES = ("normalized", "input")
SHADES = ("attention", "split", "subsampling")
MARGIN = 0.03  # of the depth axis, beyond its first and last layer
COLUMNS = (
    "panel", "model", "epoch", "layer", "index", "depth", "kind", "height", "width", "stride", "quantity",
    "parameter", "frequency", "x", "y", "standard_error", "count",
)  # fmt: skip

_MEASURE_LABELS = {
    "feature_variance": "feature variance (activation²)",
    "high_frequency_share": "share of non-DC energy",
    "attention_distance": "attention distance (patches)",
    "head_diversity": "head diversity (patches)",
}


@dataclass(frozen=True)
class Curve:
    """One layer against frequency, or against the axis of a measure: ``x``, ``y``, ``error`` (K,)."""

    layer: str
    attrs: dict[str, Any]
    frequency: np.ndarray
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray
    count: int


@dataclass(frozen=True)
class Point:
    """One layer of a `Trend`: a value and its error; ``marked`` where it is not quite what was asked for.

    ``parts`` are the values that ``y`` is the mean of (heads): name, value, error.
    """

    layer: str
    attrs: dict[str, Any]
    y: float
    error: float
    count: int
    frequency: float | None = None
    marked: bool = False
    parameter: str = ""
    parts: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class Trend:
    """One capture by depth, with what its axis, its legend (``mark``) and its caption have to say."""

    points: list[Point]
    quantity: str
    panel: str
    label: str
    mark: str = ""
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Images behind the points; the most of any."""
        return max(point.count for point in self.points)

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Depth, value, error and mark of the points, each (L,)."""
        table = [(p.attrs["depth"], p.y, p.error, p.marked) for p in self.points]
        depth, y, error, marked = np.array(table, dtype=float).T
        return depth, y, error, marked.astype(bool)


@dataclass(frozen=True)
class View:
    """What is looked at: spectra and their value at a frequency ``at``, or a measure (at a cut-off ``at``).

    ``names`` are those of the captures looked at, ``lacking`` of those left out for want of the measure.
    """

    at: float | None = None
    axis: str = "normalized"
    measure: str | None = None
    names: Sequence[str] = ()
    lacking: Sequence[str] = ()

    def curves(self, capture: Capture) -> list[Curve]:
        """One curve per layer; none where a measure is a single number, or one per head."""
        if self.measure is None:
            return spectrum_curves(capture, self.axis)
        return measure_curves(capture, self.measure)

    def trend(self, capture: Capture) -> Trend:
        """One point per layer."""
        if self.measure is None:
            return response_trend(capture, 1.0 if self.at is None else self.at)
        return measure_trend(capture, self.measure, 0.5 if self.at is None else self.at)


def spectrum_curves(capture: Capture, axis: str = "normalized") -> list[Curve]:
    """Δ log amplitude of each layer, against frequency in π rad/sample or in cycles per input pixel.

    The second is f / (2 · stride), ours: π rad per step of a grid is half a cycle per ``stride`` pixels.
    """
    if capture.path == "2d":
        raise FourierBiasError("a 2-D spectrum is no curve: choose a line or radial with path=")
    curves = []
    for layer, spectrum in checked(capture).items():
        attrs = capture.layers[layer].attrs
        x = spectrum.frequency if axis == "normalized" else spectrum.frequency / (2 * attrs["stride"])
        y, error = spectrum.relative, spectrum.relative_standard_error
        curves.append(Curve(layer, attrs, spectrum.frequency, x, y, error, spectrum.count))
    return curves


def response_trend(capture: Capture, at: float) -> Trend:
    """Δ log amplitude of each layer at the frequency ``at``; marked where read at a lower, highest bin."""
    points = []
    for layer, spectrum in checked(capture).items():
        # A grid of DC alone would read 0 by definition: that is no response.
        known = spectrum.highest > 0
        y, error = (spectrum.at(at), spectrum.standard_error_at(at)) if known else (np.nan, np.nan)
        read, attrs = min(at, spectrum.highest), capture.layers[layer].attrs
        points.append(Point(layer, attrs, y, error, spectrum.count, frequency=read, marked=read < at - 1e-9))
    lacking = sum(not spectrum.highest > 0 for spectrum in capture.values())
    frequency = "π" if at == 1 else f"{at:g}π"
    return Trend(
        points,
        "relative_log_amplitude",
        panel="response",
        label=f"Δ log amplitude at {frequency} (ln)",
        mark=f"highest bin (below {frequency})",
        notes=(f"{numbered(lacking, 'layer')} with no frequency but 0 left out",) if lacking else (),
    )


def measure_trend(capture: Capture, name: str, at: float) -> Trend:
    """A measure of each layer that has it: at the cut-off nearest to ``at``, or the mean of its heads."""
    measures = checked(capture).measure(name)
    points = [_measure_point(layer, capture.layers[layer], m, at) for layer, m in measures.items()]
    lacking = len(capture.layers) - len(measures)
    notes = [f"{numbered(lacking, 'layer')} without this measure left out"] if lacking else []
    if any(point.parts for point in points):
        notes.append("dots: heads; line: their mean; its band: mean of the heads' standard errors")
    label = measure_label(name, next(iter(measures.values())), points[0].parameter)
    return Trend(points, name, panel="measure", label=label, notes=tuple(notes))


def _measure_point(layer: str, record: CapturedLayer, measure: Measure, at: float) -> Point:
    mean, error = np.asarray(measure.mean, float), np.asarray(measure.standard_error, float)
    parameter, parts = "", ()
    if _per_head(measure):
        heads = np.arange(len(mean)) if measure.axis is None else measure.axis
        parts = tuple(zip([f"{h:g}" for h in heads], mean.tolist(), error.tolist(), strict=True))
        # Heads see the same images, so their errors do not average out: the mean error bounds the mean's.
        y, spread = mean.mean(), error.mean()
    else:
        nearest = 0 if measure.axis is None else int(np.abs(measure.axis - at).argmin())
        y, spread = mean[nearest], error[nearest]
        parameter = "" if measure.axis is None else f"{measure.axis[nearest]:g}"
    return Point(
        layer, record.attrs, float(y), float(spread), measure.count, parameter=parameter, parts=parts
    )


def measure_curves(capture: Capture, name: str) -> list[Curve]:
    """A measure over its whole axis, one curve per layer; none where it has no axis, or one of heads."""
    curves = []
    for layer, m in checked(capture).measure(name).items():
        if m.axis is not None and not _per_head(m):
            unknown = np.full(len(m.axis), np.nan)
            attrs = capture.layers[layer].attrs
            curves.append(Curve(layer, attrs, unknown, m.axis, m.mean, m.standard_error, m.count))
    return curves


def _per_head(measure: Measure) -> bool:
    return len(measure.mean) > 1 if measure.axis is None else "head" in measure.axis_name


def measure_label(name: str, measure: Measure, parameter: str = "") -> str:
    """The label of a measure's axis, with its unit and, where there is one, the cut-off."""
    label = _MEASURE_LABELS.get(name, name.replace("_", " "))
    return f"{label} above {parameter}π" if measure.axis_name == "cutoff" and parameter else label


def shaded_spans(capture: Capture) -> list[tuple[float, float, str]]:
    """Intervals of depth to shade, (start, stop, shade): the step from the layer before into the layer.

    That is where Park & Kim shade: what a layer does is how the curve changes across it.  ``"attention"``
    and ``"split"`` (some channels attend, some convolve) are by kind, ``"subsampling"`` is a pooling layer
    or one of a coarser grid than the layer before.  Neighbours of one shade are joined.
    """
    records = list(capture.layers.values())
    # A single layer has no step: it is shaded about its place.
    depths = [float(r.attrs["depth"]) for r in records] if len(records) > 1 else [MARGIN]
    strides = [r.attrs["stride"] for r in records]
    coarser = [False, *(after > 1.001 * before for before, after in pairwise(strides))]
    kinds = [r.attrs["kind"] for r in records]
    shaded = {
        **{shade: [kind == shade for kind in kinds] for shade in ("attention", "split")},
        "subsampling": [kind == "pool" or step for kind, step in zip(kinds, coarser, strict=True)],
    }
    spans: list[tuple[float, float, str]] = []
    for shade in SHADES:
        for start, stop, wanted in zip([-MARGIN, *depths], depths, shaded[shade], strict=False):
            if wanted and spans and spans[-1][1:] == (start, shade):
                spans[-1] = (spans[-1][0], stop, shade)
            elif wanted:
                spans.append((start, stop, shade))
    return spans


def rows(capture: Capture, name: str, view: View, epoch: float | None = None) -> list[dict[str, Any]]:
    """Curves and trend of one capture as rows with the keys `COLUMNS`, a row per value."""
    trend = view.trend(capture)
    found: list[dict[str, Any]] = []

    def add(source: Curve | Point, panel: str, **values: Any) -> None:
        place = {key: source.attrs.get(key) for key in COLUMNS if key in source.attrs}
        known = {"model": name, "epoch": epoch, "layer": source.layer, "quantity": trend.quantity}
        found.append({**place, **known, "panel": panel, "count": source.count, **values})

    for curve in view.curves(capture):
        for f, x, y, error in zip(curve.frequency, curve.x, curve.y, curve.error, strict=True):
            parameter = f"{x:g}" if view.measure else ""
            panel = "measure_curve" if view.measure else "spectrum"
            add(curve, panel, parameter=parameter, frequency=f, x=x, y=y, standard_error=error)
    for p in trend.points:
        place = {"frequency": p.frequency, "x": p.attrs["depth"]}
        add(p, trend.panel, parameter=p.parameter, y=p.y, standard_error=p.error, **place)
        for part, y, error in p.parts:
            add(p, "measure_part", parameter=part, y=y, standard_error=error, **place)
    return found


def numbered(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def checked(capture: Capture) -> Capture:
    """``capture``, if it holds a layer; else `FourierBiasError`."""
    if not capture.layers:
        name = capture.file or capture.attrs.get("model", "this capture")
        raise FourierBiasError(f"{name} holds no layer with spatial maps: capture again with other layers")
    return capture
