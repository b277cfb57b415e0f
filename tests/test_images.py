"""Every way in which people keep images, and every way in which they are damaged."""

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fourierbias.errors import FourierBiasError
from fourierbias.images import PHOTOS, Batch, ImageSource, decode, open_images, photo_path

SMALL = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.9,
    "crop_mode": "center",
}
PLAIN = {**SMALL, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}  # pixels / 255


def pixels(seed=0, size=(16, 16), channels=3):
    shape = (*size, channels) if channels else size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, seed=0, size=(16, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, size)).save(path, **options)
    return path


def fetch(source):
    """(images, indices) of a whole source."""
    batches = list(source)
    assert all(isinstance(batch, Batch) and batch.images.dtype == torch.float32 for batch in batches)
    assert all(len(batch.images) == len(batch.indices) for batch in batches)
    return torch.cat([batch.images for batch in batches]), [i for batch in batches for i in batch.indices]


def as_tensor(array):
    """(H, W, 3) uint8 as what PLAIN makes of it, written down once more."""
    return torch.from_numpy(array.astype(np.float64).transpose(2, 0, 1) / 255).float()


# ---------------------------------------------------------------------------- preprocessing, batching


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 16, 16), (3, 24, 16)])
def test_preprocessing_is_timms_bit_for_bit(tmp_path, size, mode):
    config = {**SMALL, "input_size": size, "crop_mode": mode}
    paths = [save(tmp_path / f"{i}.png", i, (20 + 7 * i, 40)) for i in range(5)]
    transform = timm.data.create_transform(**config, is_training=False)
    expected = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    images, indices = fetch(open_images(str(tmp_path), config, batch_size=2))
    assert torch.equal(images, expected)
    assert indices == [0, 1, 2, 3, 4]


def test_lists_from_json_do_as_tuples(tmp_path):
    save(tmp_path / "a.png")
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()}
    assert torch.equal(fetch(open_images(tmp_path, config))[0], fetch(open_images(tmp_path, SMALL))[0])


def test_one_channel_models_get_grey(tmp_path):
    path = save(tmp_path / "a.png", 3)
    images, _ = fetch(open_images(path, {**PLAIN, "input_size": (1, 16, 16)}))
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert images.shape == (1, 1, 16, 16)
    assert np.abs(images[0, 0].numpy() * 255 - pixels(3) @ weights).max() <= 1


def test_a_model_of_other_channels_is_told(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(FourierBiasError, match="takes 4 channels"):
        open_images(tmp_path, {**SMALL, "input_size": (4, 16, 16)})


def test_workers_threads_and_batch_sizes_agree(tmp_path):
    for i in range(11):
        save(tmp_path / f"{i}.png", i)
    (tmp_path / "7.png").write_bytes(b"")
    expected, indices = fetch(open_images(tmp_path, SMALL, batch_size=32))
    assert indices == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    for options in ({"batch_size": 3}, {"batch_size": 1}, {"batch_size": 4, "workers": 2}):
        source = open_images(tmp_path, SMALL, **options)
        images, found = fetch(source)
        assert torch.equal(images, expected)
        assert found == indices
        assert source.failures == [("7.png", "empty file")]


def test_a_failure_makes_its_batch_smaller_and_moves_no_other(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.png", i)
    (tmp_path / "1.png").write_bytes(b"no image")
    for i in (6, 7, 8):  # a whole batch
        (tmp_path / f"{i}.png").write_bytes(b"")
    source = open_images(tmp_path, SMALL, batch_size=3)
    assert [batch.indices for batch in source] == [[0, 2], [3, 4, 5]]
    assert len(source) == 9
    assert [name for name, _ in source.failures] == ["1.png", "6.png", "7.png", "8.png"]
    list(source)
    assert len(source.failures) == 4  # counted anew each time


def test_reading_goes_no_further_than_one_batch_ahead():
    class Counting(Dataset):
        read = 0

        def __len__(self):
            return 100

        def __getitem__(self, index):
            self.read += 1
            return torch.full((3, 4, 4), float(index))

    data = Counting()
    batches = iter(open_images(data, SMALL, batch_size=5))
    next(batches)
    next(batches)
    assert data.read <= 15
    batches.close()
    assert data.read <= 15


# --------------------------------------------------------------------------------------------- layouts


def test_nested_folder(tmp_path):
    for i, name in enumerate(["dog/10.png", "dog/9.JPG", "cat/x/1.jpeg", "cat/2.webp"]):
        save(tmp_path / name, i)
    for name in ("cat/notes.md", "cat/.3.png", ".hidden/4.png", "__MACOSX/5.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = open_images(tmp_path, SMALL)
    assert source.names == ["cat/2.webp", "cat/x/1.jpeg", "dog/9.JPG", "dog/10.png"]
    assert source.labels == ["cat", "cat", "dog", "dog"]
    assert len(source) == len(fetch(source)[1]) == 4
    assert source.description == f"folder {tmp_path}: 4 images"


def test_flat_folder(tmp_path):
    for i in (1, 2, 10):
        save(tmp_path / f"im{i}.bmp", i)
    source = open_images(str(tmp_path) + "/", SMALL)
    assert source.names == ["im1.bmp", "im2.bmp", "im10.bmp"]
    assert source.labels is None
    assert fetch(source)[0].shape == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("folders", "chosen"),
    [
        (["train/a", "val/a"], "val"),
        (["train/a", "test/a"], "test"),
        (["train/a", "Validation/a", "test/a", "docs"], "Validation"),
        (["train/a"], "train"),
        (["cat", "dog", "test"], None),  # a class of that name
    ],
)
def test_of_splits_the_evaluation_one_is_taken(tmp_path, folders, chosen):
    for folder in folders:
        save(tmp_path / folder / "0.png")
    source = open_images(tmp_path, SMALL)
    if chosen is None:
        assert source.labels == folders
    else:
        assert source.names == [f"{chosen}/a/0.png"]
        assert source.labels == ["a"]
        assert f"{chosen}/" in source.description
    assert fetch(source)[1] == list(range(len(source)))


def test_an_empty_split_is_passed_over(tmp_path):
    save(tmp_path / "train/a/0.png")
    (tmp_path / "val").mkdir()
    source = open_images(tmp_path, SMALL)
    assert source.names == ["train/a/0.png"]
    assert "train/" in source.description


def test_linked_folders_are_followed_but_not_for_ever(tmp_path):
    save(tmp_path / "real/a/0.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/b").symlink_to(tmp_path / "real/a")
    (tmp_path / "real/a/loop").symlink_to(tmp_path / "real")
    assert open_images(tmp_path / "data", SMALL).names == ["b/0.png"]


def test_single_image(tmp_path):
    path = save(tmp_path / "one.tiff", 5)
    source = open_images(path, PLAIN)
    assert torch.equal(fetch(source)[0][0], as_tensor(pixels(5)))
    assert source.names == [str(path)]
    assert source.description == "image: 1 image"
    path.rename(tmp_path / "one.scan")  # what it is counts, not what it is called
    assert len(open_images(tmp_path / "one.scan", PLAIN)) == 1


def test_list_file_is_relative_to_its_folder(tmp_path):
    save(tmp_path / "in/a b.png", 1)
    absolute = save(tmp_path / "c.png", 2)
    (tmp_path / "in/list.txt").write_bytes(f"\ufeffa b.png\r\n\r\nmissing.png\n{absolute}\n".encode())
    source = open_images(tmp_path / "in/list.txt", PLAIN)
    images, indices = fetch(source)
    assert source.names == ["a b.png", "missing.png", str(absolute)]  # in its own order
    assert indices == [0, 2]
    assert source.failures == [("missing.png", "no such file")]
    assert torch.equal(images[1], as_tensor(pixels(2)))


def test_list_with_labels(tmp_path):
    save(tmp_path / "a 1.png")
    save(tmp_path / "b.png")
    (tmp_path / "val.lst").write_text("a 1.png 65\nb.png\t0\n")
    source = open_images(tmp_path / "val.lst", PLAIN)
    assert source.names == ["a 1.png", "b.png"]
    assert source.labels == [65, 0]
    assert fetch(source)[1] == [0, 1]


def test_list_from_standard_input(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.png\nb.png\n")))
    source = open_images("-", SMALL)
    assert fetch(source)[1] == [0]
    assert source.description == "list on standard input: 2 images"
    assert source.failures == [("b.png", "no such file")]


@pytest.mark.parametrize("root", ["", "cifar/png/"])
def test_zip_archive(tmp_path, root):
    names = ["train/a/1.png", "test/a/10.png", "test/b/2.png", "test/b/.3.png", "readme.txt"]
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.write(save(tmp_path / "x.png", i), root + name)
        archive.writestr(root + "test/b/20.png", b"")
    source = open_images(tmp_path / "data.zip", PLAIN)
    assert source.names == [f"{root}test/a/10.png", f"{root}test/b/2.png", f"{root}test/b/20.png"]
    assert source.labels == ["a", "b", "b"]
    assert "test/" in source.description
    images, indices = fetch(source)
    assert torch.equal(images, torch.stack([as_tensor(pixels(1)), as_tensor(pixels(2))]))
    assert indices == [0, 1]
    assert source.failures == [(f"{root}test/b/20.png", "empty file")]
    again = open_images(tmp_path / "data.zip", PLAIN, workers=2, batch_size=1)
    assert torch.equal(fetch(again)[0], images)


ARRAYS = {
    "NHWC": lambda images: images,
    "NCHW": lambda images: images.transpose(0, 3, 1, 2),
    "uint16": lambda images: images.astype(np.uint16) * 257,
    "int64": lambda images: images.astype(np.int64),
    "float, to 1": lambda images: images / 255,
    "float16, to 1": lambda images: (images / 255).astype(np.float16),
    "float, to 255": lambda images: images.astype(np.float32),
    "RGBA": lambda images: np.concatenate([images, np.full_like(images[..., :1], 255)], axis=-1),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("form", ["h5", "npy", "npz", "npz compressed"])
def test_arrays(tmp_path, form, kind):
    images = np.stack([pixels(i, (16, 17)) for i in range(5)])[:, :, :16]
    array = ARRAYS[kind](images)
    path = tmp_path / f"stimuli.{form[:3].strip()}"
    if form == "h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("set/images", data=array, chunks=(2, *array.shape[1:]), compression="gzip")
            file["set/labels"] = np.arange(5)
        name = f"{path}:/set/images"
    elif form == "npy":
        np.save(path, array)
        name = str(path)
    else:
        (np.savez if form == "npz" else np.savez_compressed)(path, images=array, labels=np.arange(5))
        name = f"{path}:images"
    for workers in (0, 1):
        source = open_images(name, PLAIN, batch_size=2, workers=workers)
        found, indices = fetch(source)
        assert indices == [0, 1, 2, 3, 4]
        assert torch.equal(found, torch.stack([as_tensor(image) for image in images]))
    assert source.names == ["0", "1", "2", "3", "4"]
    assert source.labels is None
    assert source.description == f"{name}: 5 images"


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 16, 16, 1), (4, 1, 16, 16)])
def test_grey_arrays(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "grey.npy", array)
    found, _ = fetch(open_images(tmp_path / "grey.npy", PLAIN))
    expected = np.repeat(array.reshape(4, 16, 16, 1), 3, axis=-1)
    assert torch.equal(found, torch.stack([as_tensor(image) for image in expected]))


def test_the_only_array_of_images_need_not_be_named(tmp_path):
    images = np.stack([pixels(i) for i in range(3)])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["labels"] = images, np.arange(3)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(3))
    for name in ("a.h5", "a.npz"):
        source = open_images(tmp_path / name, PLAIN)
        assert source.description.endswith("images: 3 images")
        assert torch.equal(fetch(source)[0][2], as_tensor(images[2]))


def test_virtual_hdf5_dataset(tmp_path):
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file["images"] = np.stack([pixels(i) for i in range(3)])
    layout = h5py.VirtualLayout(shape=(3, 16, 16, 3), dtype=np.uint8)
    layout[:] = h5py.VirtualSource(tmp_path / "part.h5", "images", shape=(3, 16, 16, 3))
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.create_virtual_dataset("images", layout)
    found, _ = fetch(open_images(f"{tmp_path}/whole.h5:images", PLAIN))
    assert torch.equal(found[2], as_tensor(pixels(2)))


def test_one_scale_for_all_images_of_an_array(tmp_path):
    array = np.zeros((3, 16, 16, 3), dtype=np.float32)
    array[1] = 1.0  # nearly black, as the third shows
    array[2] = 255.0
    np.save(tmp_path / "a.npy", array)
    found, _ = fetch(open_images(tmp_path / "a.npy", PLAIN))
    assert found.amax((1, 2, 3)).tolist() == pytest.approx([0, 1 / 255, 1])


def test_values_beyond_the_scale_are_failures(tmp_path):
    array = np.random.default_rng(0).random((100, 8, 8, 3), dtype=np.float32)
    array[50, 0, 0, 0] = 7
    array[51, 0, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", array)  # only some of the images are looked at beforehand
    source = open_images(tmp_path / "a.npy", PLAIN)
    assert len(fetch(source)[1]) == 98
    assert source.failures == [("50", "values outside 0…1"), ("51", "values outside 0…1")]


@pytest.mark.parametrize("form", ["npy", "npz", "h5"])
def test_large_arrays_are_not_loaded(tmp_path, form):
    array = np.zeros((2000, 64, 64, 3), dtype=np.uint8)  # 25 MB
    path = tmp_path / f"large.{form}"
    if form == "h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=array, chunks=(1, 64, 64, 3))
    else:
        (np.save if form == "npy" else np.savez)(path, array)
    del array
    next(iter(open_images(path, SMALL, images=2, batch_size=1)))  # what is allocated once
    tracemalloc.start()
    batches = iter(open_images(path, SMALL, batch_size=4))
    for _ in range(5):
        next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    batches.close()
    assert peak < 3e6


def test_tensor_is_taken_as_preprocessed():
    images = torch.randn(7, 3, 5, 9, dtype=torch.float64)
    source = open_images(images, SMALL, batch_size=3)
    assert [batch.indices for batch in source] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(fetch(source)[0], images.float())
    assert torch.equal(fetch(source.subset([6, 1, 4]))[0], images[[1, 4, 6]].float())
    assert torch.equal(fetch(open_images(images.numpy(), SMALL, images=2))[0], images[:2].float())
    assert source.description == "tensor: 7 images"


def test_read_only_array_is_taken_without_a_warning(recwarn):
    images = np.random.default_rng(0).random((3, 3, 8, 8))
    images.flags.writeable = False
    fetch(open_images(images, SMALL))
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_tensor_of_integers_is_images():
    images = np.stack([pixels(i) for i in range(3)])
    for data in (images, torch.from_numpy(images), torch.from_numpy(images).permute(0, 3, 1, 2)):
        assert torch.equal(fetch(open_images(data, PLAIN))[0][1], as_tensor(images[1]))


class Labelled(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return self.item(index)


@pytest.mark.parametrize(
    ("item", "labels"),
    [
        (lambda i: as_tensor(pixels(i)), None),
        (lambda i: (as_tensor(pixels(i)), i % 2), [0, 1, 0, 1, 0, 1]),
        (lambda i: (Image.fromarray(pixels(i)), torch.tensor(i)), [0, 1, 2, 3, 4, 5]),
        (lambda i: {"pixel_values": pixels(i), "label": "ab"[i % 2]}, list("ababab")),
        (lambda i: [torch.from_numpy(pixels(i)).permute(2, 0, 1), np.int64(i)], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_dataset(item, labels):
    expected = torch.stack([as_tensor(pixels(i)) for i in range(6)])
    source = open_images(Labelled(item), PLAIN, batch_size=4)
    assert torch.equal(fetch(source)[0], expected)
    assert source.labels == labels
    assert source.description == "Labelled: 6 images"
    listed = open_images([item(i) for i in range(6)], PLAIN)
    assert torch.equal(fetch(listed)[0], expected)


def test_list_of_paths_and_single_image(tmp_path):
    paths = [save(tmp_path / f"{i}.png", i) for i in (2, 1)]
    source = open_images(paths, PLAIN)
    assert source.names == [str(path) for path in paths]
    assert torch.equal(fetch(source)[0], torch.stack([as_tensor(pixels(i)) for i in (2, 1)]))
    assert torch.equal(fetch(open_images(Image.open(paths[1]), PLAIN))[0][0], as_tensor(pixels(1)))


def test_items_of_a_dataset_that_fail_are_named():
    def item(index):
        if index == 4:
            raise KeyError("no such image")
        return torch.zeros(3, 8, 8) if index else "nowhere.png"

    source = open_images(Labelled(item), SMALL)
    assert fetch(source)[1] == [1, 2, 3, 5]
    assert source.failures == [("0", "no such file"), ("4", "'no such image'")]


def test_images_of_unequal_shape_are_told():
    data = Labelled(lambda i: torch.zeros(3, 8, 8 + i))
    for workers in (0, 1):
        with pytest.raises(FourierBiasError, match=r"differ in shape, \(3, 8, 8\) and \(3, 8, 13\)"):
            fetch(open_images(data, SMALL, workers=workers))


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"batch_size": 4, "drop_last": True}])
def test_dataloader_is_used_as_it_is(options):
    images, labels = torch.randn(10, 3, 8, 8), torch.arange(10)
    source = open_images(DataLoader(TensorDataset(images, labels), **options), SMALL, batch_size=7)
    count = 8 if "drop_last" in options else 10
    found, indices = fetch(source)
    assert len(source) == count
    assert indices == list(range(count))
    assert torch.equal(found, images[:count])
    assert source.labels == list(range(count))
    size = options.get("batch_size", 1)
    assert len(next(iter(source)).indices) == size
    part = open_images(DataLoader(TensorDataset(images), **options), SMALL, images=5).shard(1, 2)
    assert torch.equal(fetch(part)[0], images[2:5])
    assert part.labels is None


def test_dataloader_that_does_not_collate_needs_a_number():
    batches = [torch.randn(4, 3, 8, 8), torch.randn(3, 3, 8, 8)]
    with pytest.raises(FourierBiasError, match="images=N"):
        open_images(DataLoader(batches, batch_size=None), SMALL)
    source = open_images(DataLoader(batches, batch_size=None), SMALL, images=6)
    assert torch.equal(fetch(source)[0], torch.cat(batches)[:6])


def test_shuffled_dataloader_cannot_be_divided():
    source = open_images(DataLoader(TensorDataset(torch.randn(10, 3, 8, 8)), shuffle=True), SMALL)
    with pytest.raises(FourierBiasError, match="shuffle=False"):
        source.shard(0, 2)
    assert len(fetch(source)[1]) == 10


@pytest.mark.parametrize(
    ("sampler", "fixed"),
    [
        (SubsetRandomSampler(range(10)), False),
        (WeightedRandomSampler(torch.ones(10), 10), False),
        (list(range(9, -1, -1)), True),
        (SequentialSampler(range(10)), True),
        (DistributedSampler(range(10), num_replicas=1, rank=0, shuffle=False), True),
        (DistributedSampler(range(10), num_replicas=1, rank=0), False),
    ],
)
def test_only_a_loader_of_a_fixed_order_can_be_divided(sampler, fixed):
    data = TensorDataset(torch.randn(10, 3, 8, 8))
    batches = BatchSampler(sampler, 2, drop_last=False)
    for loader in (DataLoader(data, sampler=sampler), DataLoader(data, batch_sampler=batches)):
        with (
            contextlib.nullcontext() if fixed else pytest.raises(FourierBiasError, match="cannot be divided")
        ):
            assert len(open_images(loader, SMALL).shard(0, 2)) == 5


def test_what_tells_images_of_the_same_names_apart(tmp_path):
    zeros, ones = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    prints = [
        open_images(x, SMALL).fingerprint for x in (zeros, zeros.numpy(), zeros.double(), ones, ones[:2])
    ]
    assert prints[0] == prints[1] == prints[2]
    assert len(set(prints)) == 3
    pixels = [open_images(x.byte(), SMALL).fingerprint for x in (zeros, ones)]
    assert pixels[0] != pixels[1]
    seeds = [open_images("photos", SMALL, images=n, seed=s).fingerprint for n in (16, 17) for s in (0, 1)]
    assert seeds == ["", "", "seed 0", "seed 1"]  # the crops alone are drawn
    np.save(tmp_path / "a.npy", ones.byte().numpy())
    source = open_images(str(tmp_path / "a.npy"), SMALL)
    assert (source.fingerprint, source.files) == ("", [str(tmp_path / "a.npy")])


def test_iterable_dataset():
    class Endless(IterableDataset):
        def __iter__(self):
            return (torch.full((3, 4, 4), float(i)) for i in range(1_000_000_000))

    with pytest.raises(FourierBiasError, match="images=N"):
        open_images(Endless(), SMALL)
    source = open_images(Endless(), SMALL, images=10, batch_size=4)
    assert [batch.indices for batch in source] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert fetch(source.subset([3, 9]))[0][:, 0, 0, 0].tolist() == [3, 9]


def test_source_is_passed_on():
    source = open_images(torch.rand(8, 3, 4, 4), SMALL)
    assert open_images(source, SMALL) is source
    assert list(open_images(source.shard(1, 2), SMALL, images=3).indices) == [4, 5, 6]


def test_named_dataset(tmp_path, monkeypatch):
    raw = tmp_path / "fourierbias/MNIST/raw"
    raw.mkdir(parents=True)
    digits = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, 6, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + digits.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 6) + bytes(range(6)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = {**PLAIN, "input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,)}
    for name in ("mnist", "torch/mnist", "MNIST:train".lower()):
        source = open_images(name, config)
        images, _ = fetch(source)
        assert torch.equal(images[:, 0], torch.from_numpy(digits / 255).float())
        assert source.labels == [0, 1, 2, 3, 4, 5]
    assert source.description == "data set mnist, train: 6 images"


@pytest.mark.parametrize("name", ["cifar10", "torch/cifar100", "hfds/nobody/nothing", "tfds/nothing"])
def test_named_dataset_without_network(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(FourierBiasError, match=f"{name}.*(needs a network|pip install)"):
        open_images(name, SMALL)


# -------------------------------------------------------------------------------------------- photos


def test_photos():
    source = open_images("photos", SMALL)
    assert tuple(source.names) == PHOTOS
    assert len(source) == len(PHOTOS) == 16
    assert source.description == "photographs of scikit-image: 16 images"
    transform = timm.data.create_transform(**SMALL, is_training=False)
    expected = [transform(Image.open(photo_path(name)).convert("RGB")) for name in PHOTOS]
    assert torch.equal(fetch(source)[0], torch.stack(expected))


def test_any_number_of_photos_and_the_same_each_time():
    first = open_images("photos", SMALL, images=35, batch_size=8)
    images, indices = fetch(first)
    assert indices == list(range(35))
    assert first.names[14:18] == ["retina", "rocket", "astronaut#2", "brick#2"]
    assert first.names[34] == "camera#3"
    assert first.labels[34] == "camera"
    again = open_images("photos", SMALL, images=35, workers=2)
    assert torch.equal(fetch(again)[0], images)
    assert torch.equal(fetch(first.subset([20, 34]))[0], images[[20, 34]])
    other, _ = fetch(open_images("photos", SMALL, images=35, seed=1))
    assert torch.equal(other[:16], images[:16])
    assert all(not torch.equal(a, b) for a, b in zip(other[16:], images[16:], strict=True))
    assert all(not torch.equal(images[i], images[i + 16]) for i in range(19))
    assert fetch(open_images("photos", SMALL, images=4))[1] == [0, 1, 2, 3]


def test_photos_take_neither_network_nor_scikit_images_code():
    program = (
        "import sys; from fourierbias.images import open_images\n"
        "batch = next(iter(open_images('photos', {'input_size': (3, 32, 32)}, images=1)))\n"
        "print(*batch.images.shape, 'skimage' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ran.stdout.decode().split() == ["1", "3", "32", "32", "False"]


def test_photo_path_errors():
    with pytest.raises(FourierBiasError, match="choose from astronaut"):
        photo_path("../../etc/passwd")


# -------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("count", [1, 2, 3, 16, 25])
def test_shards_make_the_whole(count):
    source = open_images("photos", SMALL, images=20, batch_size=3)
    images, indices = fetch(source)
    parts = [source.shard(k, count) for k in range(count)]
    assert [i for part in parts for i in part.indices] == indices
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    found = [fetch(part) for part in parts if len(part)]
    assert torch.equal(torch.cat([part for part, _ in found]), images)
    assert [i for _, part in found for i in part] == indices
    assert all(part.names == source.names and isinstance(part, ImageSource) for part in parts)
    assert [list(part) for part in parts if not len(part)] == [[]] * max(0, count - 20)


def test_parts_of_parts_and_their_failures(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i}.png", i)
    (tmp_path / "8.png").write_bytes(b"")
    source = open_images(tmp_path, SMALL)
    part = source.shard(1, 2).subset([9, 8, 5])
    assert len(part) == 3
    images, indices = fetch(part)
    assert indices == [5, 9]
    assert torch.equal(images, torch.cat([b.images for b in source])[[5, 8]])
    assert part.failures == [("8.png", "empty file")]
    source.failures.clear()
    assert fetch(pickle.loads(pickle.dumps(part)))[1] == [5, 9]
    with pytest.raises(FourierBiasError, match="image 3 is not among the 5"):
        source.shard(1, 2).subset([3])
    with pytest.raises(FourierBiasError, match="shard 2 of 2"):
        source.shard(2, 2)
    assert list(source.subset([8])) == []  # no error: it cannot speak for the whole
    with pytest.raises(FourierBiasError, match=r"none of the 1 images.*8\.png: empty file"):
        list(open_images([tmp_path / "8.png"], SMALL))


def test_a_number_is_spread_over_a_folder_and_cut_from_a_list(tmp_path):
    paths = [save(tmp_path / name / f"{i}.png") for name in "abcd" for i in range(3)]
    source = open_images(tmp_path, SMALL, images=4)
    assert source.labels == list("abcd")
    assert source.description == f"folder {tmp_path}: 4 images of 12, evenly spread"
    assert fetch(source)[1] == [0, 1, 2, 3]
    listed = open_images(paths, SMALL, images=4)
    assert listed.names == [str(path) for path in paths[:4]]
    assert listed.description == "list: 4 images of 12, the first"
    asked = open_images(tmp_path, SMALL, images=100)
    assert len(asked) == 12
    assert asked.description.endswith("12 images, all there are (100 asked for)")


# ----------------------------------------------------------------------------------------- decoding


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_16_bit_grey():
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    expected = np.rint(ramp / 257).astype(np.uint8)
    for form in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(ramp), form))
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image)[..., 1], expected)
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(ramp)), "L")), expected)
    portable = b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes()  # Pillow's mode I
    assert np.array_equal(np.asarray(decode(portable, "L")), expected)
    big_endian = decode(
        encoded(Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes()), "TIFF"), "L"
    )
    assert np.array_equal(np.asarray(big_endian), expected)


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_float_tiff(white):
    levels = np.linspace(0, white, 256, dtype=np.float32).reshape(16, 16)
    image = decode(encoded(Image.fromarray(levels), "TIFF"), "L")
    assert np.array_equal(np.asarray(image).ravel(), np.arange(256))


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, 1e6])
def test_float_tiff_that_is_no_picture(bad):
    levels = np.zeros((4, 4), dtype=np.float32)
    levels[1, 1] = bad
    with pytest.raises(FourierBiasError, match="no range of pixels"):
        decode(encoded(Image.fromarray(levels), "TIFF"))


def test_palette_and_bilevel():
    picture = Image.fromarray(pixels(1)).quantize(16)
    assert np.array_equal(np.asarray(decode(encoded(picture))), np.asarray(picture.convert("RGB")))
    bilevel = Image.fromarray(pixels(1, channels=0) > 127)
    assert np.array_equal(np.asarray(decode(encoded(bilevel), "L")), np.asarray(bilevel) * 255)


def test_transparency_is_composited_on_white(recwarn):
    rgb, alpha = pixels(1), pixels(2, channels=1)
    rgba = Image.fromarray(np.concatenate([rgb, alpha], axis=-1))
    share = alpha / 255
    expected = rgb * share + 255 * (1 - share)
    assert np.abs(np.asarray(decode(encoded(rgba)), dtype=float) - expected).max() <= 1
    grey = Image.fromarray(np.concatenate([rgb[..., :1], alpha], axis=-1))
    assert np.abs(np.asarray(decode(encoded(grey), "L"), dtype=float) - expected[..., 0]).max() <= 1
    palette = Image.fromarray(pixels(3)).quantize(4)
    clear = np.asarray(palette) == 2
    for transparency in (2, bytes([255, 255, 0, 255])):  # the second makes Pillow warn in a plain convert
        image = np.asarray(decode(encoded(palette, transparency=transparency)))
        assert (image[clear] == 255).all()
        assert np.array_equal(image[~clear], np.asarray(palette.convert("RGB"))[~clear])
    keyed = Image.fromarray(np.full((4, 4, 3), (9, 8, 7), dtype=np.uint8))
    assert np.asarray(decode(encoded(keyed, transparency=(9, 8, 7)))).min() == 255
    assert not recwarn.list


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for form in ("JPEG", "TIFF"):
        red, green, blue = np.asarray(decode(encoded(image, form))).reshape(-1, 3).mean(0)
        assert red > 250
        assert green < 5
        assert blue < 5


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation(tmp_path, form, orientation, upright):
    corners = np.zeros((16, 32, 3), dtype=np.uint8)  # three corners of different colours
    corners[:8, :8, 0] = corners[:8, -8:, 1] = corners[-8:, :8, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    path = tmp_path / f"a.{form.lower()}"
    Image.fromarray(corners).save(path, form, exif=exif, **options)
    image = decode(path)
    expected = upright(corners)
    assert image.size == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(image, dtype=int) - expected).max() < 30
    through, _ = fetch(open_images([Image.open(path)], {**PLAIN, "input_size": (3, *expected.shape[:2])}))
    assert np.abs(through[0].permute(1, 2, 0).numpy() * 255 - expected).max() < 30  # turned, and only once


def test_first_of_several_frames():
    frames = [Image.fromarray(pixels(i)).quantize(256) for i in range(3)]
    image = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert np.array_equal(np.asarray(image), np.asarray(frames[0].convert("RGB")))


def test_a_thousand_small_images_of_which_37_are_bad(tmp_path):
    for i in range(1000):
        save(tmp_path / f"{i % 10}/{i:04d}.jpg", i, (8, 8))
    bad = {}
    for i in range(37):
        path = tmp_path / f"{27 * i % 10}/{27 * i:04d}.jpg"
        content = path.read_bytes()
        path.unlink()
        kind = ("truncated", "empty", "text", "absent")[i % 4]
        if kind == "absent":
            path.symlink_to(tmp_path / "gone.jpg")
        else:
            path.write_bytes({"truncated": content[:-40], "empty": b"", "text": b"not an image\n"}[kind])
        bad[path.relative_to(tmp_path).as_posix()] = {
            "truncated": "truncated",
            "empty": "empty file",
            "text": "not an image",
            "absent": "no such file",
        }[kind]
    source = open_images(tmp_path, SMALL)
    images, indices = fetch(source)
    assert images.shape == (963, 3, 16, 16)
    assert len(source.failures) == 37
    assert {name for name, _ in source.failures} == set(bad)
    assert all(bad[name] in reason for name, reason in source.failures)
    assert sorted({source.names[i] for i in indices} | set(bad)) == sorted(source.names)
    assert all(source.names[i].startswith(source.labels[i] + "/") for i in indices)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_images_are_errors_whatever_the_cut(form):
    whole = encoded(Image.fromarray(pixels(0, (32, 32))), form)
    for share in (0.1, 0.5, 0.8):
        with pytest.raises(FourierBiasError, match=r"image cannot be read: .+"):
            decode(whole[: int(share * len(whole))])


def test_decompression_bomb_is_an_error_line(tmp_path):
    head = b"P5 100000 100000 255\n"
    (tmp_path / "bomb.png").write_bytes(head)
    save(tmp_path / "fine.png")
    source = open_images(tmp_path, SMALL)
    assert fetch(source)[1] == [1]
    assert "exceeds limit" in source.failures[0][1]


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(FourierBiasError, match="not an image"):
        decode(tmp_path / "a.jpg")


def test_pipes_and_folders_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FourierBiasError, match="not a regular file"):
        decode(tmp_path / "pipe.png")
    with pytest.raises(FourierBiasError, match="is a folder"):
        decode(tmp_path)


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9\n.png"
    save(tmp_path / "a.png").rename(os.fsdecode(path))
    source = open_images(tmp_path, SMALL)
    assert fetch(source)[1] == [0]
    assert source.names == [r"caf\xe9\n.png"]


# ------------------------------------------------------------------------------------------- errors


def error(data, preprocessing=SMALL, **options):
    with pytest.raises(FourierBiasError) as caught:
        list(open_images(data, preprocessing, **options))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("number", [0, -3])
def test_numbers_that_make_no_sense(number):
    assert error("photos", images=number) == f"images is {number}: it must be 1 or more"
    assert "batch size" in error("photos", batch_size=number)
    assert "workers" in error("photos", workers=-1)


def test_missing_path_offers_the_nearest(tmp_path):
    (tmp_path / "imagenet-val").mkdir()
    assert f"did you mean {tmp_path}/imagenet-val?" in error(tmp_path / "imagnet-val")
    assert "there is no folder" in error(tmp_path / "a/b/c")
    assert "did you mean cifar10?" in error("cifar-10")
    assert "did you mean photos?" in error("photo")
    assert "did you mean cifar10?" in error("torch/cifar-10")
    assert "choose from cifar10" in error("torch/unheard-of")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    assert "link to a file that is not there" in error(tmp_path / "dangling.png")


def test_empty_folder_says_what_is_read(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    assert ".jpeg" in error(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.md", "x")
    assert "no images in" in error(tmp_path / "a.zip")
    (tmp_path / "a.txt").write_text("\n\n")
    assert "one path per line" in error(tmp_path / "a.txt")


def test_files_that_are_something_else(tmp_path):
    for name in ("a.png", "a.zip", "a.npy", "a.npz", "a.h5", "a.bin"):
        for content in (
            b"",
            b"text",
            b"\x93NUMPY\x01\x00",
            b"PK\x03\x04" + bytes(50),
            b"\x89HDF\r\n\x1a\n" * 9,
        ):
            (tmp_path / name).write_bytes(content)
            assert name in error(tmp_path / name)
    save(tmp_path / "b.png")
    assert "leave :/images out" in error(f"{tmp_path}/b.png:/images")
    (tmp_path / "all.txt").write_bytes(bytes(range(256)))
    assert "none of the" in error(tmp_path / "all.txt")


def test_all_bad_is_an_error(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    message = error(tmp_path)
    assert "none of the 40 images" in message
    assert "0.png: not an image" in message
    assert message == error(tmp_path, workers=1)


def test_hdf5_keys(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["stimuli/images"] = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        file["stimuli/masks"] = np.zeros((2, 8, 8), dtype=np.uint8)
        file["labels"] = np.arange(2)
        file.create_dataset("claims", shape=(10**13, 8, 8, 3), dtype="u1", chunks=(1, 8, 8, 3))
        file.create_dataset(
            "wide", data=np.zeros((1, 1, 1, 3)), maxshape=(1, None, None, 3), chunks=(1, 1, 1, 3)
        )
        file["wide"].resize((1, 10**7, 10**7, 3))
        file["words"] = np.array([[b"a"] * 8] * 8)[None]
    assert f"name one, as in {path}:/claims, {path}:/stimuli/images, {path}:/stimuli/masks" in error(path)
    assert "claims 10000000000000 images in 0 bytes" in error(f"{path}:/claims")
    assert "too large" in error(f"{path}:/wide")
    assert "it has /stimuli/images" in error(f"{path}:/stimuli/image")
    assert "it has" in error(f"{path}:/stimuli")
    assert "shape (2,) of int64: images are" in error(f"{path}:/labels")
    assert "of |S1" in error(f"{path}:/words")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["labels"] = np.arange(2)
    assert "no array of images" in error(tmp_path / "b.h5")


def test_array_keys_and_shapes(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 8, 8, 3)), y=np.zeros((2, 8, 8)))
    assert "a.npz:x" in error(tmp_path / "a.npz")
    assert "it has x, y" in error(f"{tmp_path}/a.npz:z")
    np.save(tmp_path / "b.npy", np.zeros((8, 8)))
    assert "shape (8, 8) of float64" in error(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros((0, 8, 8, 3)))
    assert "(0, 8, 8, 3)" in error(tmp_path / "c.npy")
    np.save(tmp_path / "d.npy", np.random.default_rng(0).normal(size=(4, 3, 8, 8)))
    assert "preprocessed images go in from Python" in error(tmp_path / "d.npy")
    np.save(tmp_path / "e.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    assert "e.npy" in error(tmp_path / "e.npy")  # never unpickled


def test_python_objects_that_are_no_images():
    assert "images[None]" in error(torch.zeros(3, 8, 8))
    assert "(N, C, H, W)" in error(torch.zeros(8, 8))
    assert "(N, C, H, W)" in error(torch.zeros(0, 3, 8, 8))
    assert "int is no source of images" in error(3)
    assert "dict is no source of images" in error({"images": torch.zeros(1, 3, 8, 8)})
    assert "empty" in error([])
    assert "object is no image" in error([object()])
    assert "none of the 2 images" in error([torch.zeros(8), torch.zeros(8)])


def test_a_stream_that_breaks_off():
    class Broken(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 4, 4)
            raise OSError("connection lost")

    assert error(Broken(), images=5, batch_size=1) == "Broken stopped: connection lost"


@pytest.fixture
def _anybody():
    """Run as a user whom permissions bind, if the tests run as root, whom they do not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def _locked(tmp_path, monkeypatch):
    for name in ("open/a/1.png", "open/b/2.png", "shut/3.png"):
        save(tmp_path / name)
    np.save(tmp_path / "c.npy", pixels()[None])
    (tmp_path / "d.txt").write_text("c.npy")
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["images"] = pixels()[None]
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above may be closed to others
    for name in ("open/a/1.png", "open/b", "shut", "c.npy", "d.txt", "e.h5"):
        (tmp_path / name).chmod(0)
    yield
    for name in ("open/b", "shut"):
        (tmp_path / name).chmod(0o755)


@pytest.mark.usefixtures("_locked", "_anybody")
def test_permission_denied():
    for name in ("open/a/1.png", "shut", "c.npy", "d.txt", "e.h5"):
        message = error(name)
        assert name in message
        assert "permission denied" in message
    source = open_images("open", SMALL)
    assert "1 of its folders cannot be listed" in source.description
    with pytest.raises(FourierBiasError, match="permission denied"):
        list(source)


def test_a_worker_that_dies():
    def item(index):
        os._exit(1)

    assert "use fewer workers" in error(Labelled(item), workers=1)


def seeds():
    """One small whole file of each kind."""
    array = np.stack([pixels(i) for i in range(3)])
    files = {}
    for form in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA"):
        exif = Image.Exif()
        exif[0x0112] = 6
        files[f"a.{form.lower()}"] = encoded(Image.fromarray(array[0]), form, exif=exif)
    buffers = {name: io.BytesIO() for name in ("a.zip", "a.npy", "a.npz", "a.h5")}
    with zipfile.ZipFile(buffers["a.zip"], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", files["a.png"])
        archive.writestr("b/2.jpg", files["a.jpeg"])
    np.save(buffers["a.npy"], array)
    np.savez_compressed(buffers["a.npz"], images=array, labels=np.arange(3))
    with h5py.File(buffers["a.h5"], "w") as file:
        file.create_dataset("images", data=array, chunks=(1, 16, 16, 3), compression="gzip")
        file["labels"] = np.arange(3)
    files |= {name: buffer.getvalue() for name, buffer in buffers.items()}
    return files | {"a.txt": b"a.png 3\n../a.png 4\n/dev/zero 5\n"}


def mutate(content, random):
    content = bytearray(content)
    for _ in range(random.choice([1, 3, 10, 50])):
        place, length = int(random.integers(len(content))), int(random.integers(1, 20))
        kind = random.choice(["change", "change", "delete", "insert", "cut"])
        if kind == "change":
            content[place] = random.integers(256)
        elif kind == "delete":
            del content[place : place + length]
        elif kind == "insert":
            content[place:place] = random.bytes(length)
        else:
            del content[max(place, 1) :]
        content = content or bytearray(b"x")
    return bytes(content)


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged EXIF data
def test_damage_of_any_kind_is_one_line(tmp_path, count):
    random = np.random.default_rng(count)
    whole = seeds()
    outcomes = {True: 0, False: 0}
    for _ in range(count):
        name = random.choice(list(whole))
        path = tmp_path / (name if random.random() < 0.9 else random.choice(list(whole)))
        path.write_bytes(mutate(whole[name], random))
        try:
            fetch(open_images(path, SMALL))
            lines = []
        except FourierBiasError as caught:
            lines = str(caught).splitlines()
        assert len(lines) <= 1
        outcomes[not lines] += 1
    assert min(outcomes.values()) > count / 20  # or it would be no test
