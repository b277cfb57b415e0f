"""The reference networks: size, grids, registration, and the CNN's function written out once more."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config

from fourierbias.models import cnn, vit  # noqa: F401  (registers them)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_both_have_one_size_and_cifar_preprocessing(name):
    model = timm.create_model(name)
    assert 0.83e6 < sum(p.numel() for p in model.parameters()) < 0.87e6
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.4914, 0.4822, 0.4465)
    assert (config["crop_pct"], config["interpolation"]) == (1.0, "bicubic")


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_arguments_of_timm_go_through(name):
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_path_rate=0.2)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    dropped = [m for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(m.drop_prob for m in dropped) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "grids"), [("cnn", {1: 32, 2: 16, 4: 8, 8: 4}), ("vit", {4: 8})], ids=["cnn", "vit"]
)
def test_feature_info_tells_the_grids(name, grids):
    model = timm.create_model(name).eval()
    shapes = {}
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda m, i, out, key=info["module"]: shapes.update({key: out.shape}))
    model(torch.randn(1, 3, 32, 32))
    for info in model.feature_info:
        shape, side = shapes[info["module"]], 32 // info["reduction"]
        if name == "cnn":
            assert shape == (1, info["num_chs"], side, side)
        else:
            assert shape == (1, 1 + side * side, info["num_chs"])
    assert {info["reduction"] for info in model.feature_info} == set(grids)


def test_cnn_is_the_residual_network_written_out():
    model = timm.create_model("cnn").double()
    for module in model.modules():  # statistics other than 0 and 1, scales other than 0
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.1)
    w = model.eval().state_dict()

    def norm(x, key):
        mean, var = w[f"{key}.running_mean"], w[f"{key}.running_var"]
        scale = w[f"{key}.weight"] / torch.sqrt(var + 1e-5)
        return (x - mean[:, None, None]) * scale[:, None, None] + w[f"{key}.bias"][:, None, None]

    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = norm(F.conv2d(images, w["conv1.weight"], padding=1), "bn1").clamp(min=0)
    for stage, blocks in enumerate((2, 2, 4, 2), start=1):
        for block in range(blocks):
            key, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, w[f"{key}.conv1.weight"], stride=stride, padding=1), f"{key}.bn1")
            y = norm(F.conv2d(y.clamp(min=0), w[f"{key}.conv2.weight"], padding=1), f"{key}.bn2")
            if stride == 2:
                x = norm(F.conv2d(x, w[f"{key}.downsample.0.weight"], stride=2), f"{key}.downsample.1")
            x = (x + y).clamp(min=0)
    expected = x.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_vit_is_deit_with_nine_heads():
    model = timm.create_model("vit")
    assert model.num_prefix_tokens == 1
    assert model.pos_embed.requires_grad
    assert [block.attn.num_heads for block in model.blocks] == [9] * 6
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}


def test_vit_can_be_built_for_another_size():
    assert timm.create_model("vit", img_size=48)(torch.randn(1, 3, 48, 48)).shape == (1, 10)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_features_only_and_meta_device(name):
    features = timm.create_model(name, features_only=True)(torch.randn(1, 3, 32, 32))
    assert features[-1].shape[1] == {"cnn": 128, "vit": 108}[name]
    with torch.device("meta"):
        assert timm.create_model(name).get_parameter({"cnn": "fc.weight", "vit": "head.weight"}[name]).is_meta
