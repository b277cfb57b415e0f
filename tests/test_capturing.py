import numpy as np
import pytest
import reference
import timm
import torch
from torch import nn

import fourierbias
from fourierbias import FourierBiasError, capture
from fourierbias.capturing import inspect
from fourierbias.images import open_images
from fourierbias.models.loading import load_model


def maps_of(model, modules, images, batch_size=None):
    """Outputs of named modules, by plain hooks of the test's own.

    Give the batch size of the capture where values are compared closely: a float32 forward depends a little
    on how images are batched, and the logarithm of an amplitude that is almost zero depends much on that.
    """
    kept = {name: [] for name in modules}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: kept[name].append(output.clone())
        )
        for name in modules
    ]
    with torch.no_grad():
        for batch in images.split(batch_size or len(images)):
            model.eval()(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def photographs(loaded):
    batches = list(open_images("photos", loaded.preprocessing, batch_size=16))
    return torch.cat([batch.images for batch in batches])


def check_against_definition(result, maps):
    for name, values in maps.items():
        side = values.shape[-1]
        expected = np.diag(reference.log_amplitude_map(values.numpy()))[: side // 2 + 1]
        np.testing.assert_allclose(result[name].frequency, 2 * np.arange(side // 2 + 1) / side, atol=1e-12)
        np.testing.assert_allclose(result[name].log_amplitude, expected, atol=1e-4)
        axis, relative = reference.notebook(values.numpy())
        np.testing.assert_allclose(result[name].park_kim().relative, relative, atol=1e-4)
        np.testing.assert_array_equal(result[name].park_kim().frequency, axis)


def test_resnet50_blocks_on_photographs_equal_the_definition():
    loaded = load_model("resnet50", seed=0)
    # Zero-initialised last norms make every residual branch of an untrained ResNet silent: wake them up.
    for block in (m for m in loaded.module.modules() if isinstance(m, timm.models.resnet.Bottleneck)):
        nn.init.uniform_(block.bn3.weight, 0.5, 1.5)
    result = capture(loaded, "photos", layers="blocks", batch_size=8)
    assert [spectrum.count for spectrum in result.values()] == [16] * 16
    check_against_definition(result, maps_of(loaded.module, list(result), photographs(loaded), 8))
    sublayers = capture(loaded, "photos", layers="sublayers", batch_size=8)
    for name in result:
        np.testing.assert_array_equal(sublayers[name].log_amplitude, result[name].log_amplitude)


def test_vit_tiny_sublayers_on_photographs_equal_the_definition():
    loaded = load_model("vit_tiny_patch16_224", seed=0)
    result = capture(loaded, "photos", layers="sublayers", batch_size=8)
    model = loaded.module
    states = {}
    with torch.no_grad():
        for images in photographs(loaded).split(8):  # as the capture: see maps_of
            tokens = model._pos_embed(model.patch_embed(images))
            for index, block in enumerate(model.blocks):
                tokens = tokens + block.attn(block.norm1(tokens))
                states.setdefault(f"blocks.{index}:attn", []).append(tokens[:, 1:].mT.unflatten(2, (14, 14)))
                tokens = tokens + block.mlp(block.norm2(tokens))
                states.setdefault(f"blocks.{index}:mlp", []).append(tokens[:, 1:].mT.unflatten(2, (14, 14)))
    assert list(result) == list(states)
    check_against_definition(result, {name: torch.cat(parts) for name, parts in states.items()})


def test_what_a_file_holds_is_what_was_returned(tmp_path):
    model = timm.create_model("test_resnet")
    images = torch.randn(5, 3, 64, 64)
    options = {"paths": ("diagonal", "radial", "2d"), "measures": ["high_frequency_share"], "batch_size": 2}
    result = capture(
        model, images, output=tmp_path / "a.h5", features=True, feature_dtype="float32", **options
    )
    back = fourierbias.load(tmp_path / "a.h5")
    assert list(back) == list(result)
    assert back.attrs["count"] == 5
    maps = maps_of(model, list(result), images)
    for name in result:
        np.testing.assert_allclose(back[name].relative, result[name].relative, atol=1e-12)
        np.testing.assert_allclose(back.feature_maps(name), maps[name], rtol=1e-5, atol=1e-5)
        radial = reference.along(maps[name].numpy(), "radial")[1]
        np.testing.assert_allclose(back.along("radial")[name].log_amplitude, radial, atol=1e-4)
        share = back.measure("high_frequency_share")[name]
        expected = reference.high_frequency_share(maps[name].numpy(), share.axis[10])
        np.testing.assert_allclose(share.mean[10], expected.mean(), rtol=1e-4)
        np.testing.assert_allclose(share.standard_error[10], expected.std(ddof=1) / 5**0.5, rtol=1e-3)
        variance = back.measure("feature_variance")[name]
        np.testing.assert_allclose(variance.mean[0], reference.feature_variance(maps[name]).mean(), rtol=1e-4)
    depths = [spectrum.attrs["depth"] for spectrum in back.values()]
    assert depths == list(np.linspace(0, 1, len(back)))


def test_batches_do_not_change_the_result():
    model, images = timm.create_model("test_vit", img_size=32), torch.randn(7, 3, 32, 32)
    whole, parts = (capture(model, images, batch_size=size) for size in (7, 3))
    for name in whole:
        np.testing.assert_allclose(parts[name].log_amplitude, whole[name].log_amplitude, atol=1e-5)
        np.testing.assert_allclose(parts[name].standard_error, whole[name].standard_error, rtol=1e-3)
    half = capture(model, images[:4])
    assert not np.allclose(half["blocks.0"].log_amplitude, whole["blocks.0"].log_amplitude, atol=1e-5)


def test_the_users_model_is_left_alone():
    model = timm.create_model("test_resnet")
    model.layer1.eval()
    model.conv1[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    capture(model, torch.randn(2, 3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()  # nothing left in it that autograd refuses


def test_datasets_loaders_and_progress():
    model, images = timm.create_model("test_resnet"), torch.randn(5, 3, 32, 32)
    expected = capture(model, images, batch_size=2)
    data = torch.utils.data.TensorDataset(images, torch.arange(5))
    calls = []
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    for source in (data, loader):
        result = capture(
            model, source, batch_size=2, progress=lambda done, total: calls.append((done, total))
        )
        for name in expected:
            np.testing.assert_allclose(result[name].log_amplitude, expected[name].log_amplitude, atol=1e-5)
    assert calls == [(2, 5), (4, 5), (5, 5)] * 2
    assert [int(label) for label in result.labels] == list(range(5))


class Spoiler(nn.Module):
    """Gives NaN for images whose first pixel is above 5."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        bad = x[:, :1, :1, :1] > 5
        return self.second(self.first(x).masked_fill(bad, torch.nan))


def test_images_that_give_nan_are_left_out_of_that_layer_with_a_warning():
    model, images = Spoiler(), torch.randn(6, 3, 16, 16)
    images[2, 0, 0, 0] = images[5, 0, 0, 0] = 9
    with pytest.warns(UserWarning, match="layer second: 2 of 6 images gave NaN"):
        result = capture(model, images, layers=["first", "second"])
    assert (result["first"].count, result["second"].count, result["second"].rejected) == (6, 4, 2)
    good = capture(model, images[[0, 1, 3, 4]], layers=["second"])
    np.testing.assert_allclose(result["second"].log_amplitude, good["second"].log_amplitude, atol=1e-5)


def test_memory_does_not_grow_with_the_number_of_images():
    import tracemalloc

    model = timm.create_model("test_resnet")

    class Noise(torch.utils.data.Dataset):
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            return torch.full((3, 32, 32), float(index % 7)) + torch.randn(3, 32, 32)

    def peak(count):
        tracemalloc.start()
        capture(model, Noise(count), batch_size=8)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(8)
    few, many = peak(32), peak(256)
    assert many < few + 224 * 2000  # names and indices of the images, nothing of the size of a map


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "blokcs"}, "matches no module"),
        ({"measures": ["entropy"]}, "'entropy' is not known"),
        ({"features": True}, "output="),
        ({"paths": ("zigzag",)}, "'zigzag' is not known"),
        ({"limit": 0}, "images"),
        ({"batch_size": 0}, "batch"),
        ({"device": "cuda:9"}, "device cuda:9 cannot be used"),
        ({"device": "toaster"}, "device toaster cannot be used"),
        ({"calls": "first"}, "'last' or 'each'"),
        ({"layers": ["fc"]}, "gave a spatial map.*fc"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, tmp_path):
    with pytest.raises(FourierBiasError, match=message) as caught:
        capture(timm.create_model("test_resnet"), torch.randn(2, 3, 32, 32), **arguments)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_behind_by_a_failure(tmp_path):
    with pytest.raises(FourierBiasError, match="fails on images of shape"):
        capture(timm.create_model("test_vit"), torch.randn(2, 3, 33, 31), output=tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


def test_inspect_lists_what_capture_takes():
    found, skipped = inspect("vit", "sublayers")
    result = capture("vit", torch.randn(2, 3, 32, 32), layers="sublayers")
    assert [layer.name for layer in found] == list(result)
    assert not skipped


def test_maps_beyond_half_precision_are_told(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    nn.init.constant_(model[0].weight, 1e6)
    words = {"layers": ["0", "1"], "features": True, "overwrite": True, "output": tmp_path / "a.h5"}
    with pytest.warns(UserWarning, match=r"layer 0: values beyond 65504 .* float32") as told:
        capture(model, torch.ones(3, 3, 8, 8), batch_size=1, **words)
    assert len(told) == len({str(warning.message) for warning in told})
    result = capture(model, torch.ones(3, 3, 8, 8), feature_dtype="float32", **words)
    assert np.isfinite(result.feature_maps("0")).all()


def test_eps_and_dead_channels_reach_the_spectra():
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        conv.weight[2:] = conv.bias[2:] = 0
        maps = conv(x)
    plain = capture(conv, x)["Conv2d"].log_amplitude
    for options in ({"eps": 1e-2}, {"dead_channels": "drop"}):
        found, expected = capture(conv, x, **options)["Conv2d"], fourierbias.spectrum(maps, **options)
        np.testing.assert_allclose(found.log_amplitude, expected.log_amplitude, atol=1e-4)
        assert np.abs(found.log_amplitude - plain).min() > 1
    _, expected = reference.along(maps.numpy(), "diagonal", 1e-2)
    np.testing.assert_allclose(fourierbias.spectrum(maps, eps=1e-2).log_amplitude, expected, atol=1e-9)


def test_a_network_of_one_layer_is_kept(tmp_path):
    result = capture(nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 16, 16), output=tmp_path / "a.h5")
    assert list(fourierbias.load(tmp_path / "a.h5")) == list(result) == ["Conv2d"]
