import numpy as np
import pytest
import reference
import torch

import fourierbias
from fourierbias import FourierBiasError, spectrum
from fourierbias.spectra import MapReducer, make_spectrum

GRIDS = [(1, 1), (2, 2), (3, 3), (7, 7), (8, 8), (14, 14), (33, 33), (6, 9), (10, 4), (5, 8)]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.3, 1, size=shape)


@pytest.mark.parametrize("path", ["diagonal", "horizontal", "vertical", "radial"])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_path_equals_the_definition(path, grid):
    maps = noise(3, 4, *grid)
    frequency, expected = reference.along(maps, path)
    got = spectrum(maps, path=path)
    np.testing.assert_allclose(got.frequency, frequency, atol=1e-15)
    np.testing.assert_allclose(got.log_amplitude, expected, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
def test_2d_equals_the_definition_with_dc_at_the_centre(grid):
    maps = noise(3, 4, *grid)
    got = spectrum(maps, path="2d")
    np.testing.assert_allclose(
        got.log_amplitude, np.fft.fftshift(reference.log_amplitude_map(maps)), atol=1e-9
    )
    height, width = grid
    assert got.relative[height // 2, width // 2] == 0
    assert got.frequency.shape == (*grid, 2)
    assert not got.frequency[height // 2, width // 2].any()
    per_image = np.fft.fftshift(np.log(np.abs(np.fft.fft2(maps)) + 1e-6).mean(axis=1), axes=(-2, -1))
    np.testing.assert_allclose(got.standard_error, per_image.std(0, ddof=1) / np.sqrt(3), atol=1e-6)


@pytest.mark.parametrize("side", [2, 4, 7, 8, 14, 16, 28, 33])
def test_park_kim_form_equals_the_notebook(side):
    maps = noise(2, 3, side, side)
    axis, expected = reference.notebook(maps)
    got = spectrum(maps, compat="park-kim")
    np.testing.assert_allclose(got.relative, expected, atol=1e-9)
    np.testing.assert_array_equal(got.frequency, axis)


def test_park_kim_stops_short_of_pi_and_the_true_axis_does_not():
    # Table of methods.md 4.3: the notebook's last value on a 14-grid is at 0.857π, labelled 1.
    maps = noise(2, 3, 14, 14)
    true, notebook = spectrum(maps), spectrum(maps, compat="park-kim")
    assert true.frequency[-1] == 1
    assert notebook.relative[-1] == pytest.approx(true.at(12 / 14))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_layouts_agree(dtype):
    maps = torch.from_numpy(noise(2, 5, 6, 8)).to(dtype)
    expected = reference.along(maps.double().numpy(), "diagonal")[1]
    forms = {
        "NCHW": spectrum(maps),
        "numpy": spectrum(maps.float().numpy()),
        "NHWC": spectrum(maps.permute(0, 2, 3, 1).contiguous(), layout="NHWC"),
        "channels_last": spectrum(maps.contiguous(memory_format=torch.channels_last)),
        "tokens": spectrum(maps.flatten(2).mT.contiguous(), grid=(6, 8)),
        "strided": spectrum(torch.stack([maps, maps], dim=-1)[..., 0]),
    }
    for name, got in forms.items():
        np.testing.assert_allclose(got.log_amplitude, expected, atol=1e-9, err_msg=name)


def test_the_hot_path_in_float32_keeps_six_digits():
    for maps in (torch.randn(4, 16, 14, 14), torch.randn(4, 196, 16).mT.unflatten(2, (14, 14))):
        expected = reference.along(maps.numpy(), "diagonal")[1]
        np.testing.assert_allclose(MapReducer()(maps)["diagonal"].mean(0), expected, atol=2e-5)


def test_autocast_does_not_reach_the_arithmetic():
    maps = torch.randn(2, 4, 14, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = MapReducer()(maps)["diagonal"]
    assert torch.equal(under, MapReducer()(maps)["diagonal"])


def test_a_cosine_has_one_bin():
    y, x = np.mgrid[:16, :16]
    wave = np.cos(2 * np.pi * 3 * (y + x) / 16)[None, None]
    got = np.exp(spectrum(wave).log_amplitude)
    np.testing.assert_allclose(got, np.where(np.arange(9) == 3, 128, 0), atol=2e-6)


def test_a_delta_is_flat():
    delta = np.zeros((1, 1, 9, 12))
    delta[0, 0, 4, 7] = 1
    for path in ("diagonal", "horizontal", "vertical", "radial", "2d"):
        np.testing.assert_allclose(spectrum(delta, path=path).relative, 0, atol=1e-12)


def test_a_checkerboard_lies_at_pi_where_the_notebook_does_not_look():
    y, x = np.mgrid[:14, :14]
    board = ((-1.0) ** (y + x))[None, None]
    assert spectrum(board).log_amplitude[-1] == pytest.approx(np.log(196))
    np.testing.assert_allclose(spectrum(board, compat="park-kim").log_amplitude, np.log(1e-6), atol=1e-6)


def test_stripes_show_on_their_own_axis_only():
    stripes = np.tile((-1.0) ** np.arange(8), (8, 1))[None, None]  # varies along x
    assert spectrum(stripes, path="horizontal").log_amplitude[-1] == pytest.approx(np.log(64))
    assert spectrum(stripes, path="vertical").log_amplitude.max() == pytest.approx(np.log(1e-6))
    assert spectrum(stripes).log_amplitude.max() == pytest.approx(np.log(1e-6))


def test_a_constant_is_all_dc_also_in_float32():
    got = spectrum(np.full((2, 3, 14, 14), 0.1, dtype=np.float32))
    assert got.log_amplitude[0] == pytest.approx(np.log(19.6), abs=1e-6)
    np.testing.assert_allclose(got.log_amplitude[1:], np.log(1e-6), atol=1e-6)


def test_standard_errors_are_those_of_the_per_image_values():
    maps = noise(6, 4, 8, 8)
    images = [reference.along(image[None], "diagonal")[1] for image in maps]
    got = spectrum(maps)
    np.testing.assert_allclose(got.standard_error, np.std(images, 0, ddof=1) / np.sqrt(6), rtol=1e-6)
    relative = np.array([image - image[0] for image in images])
    expected = relative.std(0, ddof=1) / np.sqrt(6)
    np.testing.assert_allclose(got.relative_standard_error, expected, rtol=1e-6, atol=1e-12)
    between = np.array([np.interp(0.6, got.frequency, image) for image in relative])
    assert got.at(0.6) == pytest.approx(between.mean())
    assert got.standard_error_at(0.6) == pytest.approx(between.std(ddof=1) / np.sqrt(6))


def test_reference_first_is_the_lowest_bin_and_free_of_the_mean():
    maps = noise(4, 3, 8, 8)
    shifted = spectrum(maps + 10, reference="first")
    np.testing.assert_allclose(
        shifted.relative[1:], spectrum(maps, reference="first").relative[1:], atol=1e-9
    )
    assert shifted.relative[1] == 0
    assert spectrum(maps + 10).relative[-1] < spectrum(maps).relative[-1] - 2
    assert np.isnan(spectrum(noise(1, 1, 1, 1), reference="first").relative).all()


def test_an_odd_grid_is_read_at_its_highest_bin():
    got = spectrum(noise(2, 2, 7, 7))
    assert got.highest == pytest.approx(6 / 7)
    assert got.at(1.0) == got.relative[-1]


def test_dead_channels_are_counted_and_can_be_dropped():
    maps = noise(3, 4, 8, 8)
    half_dead = np.concatenate([maps, np.zeros_like(maps)], axis=1)
    kept, dropped = spectrum(half_dead), spectrum(half_dead, dead_channels="drop")
    assert kept.dead_share == dropped.dead_share == 0.5
    np.testing.assert_allclose(dropped.log_amplitude, spectrum(maps).log_amplitude, atol=1e-12)
    np.testing.assert_allclose(
        kept.log_amplitude, (spectrum(maps).log_amplitude + np.log(1e-6)) / 2, atol=1e-9
    )


def test_images_with_nan_or_inf_are_left_out_with_a_warning():
    maps = noise(5, 3, 8, 8)
    spoiled = maps.copy()
    spoiled[1, 2, 3, 3], spoiled[4, 0, 0, 0] = np.nan, np.inf
    with pytest.warns(UserWarning, match="2 of 5"):
        got = spectrum(spoiled)
    assert (got.count, got.rejected) == (3, 2)
    np.testing.assert_allclose(got.log_amplitude, spectrum(maps[[0, 2, 3]]).log_amplitude, atol=1e-12)


@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (6, 9), (1, 1)])
def test_feature_variance_and_high_frequency_share_equal_their_definitions(grid):
    maps = torch.from_numpy(noise(3, 4, *grid))
    reducer = MapReducer(high_frequency_share=True)
    for view in (maps, maps.contiguous(memory_format=torch.channels_last)):
        values = reducer(view)
        if grid != (1, 1):
            np.testing.assert_allclose(
                values["feature_variance"][:, 0], reference.feature_variance(maps), rtol=1e-9
            )
            for index, cutoff in enumerate(reducer.cutoffs):
                expected = reference.high_frequency_share(maps, cutoff)
                np.testing.assert_allclose(values["high_frequency_share"][:, index], expected, atol=1e-12)
        else:
            assert not values["feature_variance"].any()
            assert not values["high_frequency_share"].any()


def test_several_paths_at_once_equal_each_alone():
    maps = torch.from_numpy(noise(3, 4, 6, 10))
    paths = ("vertical", "2d", "diagonal", "radial", "horizontal")
    reducer = MapReducer(paths)
    sums = reducer.moments(6, 10)
    for name, values in reducer.finish([reducer.project(maps)])[0].items():
        sums[name].update(values.numpy())
    moments = reducer.quantities(sums, 6, 10)
    for path in paths:
        got = make_spectrum(moments, path, (6, 10))
        np.testing.assert_allclose(got.log_amplitude, spectrum(maps, path=path).log_amplitude, atol=1e-12)


def test_a_large_array_is_done_in_pieces(monkeypatch):
    maps = noise(7, 3, 8, 8)
    whole = spectrum(maps)
    monkeypatch.setattr(fourierbias.spectra, "_CHUNK_ELEMENTS", 2 * 3 * 64)
    pieces = spectrum(maps)
    np.testing.assert_allclose(pieces.log_amplitude, whole.log_amplitude, atol=1e-13)
    np.testing.assert_allclose(pieces.standard_error, whole.standard_error, rtol=1e-9)


def test_gradients_are_not_poisoned_by_a_basis_made_under_inference_mode():
    with torch.inference_mode():
        MapReducer()(torch.randn(1, 2, 11, 11))
    x = torch.randn(1, 2, 11, 11, requires_grad=True)
    MapReducer()(x)["diagonal"].sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 3, 4, 4), dtype=int),), "float"),
        ((np.ones((2, 16, 3)),), "grid"),
        ((np.ones((4, 4)),), "shape"),
        ((np.ones((0, 3, 4, 4)),), "no values"),
        (([1.0, 2.0],), "numpy array"),
    ],
)
def test_arrays_that_are_no_maps_are_refused(arguments, message):
    with pytest.raises(FourierBiasError, match=message):
        spectrum(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "spiral"}, "spiral.*diagonal"),
        ({"reference": "last"}, "last.*first"),
        ({"dead_channels": "mend"}, "keep, drop"),
        ({"compat": "other"}, "park-kim"),
        ({"eps": -1.0}, "eps"),
        ({"layout": "CHWN"}, "NHWC"),
    ],
)
def test_options_that_are_not_known_are_refused(options, message):
    with pytest.raises(FourierBiasError, match=message):
        spectrum(noise(1, 2, 4, 4), **options)


def test_tokens_with_a_class_token_are_refused():
    with pytest.raises(FourierBiasError, match="class and register tokens"):
        spectrum(noise(1, 17, 3), grid=(4, 4))


def test_park_kim_needs_a_square_diagonal():
    with pytest.raises(FourierBiasError, match="square"):
        spectrum(noise(1, 2, 4, 6), compat="park-kim")
    with pytest.raises(FourierBiasError, match="diagonal"):
        spectrum(noise(1, 2, 4, 4), path="radial", compat="park-kim")


def test_at_refuses_what_has_no_frequency():
    with pytest.raises(FourierBiasError, match="outside"):
        spectrum(noise(1, 2, 4, 4)).at(1.5)
    with pytest.raises(FourierBiasError, match="2-D"):
        spectrum(noise(1, 2, 4, 4), path="2d").at(0.5)
