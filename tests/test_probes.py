import pytest
import timm
import torch
from timm.models.nest import Nest
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


def test_hieras_tokens_come_back_from_the_order_of_its_mask_units():
    model = timm.create_model("hiera_tiny_224", img_size=96, embed_dim=16, stages=(1, 1, 2, 1)).eval()
    x, values, recorder = record(model, "blocks", size=96)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
    assert not recorder.skipped
    for name, reference in zip(("blocks.0", "blocks.1", "blocks.3", "blocks.4"), expected, strict=True):
        torch.testing.assert_close(values[name], reference, rtol=1e-5, atol=1e-5)
    _, values, recorder = record(model, ["blocks.1.norm1", "blocks.1.norm2"], size=96)
    assert list(values) == ["blocks.1.norm2"]
    assert "not in the order" in recorder.skipped["blocks.1.norm1"]


def test_windows_that_look_like_a_grid_are_no_map():
    model = Nest(img_size=64, embed_dims=(24, 24, 24), num_heads=(1, 2, 2), depths=(1, 1, 1)).eval()
    _, _, recorder = record(model, ["levels.0.transformer_encoder.0"])
    assert "16 windows of 16 tokens" in recorder.skipped["levels.0.transformer_encoder.0"]
    x, values, recorder = record(model, "blocks")
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
    assert list(values) == ["levels.0", "levels.1", "levels.2"]
    for maps, reference in zip(values.values(), expected, strict=True):
        torch.testing.assert_close(maps, reference, rtol=1e-5, atol=1e-5)


class Branches(nn.Module):
    """Puts out maps of two resolutions, and a state that is none beside a map."""

    def __init__(self):
        super().__init__()
        self.fork, self.mixed = Fork(), Mixed()

    def forward(self, x):
        return self.fork(x)[0] + self.mixed(x)[0]


class Fork(nn.Module):
    def forward(self, x):
        return [x, nn.functional.avg_pool2d(x, 2)]


class Mixed(nn.Module):
    def forward(self, x):
        return x, x[:, :, :7, :7].flatten(2).mT


def test_branches_of_different_resolution_are_layers_each():
    x, values, _ = record(Branches(), ["fork", "mixed"])
    assert list(values) == ["fork", "fork[1]", "mixed"]
    torch.testing.assert_close(values["fork[1]"], nn.functional.avg_pool2d(x, 2))


def test_stages_that_timm_names_wrongly_are_the_ends_of_runs():
    model = timm.create_model("mvitv2_tiny")
    assert not set(dict(model.named_modules())) & {info["module"] for info in model.feature_info}
    names = [probe.name for probe in choose_probes(model, "stages")]
    assert names == ["stages.0.blocks.0", "stages.1.blocks.1", "stages.2.blocks.4", "stages.3.blocks.1"]


def test_stages_of_a_network_inside_another_are_found():
    model = nn.ModuleDict({"encoder": timm.create_model("test_vit")})
    model.feature_info = model["encoder"].feature_info
    assert choose_probes(model, "stages")[0].name == "encoder.blocks.0"


class Block(nn.Module):
    """A residual block that declares its children in the given order."""

    def __init__(self, order, forward):
        super().__init__()
        makers = {"attn": nn.Linear, "mlp": nn.Linear}
        for name in order:
            self.add_module(name, makers[name](4, 4) if name in makers else nn.LayerNorm(4))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def pre_norm(block, x):
    block.state = x + block.attn(block.norm1(x))
    return block.state + block.mlp(block.norm2(block.state))


def after_norm(block, x):
    block.state = x + block.norm1(block.attn(x))
    return block.state + block.norm2(block.mlp(block.state))


def without_norm(block, x):
    block.state = x + block.attn(x)
    return block.state + block.mlp(block.state)


def one_residual(block, x):
    return x + block.mlp(block.norm1(block.attn(x)))


@pytest.mark.parametrize(
    ("order", "forward"),
    [
        (("norm1", "attn", "norm2", "mlp"), pre_norm),
        (("attn", "norm1", "norm2", "mlp"), pre_norm),
        (("attn", "norm1", "mlp", "norm2"), after_norm),
        (("attn", "mlp"), without_norm),
        (("attn", "mlp", "norm1", "norm2"), pre_norm),
        (("attn", "norm1", "mlp"), one_residual),
    ],
)
def test_the_state_after_attention_in_blocks_of_every_order(order, forward):
    """The state after the residual, or the whole block where the order does not tell; nothing else."""
    model = nn.Sequential(Block(order, forward), Block(order, forward))
    x = torch.randn(2, 16, 4)
    with (
        torch.no_grad(),
        Recorder(
            model,
            choose_probes(model, "sublayers"),
            lambda layer, maps: maps.clone(),
            input_size=(16, 16),
        ) as recorder,
    ):
        values = recorder.forward(x)
    told = order[-2:] != ("norm1", "norm2") and forward is not one_residual
    assert list(values) == (["0:attn", "0:mlp", "1:attn", "1:mlp"] if told else ["0", "1"])
    if told:
        torch.testing.assert_close(values["0:attn"], model[0].state.mT.unflatten(2, (4, 4)))


def test_blocks_that_work_on_patches_give_way_to_the_module_around_them():
    model = timm.create_model("mobilevit_xxs").eval()
    _, values, recorder = record(model, "blocks", size=64)
    assert "stages.2.1" in values
    assert not recorder.skipped
    patterns = [probe.name for probe in choose_probes(model, "blocks")]  # what is named is not replaced
    _, narrow, recorder = record(model, patterns, size=64)
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
    found = recorder._form(torch.zeros(shape), nn.Identity)
    assert form in found if isinstance(form, str) else found == form


def test_kinds():
    resnet, vit = timm.create_model("seresnet18"), timm.create_model("test_vit")
    assert kind_of(resnet.layer1[0]) == "conv"
    assert kind_of(resnet.maxpool) == "pool"
    assert kind_of(vit.patch_embed) == "embed"
    assert kind_of(vit.blocks[0]) == "attention"
    assert kind_of(vit.blocks[0].mlp) == "mlp"
    assert kind_of(nn.ReLU()) == "other"


def test_as_many_channels_as_pixels_on_a_side_channels_last():
    # 24 channels on 24×24: the later stages, of 48 on 12×12, tell where the channels are.
    options = {"img_size": 96, "embed_dim": 24, "window_size": 6, "depths": (1, 1, 1, 1)}
    model = timm.create_model("swinv2_cr_tiny_ns_224", num_heads=(1, 2, 4, 8), **options)
    outputs = []
    model.stages[0].blocks[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    _, values, recorder = record(model, "blocks", size=96)
    assert outputs[-1].shape == (2, 24, 24, 24)
    assert torch.equal(values["stages.0.blocks.0"], outputs[-1].permute(0, 3, 1, 2))
    assert not recorder.skipped
    # Asked for alone, too: the other layers are looked at all the same.
    _, values, _ = record(model, ["stages.0.blocks.0"], size=96)
    assert torch.equal(values["stages.0.blocks.0"], outputs[-1].permute(0, 3, 1, 2))


@pytest.mark.parametrize(("name", "layout"), [("convnext_tiny", "NHWC"), ("convnext_atto", "NCHW")])
def test_as_many_channels_as_pixels_on_a_side_in_a_network_of_both_layouts(name, layout):
    model = timm.create_model(name, dims=(16, 32, 64, 128), depths=(1, 1, 1, 1))
    block, outputs = model.stages[0].blocks[0], {}
    block.register_forward_hook(lambda module, args, output: outputs.update(block=output))
    block.mlp.register_forward_hook(lambda module, args, output: outputs.update(mlp=output))
    _, values, _ = record(model, ["stages.*.blocks.0", "stages.*.blocks.0.mlp"])
    assert all(output.shape == (2, 16, 16, 16) for output in outputs.values())
    assert torch.equal(values["stages.0.blocks.0"], outputs["block"])
    mlp = outputs["mlp"].permute(0, 3, 1, 2) if layout == "NHWC" else outputs["mlp"]
    assert torch.equal(values["stages.0.blocks.0.mlp"], mlp)


def test_a_layout_that_nothing_tells_is_not_guessed():
    class Opaque(nn.Module):
        def forward(self, x):
            return x.mean(1, keepdim=True).expand(-1, x.shape[-1], -1, -1)

    _, values, recorder = record(nn.Sequential(Opaque()), ["0"])
    assert not values
    assert recorder.skipped == {"0": "an output of shape (2, 64, 64, 64) may have its channels first or last"}


def test_attention_between_tokens_is_no_map():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    model.blocks[0].attn.fused_attn = False
    _, values, recorder = record(model, ["blocks.0.attn.attn_drop", "blocks.0"], size=224, images=1)
    assert list(values) == ["blocks.0"]
    assert "attention between tokens" in recorder.skipped["blocks.0.attn.attn_drop"]


def test_layers_that_are_not_called_are_named():
    model = timm.create_model("test_vit", img_size=64)
    model.blocks[0].attn.fused_attn = True
    _, _, recorder = record(model, ["blocks.0", "blocks.0.attn.attn_drop"])
    assert recorder.skipped == {"blocks.0.attn.attn_drop": "it is not called in a forward pass"}


def test_choices_beside_patterns():
    model = timm.create_model("test_vit", img_size=64)
    names = [probe.name for probe in choose_probes(model, ["blocks", "blocks.0", "blocks.0.attn"])]
    assert names == [*(f"blocks.{i}" for i in range(len(model.blocks))), "blocks.0.attn"]
    assert names == [p.name for p in choose_probes(model, ["blocks", "blocks.0.attn"])]


def test_a_network_that_is_one_layer_is_named_by_its_class():
    assert [probe.name for probe in choose_probes(nn.Conv2d(3, 8, 3), "blocks")] == ["Conv2d"]
