"""Captured maps of ten families, through the file, against timm's extraction and hooks placed by hand."""

import pytest
import timm
import torch
from torch import nn

import fourierbias

# Name, arguments that make it small, image height and width, and how the output of a block is laid out.
FAMILIES = {
    "ResNet": ("test_resnet", {}, (64, 96), "NCHW"),
    "ConvNeXt": ("test_convnext", {}, (64, 96), "NCHW"),
    "EfficientNet": ("test_efficientnet", {}, (64, 96), "NCHW"),
    "ViT with registers": ("test_vit", {"img_size": (64, 96), "reg_tokens": 4, "depth": 3}, (64, 96), 5),
    "DeiT distilled": (
        "deit_tiny_distilled_patch16_224", {"img_size": (64, 96), "depth": 3, "embed_dim": 48}, (64, 96), 2,
    ),
    "ConViT": ("convit_tiny", {"img_size": 64, "depth": 4, "local_up_to_layer": 2}, (64, 64), "joins"),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": (64, 96), "window_size": 2, "embed_dim": 24, "depths": (2, 2, 2, 2)},
        (64, 96), "NHWC",
    ),
    "MaxViT": ("test_maxvit", {"img_size": (96, 64)}, (96, 64), "NCHW"),
    "MLP-Mixer": ("mixer_s32_224", {"img_size": 96}, (96, 96), 0),
    "MobileViT": ("mobilevit_xxs", {}, (64, 96), "NCHW"),
}  # fmt: skip


def maps_of(file, model, images, **options):
    """Every captured layer's maps (N, C, H, W), as they lie in the file."""
    fourierbias.capture(model, images, output=file, features=True, feature_dtype="float32", **options)
    capture = fourierbias.load(file)
    return {name: torch.from_numpy(capture.feature_maps(name)) for name in capture}


def hooked(model, names, images):
    """The outputs of the modules ``names`` in one forward, by hooks placed by hand; of tuples the first."""
    outputs = {}

    def keep(name, output):
        outputs[name] = (output[0] if isinstance(output, tuple) else output).clone()

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return outputs


def as_maps(output, layout, grid):
    """A block's output as (N, C, H, W), by what is known of the family."""
    if layout == "NCHW":
        return output
    if layout == "NHWC":
        return output.permute(0, 3, 1, 2)
    if layout == "joins":  # ConViT's class token joins halfway
        layout = output.shape[1] - grid[0] * grid[1]
    return output[:, layout:].mT.unflatten(2, grid)


@pytest.fixture(params=FAMILIES)
def family(request):
    name, options, size, layout = FAMILIES[request.param]
    model = timm.create_model(name, **options).eval()
    return model, torch.randn(2, 3, *size), layout


def test_stages_equal_timms_extraction(family, tmp_path):
    model, images, _ = family
    captured = maps_of(tmp_path / "a.h5", model, images, layers="stages")
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)
    assert len(captured) == len(expected)
    for maps, reference in zip(captured.values(), expected, strict=True):
        torch.testing.assert_close(maps, reference, rtol=1e-5, atol=1e-5)


def test_blocks_equal_hooks_placed_by_hand(family, tmp_path):
    model, images, layout = family
    captured = maps_of(tmp_path / "a.h5", model, images, batch_size=1)
    assert len(captured) >= 3
    outputs = hooked(model, captured, images)
    grid = (images.shape[2] // 16, images.shape[3] // 16) if layout != 0 else (3, 3)
    for name, maps in captured.items():
        expected = as_maps(outputs[name], layout, grid)
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x):
        return torch.relu_(self.conv3(torch.relu_(self.conv2(torch.relu_(self.conv1(x))))))


class OwnNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean(dim=(2, 3)))


def test_one_convolution_of_ones_own_network(tmp_path):
    model, images = OwnNetwork().eval(), torch.randn(3, 3, 16, 24)
    captured = maps_of(tmp_path / "a.h5", model, images, layers=["encoder.conv3"])
    outputs = hooked(model, ["encoder.conv3"], images)
    assert list(captured) == ["encoder.conv3"]
    torch.testing.assert_close(captured["encoder.conv3"], outputs["encoder.conv3"])
    assert captured["encoder.conv3"].min() < 0  # before the ReLU that overwrites it


def hugging_face(name):
    """A tiny network of Hugging Face `transformers`, its layout, and its blocks."""
    hf = pytest.importorskip("transformers")
    small = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    grid = {"image_size": 32, "patch_size": 8}
    config = {
        "ViT": lambda: hf.ViTConfig(intermediate_size=24, **small, **grid),
        "Dinov2": lambda: hf.Dinov2Config(**small, **grid),
        "Dinov2WithRegisters": lambda: hf.Dinov2WithRegistersConfig(num_register_tokens=4, **small, **grid),
        "ConvNext": lambda: hf.ConvNextConfig(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 2, 1]),
        "Swin": lambda: hf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=6, depths=[2, 2], num_heads=[1, 2], window_size=4
        ),
    }
    return getattr(hf, f"{name}Model")(config[name]()).eval()


PREFIX = {"ViT": 1, "Dinov2": 1, "Dinov2WithRegisters": 5, "ConvNext": None, "Swin": 0}


@pytest.mark.parametrize("name", PREFIX)
def test_networks_of_transformers(name, tmp_path):
    model, images = hugging_face(name), torch.randn(2, 3, 32, 32)
    captured = maps_of(tmp_path / "a.h5", model, images)
    outputs = hooked(model, captured, images)
    assert len(captured) == {"ConvNext": 5, "Swin": 4}.get(name, 2)
    for layer, maps in captured.items():
        output = outputs[layer]
        if PREFIX[name] is not None:
            output = output[:, PREFIX[name] :]
            side = int(output.shape[1] ** 0.5)
            output = output.mT.unflatten(2, (side, side))
        torch.testing.assert_close(maps, output, rtol=1e-4, atol=1e-4)


def test_sublayers_and_patterns_of_transformers(tmp_path):
    model, images = hugging_face("ViT"), torch.randn(2, 3, 32, 32)
    captured = maps_of(tmp_path / "a.h5", model, images, layers="sublayers")
    assert len(captured) == 4
    name = next(iter(captured))
    block = model.get_submodule(name.partition(":")[0])
    entered = []
    handle = block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    attended = hooked(model, [name.replace(":", ".")], images)[name.replace(":", ".")]
    handle.remove()
    state = entered[0] + attended
    torch.testing.assert_close(captured[name], state[:, 1:].mT.unflatten(2, (4, 4)), rtol=1e-4, atol=1e-4)
    both = maps_of(tmp_path / "b.h5", model, images, layers="**.attention")
    assert len(both) == 2
