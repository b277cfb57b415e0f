"""Every layout in which weights are found is made here as a file and loaded, and compared value by value."""

import argparse
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from fourierbias.errors import FourierBiasError
from fourierbias.models import checkpoint as ours
from fourierbias.models.loading import load_model
from fourierbias.models.weights import find_state_dicts, is_averaged, kind_of, read_weights, sha256

ARCH = "test_resnet"
VIT = "test_vit"


@pytest.fixture(scope="module")
def trained():
    """A network of 7 classes whose every weight and buffer is random, as after training."""
    return randomised(timm.create_model(ARCH, num_classes=7))


@pytest.fixture(scope="module")
def vit():
    return randomised(timm.create_model(VIT, num_classes=7))


def randomised(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return model.eval()


def prefixed(tensors, prefix):
    return OrderedDict((prefix + name, value) for name, value in tensors.items())


def noise(tensors, seed=6):
    """Other weights of the same names, for what must not be loaded."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def assert_same(module, tensors, *, but=()):
    own = module.state_dict()
    assert set(own) == set(tensors)
    differing = [name for name in own if not torch.equal(own[name].float(), tensors[name].float())]
    assert sorted(differing) == sorted(but)


def line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# -- modules and names ------------------------------------------------------------------------------------


def test_a_module_passes_through_untouched():
    model = timm.create_model(ARCH).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = load_model(model)
    assert loaded.module is model
    assert model.training
    assert_same(model, before)
    assert loaded.arch == ARCH
    assert loaded.preprocessing["input_size"] == (3, 160, 160)
    assert loaded.notes == []


def test_a_module_of_unknown_making_gets_the_usual_preprocessing_and_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    loaded = load_model(model, image_size=(64, 48))
    assert loaded.module is model
    assert loaded.arch == "Sequential"
    assert loaded.preprocessing == {
        "input_size": (3, 64, 48),
        "interpolation": "bicubic",
        "mean": timm.data.IMAGENET_DEFAULT_MEAN,
        "std": timm.data.IMAGENET_DEFAULT_STD,
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    assert any("preprocessing unknown" in note for note in loaded.notes)


def test_a_timm_name_gets_seeded_weights_and_leaves_the_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded = load_model(ARCH, seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(11)
    assert_same(loaded.module, timm.create_model(ARCH).state_dict())
    assert not loaded.module.training
    assert loaded.weights == "random seed=11"
    assert loaded.weights_sha256 is None
    assert loaded.notes == ["random weights, seed 11"]
    other = load_model(ARCH, seed=12).module.state_dict()
    assert not torch.equal(other["conv1.0.weight"], loaded.module.state_dict()["conv1.0.weight"])


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_reference_architectures_are_known_by_name(name):
    loaded = load_model(name, num_classes=4)
    assert loaded.module(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    assert loaded.preprocessing["input_size"] == (3, 32, 32)
    assert loaded.arch_args == {"num_classes": 4}


def test_image_size_is_built_in_where_the_architecture_fixes_it():
    fixed = load_model(VIT, image_size=(64, 96))
    assert fixed.module.patch_embed.grid_size == (4, 6)
    assert fixed.preprocessing["input_size"] == (3, 64, 96)
    assert fixed.arch_args == {"img_size": (64, 96)}
    free = load_model(ARCH, image_size=96)
    assert free.preprocessing["input_size"] == (3, 96, 96)
    assert free.arch_args == {}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet5O", {}, "resnet50"),
        ("vit_tinny_patch16_224", {}, "vit_tiny_patch16_224"),
        ("CNN", {}, "no model called 'CNN'"),
        ("", {}, "empty"),
        ("timm/resnet50", {}, "hf-hub:timm/resnet50"),
        ("http:thing", {}, "http has no thing"),
        ("hf-hub:", {}, "no model called"),
        ("resnet10t.nonsense", {}, "c3_in1k"),
        ("resnet10t.nonsense", {"pretrained": True}, "c3_in1k"),
        ("cnn", {"pretrained": True}, "cnn has no pretrained weights"),
        (VIT, {"image_size": 65}, "whole patches of 16×16"),
        (VIT, {"image_size": 8}, "whole patches of 16×16"),
        (VIT, {"model_args": {"num_heads": 7}}, "test_vit cannot be built with num_heads=7"),
        (VIT, {"image_size": 0}, "image size"),
        (VIT, {"image_size": "big"}, "image size"),
        (ARCH, {"model_args": {"wings": 2}}, "wings"),
        (ARCH, {"seed": 2**70}, "no seed"),
        ("nothing.pth", {}, "no such file: nothing.pth"),
        ("nothing", {"arch": ARCH}, "no such file: nothing"),
        ("local-dir:nowhere", {}, "nowhere has no config.json"),
        (7, {}, "not int"),
        ("x" * 5000, {}, "no model called"),
        ("x" * 5000 + ".pth", {}, "no such file"),
        ("nul\0.pth", {}, "no such file"),
        ("~nobody-of-this-name/x", {}, "no such file"),
    ],
)
def test_bad_names_and_options_are_one_line_with_the_mend(name, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FourierBiasError) as error:
        load_model(name, **options)
    assert said in line(error)


def test_a_tag_without_pretrained_is_random_and_says_how_to_get_the_weights():
    loaded = load_model("resnet10t.c3_in1k")
    assert loaded.weights == "random seed=0"
    assert any("--pretrained" in note for note in loaded.notes)


def test_pretrained_without_a_network_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the client's own switch
    for name, options in ((f"{VIT}.r160_in1k", {"pretrained": True}), ("hf-hub:timm/test_vit.r160_in1k", {})):
        with pytest.raises(FourierBiasError) as error:
            load_model(name, model_args={"cache_dir": str(tmp_path)}, **options)
        assert "no connection" in line(error)
        assert name in line(error)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "their_nets.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, width=4, classes=3):\n"
        "        super().__init__()\n"
        "        self.encoder = torch.nn.Sequential(\n"
        "            torch.nn.Conv2d(3, width, 3), torch.nn.BatchNorm2d(width))\n"
        "        self.fc = torch.nn.Linear(width, classes)\n"
        "def number(): return 3\n"
        "def broken(): raise KeyError('inside')\n"
    )
    yield tmp_path
    sys.modules.pop("their_nets", None)


def test_a_factory_of_the_user_is_imported_only_when_named(user_code):
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert "their_nets" not in sys.modules
    loaded = load_model("their_nets:Net", model_args={"width": 6}, seed=4)
    assert "their_nets" in sys.modules
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert_same(loaded.module, sys.modules["their_nets"].Net(width=6).state_dict())
    assert loaded.arch == "their_nets:Net"
    assert loaded.arch_args == {"width": 6}
    assert any(note.startswith("imported their_nets") for note in loaded.notes)


def test_weights_of_a_factory_of_the_user(user_code):
    reference = load_model("their_nets:Net").module
    wanted = randomised(reference).state_dict()
    torch.save({"epoch": 3, "network": prefixed(wanted, "module.")}, user_code / "theirs.pth")
    loaded = load_model(user_code / "theirs.pth", arch="their_nets:Net")
    assert_same(loaded.module, wanted)
    assert any(note.startswith("imported their_nets") for note in loaded.notes)
    other = load_model(user_code / "theirs.pth", arch="their_nets:Net", model_args={"classes": 5})
    assert_same(
        other.module, {**wanted, **head_of(other.module, "fc")}
    )  # the body is the file's, the head its own
    assert "head of 5 classes replaced: 3 in the file; it stays random" in other.notes


def head_of(module, name):
    return {key: value for key, value in module.state_dict().items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("their_nets:Nett", "nearest: Net"),
        ("their_nets:number", "returned int"),
        ("their_nets:broken", "KeyError: 'inside'"),
        ("no_such_package_here:Net", "no module named no_such_package_here"),
        ("their_nets:__name__", "no function"),
    ],
)
def test_a_factory_that_gives_no_network_is_one_line(name, said, user_code):
    with pytest.raises(FourierBiasError) as error:
        load_model(name)
    assert said in line(error)


# -- layouts of weights files -----------------------------------------------------------------------------

LAYOUTS = {
    "bare": lambda t: t,
    "parameters": lambda t: OrderedDict((name, nn.Parameter(v.float())) for name, v in t.items()),
    "state_dict": lambda t: {"state_dict": t, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(3)}}}},
    "model": lambda t: {"model": t, "lr": 0.1},
    "model_state_dict": lambda t: {"model_state_dict": t, "loss": torch.tensor(0.5)},
    "model_state": lambda t: {"model_state": t},
    "net": lambda t: {"net": t, "acc": 91.2},
    "network": lambda t: {"network": t},
    "weights": lambda t: {"weights": t},
    "params": lambda t: {"params": t},
    "only ema": lambda t: {"ema": t},
    "any other word": lambda t: {"Gewichte": t},
    "nested": lambda t: {"checkpoint": {"trainer": {"model": t}}},
    "tuple": lambda t: (t, 12),
    "ddp": lambda t: prefixed(t, "module."),
    "compiled": lambda t: prefixed(t, "_orig_mod."),
    "ddp of compiled": lambda t: prefixed(t, "module._orig_mod."),
    "compiled ddp": lambda t: prefixed(t, "_orig_mod.module."),
    "compiled in parts": lambda t: OrderedDict(
        (name.replace("layer1.", "layer1._orig_mod."), value) for name, value in t.items()
    ),
    "half": lambda t: OrderedDict(
        (name, v.bfloat16().float().bfloat16() if v.is_floating_point() else v) for name, v in t.items()
    ),
    "numpy in it": lambda t: {"state_dict": t, "best": np.float64(0.93), "rng": np.random.get_state()},
    "swa": lambda t: {**prefixed(t, "module."), "n_averaged": torch.tensor(5)},
    "old batch norm": lambda t: OrderedDict((n, v) for n, v in t.items() if "num_batches" not in n),
    "backbone": lambda t: {"state_dict": prefixed(t, "backbone.")},
    "encoder": lambda t: {"state_dict": prefixed(t, "module.encoder.")},
    "lightning": lambda t: {
        "pytorch-lightning_version": "2.2.0",
        "state_dict": {**prefixed(t, "model."), "criterion.weight": torch.ones(7)},
        "hyper_parameters": {"arch": "wide_resnet", "lr": 1e-3},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best": torch.tensor(1.0)}},
        "loops": {"fit_loop": {"state_dict": {}}},
    },
}


@pytest.mark.parametrize(
    ("layout", "legacy"),
    [(layout, False) for layout in LAYOUTS] + [("bare", True), ("ddp", True), ("lightning", True)],
)
def test_torch_layouts(layout, legacy, trained, tmp_path):
    wanted = trained.state_dict()
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](wanted), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_model(path, arch=ARCH)
    if layout == "half":
        wanted = {n: v.bfloat16().float() if v.is_floating_point() else v for n, v in wanted.items()}
    assert_same(loaded.module, wanted)
    assert not loaded.module.training
    assert loaded.weights == str(path)
    assert loaded.weights_sha256 == sha256(path)
    assert loaded.arch_args == {"num_classes": 7}
    assert "head of 7 classes, as in the file" in loaded.notes


def test_lightning_says_which_prefix_and_what_was_left(trained, tmp_path):
    path = tmp_path / "epoch=3.ckpt"
    torch.save(LAYOUTS["lightning"](trained.state_dict()), path)
    loaded = load_model(path, arch=ARCH)
    assert "prefix 'model.' of the file's names taken off" in loaded.notes
    assert "1 tensors outside 'model.' left out (criterion.weight)" in loaded.notes


def test_timm_training_checkpoint_needs_no_arch(trained, tmp_path):
    raw = trained.state_dict()
    averaged = noise(raw)
    options = argparse.Namespace(
        model=ARCH, num_classes=7, mean=[0.4, 0.5, 0.6], crop_pct=0.8, img_size=96, input_size=None
    )
    path = tmp_path / "model_best.pth.tar"
    torch.save(
        {"epoch": 9, "arch": "resnet", "state_dict": raw, "state_dict_ema": averaged, "args": options}, path
    )
    loaded = load_model(path)
    assert loaded.arch == ARCH
    assert_same(loaded.module, averaged)
    assert "EMA weights used (state_dict_ema)" in loaded.notes
    assert f"architecture {ARCH}, as recorded in the file" in loaded.notes
    assert loaded.preprocessing["mean"] == (0.4, 0.5, 0.6)
    assert loaded.preprocessing["crop_pct"] == 0.8
    assert loaded.preprocessing["input_size"] == (3, 96, 96)
    loaded = load_model(path, ema=False)
    assert_same(loaded.module, raw)
    assert "raw weights used (state_dict), as asked" in loaded.notes


def test_arch_recorded_at_the_top_as_in_torch_examples(trained, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"arch": ARCH, "state_dict": prefixed(trained.state_dict(), "module.")}, path)
    loaded = load_model(path)
    assert loaded.arch == ARCH
    assert_same(loaded.module, trained.state_dict())


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize(
    "layout",
    [
        lambda raw, averaged: {"model": raw, "model_ema": averaged},
        lambda raw, averaged: {"ema": averaged, "net": raw},
        lambda raw, averaged: {"state_dict": {**prefixed(raw, "model."), **prefixed(averaged, "ema_model.")}},
        lambda raw, averaged: {
            "student": prefixed(raw, "module.backbone."),
            "teacher": prefixed(averaged, "backbone."),
        },
        lambda raw, averaged: {
            "state_dict": prefixed(raw, "net."),
            "callbacks": {"EMA": {"ema_state_dict": averaged}},
        },
    ],
    ids=["model_ema", "ema", "prefixes", "teacher", "callback"],
)
def test_averaged_weights_are_preferred_or_not(layout, ema, trained, tmp_path):
    raw = trained.state_dict()
    averaged = noise(raw)
    torch.save(layout(raw, averaged), tmp_path / "both.pth")
    loaded = load_model(tmp_path / "both.pth", arch=ARCH, ema=ema)
    assert_same(loaded.module, averaged if ema else raw)
    assert any(note.startswith("EMA weights used" if ema else "raw weights used") for note in loaded.notes)


def test_averaged_weights_without_buffers_are_not_taken_for_whole(trained, tmp_path):
    raw = trained.state_dict()
    parameters = {name: torch.rand_like(value) for name, value in trained.named_parameters()}
    torch.save({"state_dict": raw, "ema": parameters}, tmp_path / "both.pth")
    loaded = load_model(tmp_path / "both.pth", arch=ARCH)
    assert_same(loaded.module, raw)
    assert any("do not fit whole" in note for note in loaded.notes)


def test_safetensors_by_content_whatever_the_name(trained, tmp_path):
    wanted = {name: value.contiguous() for name, value in trained.state_dict().items()}
    for name in ("model.safetensors", "model.bin"):
        safetensors.torch.save_file(prefixed(wanted, "model."), tmp_path / name)
        loaded = load_model(tmp_path / name, arch=ARCH)
        assert_same(loaded.module, wanted)


def test_file_inside_a_wrapping_network_of_the_user(user_code):
    wanted = randomised(timm.create_model(ARCH, num_classes=0)).state_dict()
    (user_code / "their_nets.py").write_text(
        "import timm, torch\n"
        "class Wrapped(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.body = timm.create_model({ARCH!r}, num_classes=0)\n"
        "        self.head = torch.nn.Linear(2, 2)\n"
    )
    torch.save(wanted, user_code / "body.pth")
    loaded = load_model(user_code / "body.pth", arch="their_nets:Wrapped")
    assert_same(loaded.module.body, wanted)
    assert "prefix 'body.' put before the file's names" in loaded.notes
    assert any("head is not in the file" in note for note in loaded.notes)


def test_a_file_without_a_head_or_with_another(trained, tmp_path):
    whole = trained.state_dict()
    body = {name: value for name, value in whole.items() if not name.startswith("fc.")}
    path = tmp_path / "body.pth"
    torch.save(body, path)
    loaded = load_model(path, arch=ARCH, seed=2)
    assert_same(loaded.module, {**body, **head_of(load_model(ARCH, seed=2).module, "fc")})
    assert "the head is not in the file (fc.weight, fc.bias) and stays random" in loaded.notes

    torch.save({**body, "fc.0.weight": torch.ones(3, 3), "projector.bias": torch.ones(3)}, path)
    loaded = load_model(path, arch=ARCH)
    assert_same(loaded.module, {**body, **head_of(loaded.module, "fc")})
    assert any("heads of the file that this network has not" in note for note in loaded.notes)

    torch.save(whole, path)
    loaded = load_model(path, arch=ARCH, num_classes=5)
    assert_same(loaded.module, {**body, **head_of(loaded.module, "fc")})
    assert loaded.module.num_classes == 5
    assert "head of 5 classes replaced: 7 in the file; it stays random" in loaded.notes


def test_input_size_follows_the_file_or_is_interpolated_when_asked(tmp_path):
    small = randomised(timm.create_model(VIT, img_size=64, num_classes=3))
    path = tmp_path / "small.pth"
    torch.save({"model": prefixed(small.state_dict(), "module.")}, path)
    loaded = load_model(path, arch=VIT)
    assert_same(loaded.module, small.state_dict())
    assert loaded.preprocessing["input_size"] == (3, 64, 64)
    assert loaded.arch_args == {"img_size": (64, 64), "num_classes": 3}
    assert any("64×64 pixels" in note for note in loaded.notes)
    larger = load_model(path, arch=VIT, image_size=96)
    assert larger.module.patch_embed.grid_size == (6, 6)
    assert_same(
        larger.module,
        {**small.state_dict(), "pos_embed": larger.module.pos_embed},
    )
    expected = timm.layers.resample_abs_pos_embed(small.pos_embed, [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(larger.module.pos_embed, expected)


def test_published_names_are_converted_by_timms_filter(tmp_path):
    model = randomised(timm.create_model("test_convnext", num_classes=7))
    published = {}  # the names of Liu et al.'s own files
    for name, value in model.state_dict().items():
        name = name.replace("stages_0.", "stages.0.").replace("stem.", "downsample_layers.0.")
        name = name.replace("head.fc.", "head.").replace("head.norm.", "norm.")
        for stage in range(4):
            name = name.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
            name = name.replace(f"stages.{stage}.blocks.", f"stages.{stage}.")
        name = name.replace(".conv_dw.", ".dwconv.").replace(".mlp.fc", ".pwconv")
        published[name] = value
    assert set(published) != set(model.state_dict())
    torch.save({"model": published}, tmp_path / "published.pth")
    loaded = load_model(tmp_path / "published.pth", arch="test_convnext", num_classes=7)
    assert_same(loaded.module, model.state_dict())
    assert "weights converted by timm's own filter for this architecture" in loaded.notes


def test_a_kernel_is_not_resampled_into_another_architecture(vit, tmp_path):
    tensors = dict(vit.state_dict())
    tensors["patch_embed.proj.weight"] = torch.ones(64, 3, 8, 8)
    torch.save(tensors, tmp_path / "patch8.pth")
    with pytest.raises(FourierBiasError, match=r"patch_embed\.proj\.weight \[64, 3, 8, 8\]"):
        load_model(tmp_path / "patch8.pth", arch=VIT)


def test_jax_arrays_of_a_vision_transformer(vit, tmp_path):
    arrays, path = jax_arrays(vit), tmp_path / "vit.npz"
    np.savez(path, **arrays)
    loaded = load_model(path, arch=VIT)
    assert_same(loaded.module, vit.state_dict())
    assert loaded.weights_sha256 == sha256(path)
    loaded = load_model(path, arch=VIT, num_classes=5)
    assert_same(loaded.module, {**vit.state_dict(), **head_of(loaded.module, "head")})

    headless = {name: value for name, value in arrays.items() if not name.startswith("head")}
    np.savez(path, **headless)
    loaded = load_model(path, arch=VIT, num_classes=7)
    assert_same(loaded.module, {**vit.state_dict(), **head_of(loaded.module, "head")})
    assert all(torch.isfinite(value).all() for value in loaded.module.state_dict().values())
    assert any("head is not in the file" in note for note in loaded.notes)

    for changed in (
        {name: value for name, value in arrays.items() if "encoderblock_1" not in name},
        {**arrays, "Transformer/encoderblock_6/LayerNorm_0/scale": np.ones(64)},
        {**arrays, "embedding/kernel": np.full_like(arrays["embedding/kernel"], np.nan)},
        {**arrays, "embedding/kernel": np.array([object()])},
        {"something": np.ones(3)},
    ):
        np.savez(path, **changed)
        with pytest.raises(FourierBiasError) as error:
            load_model(path, arch=VIT, num_classes=7)
        assert str(path) in line(error)
    with pytest.raises(FourierBiasError, match=r"reads no \.npz weights"):
        load_model(path, arch=ARCH)
    with pytest.raises(FourierBiasError, match="add --arch"):
        load_model(path)


def jax_arrays(vit):
    """The inverse of timm's reader: (in, heads, width) kernels, channels last."""
    heads = vit.blocks[0].attn.num_heads
    width = vit.embed_dim
    arrays = {
        "embedding/kernel": vit.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": vit.patch_embed.proj.bias,
        "cls": vit.cls_token,
        "Transformer/posembed_input/pos_embedding": vit.pos_embed,
        "Transformer/encoder_norm/scale": vit.norm.weight,
        "Transformer/encoder_norm/bias": vit.norm.bias,
        "head/kernel": vit.head.weight.T,
        "head/bias": vit.head.bias,
    }
    for index, block in enumerate(vit.blocks):
        root = f"Transformer/encoderblock_{index}"
        arrays |= {
            f"{root}/LayerNorm_0/scale": block.norm1.weight,
            f"{root}/LayerNorm_0/bias": block.norm1.bias,
            f"{root}/LayerNorm_2/scale": block.norm2.weight,
            f"{root}/LayerNorm_2/bias": block.norm2.bias,
        }
        attention = f"{root}/MultiHeadDotProductAttention_1"
        parts = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        for name, (weight, bias) in zip(("query", "key", "value"), parts, strict=True):
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = block.attn.proj.weight.T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = block.attn.proj.bias
        for number, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            arrays[f"{root}/MlpBlock_3/Dense_{number}/kernel"] = layer.weight.T
            arrays[f"{root}/MlpBlock_3/Dense_{number}/bias"] = layer.bias
    return {name: value.detach().numpy() for name, value in arrays.items()}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_local_dir_in_timms_layout(kind, trained, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    config = {
        "architecture": ARCH,
        "num_classes": 7,
        "label_names": list("abcdefg"),
        "pretrained_cfg": {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "num_classes": 7},
    }
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "bin":
        torch.save(trained.state_dict(), folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(trained.state_dict(), folder / "model.safetensors")
    loaded = load_model(f"local-dir:{folder}")
    assert_same(loaded.module, trained.state_dict())
    assert loaded.arch == ARCH
    assert loaded.weights == f"local-dir:{folder}"
    assert loaded.weights_sha256 == sha256(next(path for path in folder.iterdir() if "model" in path.name))
    assert loaded.preprocessing["input_size"] == (3, 96, 96)
    assert loaded.preprocessing["mean"] == (0.1, 0.2, 0.3)
    assert loaded.classes == list("abcdefg")
    with pytest.raises(FourierBiasError, match="type local-dir:"):
        load_model(folder)


def test_local_dir_does_not_run_code_either(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": ARCH, "pretrained_cfg": {}}))
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FourierBiasError) as error:
        load_model(f"local-dir:{tmp_path}")
    assert "beyond tensors" in line(error)
    assert not (tmp_path / "ran").exists()


# -- our own checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "tiny.ckpt"
    arch_args = {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)}
    model = randomised(ours.create("cnn", num_classes=3, **arch_args))
    preprocessing = {
        "input_size": (3, 32, 32),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    ours.save_checkpoint(
        path,
        ours.Checkpoint(
            arch="cnn",
            arch_args=arch_args,
            state_dict=model.state_dict(),
            classes=["cat", "cup", "coin"],
            preprocessing=preprocessing,
            weights="average of 3 epochs",
        ),
    )
    return path, model


def test_our_checkpoint(own_checkpoint):
    path, model = own_checkpoint
    loaded = load_model(str(path))
    assert_same(loaded.module, model.state_dict())
    assert not loaded.module.training
    assert loaded.arch == "cnn"
    assert loaded.arch_args == {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4), "num_classes": 3}
    assert loaded.classes == ["cat", "cup", "coin"]
    assert loaded.preprocessing["mean"] == (0.5, 0.4, 0.3)
    assert loaded.preprocessing["interpolation"] == "bilinear"
    assert loaded.weights == str(path)
    assert loaded.weights_sha256 == sha256(path)
    assert loaded.notes == ["weights: average of 3 epochs"]
    assert load_model(path, image_size=48).preprocessing["input_size"] == (3, 48, 48)
    with pytest.raises(FourierBiasError, match="a checkpoint of cnn, not vit"):
        load_model(path, arch="vit")
    with pytest.raises(FourierBiasError, match="leave --pretrained out"):
        load_model(path, pretrained=True)


def test_our_checkpoint_of_a_vit_at_another_size(tmp_path):
    arch_args = {"depth": 1, "embed_dim": 12, "num_heads": 2}
    model = randomised(ours.create("vit", num_classes=3, **arch_args))
    path = tmp_path / "vit.ckpt"
    ours.save_checkpoint(
        path, ours.Checkpoint("vit", model.state_dict(), ["a", "b", "c"], arch_args=arch_args)
    )
    assert_same(load_model(path).module, model.state_dict())
    assert load_model(path).preprocessing["input_size"] == (3, 32, 32)
    loaded = load_model(path, image_size=48)
    assert loaded.module.patch_embed.grid_size == (12, 12)
    assert loaded.preprocessing["input_size"] == (3, 48, 48)
    assert loaded.arch_args["img_size"] == (48, 48)
    assert "positions interpolated to 48×48 pixels" in loaded.notes
    assert_same(loaded.module, {**model.state_dict(), "pos_embed": loaded.module.pos_embed})
    assert load_model(path, image_size=32).notes == []


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("input_size", (3, 0, 32)),
        ("input_size", 7),
        ("mean", (0.5, float("nan"), 0.5)),
        ("mean", (0.5, 0.5)),
        ("std", (0.0, 0.1, 0.1)),
        ("interpolation", "bicubjc"),
        ("crop_mode", ["center"]),
        ("crop_pct", -1.0),
    ],
)
def test_unusable_preprocessing_is_named(entry, value, own_checkpoint, tmp_path):
    values = torch.load(own_checkpoint[0], weights_only=True)
    values["preprocessing"][entry] = value
    torch.save(values, tmp_path / "bad.ckpt")
    with pytest.raises(FourierBiasError) as error:
        load_model(tmp_path / "bad.ckpt")
    assert f"{entry} is {value!r}" in line(error)


# -- refusals ---------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_refused_and_not_run(legacy, protocol, trained, tmp_path):
    path, ran = tmp_path / "trap.pth", tmp_path / "ran"
    torch.save(
        {"state_dict": trained.state_dict(), "extra": Payload(ran)},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(FourierBiasError) as error:
        load_model(path, arch=ARCH)
    text = line(error)
    assert not ran.exists()
    assert "open" in text
    assert text.index("save the state dict alone") < text.index("--unsafe-pickle")

    loaded = load_model(path, arch=ARCH, unsafe_pickle=True)
    assert ran.exists()
    assert_same(loaded.module, trained.state_dict())
    assert loaded.notes[0].startswith("warning:")
    assert "--unsafe-pickle" in loaded.notes[0]


def test_unsafe_pickle_is_not_used_where_it_is_not_needed(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "plain.pth")
    loaded = load_model(tmp_path / "plain.pth", arch=ARCH, unsafe_pickle=True)
    assert not any("warning" in note for note in loaded.notes)


def test_a_whole_pickled_network_needs_unsafe_pickle(trained, tmp_path):
    path = tmp_path / "whole.pth"
    torch.save(trained, path)
    with pytest.raises(FourierBiasError, match=r"timm\.models\.resnet\.ResNet"):
        load_model(path)
    loaded = load_model(path, unsafe_pickle=True)
    assert_same(loaded.module, trained.state_dict())
    assert loaded.arch == ARCH
    assert loaded.weights == str(path)
    torch.save({"model": trained, "epoch": 1}, path)
    assert_same(load_model(path, arch=ARCH, unsafe_pickle=True).module, trained.state_dict())


def test_a_plain_pickle_is_named_and_not_run(tmp_path):
    for protocol in (2, 4, 5):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": Payload(tmp_path / "ran")}, protocol))
        with pytest.raises(FourierBiasError, match=r"plain Python pickle.*open"):
            load_model(tmp_path / "x.pkl", arch=ARCH, unsafe_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_keys_that_do_not_fit_are_counted_and_named(trained, tmp_path):
    tensors = dict(trained.state_dict())
    tensors["layer1.0.conv1.weight"] = torch.ones(2, 2)
    for name in ("bn1.weight", "bn1.bias", "layer1.0.bn1.weight", "layer1.0.bn1.bias"):
        tensors[f"strange.{name}"] = tensors.pop(name)
    path = tmp_path / "odd.pth"
    torch.save({"state_dict": prefixed(tensors, "net.")}, path)
    with pytest.raises(FourierBiasError) as error:
        load_model(path, arch=ARCH)
    text = line(error)
    total = len(trained.state_dict())
    assert f"{total - 5} of {total} weights match" in text
    assert "4 not in the file (bn1.weight, bn1.bias, layer1.0.bn1.weight and 1 more)" in text
    assert "4 not in the network (strange.bn1.weight," in text
    assert "1 of other shape (layer1.0.conv1.weight [2, 2] for [" in text
    assert "prefix 'net.' of the file's names taken off" in text


def test_another_architecture_that_fits_is_named(trained, vit, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": vit.state_dict()}, path)
    with pytest.raises(FourierBiasError, match=r"it fits --arch test_vit$"):
        load_model(path, arch="test_vit2")
    path = tmp_path / "test_resnet-4f2a.pth"
    torch.save({"model": prefixed(trained.state_dict(), "module.")}, path)
    with pytest.raises(FourierBiasError, match=r"0 of \d+ weights match.*it fits --arch test_resnet$"):
        load_model(path, arch="vit")
    with pytest.raises(FourierBiasError, match=r"add --arch NAME, perhaps --arch test_resnet$"):
        load_model(path)


HTML = b"<!DOCTYPE html>\n<html><body>404</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
TAR = b"weights".ljust(257, b"\0") + b"ustar\x0000" + b"\0" * 512
NOTHING = {
    "empty": (b"", "is empty (0 bytes)"),
    "text": (b"not a model\n" * 50, "a text file"),
    "unicode": ("längst kein Modell … \n".encode() * 400, "a text file"),
    "html": (HTML, "a web page"),
    "lfs": (LFS, "git lfs pull"),
    "jpeg": (b"\xff\xd8\xff\xe0" + b"\0" * 100, "JPEG image"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "PNG image"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "an HDF5 file"),
    "npy": (b"\x93NUMPY\x01\x00", "numpy array"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 50, "gzip"),
    "tar": (TAR, "tar archive"),
    "binary": (bytes(range(7, 256)) * 5, "no weights file that is known here"),
    "header only": (b"\x10\0\0\0\0\0\0\0{", "damaged or incomplete"),
    "zip start": (b"PK\x03\x04" + b"\0" * 200, "cut short or damaged"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_files_that_are_no_weights_say_what_they_are(kind, tmp_path):
    content, said = NOTHING[kind]
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(FourierBiasError) as error:
        load_model(path, arch=ARCH)
    assert said in line(error)
    assert str(path) in line(error)


def test_truncated_files_and_other_zips(trained, tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save(trained.state_dict(), whole)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "whole.safetensors")
    for source in (whole, tmp_path / "whole.safetensors"):
        data = source.read_bytes()
        (tmp_path / "part").write_bytes(data[: len(data) // 2])
        with pytest.raises(FourierBiasError, match=r"damaged"):
            load_model(tmp_path / "part", arch=ARCH)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a/1.jpg", b"x")
    with pytest.raises(FourierBiasError, match=r"zip archive with no weights.*a/1\.jpg"):
        load_model(tmp_path / "pictures.zip", arch=ARCH)
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "script.pt")
    for unsafe in (False, True):
        with pytest.raises(FourierBiasError, match="TorchScript"):
            load_model(tmp_path / "script.pt", arch=ARCH, unsafe_pickle=unsafe)


@pytest.mark.parametrize("values", [torch.ones(3), [], {}, {"epoch": 3}, 7, "text", {"a": [1, 2]}])
def test_a_torch_file_without_named_tensors(values, tmp_path):
    torch.save(values, tmp_path / "x.pth")
    with pytest.raises(FourierBiasError, match="no named tensors"):
        load_model(tmp_path / "x.pth", arch=ARCH)


def test_folder_and_missing_file(tmp_path):
    with pytest.raises(FourierBiasError, match="is a folder; name the weights file in it"):
        load_model(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(FourierBiasError, match=r"no such file: .*; nearest: model\.ckpt"):
        load_model(tmp_path / "modell.ckpt")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(FourierBiasError, match="no regular file"):
        load_model(tmp_path / "pipe.pth", arch=ARCH)


def test_a_file_goes_before_a_name_and_a_name_before_a_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ARCH).mkdir()
    assert load_model(ARCH).weights == "random seed=0"
    (tmp_path / ARCH).rmdir()
    torch.save(trained.state_dict(), tmp_path / ARCH)
    assert_same(load_model(ARCH, arch=ARCH).module, trained.state_dict())


# -- damage -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victims(own_checkpoint, tmp_path_factory):
    """Small files of three formats, most of whose bytes are structure."""
    folder = tmp_path_factory.mktemp("victims")
    tensors = {name: value for name, value in own_checkpoint[1].state_dict().items()}
    torch.save({"state_dict": prefixed(tensors, "module."), "arch": "cnn"}, folder / "a.pth")
    torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, folder / "a.safetensors")
    (folder / "own.ckpt").write_bytes(own_checkpoint[0].read_bytes())
    return sorted(folder.iterdir())


def error_of(path, options):
    try:
        assert isinstance(load_model(path, **options).module, nn.Module)
    except FourierBiasError as error:
        return str(error)
    return None


def assert_mutants_end_well(victims, seeds, folder):
    loaded = 0
    for seed in seeds:
        generator = np.random.default_rng(seed)
        victim = victims[seed % len(victims)]
        data = bytearray(victim.read_bytes())
        for _ in range(generator.integers(1, 9)):
            # half of the damage at the ends, where the formats keep their structure
            span = len(data) if generator.random() < 0.5 else min(2000, len(data))
            place = int(generator.integers(span)) * (1 if generator.random() < 0.5 else -1)
            data[place] = generator.integers(256)
        if generator.random() < 0.1:
            del data[int(generator.integers(len(data))) :]
        mutant = folder / f"mutant{victim.suffix}"
        mutant.write_bytes(data)
        arch_args = {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)}
        options = {} if victim.suffix == ".ckpt" else {"arch": "cnn", "model_args": arch_args}
        message = error_of(mutant, options)
        assert message is None or (str(mutant) in message and "\n" not in message)
        loaded += message is None
    return loaded


def test_mutated_files_load_or_end_in_one_line(victims, tmp_path):
    assert 0 < assert_mutants_end_well(victims, range(100), tmp_path) < 100


@pytest.mark.slow
def test_many_mutated_files_load_or_end_in_one_line(victims, tmp_path):
    assert 0 < assert_mutants_end_well(victims, range(100, 500), tmp_path) < 400


# -- the reader by itself ---------------------------------------------------------------------------------


def test_state_dicts_are_found_at_any_depth_and_named():
    values = {
        "a": {"b": {"w": torch.ones(1)}},
        "c": [{"_orig_mod.v": torch.ones(2)}],
        3: {"x": torch.ones(1)},
    }
    found = {one.where: list(one.tensors) for one in find_state_dicts(values)}
    assert found == {"a.b": ["w"], "c.0": ["v"]}
    cyclic = {"w": torch.ones(1)}
    cyclic["self"] = cyclic
    assert len(find_state_dicts(cyclic)) == 5


def test_kinds_are_told_by_content(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "b.pth")
    np.savez(tmp_path / "c.npz", w=np.ones(1))
    assert [kind_of(path) for path in sorted(tmp_path.iterdir())] == ["torch", "safetensors", "npz"]
    assert read_weights(tmp_path / "b.pth")[0]["w"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("state_dict_ema", True),
        ("ema_model.", True),
        ("model_ema", True),
        ("callbacks.EMACallback.ema_state_dict", True),
        ("teacher.backbone.", True),
        ("swa", True),
        ("schema.model", False),
        ("state_dict.model.", False),
        ("cinema", False),
    ],
)
def test_averages_are_told_by_name(name, answer):
    assert is_averaged(name) is answer
