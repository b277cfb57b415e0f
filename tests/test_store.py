import h5py
import numpy as np
import pytest
import torch

import fourierbias
from fourierbias import FourierBiasError
from fourierbias.accumulate import Moments
from fourierbias.spectra import MapReducer, make_spectrum
from fourierbias.store import Capture, CapturedLayer, Measure, load
from fourierbias.writing import Writer

PATHS = ("diagonal", "horizontal", "radial", "2d")


def make_capture():
    reducer = MapReducer(PATHS)
    layers = {}
    for index, (name, grid) in enumerate({"stem": (8, 8), "blocks.0:attn": (4, 6)}.items()):
        sums = reducer.moments(*grid)
        maps = torch.randn(5, 3, *grid, dtype=torch.float64)
        for key, values in reducer.finish([reducer.project(maps)])[0].items():
            sums[key].update(values.numpy())
        moments = reducer.quantities(sums, *grid)
        attrs = {"index": index, "depth": float(index), "kind": "conv", "height": grid[0], "width": grid[1]}
        spectra = {path: make_spectrum(moments, path, grid, attrs=attrs) for path in PATHS}
        heads = Moments(3)
        heads.update(np.arange(6.0).reshape(2, 3))
        measures = {
            "feature_variance": Measure(np.array([1.5]), np.array([0.1]), 5),
            "attention_distance": Measure(
                heads.mean, heads.standard_error, 2, np.arange(3), "head", {"stride": 4.0}
            ),
        }
        layers[name] = CapturedLayer(attrs, spectra, measures)
    attrs = {
        "model": "demo",
        "weights": "random seed=0",
        "weights_sha256": None,
        "preprocessing": {"mean": [0.5]},
    }
    return Capture(attrs, layers, images=["a.png", "ünï/b.png"], labels=["cat", "dog"])


def write(path, capture, **options):
    with Writer(path, **options) as writer:
        return writer.finish(capture)


def test_a_file_gives_back_what_was_captured(tmp_path):
    capture = make_capture()
    write(tmp_path / "a.h5", capture)
    back = load(tmp_path / "a.h5")
    assert list(back) == list(capture) == ["stem", "blocks.0:attn"]
    assert back.images == capture.images
    assert back.labels == capture.labels
    assert {key: back.attrs[key] for key in capture.attrs} == capture.attrs
    for path in PATHS:
        for name, spectrum in capture.along(path).items():
            other = back.along(path)[name]
            for field in (
                "frequency",
                "log_amplitude",
                "relative",
                "standard_error",
                "relative_standard_error",
            ):
                np.testing.assert_allclose(
                    getattr(other, field), getattr(spectrum, field), rtol=1e-12, atol=1e-12
                )
            assert (other.count, other.rejected, other.eps, other.path) == (5, 0, 1e-6, path)
            assert other.attrs == spectrum.attrs
    for name in ("feature_variance", "attention_distance"):
        ours, theirs = capture.measure(name)["stem"], back.measure(name)["stem"]
        np.testing.assert_array_equal(theirs.mean, ours.mean)
        np.testing.assert_array_equal(theirs.standard_error, ours.standard_error)
        assert (theirs.count, theirs.axis_name, theirs.attrs) == (ours.count, ours.axis_name, ours.attrs)


def test_other_programs_find_a_curve(tmp_path):
    write(tmp_path / "a.h5", make_capture())
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["complete"]
        group = file
        while "default" in group.attrs:  # the chain of NeXus to what is shown on opening
            group = group[group.attrs["default"]]
        assert group.attrs["NX_class"] == "NXdata"
        signal = group[group.attrs["signal"]]
        assert signal.dims[0]["frequency"] == group["frequency"]
        assert list(group.attrs["axes"]) == ["frequency"]
        assert group["log_amplitude_errors"] == group["standard_error"]
        assert group["log_amplitude_2d"].shape == (4, 6)
        assert group["radial/log_amplitude"].shape == (3,)
        assert group["feature_variance"].shape == ()


def spoil(path, change):
    write(path, make_capture())
    with h5py.File(path, "r+") as file:
        change(file)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.attrs.modify("format", "other"), "not one of fourierbias"),
        (lambda file: file.attrs.modify("complete", False), "unfinished"),
        (lambda file: file.attrs.modify("format_version", 99), "update fourierbias"),
        (lambda file: file.__delitem__("layers"), "not a readable"),
        (lambda file: file["layers/stem"].__delitem__("frequency"), "not a readable"),
        (lambda file: file["layers/stem"].attrs.__delitem__("index"), "not a readable"),
    ],
)
def test_files_that_are_not_whole_captures_are_refused(tmp_path, change, message):
    with pytest.raises(FourierBiasError, match=message):
        load(spoil(tmp_path / "a.h5", change))


def test_files_that_are_not_hdf5_are_refused(tmp_path):
    with pytest.raises(FourierBiasError, match=r"no file .*fourierbias capture"):
        load(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(FourierBiasError, match="not a readable"):
        load(tmp_path / "text.h5")
    whole = tmp_path / "a.h5"
    write(whole, make_capture())
    (tmp_path / "cut.h5").write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(FourierBiasError, match="not a readable"):
        load(tmp_path / "cut.h5")


def test_a_capture_is_a_mapping_with_views():
    capture = make_capture()
    assert len(capture) == 2
    assert capture["stem"].path == "diagonal"
    assert capture.along("radial")["stem"].path == "radial"
    assert capture.with_reference("first")["stem"].relative[1] == 0
    assert "demo" in repr(capture)
    with pytest.raises(FourierBiasError, match=r"no vertical.*--path vertical"):
        capture.along("vertical")
    with pytest.raises(FourierBiasError, match="'spiral' is not known"):
        capture.along("spiral")
    with pytest.raises(FourierBiasError, match=r"no measure 'gate'.*feature_variance"):
        capture.measure("gate")
    with pytest.raises(FourierBiasError, match="square"):
        capture.park_kim()


def test_the_face_offers_load(tmp_path):
    write(tmp_path / "a.h5", make_capture())
    assert list(fourierbias.load(tmp_path / "a.h5")) == ["stem", "blocks.0:attn"]
