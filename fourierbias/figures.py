"""Captures to figures: spectra by frequency, their high end and any measure by depth, one model or several.

Every figure comes from the same few numbers as its CSV: a `Curve` per layer or a `Trend` per capture is
made first, then drawn and written.  The first two views are figures 2a and 8 of Park & Kim, "How Do Vision
Transformers Work?", ICLR 2022 (arXiv 2202.06709); uncertainty, the marking of grids without the bin asked
for, the axis in cycles per input pixel, comparison, and the views of measures and of training are ours.

Figures are `matplotlib.figure.Figure` objects of their own: pyplot is not imported, nothing is shown.
"""

from __future__ import annotations

import contextlib
import csv as csv_files
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from . import curves as numbers
from .captured import open_captures
from .curves import AXES, MARGIN, Curve, Trend, View, checked, numbered, shaded_spans
from .errors import FourierBiasError
from .store import Capture, checked_output

FORMATS = (".png", ".svg", ".pdf")
# viridis without its light end, which is lost on white paper.
_MAP = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, 256)), name="viridis_dark")
# Okabe & Ito's colours, told apart with any colour vision; their yellow, too light for lines, is replaced.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7A5C00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_SHADES = {"attention": "#e0e0e0", "split": "#f0e4c4", "subsampling": "#bfdcf2"}
_SHADE_NAMES = {
    "attention": "attention",
    "split": "attention and convolution",
    "subsampling": "pooling/subsampling",
}

_WIDTH = 9.0  # inches
_CHARACTERS_PER_INCH = 17  # of 8-point text
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "figure.titlesize": 10,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "svg.hashsalt": "fourierbias",
}


def spectra_axes(capture: Capture, ax: Axes | None = None, *, axis: str = "normalized") -> Axes:
    """Δ log amplitude against frequency, one line per layer, coloured by depth, with ± one standard error.

    ``axis="normalized"``: frequency in π rad per step of each layer's own grid, 0…1; ``"input"``: in cycles
    per input pixel, f / (2 · stride), one axis for all stages of a pyramid.  Line i of the axes is
    layer i, the zero line comes last.  Raises `FourierBiasError` for another axis, for 2-D spectra and for an
    empty capture.  Source: Park & Kim 2022, figure 2a; the bands and the input axis are ours.

    >>> import torch, timm, fourierbias
    >>> c = fourierbias.capture(timm.create_model("test_resnet"), torch.rand(2, 3, 64, 64))
    >>> ax = spectra_axes(c)
    >>> bool((ax.lines[0].get_ydata() == c["layer1.0"].relative).all()), ax.get_xlabel()
    (True, 'frequency (π rad/sample)')
    """
    ax = _axes(ax)
    _draw_curves(ax, numbers.spectrum_curves(capture, _known("axis", axis, AXES)))
    _label_spectra(ax, [capture], axis)
    return ax


def response_axes(
    captures: Capture | Sequence[Capture],
    ax: Axes | None = None,
    *,
    at: float = 1.0,
    names: Sequence[str] | None = None,
) -> Axes:
    """Δ log amplitude at one frequency ``at`` (units of π) against normalised depth, with standard errors.

    One capture is shaded by what its layers do: grey over the step into an attention layer, blue over the
    step into a pooling layer or one of a coarser grid.  Several captures differ in colour, dash and marker
    and are not shaded.  A grid whose highest bin is below ``at`` is read there and drawn hollow; a grid
    with no bin but DC has no response and is left out.  Raises `FourierBiasError` for ``at`` outside 0…1.
    Source: Park & Kim 2022, figure 8; uncertainty and marks are ours.

    >>> import torch, timm, fourierbias
    >>> c = fourierbias.capture(timm.create_model("test_resnet"), torch.rand(2, 3, 64, 64))
    >>> ax = response_axes(c, at=0.5)
    >>> float(ax.lines[0].get_ydata()[0]) == c["layer1.0"].at(0.5)
    True
    """
    return _trend_axes(captures, ax, names, lambda capture: numbers.response_trend(capture, _checked_at(at)))


def measure_axes(
    captures: Capture | Sequence[Capture],
    name: str,
    ax: Axes | None = None,
    *,
    at: float = 0.5,
    names: Sequence[str] | None = None,
) -> Axes:
    """The measure ``name`` against normalised depth, with standard errors; shading as in `response_axes`.

    Of a measure over cut-offs the one nearest to ``at`` is drawn.  Of a measure per head each head is a
    dot and the line is their mean, its band the mean of the heads' standard errors (an upper bound of the
    mean's own, whatever their correlation).  Raises `FourierBiasError` where no layer has the measure.

    >>> import torch, timm, fourierbias
    >>> c = fourierbias.capture(timm.create_model("test_resnet"), torch.rand(2, 3, 64, 64))
    >>> measure_axes(c, "feature_variance").get_ylabel()
    'feature variance (activation²)'
    """
    return _trend_axes(captures, ax, names, lambda capture: numbers.measure_trend(capture, name, at))


def training_axes(
    series: Sequence[tuple[int, Capture]],
    ax: Axes | None = None,
    *,
    at: float = 1.0,
    measure: str | None = None,
) -> Axes:
    """Δ log amplitude at ``at`` (units of π), or a measure, against depth: one line per epoch, by colour.

    ``series`` holds (epoch, capture) of one model through training.  Raises `FourierBiasError` when it is
    empty or ``at`` lies outside 0…1.

    >>> import torch, timm, fourierbias
    >>> model = timm.create_model("test_resnet")
    >>> series = [(e, fourierbias.capture(model, torch.rand(2, 3, 64, 64))) for e in (0, 10)]
    >>> len(training_axes(series).lines)  # and the zero line
    3
    """
    ax = _axes(ax)
    series = _checked_series(series)
    _draw_training(ax, series, _trends_of(series, View(at=at, measure=measure)))
    ax.set_xlabel(_DEPTH_LABEL)
    return ax


def plot(
    captures: Capture | str | os.PathLike[str] | Sequence[Capture | str | os.PathLike[str]],
    *,
    compare: bool = False,
    at: float | None = None,
    axis: str = "normalized",
    reference: str = "dc",
    compat: str | None = None,
    path: str | None = None,
    measure: str | None = None,
    output: str | os.PathLike[str] | None = None,
    csv: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Figure of one capture, or of several compared: spectra by frequency, and their high end by depth.

    ``captures``: a `Capture`, a file (``.h5``; a checkpoint is captured on the fly), or a list of these.
    Several, or one with ``compare``, are drawn side by side on shared axes, and together by depth.
    ``at``: the high frequency, in units of π (default 1; of a measure over cut-offs the cut-off, default
    0.5).  ``axis``: see `spectra_axes`.  ``path``, ``reference`` and ``compat`` are those of `spectrum`;
    by default the path that the first capture shows.  ``measure``: draw this measure by depth instead.

    ``output`` writes the figure (.png at 200 dpi, .svg, .pdf), ``csv`` the numbers in it, both replacing
    what was there only when complete.  The columns of the CSV, a row per value drawn:
    panel (spectrum, response, measure_curve, measure, measure_part), model, epoch (of a training series),
    layer, index, depth (0…1), kind, height, width, stride (input pixels per step), quantity, parameter
    (cut-off or head), frequency (units of π, where read), x and y (as drawn), standard_error (over images,
    empty where unknown), count (images).

    Raises `FourierBiasError` for options that are not known or do not fit together, captures without the
    path or measure, and outputs that cannot be written.

    >>> import torch, timm, fourierbias
    >>> c = fourierbias.capture(timm.create_model("test_resnet"), torch.rand(2, 3, 64, 64))
    >>> len(plot(c).axes)  # spectra, response, and the colour bar of depth
    3
    """
    _check_options(at=at, axis=axis, compat=compat, output=output, csv=csv)
    opened = _opened(captures, measure)
    names = unique_names(opened)
    view = View(at=at, axis=axis, measure=measure, names=names)
    if measure is None:
        opened = _prepared(opened, path=path, reference=reference, compat=compat)
    else:
        opened, view = _with_measure(opened, view)
    with matplotlib.rc_context(_STYLE):
        draw = _compare_figure if compare or len(opened) > 1 else _single_figure
        figure = draw(opened, view)
        if title or draw is _single_figure:
            figure.suptitle(_wrapped(title or _full_name(opened[0]), 100))
        _save(figure, output)
    if csv is not None:
        _write_csv(
            csv, [r for c, n in zip(opened, view.names, strict=True) for r in numbers.rows(c, n, view)]
        )
    return figure


def plot_training(
    series: Sequence[tuple[int, Capture]],
    *,
    at: float | None = None,
    axis: str = "normalized",
    reference: str = "dc",
    compat: str | None = None,
    path: str | None = None,
    measure: str | None = None,
    output: str | os.PathLike[str] | None = None,
    csv: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Figure of one model through training: the high end by depth, and the last layer's spectrum, by epoch.

    ``series`` holds (epoch, capture); the options are those of `plot`.  Below the first panel a strip shows
    which layers were attention at which epoch, where any was: the schedule of a network that switches.
    Raises `FourierBiasError` as `plot` does, and for an empty series.

    >>> import torch, timm, fourierbias
    >>> model = timm.create_model("test_resnet")
    >>> series = [(e, fourierbias.capture(model, torch.rand(2, 3, 64, 64))) for e in (0, 10)]
    >>> [ax.get_title() for ax in plot_training(series).axes][:2]
    ['', 'last layer: layer4.0']
    """
    _check_options(at=at, axis=axis, compat=compat, output=output, csv=csv)
    series = _checked_series(series)
    if measure is None:
        prepared = _prepared([c for _, c in series], path=path, reference=reference, compat=compat)
        series = [(epoch, capture) for (epoch, _), capture in zip(series, prepared, strict=True)]
    view = View(at=at, axis=axis, measure=measure, names=[str(series[0][1].attrs.get("model", "model"))])
    with matplotlib.rc_context(_STYLE):
        figure = _training_figure(series, view)
        figure.suptitle(_wrapped(title or f"{view.names[0]} through training", 100))
        _save(figure, output)
    if csv is not None:
        _write_csv(csv, [r for epoch, c in series for r in numbers.rows(c, view.names[0], view, epoch)])
    return figure


def in_words(
    captures: Sequence[Capture],
    *,
    at: float | None = None,
    reference: str = "dc",
    compat: str | None = None,
    path: str | None = None,
) -> str:
    """Two sentences on the high-frequency response of captures: where it ends, and how it got there.

    The options are those of `plot`, and the numbers those it draws and writes: Δ log amplitude, ± one
    standard error over images, and where a grid has no bin so high the frequency it was read at.

    >>> import torch, timm, fourierbias
    >>> c = fourierbias.capture(timm.create_model("test_vit"), torch.ones(2, 3, 160, 160))
    >>> print(in_words([c]))
    Δ log amplitude at π in the last layer: test_vit ... ± 0.00. From the first layer to the last: ...
    """
    prepared = _prepared(captures, path=path, reference=reference, compat=compat)
    trends = [View(at=at).trend(capture) for capture in prepared]
    ends, courses = [], []
    for name, trend in zip(unique_names(captures), trends, strict=True):
        points = [point for point in trend.points if np.isfinite(point.y)]
        if not points:
            continue
        first, last = points[0], points[-1]
        error = f" ± {last.error:.2f}" if np.isfinite(last.error) else ""
        read = f" (read at {last.frequency:.3g}π)" if last.marked else ""
        ends.append(f"{name} {last.y:.2f}{error}{read}")
        if len(points) > 1:
            course = "rises" if last.y > first.y else "falls"
            courses.append(f"{name} {course} from {first.y:.2f} by {abs(last.y - first.y):.2f}")
    sentences = []
    if ends:
        quantity = trends[0].label.removesuffix(" (ln)")
        sentences.append(f"{quantity} in the last layer: {', '.join(ends)}.")
    if courses:
        sentences.append(f"From the first layer to the last: {', '.join(courses)}.")
    return " ".join(sentences)


def unique_names(captures: Sequence[Capture]) -> list[str]:
    """A short name for each capture: its model, and where models are the same, what tells them apart.

    >>> runs = [Capture({"model": "vit", "weights": w}, {}) for w in ("vit.ckpt", "vit-boot.ckpt")]
    >>> unique_names(runs)
    ['vit', 'vit-boot']
    """
    names = [str(capture.attrs.get("model", "model")) for capture in captures]
    for distinguish in (_weights_name, lambda c: c.file.stem if c.file else ""):
        added = [distinguish(capture) for capture in captures]
        names = [
            _joined(name, extra) if names.count(name) > 1 and extra else name
            for name, extra in zip(names, added, strict=True)
        ]
    for name in {n for n in names if names.count(n) > 1}:
        same = [i for i, other in enumerate(names) if other == name]
        for position, index in enumerate(same, 1):
            names[index] = f"{name} #{position}"
    return names


# -- drawing -------------------------------------------------------------------------------------------------

_DEPTH_LABEL = "normalised depth (0: first layer, 1: last)"


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    with matplotlib.rc_context(_STYLE):
        return Figure(figsize=(_WIDTH / 2, 3.4), layout="constrained").add_subplot()


def _draw_curves(
    ax: Axes, curves: Sequence[Curve], values: Sequence[float] | None = None, norm: Normalize | None = None
) -> None:
    """Curves coloured by ``values`` (by default their depth), thin bands of one standard error."""
    norm = norm or Normalize(0, 1)
    values = [curve.attrs["depth"] for curve in curves] if values is None else values
    width = 1.3 if len(curves) <= 24 else 0.8
    for curve, value in zip(curves, values, strict=True):
        color = _MAP(norm(value))
        ax.plot(curve.x, curve.y, color=color, linewidth=width, zorder=3)
        _band(ax, curve.x, curve.y, curve.error, color, alpha=max(0.02, min(0.15, 0.6 / len(curves))))
    _zero_line(ax)


def _zero_line(ax: Axes) -> None:
    """Mark zero, unless it lies further off than the values spread: a line chart need not reach it."""
    low, high = ax.dataLim.intervaly
    near = high == low or low - (high - low) <= 0 <= high + (high - low)
    if near and ax.get_yscale() == "linear":
        ax.axhline(0, color="0.55", linewidth=0.8, zorder=1)


def _band(ax: Axes, x: np.ndarray, y: np.ndarray, error: np.ndarray, color: Any, alpha: float) -> None:
    if np.isfinite(error).any():
        ax.fill_between(x, y - error, y + error, color=color, alpha=alpha, linewidth=0, zorder=2)


def _label_spectra(ax: Axes, captures: Sequence[Capture], axis: str) -> None:
    path = captures[0].path
    along = "" if path == "diagonal" else f"{path} "
    if axis == "normalized":
        notebook = any(spectrum.attrs.get("compat") for c in captures for spectrum in c.values())
        ax.set_xlabel(
            "frequency (as labelled by the notebook)" if notebook else f"{along}frequency (π rad/sample)"
        )
        ax.set_xlim(0, 1.02)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    else:
        ax.set_xlabel(f"{along}frequency (cycles per input pixel)")
        highest = max(c[n].highest / (2 * c.layers[n].attrs["stride"]) for c in captures for n in c)
        ax.set_xlim(0, 1.02 * highest if highest > 0 else 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_ylabel("Δ log amplitude (ln)")


def _trend_axes(
    captures: Capture | Sequence[Capture],
    ax: Axes | None,
    names: Sequence[str] | None,
    trend: Callable[[Capture], Trend],
) -> Axes:
    captures = [captures] if isinstance(captures, Capture) else list(captures)
    if not captures:
        raise FourierBiasError("no captures to draw: give at least one")
    ax = _axes(ax)
    names = unique_names(captures) if names is None else names
    _draw_trends(ax, captures, [trend(capture) for capture in captures], names)
    ax.set_xlabel(_DEPTH_LABEL)
    return ax


def _draw_trends(
    ax: Axes, captures: Sequence[Capture], trends: Sequence[Trend], names: Sequence[str], strip: bool = False
) -> None:
    """Trends by depth with their legend above; a single one is shaded by the kinds of its layers."""
    single = len(trends) == 1
    _frame(ax, trends)
    shades = (
        {shade for capture in captures for *_, shade in shaded_spans(capture)} if single or strip else set()
    )
    if single and not strip:
        for start, stop, shade in shaded_spans(captures[0]):
            ax.axvspan(start, stop, color=_SHADES[shade], linewidth=0, zorder=0)
    for index, (trend, name) in enumerate(zip(trends, names, strict=True)):
        color, style = _COLORS[index % len(_COLORS)], _line_style(index)
        _draw_trend(ax, trend, color, label=None if single and not strip else _wrapped(name, 44), **style)
    _zero_line(ax)
    handles = ax.get_legend_handles_labels()[0]
    _legend_above(ax, [*handles, *_keys(trends, shades)])


def _keys(trends: Sequence[Trend], shades: set[str]) -> list[Any]:
    """Legend entries for what is not a line of its own: hollow marks and shading, where there are any."""
    keys: list[Any] = []
    if any(p.marked and np.isfinite(p.y) for trend in trends for p in trend.points):
        keys.append(Line2D([], [], color="0.3", linestyle="none", marker="o", fillstyle="none"))
        keys[0].set_label(trends[0].mark)
    return keys + [Patch(color=_SHADES[s], label=_SHADE_NAMES[s]) for s in _SHADES if s in shades]


def _line_style(index: int) -> dict[str, Any]:
    turn = index // len(_COLORS)  # past eight models the pairs of colour and marker change
    return {
        "marker": _MARKERS[(index + turn) % len(_MARKERS)],
        "linestyle": _DASHES[(index + turn) % len(_DASHES)],
    }


def _frame(ax: Axes, trends: Sequence[Trend]) -> None:
    ax.set_xlim(-MARGIN, 1 + MARGIN)
    ax.set_ylabel(trends[0].label)
    values = np.concatenate([trend.columns()[1] for trend in trends])
    # A variance accumulates along a residual stream: over two decades, only a log axis shows all of it.
    if trends[0].quantity == "feature_variance" and 0 < 100 * np.nanmin(values) < np.nanmax(values):
        ax.set_yscale("log", nonpositive="mask")


def _draw_trend(
    ax: Axes,
    trend: Trend,
    color: Any,
    *,
    label: str | None = None,
    marker: str = "o",
    linestyle: Any = "-",
) -> None:
    depth, y, error, marked = trend.columns()
    size = 4.5 if len(depth) <= 30 else 3.0
    ax.plot(
        depth, y, color=color, linestyle=linestyle, linewidth=1.3, marker=marker, markersize=size,
        label=label, zorder=4,
    )  # fmt: skip
    if marked.any():
        ax.plot(
            depth[marked], y[marked], color=color, linestyle="none", marker=marker, markersize=size,
            markerfacecolor="white", zorder=5,
        )  # fmt: skip
    if len(depth) > 1:
        _band(ax, depth, y, error, color, alpha=0.2)
    elif np.isfinite(error).all():
        ax.errorbar(depth, y, error, color=color, linestyle="none", capsize=3, zorder=3)
    parts = [(p.attrs["depth"], value, spread) for p in trend.points for _, value, spread in p.parts]
    if parts:
        at, values, spread = (np.array(column) for column in zip(*parts, strict=True))
        ax.errorbar(
            at, values, np.nan_to_num(spread), color=color, linestyle="none", marker=".", markersize=4,
            elinewidth=0.6, alpha=0.4, zorder=3,
        )  # fmt: skip


def _legend_above(ax: Axes, handles: Sequence[Any]) -> None:
    """A legend over the top of the axes, in as many columns as its width holds: it never covers data."""
    if not handles:
        return
    longest = max(len(line) for handle in handles for line in handle.get_label().splitlines())
    inches = ax.get_position().width * ax.figure.get_figwidth()
    columns = int(inches * _CHARACTERS_PER_INCH / (longest + 8))
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=max(1, min(columns, len(handles))),
        frameon=False, borderaxespad=0.3, handlelength=2.6, columnspacing=1.5,
    )  # fmt: skip


def _draw_strip(ax: Axes, captures: Sequence[Capture]) -> None:
    """A row per capture, first on top, filled where `shaded_spans` shades; x is depth."""
    for row, capture in enumerate(captures):
        for start, stop, shade in shaded_spans(capture):
            ax.broken_barh([(start, stop - start)], (row - 0.4, 0.8), color=_SHADES[shade], linewidth=0)
    ax.set_ylim(len(captures) - 0.5, -0.5)
    ax.set_yticks([])
    ax.spines[["left", "bottom"]].set_visible(False)


def _draw_training(
    ax: Axes, series: Sequence[tuple[int, Capture]], trends: Sequence[Trend], strip: bool = False
) -> None:
    norm = _epoch_norm(series)
    _frame(ax, trends)
    for (epoch, _), trend in zip(series, trends, strict=True):
        _draw_trend(ax, trend, _MAP(norm(epoch)))
    _zero_line(ax)
    shades = {shade for _, capture in series for *_, shade in shaded_spans(capture)} if strip else set()
    _legend_above(ax, _keys(trends, shades))


def _trends_of(series: Sequence[tuple[int, Capture]], view: View) -> list[Trend]:
    return [view.trend(capture) for _, capture in series]


def _epoch_norm(series: Sequence[tuple[int, Capture]]) -> Normalize:
    epochs = [epoch for epoch, _ in series]
    return Normalize(min(epochs), max(max(epochs), min(epochs) + 1))


# -- figures -------------------------------------------------------------------------------------------------


def _single_figure(captures: Sequence[Capture], view: View) -> Figure:
    (capture,) = captures
    curves, trend = view.curves(capture), view.trend(capture)
    figure = Figure(figsize=(_WIDTH if curves else 0.62 * _WIDTH, 3.9))
    panels = figure.subplots(1, 2 if curves else 1, squeeze=False, width_ratios=[5, 6] if curves else None)[0]
    if curves:
        _draw_curves(panels[0], curves)
        _label_curves(panels[0], captures, view)
        if len(curves) > 1:
            _bar(figure, panels[0], Normalize(0, 1), "depth")
    _draw_trends(panels[-1], captures, [trend], view.names)
    panels[-1].set_xlabel(_DEPTH_LABEL)
    _caption(figure, captures, view, [trend])
    return figure


def _compare_figure(captures: Sequence[Capture], view: View) -> Figure:
    all_curves = [view.curves(capture) for capture in captures]
    trends = [view.trend(capture) for capture in captures]
    with_curves = any(all_curves)
    rows = -(-len(captures) // 4) if with_curves else 0
    columns = -(-len(captures) // max(rows, 1)) if with_curves else 1
    strip = 0.11 * len(captures) if any(shaded_spans(capture) for capture in captures) else 0.0
    heights = [2.15] * rows + [2.9] + ([strip + 0.1] if strip else [])
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.9))
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    panels: list[Axes] = []
    names = _counted(view.names, trends)
    for index, (name, curves) in enumerate(zip(names, all_curves, strict=True)):
        if not with_curves:
            break
        row, column = divmod(index, columns)
        first = panels[0] if panels else None
        ax = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
        panels.append(ax)
        _draw_curves(ax, curves)
        width = int(0.85 * _WIDTH / columns * 13)
        ax.set_title(_wrapped(name, width))
        _label_curves(ax, captures, view)
        ax.set_xlabel(_wrapped(ax.get_xlabel(), width))
        if column:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
        if index + columns < len(captures):
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
    if panels:
        _bar(figure, panels, Normalize(0, 1), "depth")
    bottom = figure.add_subplot(grid[rows, :])
    _draw_trends(bottom, captures, trends, names, strip=True)
    if strip:
        lowest = figure.add_subplot(grid[rows + 1, :], sharex=bottom)
        _draw_strip(lowest, captures)
        for row in range(len(captures)):
            lowest.plot(
                -0.02, row, color=_COLORS[row % len(_COLORS)], marker=_line_style(row)["marker"],
                markersize=4, transform=lowest.get_yaxis_transform(), clip_on=False,
            )  # fmt: skip
        bottom.tick_params(labelbottom=False)
        bottom = lowest
    bottom.set_xlabel(_DEPTH_LABEL)
    _caption(figure, captures, view, trends)
    return figure


def _training_figure(series: Sequence[tuple[int, Capture]], view: View) -> Figure:
    captures = [capture for _, capture in series]
    trends = _trends_of(series, view)
    last = [_last_curve(curves) for curves in map(view.curves, captures) if curves]
    schedule = any(shade == "attention" for c in captures for *_, shade in shaded_spans(c))
    heights = [3.2, 0.9] if schedule else [3.2]
    figure = Figure(figsize=(_WIDTH if last else 0.62 * _WIDTH, sum(heights) + 1.2))
    grid = figure.add_gridspec(len(heights), 2 if last else 1, height_ratios=heights)
    panels = [figure.add_subplot(grid[0, 0])]
    _draw_training(panels[0], series, trends, strip=schedule)
    bottom = panels[0]
    if last:
        ax = figure.add_subplot(grid[:, 1])
        _draw_curves(ax, last, [epoch for epoch, _ in series], _epoch_norm(series))
        _label_curves(ax, captures, view)
        ax.set_title(f"last layer: {last[0].layer}")
        panels.append(ax)
    if schedule:
        bottom = figure.add_subplot(grid[1, 0], sharex=panels[0])
        _draw_strip(bottom, captures)
        panels[0].tick_params(labelbottom=False)
        shown = range(0, len(series), -(-len(series) // 6))
        bottom.set_yticks(shown, [str(series[i][0]) for i in shown])
        bottom.set_ylabel("epoch")
    bottom.set_xlabel(_DEPTH_LABEL)
    bar = _bar(figure, panels, _epoch_norm(series), "epoch")
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    _caption(figure, captures, view, trends)
    return figure


def _last_curve(curves: Sequence[Curve]) -> Curve:
    """The curve of the last layer that has more than one frequency, where any has."""
    return next((curve for curve in reversed(curves) if len(curve.x) > 1), curves[-1])


def _label_curves(ax: Axes, captures: Sequence[Capture], view: View) -> None:
    if view.measure is None:
        _label_spectra(ax, captures, view.axis)
        return
    first = next(iter(captures[0].measure(view.measure).values()))
    units = " radius (π rad/sample)" if first.axis_name == "cutoff" else ""
    ax.set_xlabel(first.axis_name.replace("cutoff", "cut-off") + units)
    ax.set_ylabel(numbers.measure_label(view.measure, first))


def _bar(figure: Figure, panels: Any, norm: Normalize, title: str) -> Any:
    bar = figure.colorbar(ScalarMappable(norm, _MAP), ax=panels, aspect=30, fraction=0.05, pad=0.015)
    bar.ax.set_title(title, fontsize=8)  # beside the bar it would be read as the next panel's label
    return bar


def _caption(figure: Figure, captures: Sequence[Capture], view: View, trends: Sequence[Trend]) -> None:
    """What a reader must know to judge the figure, in small type along its lower edge."""
    counts = sorted({trend.count for trend in trends})
    said = [f"n = {numbered(counts[0], 'image')}" if len(counts) == 1 else "n: number of images"]
    source = re.sub(r":? \d+ images?$", "", str(captures[0].attrs.get("images", "")))
    if len({_images_key(capture, same_number=len(counts) == 1) for capture in captures}) > 1:
        said.append("not the same images for all")
    elif source and len(source) < 60:
        said[0] += f" ({source})"
    said.append("bands: ± 1 standard error over images" if counts[-1] > 1 else "no error bands: one image")
    if view.measure is None:
        against = {"dc": "DC", "first": "the lowest non-zero bin"}
        reference = next(iter(captures[0].values())).reference
        path = {"diagonal": "diagonal of the spectrum", "radial": "means over annuli"}
        said.append(
            f"{path.get(captures[0].path, f'{captures[0].path} line')}, relative to {against[reference]}"
        )
        if any(s.attrs.get("compat") for c in captures for s in c.values()):
            said.append("values and axis of the published notebook, which stops one bin short of π")
    random = [name for name, c in zip(view.names, captures, strict=False) if _is_random(c)]
    if random:
        said.append("random weights" + (f": {', '.join(random)}" if len(captures) > 1 else ""))
    if view.lacking:
        said.append(f"without this measure: {', '.join(view.lacking)}")
    said += dict.fromkeys(note for trend in trends for note in trend.notes)
    text = textwrap.fill(" · ".join(said), int(figure.get_figwidth() * _CHARACTERS_PER_INCH))
    figure.supxlabel(text.replace("$", r"\$"), x=0.01, ha="left", fontsize=8, color="0.3")


def _images_key(capture: Capture, *, same_number: bool) -> tuple[str, ...]:
    """What captures of the same images have in common; of different numbers of them it is less."""
    source = re.sub(r":? \d+ images?$", "", str(capture.attrs.get("images", "")))
    identity = capture.attrs.get("identity", {})
    return source, *(str(identity.get(k) or "") for k in ("order", "fingerprint") if same_number)


# -- words ---------------------------------------------------------------------------------------------------


def _counted(names: Sequence[str], trends: Sequence[Trend]) -> list[str]:
    """The names, with the number of images where that is not the same for all."""
    counts = [trend.count for trend in trends]
    if len(set(counts)) == 1:
        return list(names)
    return [
        f"{name} (n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{count})"
        for name, count in zip(names, counts, strict=True)
    ]


def _full_name(capture: Capture) -> str:
    name, weights = str(capture.attrs.get("model", "model")), _weights_name(capture)
    return f"{name}, {weights}" if weights and weights != name else name


def _weights_name(capture: Capture) -> str:
    weights = str(capture.attrs.get("weights") or "")
    return Path(weights).stem if re.search(r"\.(ckpt|pth?|tar|bin|safetensors)$", weights) else weights


def _is_random(capture: Capture) -> bool:
    return str(capture.attrs.get("weights", "")).startswith("random")


def _joined(name: str, extra: str) -> str:
    return extra if extra.startswith(name) else f"{name}, {extra}"


def _wrapped(text: str, width: int) -> str:
    """``text`` in lines of at most ``width``, broken after the marks that model names are made of."""
    text, lines = text.replace("$", r"\$"), [""]
    for piece in re.split(r"(?<=[ _./-])", text):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


# -- input and output ----------------------------------------------------------------------------------------


def _opened(captures: Any, measure: str | None) -> list[Capture]:
    items = list(captures) if isinstance(captures, list | tuple) else [captures]
    if not items:
        raise FourierBiasError("no captures to plot: give at least one")
    opened = []
    for item in items:
        if isinstance(item, str | os.PathLike):
            opened += open_captures([os.fspath(item)], measure=measure)
        elif isinstance(item, Capture):
            opened.append(item)
        else:
            raise FourierBiasError(f"cannot plot a {type(item).__name__}: give captures or their files")
    return opened


def _prepared(
    captures: Sequence[Capture], *, path: str | None, reference: str, compat: str | None
) -> list[Capture]:
    """Every capture along one path, relative to one reference."""
    path = path or checked(captures[0]).path
    along = [checked(capture).along(path).with_reference(reference) for capture in captures]
    return [capture.park_kim() for capture in along] if compat else along


def _with_measure(captures: Sequence[Capture], view: View) -> tuple[list[Capture], View]:
    """The captures that have the measure, and the view that names the others; one at least must have it."""
    has = [any(view.measure in r.measures for r in checked(c).layers.values()) for c in captures]
    if not any(has):
        captures[0].measure(view.measure)  # says which measures there are
    kept, names, lacking = (
        [item for item, keep in zip(items, has, strict=True) if keep == wanted]
        for items, wanted in ((captures, True), (view.names, True), (view.names, False))
    )
    return kept, replace(view, names=names, lacking=lacking)


def _checked_series(series: Sequence[tuple[int, Capture]]) -> list[tuple[int, Capture]]:
    series = list(series)
    if not series:
        raise FourierBiasError("no captures to plot: a training series needs at least one epoch")
    return [(epoch, checked(capture)) for epoch, capture in series]


def _checked_at(at: float) -> float:
    if not 0 <= at <= 1:
        raise FourierBiasError(f"at={at} is outside 0…1 (units of π)")
    return float(at)


def _known(what: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise FourierBiasError(f"{what}={value!r} is not known: choose from {', '.join(known)}")
    return value


def _check_options(
    *,
    at: float | None,
    axis: str,
    compat: str | None,
    output: str | os.PathLike[str] | None,
    csv: str | os.PathLike[str] | None,
) -> None:
    """Everything that can be wrong before a capture is opened."""
    if at is not None:
        _checked_at(at)
    _known("axis", axis, AXES)
    if compat is not None:
        _known("compat", compat, ("park-kim",))
        if axis == "input":
            raise FourierBiasError(
                "compat='park-kim' has the notebook's own axis, not true frequencies: leave out axis='input'"
            )
    if output is not None:
        suffix = Path(output).suffix.lower()
        if suffix not in FORMATS:
            raise FourierBiasError(f"cannot write {output}: a figure ends in {', '.join(FORMATS)}")
        checked_output(output, overwrite=True)
    if csv is not None:
        checked_output(csv, overwrite=True)
        if output is not None and Path(csv).resolve() == Path(output).resolve():
            raise FourierBiasError(f"{csv} is to be both figure and table: give them names of their own")


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when all went well and is gone when not."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise FourierBiasError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _save(figure: Figure, output: str | os.PathLike[str] | None) -> None:
    if output is None:
        return
    kind = Path(output).suffix.lower().lstrip(".")
    # No dates inside: the same numbers give the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with _replacing(output) as partial:
        figure.savefig(partial, format=kind, dpi=200, metadata=metadata)


def _write_csv(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    with _replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as handle:
        writer = csv_files.DictWriter(handle, numbers.COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else repr(float(value))
    return value
