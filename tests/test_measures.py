import math

import numpy as np
import pytest
import reference
import timm
import torch
from timm.layers import set_fused_attn
from timm.models.convit import convit_tiny
from timm.utils import AttentionExtract
from torch import nn

import fourierbias.models.cnn
import fourierbias.models.eit
import fourierbias.models.vit  # noqa: F401 (registers the reference networks with timm)
from fourierbias import FourierBiasError, capture, load
from fourierbias.capturing import MEASURES
from fourierbias.measures import AttentionRecorder, Lattice, attention_distance, head_diversity
from fourierbias.models.agent import share_weights
from fourierbias.models.reparam import ReparamConv2d, recast
from fourierbias.probes import Recorder, choose_probes
from fourierbias.spectra import MapReducer


def distance_by_loops(attention, queries, keys, prefix=0):
    """The definition, one pair at a time: attention (queries, keys) and the coordinates of both."""
    total, rows = 0.0, 0
    for i, (y, x) in enumerate(queries):
        weights = [float(attention[prefix + i][prefix + j]) for j in range(len(keys))]
        if sum(weights):
            distances = [math.hypot(ky - y, kx - x) for ky, kx in keys]
            total += sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights)
            rows += 1
    return total / rows


def raster(height, width, step=1.0, offset=0.0):
    return [(offset + step * y, offset + step * x) for y in range(height) for x in range(width)]


def measured(model, images, measures=("attention_distance", "head_diversity"), layers=None, **options):
    """What an `AttentionRecorder` takes of one forward; of layers, if some are named."""
    size = tuple(images.shape[-2:])
    probes = choose_probes(model, layers) if layers else ()
    with (
        torch.no_grad(),
        AttentionRecorder(model, measures, **options) as attention,
        Recorder(model, probes, lambda layer, maps: None, input_size=size, **options) as recorder,
    ):
        recorder.forward(images)
        values = attention.take_layers(recorder) if layers else attention.take()
    return values, attention


# ------------------------------------------------------------------------------------- hand-made maps


@pytest.mark.parametrize("side", [1, 2, 3, 7, 14])
def test_uniform_attention_has_the_mean_distance_of_two_random_patches(side):
    n = side**2
    found = attention_distance(torch.full((2, 3, n, n), 1 / n), (side, side))
    grid = raster(side, side)
    expected = sum(math.dist(a, b) for a in grid for b in grid) / n**2
    assert found.shape == (2, 3)
    assert found.numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (1, 0), (0, -2), (3, 4), (-1, -1)])
def test_one_hot_attention_at_a_distance_has_that_distance(dy, dx):
    height, width = 9, 11
    attention = torch.zeros(1, 1, height * width, height * width)
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:  # other rows stay empty, and do not count
                attention[0, 0, y * width + x, (y + dy) * width + x + dx] = 1
    assert attention_distance(attention, (height, width)).item() == pytest.approx(math.hypot(dy, dx))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_prefix_tokens_leave_queries_and_keys_and_rows_are_renormalised(prefix, grid):
    n = grid[0] * grid[1] + prefix
    attention = (3 * torch.randn(2, 2, n, n, dtype=torch.float64)).softmax(-1)
    attention[..., prefix:, :prefix] *= 10  # most of the mass is on the prefix, as with attention sinks
    attention /= attention.sum(-1, keepdim=True)
    found = attention_distance(attention, grid, prefix)
    for image in range(2):
        for head in range(2):
            expected = distance_by_loops(attention[image, head], raster(*grid), raster(*grid), prefix)
            assert found[image, head].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "queries"),
    [
        (Lattice(6, 6), Lattice(3, 3, step=2.0)),  # a layer of stride 2
        (Lattice(2, 3, step=2.0, offset=0.5), Lattice(4, 6)),  # keys pooled 2×2
    ],
)
def test_queries_and_keys_may_lie_on_different_lattices(keys, queries):
    attention = torch.rand(1, 2, queries.size, keys.size).softmax(-1)
    found = attention_distance(attention, keys, queries=queries)
    for head in range(2):
        expected = distance_by_loops(attention[0, head], raster(*queries), raster(*keys))
        assert found[0, head].item() == pytest.approx(expected, rel=1e-5)


def test_a_pooled_key_lies_where_the_mean_of_its_patches_lies():
    pooled = Lattice(2, 2, step=3.0, offset=1.0).positions()
    full = Lattice(6, 6).positions().view(2, 3, 2, 3, 2).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(pooled, full)


def test_half_precision_maps_are_summed_in_single():
    attention = torch.rand(1, 1, 64, 64).softmax(-1)
    exact = attention_distance(attention, (8, 8)).item()
    assert attention_distance(attention.bfloat16(), (8, 8)).item() == pytest.approx(exact, rel=1e-3)


def test_a_row_without_mass_makes_no_nan_and_a_nan_stays_one():
    attention = torch.zeros(1, 2, 4, 4)
    attention[0, 1, 0, 0] = math.nan
    nothing, broken = attention_distance(attention, (2, 2))[0]
    assert nothing == 0
    assert broken.isnan()


def test_maps_of_another_size_are_refused_with_the_counts():
    with pytest.raises(FourierBiasError, match=r"\(B, heads, 5, 5\).*4 keys and 1 prefix"):
        attention_distance(torch.ones(1, 1, 6, 6), (2, 2), prefix=1)


def test_head_diversity_is_the_spread_over_heads_of_each_image():
    distances = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])
    expected = np.std(distances.numpy(), axis=1)
    np.testing.assert_allclose(head_diversity(distances)[:, 0].numpy(), expected, rtol=1e-6)
    assert head_diversity(torch.tensor([[4.0]])).item() == 0


# --------------------------------------------------------------------------------------- high-frequency share


@pytest.mark.parametrize("side", [8, 14, 15])
def test_white_noise_has_the_share_of_bins_beyond_the_cutoff(side):
    cutoffs = (0.0, 0.25, 0.5, 0.75, 1.0, 1.3)
    noise = torch.randn(64, 32, side, side, dtype=torch.float64)
    shares = MapReducer(high_frequency_share=True, cutoffs=cutoffs)(noise)["high_frequency_share"]
    frequency = np.abs(np.fft.fftfreq(side)) * 2
    radius = np.hypot(frequency[:, None], frequency[None, :])
    for cutoff, share in zip(cutoffs, shares.mean(0).tolist(), strict=True):
        beyond = sum(r > cutoff + 1e-12 for r in radius.ravel() if r > 0)
        assert share == pytest.approx(beyond / (side**2 - 1), abs=0.005)


def test_a_constant_map_has_no_high_frequencies():
    shares = MapReducer(high_frequency_share=True)(torch.full((2, 3, 8, 8), 7.0))["high_frequency_share"]
    assert shares.abs().max() < 1e-6


# ------------------------------------------------------------------------------------- models, watched


def test_distances_are_those_of_the_maps_that_timm_extracts():
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    fused = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
    values, attention = measured(fused, images)
    set_fused_attn(False)
    try:
        torch.manual_seed(1)
        unfused = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4)
        extract = AttentionExtract(unfused, method="hook")
    finally:
        set_fused_attn(True)
    with torch.no_grad():
        maps = extract(images)
    assert len(maps) == len(values) == 4
    assert not attention.skipped
    for name, map_ in maps.items():
        found = values[name.removesuffix(".attn_drop")]
        for image in range(2):
            expected = [distance_by_loops(head, raster(4, 4), raster(4, 4), 1) for head in map_[image]]
            assert found["attention_distance"][image].tolist() == pytest.approx(expected, rel=1e-4)
            assert found["head_diversity"][image].item() == pytest.approx(np.std(expected), rel=1e-2)


def test_watching_changes_nothing_of_the_model_and_its_outputs():
    model = timm.create_model("vit")
    images = torch.randn(3, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        before = model(images)
        with AttentionRecorder(model):
            during = model(images)
            assert not any(block.attn.fused_attn for block in model.blocks)
    torch.testing.assert_close(during, before, rtol=0, atol=1e-5)
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_model_is_as_it_was_after_an_exception():
    model = timm.create_model("vit").eval()
    with pytest.raises(AssertionError), AttentionRecorder(model):
        model(torch.randn(1, 3, 30, 30))
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_convit_tokens_join_late_and_its_gate_is_the_share_of_position():
    model = convit_tiny(depth=3, local_up_to_layer=2, img_size=64).eval()
    model.blocks[0].attn.gating_param.data[:] = torch.tensor([-2.0, 0.0, 2.0, 4.0])
    images = torch.randn(2, 3, 64, 64)
    maps = {}
    for index, block in enumerate(model.blocks):
        block.attn.attn_drop.register_forward_hook(
            lambda _, args, out, i=index: maps.update({i: out.clone()})
        )
    values, attention = measured(model, images, ("attention_distance", "gate", "content_share"))
    assert [maps[index].shape[-1] for index in range(3)] == [16, 16, 17]
    for index, map_ in maps.items():
        expected = distance_by_loops(map_[1, 2], raster(4, 4), raster(4, 4), prefix=map_.shape[-1] - 16)
        found = values[f"blocks.{index}.attn"]["attention_distance"][1, 2].item()
        assert found == pytest.approx(expected, rel=1e-5)
    gate = values["blocks.0.attn"]["gate"]
    assert gate.shape == (2, 4)
    assert gate[1].tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (-2, 0, 2, 4)])
    torch.testing.assert_close(gate + values["blocks.0.attn"]["content_share"], torch.ones(2, 4))
    assert attention.gate_of["blocks.0.attn"] == "position"
    assert "gate" not in values["blocks.2.attn"]


def test_window_attention_is_measured_inside_windows_and_averaged_over_them():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 1, 1)
    ).eval()
    maps = []
    model.layers[0].blocks[0].attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(args[0]))
    values, attention = measured(model, torch.randn(2, 3, 64, 64))
    assert maps[0].shape == (2 * 16, 3, 16, 16)
    found = values["layers.0.blocks.0.attn"]["attention_distance"]
    windows = [distance_by_loops(maps[0][16 + w, 1], raster(4, 4), raster(4, 4)) for w in range(16)]
    assert found[1, 1].item() == pytest.approx(np.mean(windows), rel=1e-5)
    assert attention.stride["layers.0.blocks.0.attn"] == 4


def test_pooled_keys_are_read_in_patches_of_the_queries():
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).eval()
    maps = []
    model.stages[0].blocks[0].attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(args[0]))
    values, _ = measured(model, torch.randn(1, 3, 64, 64))
    assert maps[0].shape == (1, 1, 256, 4)
    expected = distance_by_loops(maps[0][0, 0], raster(16, 16), raster(2, 2, step=8, offset=3.5))
    found = values["stages.0.blocks.0.attn"]["attention_distance"].item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_torch_attention_is_asked_for_its_map_and_its_caller_sees_no_difference():
    class Patches(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.batch_first = batch_first
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
            self.last = nn.MultiheadAttention(16, 4, batch_first=batch_first)

        def forward(self, x):
            x = self.embed(x).flatten(2).mT
            x = self.layer(x if self.batch_first else x.transpose(0, 1))
            return self.last(x, x, x)

    for batch_first in (True, False):
        model = Patches(batch_first).eval()
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            before = model(images)
            _, maps = model.last(*(3 * (model.layer(_tokens(model, images)),)), average_attn_weights=False)
        values, attention = measured(model, images)
        assert set(values) == {"layer.self_attn", "last"}
        expected = distance_by_loops(maps[1, 3], raster(4, 4), raster(4, 4))
        assert values["last"]["attention_distance"][1, 3].item() == pytest.approx(expected, rel=1e-5)
        with torch.no_grad(), AttentionRecorder(model):
            during = model(images)
        for a, b in zip(during, before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert not attention.skipped


def _tokens(model, images):
    x = model.embed(images).flatten(2).mT
    return x if model.batch_first else x.transpose(0, 1)


@pytest.mark.parametrize("gate", ["linear", "sigmoid"])
def test_reparameterised_convolutions_have_a_head_and_a_gate_for_each_tap(gate):
    model = nn.Sequential(ReparamConv2d(3, 8, 3, padding=1), ReparamConv2d(8, 8, 3, stride=2, padding=1))
    still = ReparamConv2d(8, 8, 3, padding=1)
    model.append(still).eval()
    for layer in model[:2]:
        layer.reparameterize(gate, gate_init=0.3)
    values, attention = measured(model, torch.randn(2, 3, 16, 16), MEASURES[2:])
    assert list(values) == ["0", "1"]  # a convolution that is one is not attention
    share = 0.3 if gate == "linear" else 1 / (1 + math.exp(-0.3))
    assert values["0"]["gate"].shape == (2, 9)
    assert values["0"]["gate"].flatten().tolist() == pytest.approx([share] * 18)
    content = share if gate == "linear" else 1 - share
    assert values["1"]["content_share"].flatten().tolist() == pytest.approx([content] * 18)
    assert attention.gate_of["0"] == ("content" if gate == "linear" else "position")
    assert attention.stride == {"0": 1, "1": 1}  # queries are on every second key


def test_a_reparameterised_convolution_with_a_closed_gate_looks_where_its_taps_are():
    model = nn.Sequential(ReparamConv2d(3, 4, 3, padding=1).reparameterize()).eval()
    values, _ = measured(model, torch.randn(2, 3, 8, 8))
    taps = [math.hypot(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    for image in values["0"]["attention_distance"]:
        assert image.tolist() == pytest.approx(taps, abs=1e-6)


def test_content_of_a_reparameterised_convolution_differs_between_images():
    layer = ReparamConv2d(3, 4, 3, padding=1).reparameterize(gate_init=1.0)
    layer.query.data *= 50
    layer.key.data *= 50
    images = torch.randn(2, 3, 6, 6)
    values, _ = measured(nn.Sequential(layer).eval(), images)
    maps = layer.attention_maps(images)
    for image in range(2):
        expected = [distance_by_loops(head, raster(6, 6), raster(6, 6)) for head in maps[image]]
        assert values["0"]["attention_distance"][image].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("xcit_nano_12_p16_224", {"depth": 1, "img_size": 64}, "channels"),
        ("cait_xxs24_224", {"depth": 1, "img_size": 64}, "sum to one"),
        ("levit_128s", {}, "how Attention forms its map is not known"),
    ],
)
def test_attention_that_cannot_be_read_is_named_with_the_reason(name, options, reason):
    model = timm.create_model(name, **options).eval()
    values, attention = measured(model, torch.randn(1, 3, 64 if options else 224, 64 if options else 224))
    assert not values
    assert all("attn" in module for module in attention.skipped)
    assert reason in next(iter(attention.skipped.values()))


def test_a_module_called_again_counts_by_its_last_call_or_each():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 8, 8)
            self.block = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            first = self.embed(x).flatten(2).mT
            second = self.block(first, first, 5 * first)[0]
            return self.block(second, second, second)[0]

    model, images = Twice().eval(), 9 * torch.randn(2, 3, 32, 32)
    last, _ = measured(model, images)
    each, _ = measured(model, images, calls="each")
    assert list(each) == ["block", "block#2"]
    torch.testing.assert_close(last["block"], each["block#2"])
    assert not torch.allclose(each["block"]["attention_distance"], each["block#2"]["attention_distance"])
    joined, _ = measured(model, images, layers=["block"], calls="each")
    torch.testing.assert_close(joined, each)


def test_without_a_forward_there_is_nothing_and_measures_are_checked():
    with AttentionRecorder(timm.create_model("vit")) as attention:
        assert attention.take() == {}
    with pytest.raises(FourierBiasError, match="'sharpness' is not of attention"):
        AttentionRecorder(nn.Identity(), ["sharpness"])
    with pytest.raises(FourierBiasError, match="images"), AttentionRecorder(nn.Identity()) as attention:
        attention.model(torch.randn(2, 4))


# ------------------------------------------------------------------------------------- in captures


@pytest.mark.parametrize(
    ("layers", "holder"),
    [("blocks", "blocks.{}"), ("sublayers", "blocks.{}:attn"), ("blocks.*.attn", "blocks.{}.attn")],
)
def test_capture_stores_measures_beside_the_layer_that_holds_the_attention(layers, holder, tmp_path):
    model = timm.create_model("vit", depth=2).eval()
    images = torch.randn(5, 3, 32, 32)
    expected, _ = measured(model, images)
    made = capture(model, images, layers=layers, measures="all", batch_size=2, output=tmp_path / "a.h5")
    for result in (made, load(tmp_path / "a.h5")):
        distances = result.measure("attention_distance")
        assert list(distances) == [holder.format(index) for index in range(2)]
        for index, (layer, distance) in enumerate(distances.items()):
            rows = expected[f"blocks.{index}.attn"]["attention_distance"].double().numpy()
            np.testing.assert_allclose(distance.mean, rows.mean(0), rtol=1e-5)
            np.testing.assert_allclose(
                distance.standard_error, rows.std(0, ddof=1) / math.sqrt(5), rtol=1e-2, atol=1e-6
            )
            assert (distance.count, distance.axis_name, list(distance.axis)) == (5, "head", list(range(9)))
            assert distance.attrs["pixels_per_patch"] == 4
            assert distance.attrs["modules"] == [f"blocks.{index}.attn"]
            diversity = result.layers[layer].measures["head_diversity"]
            assert diversity.mean[0] == pytest.approx(np.std(rows, axis=1).mean(), rel=1e-3)
        assert set(result.attrs["skipped_measures"]) == {"gate", "content_share"}
        assert "high_frequency_share" in result.layers[next(iter(result))].measures


def test_heads_of_several_attentions_in_a_layer_stand_side_by_side_in_its_patches():
    model = recast(timm.create_model("cnn"), "layer4.0", gate="sigmoid")
    images = torch.randn(3, 3, 32, 32)
    modules, attention = measured(model, images, MEASURES[2:])
    assert attention.stride == {"layer4.0.conv1": 4, "layer4.0.conv2": 8}
    result = capture(model, images, measures=MEASURES[2:])
    distance = result.measure("attention_distance")["layer4.0"].mean
    first, second = (modules[f"layer4.0.conv{i}"]["attention_distance"].mean(0).numpy() for i in (1, 2))
    np.testing.assert_allclose(distance, [*(first / 2), *second], rtol=1e-5)
    gate = result.measure("gate")["layer4.0"]
    assert gate.attrs == {"share_of": "position"}
    np.testing.assert_allclose(gate.mean, [1 / (1 + math.exp(-1))] * 18, rtol=1e-6)
    np.testing.assert_array_equal(gate.standard_error, 0)


def test_heads_of_a_block_that_attends_with_few_channels_are_measured():
    model = timm.create_model("eit", depth=2)
    result = capture(model, torch.randn(2, 3, 32, 32), layers="sublayers", measures=["attention_distance"])
    assert {name: len(m.mean) for name, m in result.measure("attention_distance").items()} == {
        "blocks.0:attn": 10,
        "blocks.1:attn": 10,
    }


def test_attention_that_only_lends_its_weights_is_none():
    vit, agent = timm.create_model("vit"), timm.create_model("agent")
    values, attention = measured(share_weights(agent, vit).eval(), torch.randn(1, 3, 32, 32))
    assert values == attention.skipped == {}
    assert all(block.attn.fused_attn for block in vit.blocks)


def test_measures_that_a_model_has_not_are_named_and_its_spectra_captured():
    result = capture(timm.create_model("cnn"), torch.randn(2, 3, 32, 32), measures=["attention_distance"])
    assert result.attrs["skipped_measures"] == {"attention_distance": "this model has no attention"}
    assert len(result) == 10
    with pytest.raises(FourierBiasError, match="no measure 'attention_distance'"):
        result.measure("attention_distance")


def test_an_unknown_measure_is_refused_with_those_there_are():
    with pytest.raises(FourierBiasError, match="'sharpness' is not known: choose from all, feature_variance"):
        capture(nn.Identity(), torch.randn(1, 3, 8, 8), measures=["sharpness"])


def test_high_frequency_share_of_a_capture_is_that_of_the_definition():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    images = torch.randn(3, 3, 16, 16)
    result = capture(model, images, layers="0", measures=["high_frequency_share"])
    share = result.measure("high_frequency_share")["0"]
    maps = model(images).detach().numpy()
    for cutoff, mean in zip(share.axis, share.mean, strict=True):
        expected = reference.high_frequency_share(maps, cutoff).mean()
        assert mean == pytest.approx(expected, rel=1e-4, abs=1e-7)
