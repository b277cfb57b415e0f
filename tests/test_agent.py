"""The agent CNN: its taps, its sharing with a ViT, and the stand-alone agent that comes out of it."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention

import fourierbias.models.eit
import fourierbias.models.lsra
import fourierbias.models.vit  # noqa: F401
from fourierbias.errors import FourierBiasError
from fourierbias.models.agent import (
    AgentCNN,
    SharedTapConv2d,
    TapConv2d,
    attention_taps,
    kernel_size,
    share_weights,
    tap_kernel,
)
from fourierbias.probes import Recorder, choose_probes

FITTING = [1, *range(5, 10), *range(17, 26)]


def small_vit(**kwargs):
    return timm.create_model("vit", **{"depth": 2, "embed_dim": 36, **kwargs})


def randomise(module):
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    return module


def heads_on_shifts(attention, x):
    """The paper's sum over heads: tokens moved by a shift matrix, times W_V^h, times W_O^h."""
    dim, heads, side = x.shape[1], attention.num_heads, math.isqrt(attention.num_heads - 1) + 1
    height, width, size = x.shape[2], x.shape[3], dim // heads
    tokens = x.flatten(2).transpose(1, 2)
    out = attention.proj.bias.expand(len(x), height * width, dim).clone()
    for h in range(heads):
        down, right = h // side - side // 2, h % side - side // 2
        phi = torch.zeros(height * width, height * width, dtype=x.dtype)
        for row in range(height):
            for column in range(width):
                if 0 <= row + down < height and 0 <= column + right < width:
                    phi[row * width + column, (row + down) * width + column + right] = 1
        part = slice(h * size, (h + 1) * size)
        value = attention.qkv.weight[2 * dim :][part]
        out += phi @ tokens @ value.T @ attention.proj.weight[:, part].T
    return out.transpose(1, 2).unflatten(2, (height, width))


@pytest.mark.parametrize("heads", range(1, 26))
def test_heads_fit_odd_kernels_only(heads):
    if heads in FITTING:
        side = kernel_size(heads)
        assert side % 2 == 1
        assert (side - 1) ** 2 < heads <= side**2
    else:
        with pytest.raises(FourierBiasError, match="choose 1, 5 to 9, or 17 to 25 heads"):
            kernel_size(heads)
        with pytest.raises(FourierBiasError, match=f"{heads} heads do not fit"):
            timm.create_model("agent", num_heads=heads)


@pytest.mark.parametrize("heads", [0, -3])
def test_no_heads_are_refused(heads):
    with pytest.raises(FourierBiasError, match="do not fit"):
        kernel_size(heads)


@pytest.mark.parametrize("heads", [1, 6, 9, 17])
def test_shared_convolution_is_conv2d_with_the_products_as_taps(heads):
    dim = 2 * heads
    attention = randomise(Attention(dim, num_heads=heads, qkv_bias=True))
    attention.qkv.bias.data[2 * dim :] = 0  # b_V, which the agent leaves out
    side = kernel_size(heads)
    kernel = torch.zeros(dim, dim, side, side)
    for h in range(heads):
        value = attention.qkv.weight[2 * dim + 2 * h : 2 * dim + 2 * h + 2]
        kernel[:, :, h // side, h % side] = attention.proj.weight[:, 2 * h : 2 * h + 2] @ value
    x = torch.randn(2, dim, 7, 5)
    with torch.no_grad():
        out = SharedTapConv2d(attention)(x)
        expected = F.conv2d(x, kernel, attention.proj.bias, padding=side // 2)
        assert (out - expected).abs().max() < 1e-5
        double = attention.double()
        exact = heads_on_shifts(double, x.double())
        assert (SharedTapConv2d(double)(x.double()) - exact).abs().max() < 1e-12


def test_one_hot_attention_is_the_shared_convolution_inside_the_image():
    # Where every head looks at its tap's neighbour alone, attention and agent agree, borders aside.
    attention = randomise(Attention(18, num_heads=9, qkv_bias=True)).double()
    attention.qkv.bias.data[36:] = 0
    x = torch.randn(1, 18, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        values = F.linear(x.flatten(2).transpose(1, 2), attention.qkv.weight[36:])
        grid = values.unflatten(1, (6, 6))
        looked = torch.cat(
            [
                torch.roll(grid, (1 - h // 3, 1 - h % 3), dims=(1, 2))[..., 2 * h : 2 * h + 2]
                for h in range(9)
            ],
            dim=-1,
        )
        attended = attention.proj(looked).permute(0, 3, 1, 2)
        out = SharedTapConv2d(attention)(x)
    torch.testing.assert_close(out[..., 1:-1, 1:-1], attended[..., 1:-1, 1:-1])
    assert (out - attended).abs().max() > 0.1


def test_six_heads_are_the_first_six_taps():
    taps = torch.arange(1.0, 7.0).view(1, 1, 6)
    assert tap_kernel(taps).tolist() == [[[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]]


def test_standalone_taps_are_full_matrices_and_xavier():
    conv = TapConv2d(40, 9)
    assert conv.weight.shape == (40, 40, 9)
    bound = math.sqrt(6 / (2 * 40 * 9))
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    x = torch.randn(1, 40, 5, 5)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight.view(40, 40, 3, 3), padding=1))


def test_shared_taps_have_the_rank_of_a_head():
    taps = attention_taps(randomise(Attention(36, num_heads=9, qkv_bias=True))).detach()
    assert {torch.linalg.matrix_rank(taps[..., h]).item() for h in range(9)} == {4}


@pytest.mark.parametrize(
    ("name", "stem", "grids"),
    [("agent", 48 * 108 + 108, [8] * 6), ("agent_res", 27 * 32 + 64 + 288 * 108 + 108, [16, 8, 4, 4, 4, 4])],
)
def test_reference_forms(name, stem, grids):
    model = timm.create_model(name).eval()
    block = 9 * 108**2 + 108 + 2 * 4 * 108**2 + 5 * 108 + 4 * 108  # taps, two linear layers, two BatchNorms
    parameters = stem + 6 * block + 2 * 108 + 108 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == parameters
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features, maps = model.forward_intermediates(images)
        assert [tuple(m.shape) for m in maps] == [(2, 108, grid, grid) for grid in grids]
        assert torch.equal(model.forward_head(features), model(images))
        assert torch.equal(model.forward_features(images), features)
        last = model.forward_intermediates(images, indices=1, stop_early=True, intermediates_only=True)
        assert torch.equal(last[0], maps[-1])
    assert [info["reduction"] for info in model.feature_info] == [32 // grid for grid in grids]
    assert model.default_cfg["input_size"] == (3, 32, 32)
    model.reset_classifier(3)
    assert model.get_classifier().out_features == 3
    assert len(timm.create_model(name, features_only=True)(images)) == 3


def test_blocks_are_the_described_ones():
    # BN, taps, residual; BN, two 1×1 convolutions with GELU, residual; BN, GELU, average, linear.
    model = randomise(AgentCNN(embed_dim=20, depth=2, num_heads=5)).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)

    def norm(x, bn):
        mean, var, weight, bias = (
            v.view(-1, 1, 1) for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        return (x - mean) / torch.sqrt(var + bn.eps) * weight + bias

    with torch.no_grad():
        x = F.conv2d(images, model.stem.weight, model.stem.bias, stride=4)
        for block in model.blocks:
            kernel = F.pad(block.token_mixer.weight, (0, 4)).view(20, 20, 3, 3)
            x = x + F.conv2d(norm(x, block.norm1), kernel, block.token_mixer.bias, padding=1)
            first, second = block.mlp.fc1, block.mlp.fc2
            hidden = F.gelu(F.conv2d(norm(x, block.norm2), first.weight[..., None, None], first.bias))
            x = x + F.conv2d(hidden, second.weight[..., None, None], second.bias)
        expected = F.linear(F.gelu(norm(x, model.norm)).mean((2, 3)), model.head.weight, model.head.bias)
        torch.testing.assert_close(model(images), expected)


def test_sharing_is_by_reference_both_ways():
    vit = small_vit()
    agent = share_weights(timm.create_model("agent", depth=2, embed_dim=36), vit)
    agent(torch.rand(2, 3, 32, 32)).sum().backward()
    for own, block in zip(agent.blocks, vit.blocks, strict=True):
        assert own.token_mixer.attention is block.attn
        assert own.mlp.fc1.weight is block.mlp.fc1.weight
        assert own.mlp.fc2.bias is block.mlp.fc2.bias
        assert block.attn.proj.weight.grad.abs().max() > 0
        queries, keys, values = block.attn.qkv.weight.grad.chunk(3)
        assert values.abs().max() > 0
        assert queries.abs().max() == keys.abs().max() == 0
        assert block.attn.qkv.bias.grad is None or block.attn.qkv.bias.grad.abs().max() == 0


@pytest.mark.parametrize(("form", "heads"), [("agent", 9), ("agent", 6), ("agent_res", 9)])
def test_standalone_of_a_shared_agent_is_a_plain_agent_of_the_same_function(form, heads):
    vit = randomise(small_vit(num_heads=heads))
    args = {"depth": 2, "embed_dim": 36, "num_heads": heads}
    shared = share_weights(timm.create_model(form, **args), vit).eval()
    plain = timm.create_model(form, **args).eval()
    plain.load_state_dict(shared.standalone().state_dict(), strict=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), shared(images), rtol=1e-4, atol=1e-4)
    own = {id(p) for p in shared.standalone().parameters()}
    assert not own & {id(p) for p in vit.parameters()}
    assert plain.standalone() is plain


def test_standalone_draws_no_random_numbers_and_leaves_the_pair_alone():
    vit = small_vit()
    shared = share_weights(timm.create_model("agent", depth=2, embed_dim=36), vit)
    state, before = torch.get_rng_state(), copy.deepcopy(vit.state_dict())
    shared.standalone()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert isinstance(shared.blocks[0].token_mixer, SharedTapConv2d)


@pytest.mark.parametrize(
    ("vit", "match"),
    [
        ({"depth": 3}, "2 blocks, the ViT 3"),
        ({"embed_dim": 72}, "no plain attention and MLP of width 36"),
        ({"init_values": 0.1}, "no plain attention"),
        ({"num_heads": 4}, "4 heads do not fit"),
    ],
)
def test_networks_that_cannot_share_are_refused(vit, match):
    agent = timm.create_model("agent", depth=2, embed_dim=36)
    with pytest.raises(FourierBiasError, match=match):
        share_weights(agent, small_vit(**vit))
    assert isinstance(agent.blocks[0].token_mixer, TapConv2d)


def test_sliced_attention_cannot_be_shared():
    with pytest.raises(FourierBiasError, match="no plain attention"):
        share_weights(AgentCNN(embed_dim=126), timm.create_model("lsra"))


@pytest.mark.parametrize(
    ("kwargs", "match"), [({"stem": "deep"}, "choose patch or residual"), ({"global_pool": "max"}, None)]
)
def test_unknown_forms_are_refused(kwargs, match):
    with pytest.raises((FourierBiasError, TypeError), match=match):
        timm.create_model("agent", **kwargs)
    with pytest.raises(FourierBiasError, match="by average"):
        timm.create_model("agent").reset_classifier(2, "max")


@pytest.mark.parametrize("name", ["agent", "agent_res"])
def test_captured_in_blocks_and_sublayers_with_kinds(name):
    model = timm.create_model(name)
    blocks, sublayers = choose_probes(model, "blocks"), choose_probes(model, "sublayers")
    assert [(p.name, p.kind) for p in blocks] == [(f"blocks.{i}", "conv") for i in range(6)]
    assert [p.kind for p in sublayers] == ["conv", "mlp"] * 6
    probes = blocks + sublayers
    with (
        torch.no_grad(),
        Recorder(model, probes, lambda layer, m: m.shape[-1], input_size=(32, 32)) as recorder,
    ):
        sides = recorder.forward(torch.rand(2, 3, 32, 32))
    expected = [8] * 6 if name == "agent" else [16, 8, 4, 4, 4, 4]
    assert [sides[f"blocks.{i}"] for i in range(6)] == expected
    assert [sides[f"blocks.{i}:token_mixer"] for i in range(6)] == expected
