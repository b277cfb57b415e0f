"""The .ckpt file: what goes in comes out, nothing in it runs, and what is wrong is said in a line."""

import os
import pickle
import random
import resource

import pytest
import torch

from fourierbias.errors import FourierBiasError
from fourierbias.models.checkpoint import (
    Checkpoint,
    build,
    built_from,
    create,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    save_torch,
)

TINY = {"cnn": {"channels": (8, 8, 8, 8), "layers": (1, 1, 1, 1)}, "vit": {"embed_dim": 18, "depth": 1}}


def make(name="cnn", **changes):
    model = create(name, num_classes=3, **TINY[name])
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 0.9)
    values = {
        **built_from(model),
        "state_dict": model.state_dict(),
        "classes": ["a", "b", "c"],
        "preprocessing": {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5)},
        "recipe": {"epochs": 2, "schedule": None},
        "metrics": {"test_accuracy": 0.5},
        "epoch": 2,
    }
    return model.eval(), Checkpoint(**{**values, **changes})


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_what_goes_in_comes_out(tmp_path, name):
    model, checkpoint = make(name)
    save_checkpoint(tmp_path / "a.ckpt", checkpoint)
    read = read_checkpoint(tmp_path / "a.ckpt")
    for key in ("arch", "arch_args", "classes", "preprocessing", "recipe", "metrics", "epoch", "version"):
        assert getattr(read, key) == getattr(checkpoint, key)
    rebuilt, images = build(read), torch.randn(2, 3, 32, 32)
    assert not rebuilt.training
    assert torch.equal(rebuilt(images), model(images))
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_file_is_plain_for_torch(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", make()[1])
    values = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert (values["format"], values["format_version"], values["arch"]) == ("fourierbias", 1, "cnn")


def test_half_precision_is_for_storage_only(tmp_path):
    checkpoint = make()[1]
    checkpoint.state_dict["bn1.running_var"] = torch.full((8,), 1e6)  # no float16
    for dtype in (torch.float32, torch.float16):
        save_checkpoint(tmp_path / f"{dtype}.ckpt", checkpoint, dtype=dtype)
    stored = torch.load(tmp_path / "torch.float16.ckpt", weights_only=True)
    assert stored["dtype"] == "float16"
    assert stored["state_dict"]["fc.weight"].dtype == torch.float16
    assert stored["state_dict"]["bn1.running_var"].dtype == torch.float32
    read = read_checkpoint(tmp_path / "torch.float16.ckpt").state_dict
    assert torch.equal(read["bn1.running_var"], torch.full((8,), 1e6))
    for key, value in checkpoint.state_dict.items():
        assert read[key].dtype == value.dtype
        torch.testing.assert_close(read[key], value, rtol=5e-4, atol=0)


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    base = torch.zeros(1_000_000)
    save_checkpoint(tmp_path / "a.ckpt", make(state_dict={"x": base[:3]})[1])
    assert (tmp_path / "a.ckpt").stat().st_size < 10_000


def test_recast_layers_are_rebuilt(tmp_path):
    recast = {"layers": ["layer4.*"], "gate": "sigmoid", "locality": 4.0}
    model = create("cnn", num_classes=3, recast=recast, **TINY["cnn"]).eval()
    record = Checkpoint(**built_from(model), state_dict=model.state_dict(), classes=["a", "b", "c"])
    save_checkpoint(tmp_path / "a.ckpt", record)
    rebuilt, images = build(read_checkpoint(tmp_path / "a.ckpt")), torch.randn(2, 3, 32, 32)
    assert rebuilt.layer4[0].conv1.is_attention
    assert not rebuilt.layer3[0].conv1.__class__.__name__.startswith("Reparam")
    torch.testing.assert_close(rebuilt(images), model(images))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_is_not_run(tmp_path, form):
    trace, path = tmp_path / "ran", tmp_path / "a.ckpt"
    content = {"format": "fourierbias", "state_dict": Payload(trace)}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(FourierBiasError, match="holds code besides weights"):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint"),
        (b"", "damaged"),
        (b"not a torch file", "damaged"),
        (b"PK\x03\x04 but no zip", "damaged"),
        ([1, 2], "holds list, not a checkpoint"),
        ({"state_dict": {}}, "no fourierbias checkpoint"),
        ({"format": "fourierbias"}, "no fourierbias checkpoint"),
        ({"format": "fourierbias", "format_version": 2, "state_dict": {}}, "format 2.*upgrade"),
        ({"format": "fourierbias", "format_version": 1, "state_dict": {}}, "arch or classes"),
        (
            {
                "format": "fourierbias",
                "format_version": 1,
                "state_dict": {"x": 1},
                "arch": "cnn",
                "classes": [],
            },
            "no tensors",
        ),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path, content, message):
    path = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(FourierBiasError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(FourierBiasError, match="is a folder"):
        read_checkpoint(tmp_path)


def test_truncated_file_is_damaged(tmp_path):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, make()[1])
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(FourierBiasError, match="damaged"):
        read_checkpoint(path)


def test_mutants_load_or_are_refused_in_a_line(tmp_path):
    path, draw = tmp_path / "a.ckpt", random.Random(0)
    save_checkpoint(path, make("vit")[1])
    whole = path.read_bytes()
    refused = []
    for _ in range(40):
        mutant = bytearray(whole)
        for _ in range(draw.choice((1, 20, 400))):
            mutant[draw.randrange(len(mutant))] = draw.randrange(256)
        path.write_bytes(mutant)
        try:
            build(read_checkpoint(path))
        except FourierBiasError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert not any("\n" in message for message in refused)


def test_keys_that_do_not_fit_are_counted_and_named():
    checkpoint = make()[1]
    keys = sorted(checkpoint.state_dict)
    total = len(keys)
    for key in keys[:5]:
        checkpoint.state_dict[f"strange.{key}"] = checkpoint.state_dict.pop(key)
    with pytest.raises(FourierBiasError) as caught:
        build(checkpoint)
    message = str(caught.value)
    assert f"{total - 5} of {total} keys match" in message
    assert "5 missing (" in message
    assert "5 not in the model (strange." in message
    assert message.count("and 2 more") == 2


def test_shapes_that_do_not_fit_are_named():
    checkpoint = make()[1]
    with pytest.raises(FourierBiasError, match=r"2 of .* another shape .*fc.weight \(3, 8\) for \(5, 8\)"):
        load_weights(create("cnn", num_classes=5, **TINY["cnn"]), checkpoint.state_dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"arch": "resnet5O"}, "nearest.*resnet50"), ({"arch_args": {"width": 3}}, "does not take")],
)
def test_architectures_that_cannot_be_built(changes, message):
    with pytest.raises(FourierBiasError, match=message):
        build(make(**changes)[1])


def test_a_network_of_no_known_architecture_has_no_record():
    with pytest.raises(FourierBiasError, match="register it with timm"):
        built_from(torch.nn.Linear(2, 2))


def test_a_file_under_its_name_is_whole(tmp_path):
    path = tmp_path / "a.ckpt"
    save_torch(path, {"x": torch.zeros(10)})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as a full disk: writing ends midway
    try:
        with pytest.raises(
            FourierBiasError, match=r"no room to write .*a\.ckpt: it needs about 40\d kB, .* are free in"
        ):
            save_torch(path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FourierBiasError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "a.ckpt", make()[1])
