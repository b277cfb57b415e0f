"""EIT against the published description: sizes, shares, names, and the function itself, written once more."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import load_checkpoint
from timm.utils import AttentionExtract

from fourierbias.errors import FourierBiasError
from fourierbias.models.eit import EIT, OverlapPatchEmbed, SplitTransformer, TokenConv
from fourierbias.probes import Recorder, choose_probes

# width, depth, heads, parameters at 1000 classes, channels that convolve in each block
PUBLISHED = {
    "eit_mini": (250, 5, 10, 3_512_750, [200, 150, 100, 50, 0]),
    "eit_tiny": (330, 8, 10, 8_927_230, [290, 250, 210, 170, 130, 90, 50, 0]),
    "eit_base": (400, 10, 16, 15_972_280, [368, 320, 288, 240, 208, 160, 128, 80, 48, 0]),
    "eit_large": (464, 12, 16, 25_305_592, [432, 400, 352, 320, 272, 240, 208, 160, 128, 80, 48, 0]),
}


def shape_of(layer, maps):
    return tuple(maps.shape)


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def published_shapes(width, conv_widths, classes=1000):
    """The tensors of the authors' weight files, by name."""
    linear = lambda name, fan_in, fan_out: {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}  # noqa: E731
    norm = lambda name: {f"{name}.weight": (width,), f"{name}.bias": (width,)}  # noqa: E731
    shapes = {
        "cls_token": (1, 1, width),
        "patch_embed.eit_p.conv.weight": (width, 3, 16, 16),
        "patch_embed.eit_p.conv.bias": (width,),
    }
    for index, conv in enumerate(conv_widths):
        block, attention = f"blocks.{index}", width - conv
        shapes |= norm(f"{block}.norm1") | linear(f"{block}.attn.qkv", attention, 3 * attention)
        shapes |= linear(f"{block}.attn.proj", attention, attention) | norm(f"{block}.norm2")
        shapes |= linear(f"{block}.mlp.fc1", width, 4 * width) | linear(f"{block}.mlp.fc2", 4 * width, width)
        if conv:
            shapes[f"{block}.eit_t.conv1.weight"] = (conv, 1, 3, 3)
    return shapes | norm("norm") | linear("head", width, classes)


def random_weights(shapes):
    """Weights of a size at which every term of the network counts, unlike those of the initialisation."""
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape)
        if name.endswith("weight") and len(shape) > 1:
            values /= math.sqrt(math.prod(shape[1:]))
        weights[name] = 1 + 0.2 * values if "norm" in name and name.endswith("weight") else values
    return weights


def described(weights, images, heads):
    """EIT's logits in float64 numpy, loop by loop, from the description of the architecture alone."""
    p = {name: value.double().numpy() for name, value in weights.items()}
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]  # noqa: E731

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(torch.from_numpy(x) / math.sqrt(2)).numpy())

    def attention(x, name):
        width = x.shape[-1]
        size = width // heads
        query, key, value = np.split(linear(x, f"{name}.qkv"), 3, axis=-1)
        out = []
        for h in range(heads):
            q, k, v = (part[..., h * size : (h + 1) * size].copy() for part in (query, key, value))
            scores = q @ k.transpose(0, 2, 1).copy() / math.sqrt(size)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(scores / scores.sum(-1, keepdims=True) @ v)
        return linear(np.concatenate(out, axis=-1), f"{name}.proj")

    def depthwise(x, kernel):
        side = math.isqrt(x.shape[1] - 1)
        grid = np.pad(x[:, 1:].reshape(len(x), side, side, -1), ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = sum(
            kernel[:, 0, a, c] * grid[:, a : a + side, c : c + side] for a in range(3) for c in range(3)
        )
        return np.concatenate([x[:, :1], out.reshape(len(x), side * side, -1)], axis=1)

    maps = F.conv2d(
        images.double(),
        weights["patch_embed.eit_p.conv.weight"].double(),
        weights["patch_embed.eit_p.conv.bias"].double(),
        stride=4,
        padding=8,
    )
    patches = F.max_pool2d(maps, 3, 3).numpy().transpose(0, 2, 3, 1)
    patches = patches.reshape(len(patches), -1, patches.shape[-1])
    x = np.concatenate(
        [np.broadcast_to(p["cls_token"], (len(patches), 1, patches.shape[-1])), patches], axis=1
    )
    for index in range(len({name.split(".")[1] for name in p if name.startswith("blocks.")})):
        block = f"blocks.{index}"
        u = layer_norm(x, f"{block}.norm1")
        conv = u.shape[-1] - p[f"{block}.attn.proj.bias"].shape[0]
        mixed = attention(u[..., conv:], f"{block}.attn")
        if conv:
            convolved = depthwise(u[..., :conv], p[f"{block}.eit_t.conv1.weight"])
            mixed = np.concatenate([convolved, mixed], axis=-1)
        x = x + mixed
        x = x + linear(gelu(linear(layer_norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return linear(layer_norm(x, "norm")[:, 0], "head")


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_presets_have_the_published_sizes_and_shares(name, published):
    width, depth, heads, parameters, conv_widths = published
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [block.conv_width for block in model.blocks] == conv_widths
    assert [block.attention_width for block in model.blocks] == [width - conv for conv in conv_widths]
    assert len(model.blocks) == depth
    assert {block.attn.num_heads for block in model.blocks} == {heads}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_weights_bear_the_published_names(name, published):
    width, _, _, _, conv_widths = published
    shapes = {key: tuple(value.shape) for key, value in on_meta(name).state_dict().items()}
    assert shapes == published_shapes(width, conv_widths)


@pytest.mark.parametrize("name", ["eit_mini", "eit_tiny"])
def test_logits_are_those_of_the_description(name, tmp_path):
    width, _, heads, _, conv_widths = PUBLISHED[name]
    weights = random_weights(published_shapes(width, conv_widths))
    torch.save({"model": weights, "epoch": 296}, tmp_path / "best_checkpoint.pth")
    model = timm.create_model(name).eval()
    load_checkpoint(model, str(tmp_path / "best_checkpoint.pth"))
    images = torch.randn(1, 3, 224, 224)
    expected = torch.from_numpy(described(weights, images, heads))
    assert expected.std() > 0.3
    with torch.no_grad():
        assert (model(images) - expected).abs().max() < 1e-5
        if name == "eit_mini":
            assert (model.double()(images.double()) - expected).abs().max() < 1e-10


def test_order_of_the_shares_matters():
    # Were attention first, the same weights would give other logits: the comparison above can fail.
    width, _, _, _, conv_widths = PUBLISHED["eit_mini"]
    model = timm.create_model("eit_mini").eval()
    model.load_state_dict(random_weights(published_shapes(width, conv_widths)))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        logits = model(images)
        for block in model.blocks:
            block.conv_first = False
        assert (model(images) - logits).abs().max() > 0.1


def test_token_conv_shifts_patches_and_leaves_the_class_token():
    conv = TokenConv(2)
    conv.grid, conv.prefix = (2, 3), 1
    with torch.no_grad():
        conv.conv1.weight.zero_()
        conv.conv1.weight[:, 0, 1, 0] = 1  # each position takes its left neighbour
        tokens = torch.arange(7.0).view(1, 7, 1).repeat(1, 1, 2)
        out = conv(tokens)
    assert out[0, :, 0].tolist() == [0, 0, 1, 2, 0, 4, 5]


@pytest.mark.parametrize(("size", "grid"), [(224, (19, 19)), (32, (3, 3)), ((224, 112), (19, 9))])
def test_grid_is_the_one_there_is(size, grid):
    embed = OverlapPatchEmbed(size, kernel_size=16, stride=4, pool=3, embed_dim=4)
    height, width = embed.img_size
    assert embed.grid_size == grid
    assert embed(torch.rand(1, 3, height, width)).shape == (1, grid[0] * grid[1], 4)


def test_reference_size_and_timm_conveniences():
    model = timm.create_model("eit").eval()
    assert sum(p.numel() for p in model.parameters()) == 852_590
    assert model.num_prefix_tokens == 1
    assert model.default_cfg["input_size"] == (3, 32, 32)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features, maps = model.forward_intermediates(images)
        assert [m.shape for m in maps] == [(2, 120, 8, 8)] * 6
        assert torch.equal(model.forward_head(features), model(images))
    assert [info["num_chs"] for info in model.feature_info] == [120] * 6
    model.reset_classifier(7)
    assert model.get_classifier().out_features == 7
    assert len(timm.create_model("eit", features_only=True)(images)) == 3


def test_other_image_sizes():
    images = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        given = timm.create_model("eit", img_size=(48, 64)).eval()
        told = timm.create_model("eit").eval()
        told.load_state_dict(given.state_dict())
        told.set_input_size((48, 64))
        assert torch.equal(given(images), told(images))
        with pytest.raises(AssertionError, match="48 px high"):
            given(torch.rand(1, 3, 64, 64))


def test_initialisation_is_the_authors():
    model = timm.create_model("eit_mini")
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    # Kaiming over fan-out: depthwise 3 × 3 of c channels in PyTorch's reckoning has a fan-out of 9 c.
    conv = model.blocks[0].eit_t.conv1.weight
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (9 * len(conv))), rel=0.1)
    assert all(p.abs().max() == 0 for n, p in model.named_parameters() if n.endswith("bias"))


def test_attention_maps_can_be_taken():
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = timm.create_model("eit").eval()
    finally:
        timm.layers.set_fused_attn(bool(before))
    maps = AttentionExtract(model, method="hook")(torch.rand(1, 3, 32, 32))
    assert [m.shape for m in maps.values()] == [(1, 10, 65, 65)] * 6
    for m in maps.values():
        torch.testing.assert_close(m.sum(-1), torch.ones(1, 10, 65))


def test_captured_in_blocks_and_sublayers_with_kinds():
    model = timm.create_model("eit")
    blocks = choose_probes(model, "blocks")
    assert [(p.name, p.kind) for p in blocks] == [
        (f"blocks.{i}", "split" if i < 5 else "attention") for i in range(6)
    ]
    sublayers = choose_probes(model, "sublayers")
    assert [p.kind for p in sublayers] == ["split", "mlp"] * 5 + ["attention", "mlp"]
    with torch.no_grad(), Recorder(model, blocks + sublayers, shape_of, input_size=(32, 32)) as recorder:
        shapes = recorder.forward(torch.rand(2, 3, 32, 32))
    assert set(shapes.values()) == {(2, 120, 8, 8)}
    assert len(shapes) == 18
    assert not recorder.skipped


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"embed_dim": 125}, "125 channels cannot be shared by 10 heads"),
        ({"embed_dim": 50}, "0 attention channels cannot be shared by 10 heads"),
        ({"img_size": 2}, "2×2 images are too small"),
        ({"dynamic_img_size": True}, "give img_size"),
    ],
)
def test_what_cannot_be_built_is_refused(kwargs, match):
    with pytest.raises(FourierBiasError, match=match):
        timm.create_model("eit", **kwargs)


def test_register_tokens_bypass_the_convolution_too():
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "num_heads": 3, "depth": 2, "reg_tokens": 2}
    model = SplitTransformer([18, 36], True, **size)
    assert model.blocks[0].eit_t.prefix == 3
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 1000)
    assert isinstance(timm.create_model("eit"), EIT)
