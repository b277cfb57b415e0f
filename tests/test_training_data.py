"""Training data: what is chosen, in what order it comes, what augmentation does, what bad input gets."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fourierbias.errors import FourierBiasError
from fourierbias.images import PHOTOS
from fourierbias.training.data import (
    Split,
    augment,
    balanced_choice,
    draw_moves,
    evaluation_batches,
    load_data,
    photograph_patches,
    plan_epoch,
    read_image,
    share,
    step_seed,
    training_batches,
)

PREPROCESSING = {
    "input_size": (3, 16, 16),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.25, 0.3),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture
def folder(tmp_path):
    """Images of three classes in train/ and test/, of a colour each and of several sizes and formats."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for label, name in enumerate(("ant", "bee", "cow")):
            where = tmp_path / part / name / "deeper"
            where.mkdir(parents=True)
            for i in range(count):
                size = (16, 16) if i % 2 else (20 + i, 18)
                values = draw.integers(0, 40, (size[1], size[0], 3), dtype=np.uint8)
                values[..., label] += 200
                Image.fromarray(values).save(where / f"{i}.{('png', 'jpg', 'bmp')[i % 3]}")
    return tmp_path


def memory_split(count=20, size=16):
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return Split(torch.arange(count) % 4, [f"{i:03d}" for i in range(count)], PREPROCESSING, pixels)


# ------------------------------------------------------------------------------------------ photographs


def test_photographs_are_balanced_and_of_the_size_asked_for():
    data = load_data("photos", PREPROCESSING)
    assert data.classes == list(PHOTOS)
    assert data.train.pixels.shape == (16 * 300, 3, 16, 16)
    assert data.evaluation.pixels.shape == (16 * 60, 3, 16, 16)
    assert data.train.labels.bincount().tolist() == [300] * 16
    assert len({data.train.pixels[i].numpy().tobytes() for i in range(0, 4800, 7)}) > 600
    again = load_data("photos", PREPROCESSING)
    assert again.description == data.description
    assert data.description["evaluated_on"] == "test"


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("shape", [(400, 300), (301, 703), (1411, 1411)])
def test_train_and_test_patches_share_no_pixel(shape, size):
    width, height = shape
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[:, : width * 3 // 4, 0] = 255  # red to train on, blue to test on
    values[:, width * 3 // 4 :, 2] = 255
    patches = photograph_patches(Image.fromarray(values), size)
    assert patches["train"].shape[1:] == patches["test"].shape[1:] == (3, size, size)
    assert patches["train"][:, 0].min() == 255
    assert patches["train"][:, 2].max() == 0
    assert patches["test"][:, 2].min() == 255
    assert patches["test"][:, 0].max() == 0


# --------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 1.0])
def test_fraction_is_balanced_and_lies_in_larger_ones(fraction):
    labels, names = torch.arange(400) % 4, [f"{i:03d}" for i in range(400)]
    kept, held = balanced_choice(labels, names, fraction, 0)
    assert labels[kept].bincount().tolist() == [max(1, round(fraction * 100))] * 4
    assert len(held) == 0
    larger, _ = balanced_choice(labels, names, min(1.0, 2 * fraction), 0)
    assert set(kept.tolist()) <= set(larger.tolist())


def test_choice_follows_names_and_not_their_order():
    labels, names = torch.arange(60) % 3, [f"{i:02d}" for i in range(60)]
    order = torch.randperm(60)
    shuffled = [names[i] for i in order]
    chosen = {
        frozenset(n[i] for i in balanced_choice(lab, n, 0.2, 6)[part].tolist())
        for lab, n in ((labels, names), (labels[order], shuffled))
        for part in (0, 1)
    }
    assert len(chosen) == 2  # one set of training images, one of held-out ones


def test_held_out_images_are_the_same_for_every_fraction_and_never_trained_on():
    labels, names = torch.arange(100) % 3, [f"{i:02d}" for i in range(100)]
    sets = [balanced_choice(labels, names, fraction, 10) for fraction in (0.1, 0.5, 1.0)]
    assert all(torch.equal(held, sets[0][1]) for _, held in sets)
    assert labels[sets[0][1]].bincount().tolist() == [4, 3, 3]
    for kept, held in sets:
        assert not set(kept.tolist()) & set(held.tolist())
    assert len(sets[2][0]) == 90


@pytest.mark.parametrize("holdout", [2, 100, 1000])
def test_a_holdout_that_cannot_be(holdout):
    with pytest.raises(FourierBiasError, match="holdout"):
        balanced_choice(torch.arange(100) % 3, [str(i) for i in range(100)], 1.0, holdout)


# ------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize(("count", "size"), [(20, 4), (21, 4), (7, 16), (2, 128)])
def test_an_epoch_sees_each_image_at_most_once(count, size):
    plan = plan_epoch(count, size, seed=3, epoch=5)
    seen = torch.cat(plan).tolist()
    assert len(set(seen)) == len(seen) > count - size
    assert all(len(batch) % 2 == 0 for batch in plan)
    assert all(torch.equal(a, b) for a, b in zip(plan, plan_epoch(count, size, 3, 5), strict=True))


def test_order_and_seed_change_with_seed_epoch_and_step():
    orders = {tuple(torch.cat(plan_epoch(50, 10, s, e)).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    seeds = {step_seed(s, e, k) for s in range(4) for e in range(4) for k in range(-1, 4)}
    assert len(seeds) == 4 * 4 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_batches_from_a_step_on_are_those_of_the_whole_epoch():
    split = memory_split()
    plan = plan_epoch(len(split), 4, 0, 2)
    whole = list(training_batches(split, plan, seed=0, epoch=2))
    tail = list(training_batches(split, plan, seed=0, epoch=2, start=3))
    assert len(tail) == len(whole) - 3
    for (a, b), (c, d) in zip(whole[3:], tail, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_ranks_together_see_the_global_batch():
    split = memory_split()
    plan = plan_epoch(len(split), 8, 0, 0)
    whole = list(training_batches(split, plan, seed=0, epoch=0))
    ranks = [list(training_batches(split, plan, seed=0, epoch=0, rank=r, world_size=3)) for r in range(3)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), images)
        assert torch.equal(torch.cat([rank[step][1] for rank in ranks]), labels)
    assert [len(share(torch.arange(8), r, 3)) for r in range(3)] == [3, 3, 2]


# ----------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("size", [8, 16, 33])
def test_augmentation_is_reflection_crop_and_mirror(size):
    images = torch.randn(6, 3, size, size)
    moves = draw_moves(6, size, True, torch.Generator().manual_seed(1))
    pad = size // 8
    found = augment(images, *moves).numpy()
    for image, top, left, mirrored, result in zip(
        images.numpy(), *(m.tolist() for m in moves), found, strict=True
    ):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        crop = padded[:, top : top + size, left : left + size]
        np.testing.assert_array_equal(result, crop[..., ::-1] if mirrored else crop)
    assert moves[0].min() >= 0
    assert moves[1].max() <= 2 * pad


def test_moves_take_every_value():
    rows, columns, mirrored = draw_moves(2000, 32, True, torch.Generator().manual_seed(0))
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(9))
    assert 900 < mirrored.sum() < 1100
    assert not draw_moves(50, 32, False, torch.Generator())[2].any()


def test_evaluation_is_in_order_and_normalised():
    split = memory_split(10)
    batches = list(evaluation_batches(split, batch_size=4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    images = torch.cat([images for images, _ in batches]).double()
    mean, std = (
        torch.tensor(PREPROCESSING[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std")
    )
    expected = (split.pixels.double() / 255 - mean) / std
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- folders


def test_folder_is_read_at_any_depth_and_size(folder):
    data = load_data(folder, PREPROCESSING)
    assert data.classes == ["ant", "bee", "cow"]
    assert data.train.pixels.shape == (30, 3, 16, 16)
    assert data.evaluation.labels.bincount().tolist() == [4, 4, 4]
    assert (data.train.pixels.float().mean((2, 3)).argmax(1) == data.train.labels).all()


def test_validation_folder_serves_as_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load_data(folder, PREPROCESSING).evaluation) == 12


def test_a_folder_without_test_is_split_and_says_so(folder):
    said = []
    data = load_data(folder / "train", PREPROCESSING, say=said.append)
    assert data.evaluation.labels.bincount().tolist() == [1, 1, 1]
    assert not set(data.train.names) & set(data.evaluation.names)
    assert "3 of 30 images" in said[0]


def test_holdout_takes_the_place_of_test(folder):
    data = load_data(folder, PREPROCESSING, holdout=6)
    assert (len(data.train), len(data.evaluation)) == (24, 6)
    assert data.description["evaluated_on"] == "held-out training images"
    assert all((folder / "train" / name).exists() for name in data.evaluation.names)


def test_unreadable_images_are_skipped_named_and_counted(folder):
    victims = sorted((folder / "train" / "bee" / "deeper").iterdir())[:4]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(b"no image")
    victims[2].write_bytes(victims[3].read_bytes()[:120])
    victims[3].unlink()
    victims[3].mkdir()
    said = []
    data = load_data(folder, PREPROCESSING, say=said.append)
    assert len(data.train) == 26
    assert len(data.train.unreadable) == 4
    assert "skipped 4 of 30 train images" in said[0]
    assert "bee/deeper/0.png" in said[0]


def test_all_unreadable_is_an_error(folder):
    for path in (folder / "train").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(FourierBiasError, match="none of the 30 train images can be read"):
        load_data(folder, PREPROCESSING)


def test_sources_that_cannot_be_trained_on(folder, tmp_path):
    (tmp_path / "one" / "only").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    file = folder / "train" / "ant" / "deeper" / "0.png"
    (tmp_path / "one" / "only" / "a.png").write_bytes(file.read_bytes())
    (folder / "test" / "dog").mkdir()
    for source, message in (
        (tmp_path / "nowhere", "no data at .*nowhere"),
        (file, "is not a folder"),
        (tmp_path / "empty", "no images in"),
        (tmp_path / "one", "one class of images"),
        (folder, "classes that .* lacks: dog"),
    ):
        with pytest.raises(FourierBiasError, match=message):
            load_data(source, PREPROCESSING)


def test_cifar_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FourierBiasError, match=r"cifar10 could not be downloaded.*image folder or `photos`"):
        load_data("cifar10", PREPROCESSING)


def test_cifar_is_trained_on_one_part_and_evaluated_on_the_other(monkeypatch, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)

    class Downloaded:
        classes = ("a", "b")

        def __init__(self, root, train, download):
            self.data = images[:5] if train else images[5:]
            self.targets = [0, 1, 1, 0, 1] if train else [1, 0, 0]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloaded)
    found = load_data("cifar10", PREPROCESSING)
    assert (found.train.labels.tolist(), found.evaluation.labels.tolist()) == ([0, 1, 1, 0, 1], [1, 0, 0])
    np.testing.assert_array_equal(found.train.pixels, images[:5].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(found.evaluation.pixels, images[5:].transpose(0, 3, 1, 2))


# ---------------------------------------------------------------------------------- large sets, formats


def test_labels_go_by_the_names_of_classes(folder):
    data = load_data(folder, PREPROCESSING)
    assert data.evaluation_for(data.classes) is data.evaluation
    more = ["before", *data.classes[::-1]]
    split = data.evaluation_for(more)
    names = [data.classes[label] for label in data.evaluation.labels]
    assert [more[label] for label in split.labels] == names
    assert torch.equal(split.pixels, data.evaluation.pixels)
    with pytest.raises(FourierBiasError, match=f"these images have a class {data.classes[-1]}"):
        data.evaluation_for(data.classes[:-1])


def test_a_set_too_large_for_memory_is_read_as_needed(folder):
    held, read = (load_data(folder, PREPROCESSING, memory_limit=limit) for limit in (1 << 30, 0))
    assert read.train.pixels is None
    for (a, b), (c, d) in zip(
        evaluation_batches(held.evaluation, 5), evaluation_batches(read.evaluation, 5), strict=True
    ):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-5)
        assert torch.equal(b, d)
    plan = plan_epoch(30, 10, 0, 0)
    whole = list(training_batches(read.train, plan, seed=0, epoch=0))
    tail = list(training_batches(read.train, plan, seed=0, epoch=0, start=1))
    other = list(training_batches(read.train, plan, seed=1, epoch=0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[1:], tail, strict=True))
    assert not torch.equal(whole[0][0], other[0][0])
    ranks = [next(training_batches(read.train, plan, seed=0, epoch=0, rank=r, world_size=2)) for r in (0, 1)]
    assert torch.equal(torch.cat([images for images, _ in ranks]), whole[0][0])


def test_unreadable_files_of_a_large_set_are_left_out(folder):
    data = load_data(folder, PREPROCESSING, memory_limit=0)
    data.evaluation.files[2].write_bytes(b"")
    labels = torch.cat([labels for _, labels in evaluation_batches(data.evaluation, 5)])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert data.evaluation.unreadable == [str(data.evaluation.files[2])]


def test_every_kind_of_image_becomes_rgb(tmp_path):
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (8, 1))
    colour = np.stack([ramp, 255 - ramp, ramp // 2], -1)
    on_white = (colour * (ramp / 255.0)[..., None] + 255 - ramp[..., None]).round()
    images = {
        "grey.png": (Image.fromarray(ramp), np.stack([ramp] * 3, -1)),
        "sixteen.png": (Image.fromarray(ramp.astype(np.uint16) * 257), np.stack([ramp] * 3, -1)),
        "alpha.png": (Image.fromarray(np.dstack([colour, ramp])), on_white),
        "bits.png": (Image.fromarray(ramp > 100), np.stack([255 * (ramp > 100)] * 3, -1)),
    }
    for name, (image, expected) in images.items():
        image.save(tmp_path / name)
        np.testing.assert_allclose(np.asarray(read_image(tmp_path / name)), expected, atol=1, err_msg=name)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(colour).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.rot90(colour, -1))
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    assert np.abs(np.asarray(read_image(tmp_path / "print.jpg")).astype(int) - colour).mean() < 8
