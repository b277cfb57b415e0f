"""What is drawn: lines hold the capture's numbers, the CSV the lines', marks and shading are where due."""

import csv
import itertools
import math
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import fourierbias
from fourierbias import FourierBiasError
from fourierbias.curves import COLUMNS, View, measure_trend, rows, shaded_spans
from fourierbias.figures import (
    measure_axes,
    plot,
    plot_training,
    response_axes,
    spectra_axes,
    training_axes,
    unique_names,
)
from fourierbias.spectra import spectrum
from fourierbias.store import Capture, CapturedLayer, Measure
from fourierbias.writing import Writer


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    """Layout that does not fit, a glyph the font lacks, an empty slice: each is a defect of a figure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make_capture(
    grids=(16, 16, 8, 7), kinds=None, images=5, model="net", paths=("diagonal",), measures=(), seed=0, **attrs
):
    """A capture of white noise that gets smoother with depth, on square grids of an input of 32 pixels."""
    rng = np.random.default_rng(seed)
    layers = {}
    for index, grid in enumerate(grids):
        maps = rng.normal(size=(images, 4, grid, grid)) + index
        place = {
            "index": index,
            "depth": index / max(len(grids) - 1, 1),
            "kind": (kinds or ["conv"] * len(grids))[index],
            "channels": 4,
            "height": grid,
            "width": grid,
            "stride": 32 / grid,
        }
        spectra = {path: spectrum(maps, path=path) for path in paths}
        for s in spectra.values():
            s.attrs.update(place)
        layers[f"block{index}"] = CapturedLayer(place, spectra, {m: make_measure(m, rng) for m in measures})
    return Capture({"model": model, "images": "noise", "count": images, **attrs}, layers)


def make_measure(name, rng):
    if name == "high_frequency_share":
        axis = np.linspace(0, 1, 5)
        return Measure(np.sort(rng.random(5))[::-1], rng.random(5) / 50, 5, axis, "cutoff")
    if name == "attention_distance":
        return Measure(rng.random(3) * 4, rng.random(3) / 10, 5, np.arange(3), "head")
    return Measure(rng.random(1) + 1, rng.random(1) / 10, 5)


def read(path):
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def number(text):
    return float(text) if text else math.nan


def solid(ax):
    """The lines through the layers, without marks and the zero line."""
    return [line for line in ax.lines if line.get_linestyle() != "None" and line.get_marker() != "None"]


def hollow(ax):
    """Points drawn as hollow marks, (x, y)."""
    lines = [line for line in ax.lines if line.get_linestyle() == "None" and line.get_marker() != "."]
    return [
        (x, y)
        for line in lines
        if to_hex(line.get_markerfacecolor()) == "#ffffff"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        if np.isfinite(y)
    ]


def shades(ax):
    """Shaded intervals of x by colour, from the patches themselves."""
    found = {}
    for patch in ax.patches:
        found.setdefault(to_hex(patch.get_facecolor()), []).append(
            (patch.get_x(), patch.get_x() + patch.get_width())
        )
    return found


def legend(ax):
    box = ax.get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


# -- spectra by frequency ------------------------------------------------------------------------------------


def test_a_line_per_layer_holds_its_relative_log_amplitude():
    capture = make_capture()
    ax = spectra_axes(capture)
    assert len(ax.lines) == len(capture) + 1  # and the zero line
    for line, s in zip(ax.lines, capture.values(), strict=False):
        np.testing.assert_array_equal(line.get_xdata(), s.frequency)
        np.testing.assert_array_equal(line.get_ydata(), s.relative)
    assert list(ax.lines[-1].get_ydata()) == [0, 0]


def test_bands_are_one_standard_error():
    capture = make_capture(grids=(8,))
    s = capture["block0"]
    (band,) = spectra_axes(capture).collections
    outline = band.get_paths()[0].vertices
    for f, y, error in zip(s.frequency, s.relative, s.relative_standard_error, strict=True):
        at = outline[np.isclose(outline[:, 0], f), 1]
        assert at.min() == pytest.approx(y - error)
        assert at.max() == pytest.approx(y + error)


def test_layers_are_coloured_in_order_of_depth_from_dark_to_light():
    luminance = [to_rgba(line.get_color())[:3] @ np.array([0.21, 0.72, 0.07])
                 for line in spectra_axes(make_capture(grids=(8,) * 6)).lines[:6]]  # fmt: skip
    assert luminance == sorted(luminance)
    assert luminance[-1] < 0.85  # still seen on white


def test_input_axis_is_cycles_per_input_pixel():
    """A grid of stride s samples once in s pixels, so its π is half a cycle per s pixels."""
    ax = spectra_axes(make_capture(grids=(16, 8)), axis="input")
    assert ax.lines[0].get_xdata()[-1] == 0.5 / 2
    assert ax.lines[1].get_xdata()[-1] == 0.5 / 4
    # Bin k of an n×n grid is k cycles across the image at any n: 1/32 per pixel here.
    assert ax.lines[0].get_xdata()[1] == ax.lines[1].get_xdata()[1] == 1 / 32
    assert "per input pixel" in ax.get_xlabel()


def test_axes_given_are_drawn_on_and_returned():
    ax = Figure().add_subplot()
    assert spectra_axes(make_capture(), ax) is ax
    assert response_axes(make_capture(), ax) is ax


# -- response by depth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1.0, 0.6, 0.0])
def test_response_by_depth(at):
    capture = make_capture()
    ax = response_axes(capture, at=at)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [s.at(at) for s in capture.values()])
    assert ("π" if at == 1 else f"{at:g}π") in ax.get_ylabel()


def test_a_grid_without_the_bin_is_hollow_and_the_legend_says_so():
    capture = make_capture(grids=(16, 8, 7, 5))
    ax = response_axes(capture)
    highest = [(2 / 3, capture["block2"].relative[-1]), (1.0, capture["block3"].relative[-1])]
    assert np.array(hollow(ax)) == pytest.approx(np.array(highest))
    assert "highest bin (below π)" in legend(ax)
    ax = response_axes(capture, at=6 / 7)  # 7 has this bin, 5 has none so high
    assert [x for x, _ in hollow(ax)] == [1.0]
    ax = response_axes(capture, at=0.5)
    assert hollow(ax) == []
    assert legend(ax) == ["pooling/subsampling"]


def test_shading_spans_the_step_into_each_attention_and_each_coarser_layer():
    kinds = ["conv", "attention", "mlp", "attention", "attention", "pool"]
    capture = make_capture(grids=(16, 16, 16, 8, 8, 8), kinds=kinds)
    expected = {
        "#e0e0e0": [(0.0, 0.2), (0.4, 0.8)],
        "#bfdcf2": [(0.4, 0.6), (0.8, 1.0)],
    }
    ax = response_axes(capture)
    found = shades(ax)
    assert found.keys() == expected.keys()
    for color, spans in expected.items():
        np.testing.assert_allclose(found[color], spans)
    assert legend(ax) == ["attention", "pooling/subsampling"]


def test_a_first_layer_of_attention_is_shaded_from_the_edge():
    capture = make_capture(grids=(8, 8, 8), kinds=["attention", "mlp", "mlp"])
    ((start, stop, shade),) = shaded_spans(capture)
    assert (start, stop, shade) == (response_axes(capture).get_xlim()[0], 0.0, "attention")


def test_plain_convolutions_are_not_shaded():
    ax = response_axes(make_capture(grids=(8, 8, 8)))
    assert not ax.patches
    assert legend(ax) == []


def test_several_captures_differ_in_colour_dash_and_marker_and_are_not_shaded():
    captures = [make_capture(model=f"m{i}", seed=i, kinds=["attention"] * 4) for i in range(8)]
    ax = response_axes(captures)
    lines = [line for line in ax.lines if line.get_label().startswith("m")]
    assert [line.get_label() for line in lines] == [f"m{i}" for i in range(8)]
    assert len({line.get_color() for line in lines}) == 8
    assert len({line.get_marker() for line in lines}) == 8
    assert all(a._unscaled_dash_pattern != b._unscaled_dash_pattern for a, b in itertools.pairwise(lines))
    assert not ax.patches
    for line, capture in zip(lines, captures, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), [s.at(1) for s in capture.values()])


def test_twenty_captures_are_all_told_apart():
    captures = [make_capture(grids=(8, 8), model=f"m{i}") for i in range(20)]
    lines = response_axes(captures).lines[:20]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


# -- measures ------------------------------------------------------------------------------------------------


def test_a_plain_measure_by_depth():
    capture = make_capture(measures=("feature_variance",))
    line = measure_axes(capture, "feature_variance").lines[0]
    expected = [m.mean[0] for m in capture.measure("feature_variance").values()]
    np.testing.assert_array_equal(line.get_ydata(), expected)


@pytest.mark.parametrize(("at", "index"), [(0.5, 2), (0.6, 2), (0.7, 3), (1.0, 4)])
def test_of_a_measure_over_cutoffs_the_nearest_is_drawn_and_named(at, index):
    capture = make_capture(measures=("high_frequency_share",))
    ax = measure_axes(capture, "high_frequency_share", at=at)
    expected = [m.mean[index] for m in capture.measure("high_frequency_share").values()]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), expected)
    assert ax.get_ylabel() == f"share of non-DC energy above {index / 4:g}π"


def test_of_a_measure_per_head_each_is_a_dot_and_their_mean_the_line():
    capture = make_capture(measures=("attention_distance",))
    ax = measure_axes(capture, "attention_distance")
    heads = np.concatenate([m.mean for m in capture.measure("attention_distance").values()])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), heads.reshape(-1, 3).mean(axis=1))
    (dots,) = [line for line in ax.lines if line.get_marker() == "."]
    np.testing.assert_allclose(dots.get_ydata(), heads)
    np.testing.assert_allclose(dots.get_xdata(), np.repeat([0, 1 / 3, 2 / 3, 1], 3))


@pytest.mark.parametrize(
    ("name", "at", "error"),
    [
        ("attention_distance", 0.5, lambda m: m.standard_error.mean()),
        ("high_frequency_share", 0.75, lambda m: m.standard_error[3]),
    ],
)
def test_errors_of_a_measure_are_those_of_the_capture_and_drawn(name, at, error):
    capture = make_capture(measures=(name,))
    points = measure_trend(capture, name, at).points
    assert [p.error for p in points] == pytest.approx([error(m) for m in capture.measure(name).values()])
    band = measure_axes(capture, name, at=at).collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(max(p.y + p.error for p in points))


def test_a_variance_over_more_than_two_decades_is_on_a_log_axis():
    capture = make_capture(measures=("feature_variance",))
    assert measure_axes(capture, "feature_variance").get_yscale() == "linear"
    capture.layers["block0"].measures["feature_variance"] = Measure(np.array([1e-4]), np.array([1e-3]), 5)
    assert measure_axes(capture, "feature_variance").get_yscale() == "log"


def test_models_without_the_measure_are_named_and_left_out(tmp_path):
    captures = [
        make_capture(model="vit", measures=("attention_distance",)),
        make_capture(model="cnn"),
        make_capture(model="deit", measures=("attention_distance",)),
    ]
    figure = plot(captures, measure="attention_distance", csv=tmp_path / "m.csv")
    assert "without this measure: cnn" in figure.get_supxlabel()
    assert {row["model"] for row in read(tmp_path / "m.csv")} == {"vit", "deit"}


def test_layers_without_spectra_have_their_measure_drawn():
    capture = make_capture(measures=("attention_distance",))
    for record in capture.layers.values():
        record.spectra.clear()
    ax = plot(capture, measure="attention_distance").axes[0]
    assert len(ax.lines[0].get_ydata()) == 4


# -- whole figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_formats(tmp_path, suffix):
    output = tmp_path / f"figure.{suffix}"
    plot(make_capture(grids=(8, 4)), output=output)
    start = output.read_bytes()[:200]
    assert {"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}[suffix] in start.replace(
        b"<!DOCTYPE svg", b"<svg"
    )
    assert sorted(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_the_same_numbers_give_the_same_file(tmp_path, suffix):
    for name in ("a", "b"):
        plot(make_capture(grids=(8, 4)), output=tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_png_is_written_at_200_dpi(tmp_path):
    figure = plot(make_capture(grids=(8, 4)), output=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == tuple(np.round(figure.get_size_inches() * 200).astype(int))


def test_csv_of_one_capture_is_what_is_drawn(tmp_path):
    capture = make_capture(kinds=["conv", "attention", "conv", "pool"])
    figure = plot(capture, csv=tmp_path / "a.csv", axis="input", at=0.9)
    table = read(tmp_path / "a.csv")
    assert tuple(table[0]) == COLUMNS
    spectra, response = figure.axes[:2]
    for line, (name, s) in zip(spectra.lines, capture.items(), strict=False):
        mine = [row for row in table if (row["panel"], row["layer"]) == ("spectrum", name)]
        np.testing.assert_array_equal([number(r["x"]) for r in mine], line.get_xdata())
        np.testing.assert_array_equal([number(r["y"]) for r in mine], line.get_ydata())
        np.testing.assert_array_equal([number(r["frequency"]) for r in mine], s.frequency)
        np.testing.assert_array_equal([number(r["standard_error"]) for r in mine], s.relative_standard_error)
        assert {r["kind"] for r in mine} == {capture.layers[name].attrs["kind"]}
        assert {r["count"] for r in mine} == {"5"}
    mine = [row for row in table if row["panel"] == "response"]
    np.testing.assert_array_equal([number(r["x"]) for r in mine], response.lines[0].get_xdata())
    np.testing.assert_array_equal([number(r["y"]) for r in mine], response.lines[0].get_ydata())
    errors = [s.standard_error_at(0.9) for s in capture.values()]
    np.testing.assert_array_equal([number(r["standard_error"]) for r in mine], errors)
    np.testing.assert_allclose([number(r["frequency"]) for r in mine], [0.9, 0.9, 0.9, 6 / 7])
    assert len(table) == sum(len(s.frequency) for s in capture.values()) + 4


def test_csv_of_a_comparison_is_what_is_drawn(tmp_path):
    captures = [make_capture(model="a"), make_capture(grids=(8, 8), model="b", seed=1)]
    figure = plot(captures, csv=tmp_path / "c.csv")
    table = read(tmp_path / "c.csv")
    response = next(ax for ax in figure.axes if "at π" in ax.get_ylabel())
    for index, name in enumerate("ab"):
        (line,) = [line for line in response.lines if line.get_label() == name]
        mine = [row for row in table if (row["model"], row["panel"]) == (name, "response")]
        np.testing.assert_array_equal([number(r["y"]) for r in mine], line.get_ydata())
        drawn = np.concatenate([line.get_ydata() for line in figure.axes[index].lines[:-1]])
        mine = [row for row in table if (row["model"], row["panel"]) == (name, "spectrum")]
        np.testing.assert_array_equal([number(r["y"]) for r in mine], drawn)


def test_csv_of_a_measure_has_its_curve_its_cutoff_and_its_heads(tmp_path):
    capture = make_capture(measures=("high_frequency_share", "attention_distance"))
    plot(capture, measure="high_frequency_share", csv=tmp_path / "share.csv")
    table = read(tmp_path / "share.csv")
    assert [r["panel"] for r in table] == ["measure_curve"] * 20 + ["measure"] * 4
    assert {r["parameter"] for r in table if r["panel"] == "measure"} == {"0.5"}
    plot(capture, measure="attention_distance", csv=tmp_path / "distance.csv")
    table = read(tmp_path / "distance.csv")
    assert [r["parameter"] for r in table[:4]] == ["", "0", "1", "2"]
    heads = [number(r["y"]) for r in table if r["panel"] == "measure_part"]
    np.testing.assert_allclose(np.reshape(heads, (4, 3)).mean(1), [number(r["y"]) for r in table[::4]])


def test_comparison_shares_axes_and_shows_kinds_in_a_strip():
    captures = [
        make_capture(model="cnn"),
        make_capture(grids=(8, 8), kinds=["attention", "mlp"], model="vit", seed=1),
    ]
    figure = plot(captures)
    first, second = figure.axes[:2]
    assert [ax.get_title() for ax in (first, second)] == ["cnn", "vit"]
    assert first.get_ylim() == second.get_ylim()
    assert first.get_xlim() == second.get_xlim()
    strip = figure.axes[-1]
    drawn = [
        (collection.get_paths()[0].get_extents().x0, collection.get_paths()[0].get_extents().x1, row)
        for collection in strip.collections
        for row in [round(collection.get_paths()[0].get_extents().y0 + 0.4)]
    ]
    expected = [(a, b, row) for row, capture in enumerate(captures) for a, b, _ in shaded_spans(capture)]
    np.testing.assert_allclose(drawn, expected)


def test_one_capture_can_be_drawn_as_a_comparison():
    figure = plot(make_capture(grids=(8, 8)), compare=True)
    assert figure.axes[0].get_title() == "net"


def test_differing_numbers_of_images_are_told(tmp_path):
    assert "n = 5 images (noise)" in plot(make_capture()).get_supxlabel()
    counted = make_capture()
    counted.attrs["images"] = "photographs: 5 images"
    assert "n = 5 images (photographs)" in plot(counted).get_supxlabel()
    figure = plot([make_capture(model="a"), make_capture(model="b", images=3)])
    titles = [ax.get_title().replace("\N{NO-BREAK SPACE}", " ") for ax in figure.axes[:2]]
    assert titles == ["a (n = 5)", "b (n = 3)"]
    other = make_capture(model="b")
    other.attrs["images"] = "street signs"
    assert "not the same images" in plot([make_capture(model="a"), other]).get_supxlabel()


def texts_drawn(figure, monkeypatch):
    """What a renderer is really asked to write: not the tick labels outside limits or of shared axes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles the layout
    found = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, renderer: found.append(self) or draw(self, renderer))
    canvas.draw()
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def test_random_weights_are_told():
    captures = [make_capture(model="a", weights="random seed=0"), make_capture(model="b", weights="b.ckpt")]
    assert "random weights: a" in plot(captures).get_supxlabel()
    assert "random" not in plot(captures[1]).get_supxlabel()


@pytest.mark.parametrize(
    ("models", "options"),
    [(1, {"axis": "input"}), (3, {"measure": "high_frequency_share"}), (5, {}), (8, {"axis": "input"})],
)
def test_text_is_legible_and_overlaps_nothing(models, options, monkeypatch):
    names = ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "cnn", "swin_tiny_patch4_window7_224.ms_in1k"]
    kinds = ["conv", "attention", "pool"]
    captures = [
        make_capture(
            (16, 8, 7),
            kinds,
            images=5 - i % 2,
            model=names[i % 3],
            weights=f"w{i}.pth",
            measures=("high_frequency_share",),
        )
        for i in range(models)
    ]
    figure = plot(captures, **options)
    texts = texts_drawn(figure, monkeypatch)
    assert min(text.get_fontsize() for text in texts) >= 8
    boxes = [(text.get_window_extent(), text.get_text()) for text in texts]
    for box, text in boxes:
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
    assert [(a[1], b[1]) for a, b in itertools.combinations(boxes, 2) if a[0].overlaps(b[0])] == []


# -- edges ---------------------------------------------------------------------------------------------------


def test_a_grid_of_dc_alone_has_no_response(tmp_path):
    capture = make_capture(grids=(8, 4, 1))
    figure = plot(capture, output=tmp_path / "a.png", csv=tmp_path / "a.csv")
    y = figure.axes[1].lines[0].get_ydata()
    assert np.isfinite(y).tolist() == [True, True, False]
    assert "1 layer with no frequency but 0 left out" in figure.get_supxlabel()
    assert read(tmp_path / "a.csv")[-1]["y"] == ""


@pytest.mark.parametrize(
    ("grids", "images", "options"),
    [
        ((1,), 1, {}),
        ((1, 1), 2, {"axis": "input"}),
        ((1, 1), 2, {"reference": "first"}),
        ((2, 1), 1, {"reference": "first", "compare": True}),
        ((2, 1), 2, {"compat": "park-kim"}),
        ((8,), 2, {"compare": True}),
        ((8,) * 60, 2, {}),
    ],
)
def test_few_and_many_layers_draw(tmp_path, grids, images, options):
    plot(make_capture(grids, images=images), output=tmp_path / "a.png", **options)
    assert (tmp_path / "a.png").stat().st_size > 0


def test_one_image_has_no_bands_and_says_so(tmp_path):
    figure = plot(make_capture(images=1), csv=tmp_path / "a.csv")
    assert not any(ax.collections for ax in figure.axes[:2])
    assert "no error bands: one image" in figure.get_supxlabel()
    assert {row["standard_error"] for row in read(tmp_path / "a.csv")} == {""}


def test_dollar_signs_and_underscores_in_names_are_themselves(tmp_path):
    captures = [make_capture(model="a_{b}$c$"), make_capture(model="plain")]
    for capture in captures:
        capture.attrs["images"] = "cost $1 or $2"
    plot(captures, output=tmp_path / "a.png")
    plot(captures[0], output=tmp_path / "b.svg")


@pytest.mark.parametrize("path", ["horizontal", "radial"])
def test_other_paths(path):
    capture = make_capture(paths=("diagonal", path))
    ax = plot(capture, path=path).axes[0]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), capture.along(path)["block1"].relative)
    assert path in ax.get_xlabel()


def test_reference_first():
    capture = make_capture()
    ax = plot(capture, reference="first").axes[0]
    expected = capture["block0"].log_amplitude - capture["block0"].log_amplitude[1]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), expected)


def test_notebook_form():
    capture = make_capture()
    figure = plot(capture, compat="park-kim")
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), capture.park_kim()["block0"].relative)
    assert len(figure.axes[0].lines[0].get_ydata()) == 8  # of 9 bins: the one at π is missing
    assert "notebook" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize(
    ("captures", "names"),
    [
        ([("vit", "a.ckpt"), ("cnn", "a.ckpt")], ["vit", "cnn"]),
        ([("prs", "x/prs.ckpt"), ("prs", "x/prs-uniform.ckpt")], ["prs", "prs-uniform"]),
        ([("vit", "old.pth"), ("vit", "new.pth")], ["vit, old", "vit, new"]),
        ([("vit", "random seed=0"), ("vit", "random seed=1")], ["vit, random seed=0", "vit, random seed=1"]),
        ([("vit", ""), ("vit", "")], ["vit #1", "vit #2"]),
        ([("vit", "a.ckpt"), ("vit", "a.ckpt")], ["vit, a #1", "vit, a #2"]),
    ],
)
def test_names_are_short_and_unique(captures, names):
    assert unique_names([Capture({"model": m, "weights": w}, {}) for m, w in captures]) == names


def test_files_are_read_and_named_by_their_stems(tmp_path):
    for name in ("before", "after"):
        with Writer(tmp_path / f"{name}.h5") as writer:
            writer.finish(make_capture(grids=(8, 4), weights=""))
    figure = plot([tmp_path / "before.h5", str(tmp_path / "after.h5")])
    assert [ax.get_title() for ax in figure.axes[:2]] == ["net, before", "net, after"]
    assert plot(tmp_path / "before.h5").axes[0].lines


# -- training ------------------------------------------------------------------------------------------------


def make_series(epochs=(0, 5, 10), **options):
    """A network whose layers turn to attention one by one, the last first."""
    count = len(epochs)
    return [
        (epoch, make_capture(kinds=["conv"] * (4 - i) + ["attention"] * i, seed=i, model="prs", **options))
        for i, epoch in zip(range(count), epochs, strict=True)
    ]


def test_a_line_per_epoch_by_depth(tmp_path):
    series = make_series()
    ax = training_axes(series, at=0.5)
    for line, (_, capture) in zip(ax.lines, series, strict=False):
        np.testing.assert_array_equal(line.get_ydata(), [s.at(0.5) for s in capture.values()])
    assert len({to_hex(line.get_color()) for line in ax.lines[:3]}) == 3


def test_training_figure_shows_the_last_layer_and_the_schedule(tmp_path):
    series = make_series()
    figure = plot_training(series, output=tmp_path / "t.png", csv=tmp_path / "t.csv")
    response, last, strip = figure.axes[:3]
    assert last.get_title() == "last layer: block3"
    for line, (_, capture) in zip(last.lines, series, strict=False):
        np.testing.assert_array_equal(line.get_ydata(), capture["block3"].relative)
    assert [t.get_text() for t in strip.get_yticklabels()] == ["0", "5", "10"]
    assert "attention" in legend(response)
    table = read(tmp_path / "t.csv")
    assert {row["epoch"] for row in table} == {"0", "5", "10"}
    mine = [number(r["y"]) for r in table if (r["epoch"], r["panel"]) == ("5", "response")]
    np.testing.assert_array_equal(mine, solid(response)[1].get_ydata())


def test_training_of_a_network_that_never_attends_has_no_strip():
    series = [(epoch, make_capture(seed=epoch)) for epoch in range(2)]
    assert [ax.get_ylabel() for ax in plot_training(series).axes].count("epoch") == 0


@pytest.mark.parametrize("epochs", [(3,), tuple(range(40))])
def test_short_and_long_series(tmp_path, epochs):
    series = [(epoch, make_capture(grids=(8, 4), kinds=["conv", "attention"])) for epoch in epochs]
    plot_training(series, output=tmp_path / "t.png")


def test_a_measure_through_training(tmp_path):
    series = make_series(measures=("feature_variance",))
    figure = plot_training(series, measure="feature_variance", csv=tmp_path / "t.csv")
    expected = [m.mean[0] for m in series[1][1].measure("feature_variance").values()]
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), expected)
    assert len(read(tmp_path / "t.csv")) == 12


def test_the_last_layer_shown_is_one_with_a_spectrum():
    series = [(epoch, make_capture(grids=(8, 4, 1), seed=epoch)) for epoch in range(2)]
    assert plot_training(series).axes[1].get_title() == "last layer: block1"


# -- errors and manners --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": 1.5}, "at=1.5 is outside"),
        ({"at": math.nan}, "at=nan is outside"),
        ({"axis": "pixels"}, "axis='pixels'.*normalized, input"),
        ({"reference": "mean"}, "reference='mean'"),
        ({"compat": "matlab"}, "compat='matlab'.*park-kim"),
        ({"compat": "park-kim", "axis": "input"}, "leave out axis='input'"),
        ({"path": "spiral"}, "path='spiral'.*choose from"),
        ({"path": "radial"}, "no radial spectra.*--path radial"),
        ({"measure": "kurtosis"}, "no measure 'kurtosis'.*--measure kurtosis"),
        ({"output": "figure.jpg"}, r"figure.jpg: a figure ends in .png, .svg, .pdf"),
        ({"output": "nowhere/figure.png"}, "folder nowhere does not exist"),
        ({"csv": "nowhere/figure.csv"}, "folder nowhere does not exist"),
    ],
)
@pytest.mark.parametrize("draw", [plot, lambda c, **options: plot_training([(0, c)], **options)])
def test_options_that_do_not_fit(draw, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FourierBiasError, match=message) as error:
        draw(make_capture(), **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot([]), "no captures"),
        (lambda: plot_training([]), "no captures"),
        (lambda: response_axes([]), "no captures"),
        (lambda: plot(3.0), "cannot plot a float"),
        (lambda: plot([3]), "cannot plot a int"),
        (lambda: plot(Capture({"model": "mlp"}, {})), "mlp holds no layer with spatial maps"),
        (lambda: spectra_axes(Capture({}, {})), "holds no layer"),
        (lambda: response_axes(Capture({}, {})), "holds no layer"),
        (lambda: response_axes(make_capture(), at=-0.1), "at=-0.1 is outside"),
        (lambda: spectra_axes(make_capture(), axis="log"), "axis='log'"),
        (lambda: spectra_axes(make_capture(paths=("2d",))), "2-D spectrum is no curve"),
        (lambda: plot(make_capture(paths=("2d",))), "2-D spectrum is no curve"),
        (lambda: plot("missing.h5"), "no file missing.h5"),
    ],
)
def test_captures_that_do_not_fit(draw, message):
    with pytest.raises(FourierBiasError, match=message):
        draw()


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *args, **options):
        args[0].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(FourierBiasError, match=r"cannot write .*a\.png: No space left"):
        plot(make_capture(), output=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_no_state_is_left_behind():
    before = dict(matplotlib.rcParams)
    plot(make_capture())
    response_axes(make_capture())
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_imported():
    code = "import sys, fourierbias; fourierbias.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rows_of_a_capture_have_the_columns():
    for row in rows(make_capture(grids=(4,)), "net", View()):
        assert set(row) <= set(COLUMNS)
        assert row["model"] == "net"


def test_a_real_capture_is_drawn(tmp_path):
    capture = fourierbias.capture(
        timm.create_model("test_vit"), torch.rand(3, 3, 160, 160), layers="sublayers"
    )
    figure = fourierbias.plot(capture, output=tmp_path / "vit.png")
    kinds = [record.attrs["kind"] for record in capture.layers.values()]
    assert len(shades(figure.axes[1])["#e0e0e0"]) == kinds.count("attention")
