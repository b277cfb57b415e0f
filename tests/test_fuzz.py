"""Damaged input of every kind, as typed: it works, or ends in one line ``Error: …`` and status 2.

Files are changed in their bytes, as disks and networks do, and in their contents, as other programs do.  (The
readers of weights and of images have such tests of their own; here the whole command runs.)
"""

import random
import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import fourierbias
from fourierbias.cli import main
from fourierbias.models.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from fourierbias.store import append_series

JUNK = [
    0,
    -1,
    2**40,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "junk",
    "ünï\n☃",
    True,
    [],
    [1, "a"],
    {"a": 1},
    None,
]


@pytest.fixture
def end_well(tmp_path, monkeypatch, capfd):
    """Type a command that may fail, but only as it should; whether it succeeded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def type_command(label, *words):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        lines = capfd.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("Error: ")]
        assert stopped.value.code in (0, 2), label
        assert len(errors) == (stopped.value.code == 2), label
        assert not errors or lines[-1] == errors[0], label
        return stopped.value.code == 0

    return type_command


def damaged(content, rng):
    """``content`` with bytes changed, cut off, put in, taken out or set to zero."""
    content = bytearray(content)
    place = rng.randrange(len(content))
    kind = rng.choice(["flip", "flip", "change", "cut", "insert", "remove", "zero"])
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "change":
        for _ in range(rng.randint(10, 200)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = rng.randbytes(rng.randint(1, 64))
    elif kind == "remove":
        del content[place : place + rng.randint(1, 64)]
    else:
        length = min(rng.randint(1, 512), len(content) - place)
        content[place : place + length] = bytes(length)
    return bytes(content)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint of a very small `cnn`."""
    path = tmp_path_factory.mktemp("network") / "small.ckpt"
    arch_args = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}
    torch.manual_seed(0)
    model = fourierbias.models.checkpoint.create("cnn", num_classes=10, **arch_args)
    checkpoint = Checkpoint(
        arch="cnn", arch_args=arch_args, state_dict=model.state_dict(), classes=[str(i) for i in range(10)]
    )
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="module")
def captures(network, tmp_path_factory):
    """Captures of it: with everything, with the maps, and through training."""
    folder = tmp_path_factory.mktemp("captures")
    images = torch.randn(3, 3, 32, 32)
    everything = fourierbias.capture(
        str(network), images, output=folder / "all.h5", paths=("diagonal", "radial", "2d"), measures="all"
    )
    fourierbias.capture(str(network), images, output=folder / "maps.h5", features=True)
    for epoch in (0, 5):
        append_series(folder / "series.h5", epoch, everything)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("seeds", [range(24), pytest.param(range(24, 424), marks=pytest.mark.slow)])
def test_captures_with_damaged_bytes(captures, end_well, tmp_path, seeds):
    drawn = 0
    for seed in seeds:
        rng = random.Random(seed)
        whole = captures[seed % len(captures)].read_bytes()
        (tmp_path / "mutant.h5").write_bytes(damaged(whole, rng))
        drawn += end_well(seed, "plot", "mutant.h5", "-o", "mutant.png", "--overwrite")
    assert drawn < len(seeds) / 4  # damage is told, whatever it hit


def spoil_hdf5(path, rng):
    """Delete or replace one object or attribute, as a program that means well may do."""
    with h5py.File(path, "r+") as file:
        names = []
        file.visit(names.append)
        name = rng.choice(["/", *names])
        attributes = sorted(file[name].attrs)
        if attributes and (name == "/" or rng.random() < 0.5):
            key = rng.choice(attributes)
            del file[name].attrs[key]
            if rng.random() < 0.7:
                file[name].attrs[key] = rng.choice([*(j for j in JUNK if np.isscalar(j)), np.zeros((2, 2))])
        elif name != "/":
            del file[name]
            if rng.random() < 0.7:
                arrays = [np.zeros(0), np.zeros((3, 2)), np.full(5, np.nan), "text", np.arange(4), 7.0]
                file[name] = rng.choice(arrays)


@pytest.mark.parametrize("seeds", [range(16), pytest.param(range(16, 166), marks=pytest.mark.slow)])
def test_captures_with_other_contents(captures, end_well, tmp_path, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        mutant = tmp_path / "mutant.h5"
        shutil.copy(captures[seed % len(captures)], mutant)
        spoil_hdf5(mutant, rng)
        words = rng.choice([(), ("--path", "radial"), ("--measure", "feature_variance"), ("--compare",)])
        end_well(seed, "plot", mutant, *words, "-o", "mutant.png", "--csv", "mutant.csv", "--overwrite")


def spoil_checkpoint(path, rng):
    """Replace one entry, however deep, by something else or nothing."""
    values = torch.load(path, weights_only=True)
    place, key = values, rng.choice(list(values))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
        place, key = place[key], rng.choice(list(place[key]))
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice([*JUNK, torch.zeros(2, 3), torch.full((1,), float("nan")), [10**9] * 4])
    torch.save(values, path)


@pytest.mark.parametrize("seeds", [range(16), pytest.param(range(16, 166), marks=pytest.mark.slow)])
def test_checkpoints(network, end_well, tmp_path, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        mutant = tmp_path / "mutant.ckpt"
        if seed % 2:
            mutant.write_bytes(damaged(network.read_bytes(), rng))
        else:
            shutil.copy(network, mutant)
            spoil_checkpoint(mutant, rng)
        end_well(seed, "capture", mutant, "--images", 2, "-o", "mutant.h5", "--overwrite")
    assert read_checkpoint(network).arch == "cnn"


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 58), marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
def test_images(network, end_well, tmp_path, seeds):
    """Of four images three are damaged: the capture goes on with those that can be read."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    picture.save(folder / "whole.png")
    for seed in seeds:
        rng = random.Random(seed)
        for index, suffix in enumerate(rng.sample(["png", "jpg", "gif", "tif", "webp", "bmp", "ppm"], 3)):
            path = folder / f"{index}.{suffix}"
            picture.save(path)
            path.write_bytes(damaged(path.read_bytes(), rng))
        assert end_well(seed, "capture", network, "--data", "images", "-o", "mutant.h5", "--overwrite")
        attrs = fourierbias.load("mutant.h5").attrs
        assert attrs["count"] + attrs["failed_images"] == 4
        for path in folder.glob("[0-9].*"):
            path.unlink()
