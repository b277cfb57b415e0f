import pytest
import timm
import torch
from torch import nn

from fourierbias import FourierBiasError
from fourierbias.probes import Form, Recorder, choose_probes, kind_of


def record(model, layers, size=64, images=2, **options):
    """Names, maps and skips of one forward: what the hooks see, cloned."""
    probes = choose_probes(model, layers)
    x = torch.randn(images, 3, size, size)
    with (
        torch.no_grad(),
        Recorder(
            model, probes, lambda layer, maps: maps.clone(), input_size=(size, size), **options
        ) as recorder,
    ):
        values = recorder.forward(x)
    return x, values, recorder


def test_blocks_of_a_resnet_are_its_residual_blocks_in_order():
    model = timm.create_model("resnet26")
    _, values, recorder = record(model, "blocks")
    assert list(values) == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert [layer.index for layer in recorder.layers.values()] == list(range(8))
    assert {layer.kind for layer in recorder.layers.values()} == {"conv"}
    assert [layer.stride for layer in recorder.layers.values()] == [4, 4, 8, 8, 16, 16, 32, 32]


def test_sublayers_of_a_vit_are_the_states_after_each_residual():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64)
    x, values, recorder = record(model, "sublayers")
    assert list(values)[:2] == ["blocks.0:attn", "blocks.0:mlp"]
    assert len(values) == 24
    assert [layer.kind for layer in recorder.layers.values()] == ["attention", "mlp"] * 12
    # The definition, by hand: x + attn(norm1(x)), then + mlp(norm2(·)).
    model.eval()
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(x))
        for index, block in enumerate(model.blocks):
            after_attention = tokens + block.attn(block.norm1(tokens))
            tokens = after_attention + block.mlp(block.norm2(after_attention))
            for name, state in ((f"blocks.{index}:attn", after_attention), (f"blocks.{index}:mlp", tokens)):
                expected = state[:, 1:].mT.reshape(2, 192, 4, 4)
                torch.testing.assert_close(values[name], expected, rtol=1e-4, atol=1e-4)


def test_sublayers_of_a_post_norm_block_are_found():
    model = timm.create_model("swinv2_cr_tiny_ns_224", img_size=64, window_size=2).eval()
    _, values, _ = record(model, "sublayers")
    assert values
    model = timm.create_model("swinv2_tiny_window8_256", img_size=64, window_size=2).eval()
    block = model.layers[0].blocks[0]
    inputs = []
    handle = block.register_forward_hook(lambda module, args, out: inputs.append((args[0], out)))
    _, values, _ = record(model, "sublayers")
    handle.remove()
    x, _ = inputs[0]
    expected = x + block.norm1(block._attn(x))
    torch.testing.assert_close(
        values["layers.0.blocks.0:attn"], expected.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"img_size": 64}),
        ("test_resnet", {}),
        ("test_efficientnet", {}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
        ("convit_tiny", {"img_size": 64}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}),
        ("convnext_atto", {}),
        ("vit_small_patch16_dinov3", {"img_size": 64}),
        ("mixer_s32_224", {"img_size": 64}),
    ],
)
def test_maps_equal_forward_intermediates(name, options):
    """timm's own extraction, value by value: prefix tokens, layouts and grids are read right."""
    model = timm.create_model(name, **options).eval()
    stages = choose_probes(model, "stages")
    x, values, recorder = record(model, "stages")
    assert not recorder.skipped
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
    assert len(stages) == len(expected)
    for maps, reference in zip(values.values(), expected, strict=True):
        torch.testing.assert_close(maps, reference, rtol=1e-4, atol=1e-4)


def test_blocks_that_work_on_patches_give_way_to_the_module_around_them():
    model = timm.create_model("mobilevit_xxs").eval()
    _, values, recorder = record(model, "blocks", size=64, widen=True)
    assert "stages.2.1" in values
    assert not recorder.skipped
    _, narrow, recorder = record(model, "blocks", size=64)
    assert "stages.2.1" not in narrow
    assert any("windows or patches" in reason for reason in recorder.skipped.values())


def test_layers_without_maps_are_named_not_crashed_on():
    model = timm.create_model("test_vit", img_size=64)
    _, values, recorder = record(model, ["head", "blocks.0", "patch_embed"])
    assert "blocks.0" in values
    assert "not a spatial map" in recorder.skipped["head"]


def test_a_state_is_taken_before_a_later_layer_overwrites_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    _, values, _ = record(model, ["0"])
    assert values["0"].min() < 0


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_maps_that_are_not_square(size):
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, depth=2)
    probes = choose_probes(model, "blocks")
    with torch.no_grad(), Recorder(model, probes, lambda layer, maps: maps, input_size=size) as recorder:
        values = recorder.forward(torch.randn(2, 3, *size))
    assert values["blocks.0"].shape == (2, 192, size[0] // 16, size[1] // 16)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return {"maps": (self.conv(self.conv(x)), None)}


def test_a_module_called_twice():
    model = Twice()
    x, last, recorder = record(model, ["conv"])
    torch.testing.assert_close(last["conv"], model.conv(model.conv(x)))
    assert recorder.repeated == {"conv": 2}
    x, each, _ = record(model, ["conv"], calls="each")
    torch.testing.assert_close(each["conv"], model.conv(x))
    torch.testing.assert_close(each["conv#2"], model.conv(model.conv(x)))


def test_nested_outputs_are_searched():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Twice()

        def forward(self, x):
            return self.inner(x)["maps"][0]

    _, values, _ = record(Wrapped(), ["inner"])
    assert values["inner"].shape == (2, 3, 64, 64)


def test_the_model_is_left_as_it_was_also_after_an_exception():
    model = timm.create_model("test_resnet")
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(layer, maps):
        raise RuntimeError("in the hook")

    with (
        pytest.raises(RuntimeError, match="in the hook"),
        Recorder(model, choose_probes(model), fail, input_size=(64, 64)) as recorder,
    ):
        recorder.forward(torch.randn(2, 3, 64, 64))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_patterns_and_their_mistakes():
    model = timm.create_model("test_resnet")
    assert [probe.name for probe in choose_probes(model, "layer*.0")] == [f"layer{i}.0" for i in (1, 2, 3, 4)]
    assert [probe.name for probe in choose_probes(model, "**.bn1")][:2] == ["layer1.0.bn1", "layer2.0.bn1"]
    assert [probe.name for probe in choose_probes(model, ["layer1", "layer2"])] == ["layer1", "layer2"]
    with pytest.raises(FourierBiasError, match=r"'layr1' matches no module.*layer1"):
        choose_probes(model, "layr1")


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((2, 64, 8, 8), Form("NCHW", 8, 8)),
        ((2, 8, 8, 64), Form("NHWC", 8, 8)),
        ((2, 64, 96), Form("NLC", 8, 8)),
        ((2, 65, 96), Form("NLC", 8, 8, 1)),  # the grid is derived where the model names none
        ((2, 66, 96), "fit no grid"),
        ((2, 5, 256), Form("NLC", 2, 2, 1)),  # 256 channels are a square too
        ((2, 96, 64), Form("NCL", 8, 8)),
        ((2, 1, 96), "one token per image"),
        ((8, 64, 96), "windows or patches"),
        ((2, 10), "not a spatial map"),
    ],
)
def test_forms_are_read_from_the_tensor(shape, form):
    recorder = Recorder(nn.Identity(), [], lambda *_: None, input_size=(64, 64))
    recorder._batch = 2
    found = recorder._form(torch.zeros(shape))
    assert form in found if isinstance(form, str) else found == form


def test_kinds():
    resnet, vit = timm.create_model("seresnet18"), timm.create_model("test_vit")
    assert kind_of(resnet.layer1[0]) == "conv"
    assert kind_of(resnet.maxpool) == "pool"
    assert kind_of(vit.patch_embed) == "embed"
    assert kind_of(vit.blocks[0]) == "attention"
    assert kind_of(vit.blocks[0].mlp) == "mlp"
    assert kind_of(nn.ReLU()) == "other"
