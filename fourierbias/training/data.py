"""Where training images come from, and in what order and form the trainer sees them.

Everything random is a function of (seed, epoch, step): nothing has to be kept to resume, and ranks that share
a batch can each draw the whole batch's augmentation and take their part of it.
"""

import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from ..errors import FourierBiasError
from ..images import PHOTOS, SUFFIXES, decode, photo_path
from ..models.checkpoint import first_three

TRAIN_GRID, TEST_GRID = (15, 20), (15, 4)  # rows and columns of patches cut from one photograph
TEST_FOLDERS = ("test", "val", "validation", "valid")
MEMORY_LIMIT = 2 << 30  # bytes of decoded images held in memory; larger sets are read as they are needed


@dataclass
class Split:
    """Images with labels: ``pixels`` (N, 3, S, S) uint8 in memory, or ``files`` read on demand.

    ``preprocessing`` is the model's (`timm.data.resolve_model_data_config`); ``unreadable`` collects the
    files that could not be decoded.
    """

    labels: torch.Tensor
    names: list[str]
    preprocessing: dict[str, Any]
    pixels: torch.Tensor | None = None
    files: list[Path] | None = None
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: torch.Tensor) -> "Split":
        """Return the images at ``indices``, in that order."""
        return Split(
            self.labels[indices],
            [self.names[i] for i in indices.tolist()],
            self.preprocessing,
            None if self.pixels is None else self.pixels[indices],
            None if self.files is None else [self.files[i] for i in indices.tolist()],
        )

    def fingerprint(self) -> str:
        """Return a checksum of labels and pixels (of names where pixels are not in memory)."""
        content = "\n".join(self.names).encode() if self.pixels is None else self.pixels.numpy()
        return f"{zlib.crc32(content, zlib.crc32(self.labels.numpy())):08x}"


@dataclass
class Data:
    """What a training sees: two splits, the names of the classes, and a plain description for the log."""

    train: Split
    evaluation: Split
    classes: list[str]
    description: dict[str, Any]

    def evaluation_for(self, classes: Sequence[str]) -> Split:
        """Return the images to evaluate on, labelled as a network of ``classes`` counts them.

        The names must be among its own; FourierBiasError if they are not.
        """
        if list(classes) == self.classes:
            return self.evaluation
        strange = next((name for name in self.classes if name not in classes), None)
        if strange is not None:
            raise FourierBiasError(
                f"the network tells {first_three(classes)} apart, and these images have a class {strange}: "
                "evaluate on its own data"
            )
        places = torch.tensor([list(classes).index(name) for name in self.classes])
        return replace(self.evaluation, labels=places[self.evaluation.labels])


def load_data(
    source: str | os.PathLike,
    preprocessing: Mapping[str, Any],
    *,
    fraction: float = 1.0,
    holdout: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Data:
    """Load a training set and what it is evaluated on.

    ``source``: ``photos`` (patches of scikit-image's photographs), ``cifar10`` or ``cifar100`` (downloaded by
    torchvision), or a folder with train/CLASS/ and test/CLASS/ (or val/), or with CLASS/ alone, of which a
    tenth is then set apart. ``fraction`` and ``holdout`` are described in `Recipe`. Raises FourierBiasError
    for a source without usable images.
    """
    source = os.fspath(source)
    preprocessing = {**preprocessing, "input_size": tuple(preprocessing["input_size"])}
    if source == "photos":
        train, evaluation, classes = load_photographs(preprocessing)
    elif source in ("cifar10", "cifar100"):
        train, evaluation, classes = load_cifar(source, preprocessing)
    else:
        train, evaluation, classes = list_folder(Path(source), preprocessing, say)
    evaluated_on = "test"
    kept, held = balanced_choice(train.labels, train.names, fraction, holdout)
    if holdout:
        train, evaluation, evaluated_on = train.take(kept), train.take(held), "held-out training images"
    elif fraction < 1:
        train = train.take(kept)
    train = decode_split(train, "train", memory_limit, progress, say)
    evaluation = decode_split(evaluation, evaluated_on, memory_limit, progress, say)
    description = {
        "source": source if not Path(source).is_dir() else Path(source).resolve().name,
        "train_images": len(train),
        "evaluation_images": len(evaluation),
        "evaluated_on": evaluated_on,
        "fingerprint": train.fingerprint() + evaluation.fingerprint(),
    }
    return Data(train, evaluation, list(classes), description)


# ---------------------------------------------------------------------------------------------- choosing


def balanced_choice(
    labels: torch.Tensor, names: Sequence[str], fraction: float, holdout: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the training and of the held-out images, both class-balanced.

    Within each class the images, sorted by name, are put in one fixed random order that depends on nothing
    but their number. Training takes the first ``fraction`` of it (at least one image), so that smaller
    fractions lie in larger ones; the held-out images are its last, the same for every fraction.

    >>> kept, held = balanced_choice(torch.arange(10) % 2, list("abcdefghij"), 0.4, 2)
    >>> len(kept), len(held)
    (4, 2)
    """
    classes = labels.unique().tolist()
    if holdout and (holdout < len(classes) or holdout >= len(labels)):
        raise FourierBiasError(
            f"holdout must be at least one image per class ({len(classes)}) and less than all "
            f"({len(labels)}), got {holdout}"
        )
    kept, held = [], []
    for position, label in enumerate(classes):
        members = sorted(torch.nonzero(labels == label).flatten().tolist(), key=names.__getitem__)
        order = [members[i] for i in np.random.RandomState(0).permutation(len(members))]
        last = holdout // len(classes) + (position < holdout % len(classes))
        if holdout and last >= len(members):
            raise FourierBiasError(f"holdout {holdout} leaves nothing to train on in class {label}")
        first = min(max(1, round(fraction * len(members))), len(members) - last)
        kept += order[:first]
        held += order[len(order) - last :]
    return torch.tensor(sorted(kept)), torch.tensor(sorted(held), dtype=torch.long)


def plan_epoch(count: int, batch_size: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """Return the indices of every batch of an epoch: a permutation, cut, without the incomplete last batch.

    A set smaller than one batch is one batch. The batches are global ones; see `share` for ranks.

    >>> [len(batch) for batch in plan_epoch(10, 4, seed=0, epoch=0)]
    [4, 4]
    """
    generator = torch.Generator().manual_seed(step_seed(seed, epoch))
    order = torch.randperm(count, generator=generator)
    size = min(batch_size, count - count % 2) or count  # even, as Mixup wants it
    return list(order[: len(order) // size * size].split(size))


def share(batch: torch.Tensor, rank: int, world_size: int, *, pairs: bool = False) -> torch.Tensor:
    """Return the part of a global batch (first dimension) that belongs to one rank.

    With ``pairs`` an entry is always together with its mirror image in the batch, as Mixup wants it, which
    mixes the first with the last and so on: a part that is mixed is then a part of the mixed batch.

    >>> share(torch.arange(6), 1, 3).tolist(), share(torch.arange(6), 1, 3, pairs=True).tolist()
    ([2, 3], [1, 4])
    """
    if pairs:
        part = share(torch.arange(len(batch) // 2), rank, world_size)
        return batch[torch.cat([part, len(batch) - 1 - part.flip(0)])]
    return batch.tensor_split(world_size)[rank]


def step_seed(seed: int, epoch: int, step: int = -1) -> int:
    """Return the seed of everything random in one step (of the order of the epoch for step -1)."""
    state = np.random.SeedSequence([seed, epoch, step + 1]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


# ---------------------------------------------------------------------------------------------- batches


def training_batches(
    split: Split,
    plan: Sequence[torch.Tensor],
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    flip: bool = True,
    rank: int = 0,
    world_size: int = 1,
    pairs: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images (B, 3, S, S) float32 normalised, labels (B,)) of the planned batches from ``start`` on.

    Images in memory are augmented in batches (`augment`); those read on demand by timm's training transform.
    Of every batch a rank gets its `share`.
    """
    own = partial(share, rank=rank, world_size=world_size, pairs=pairs)
    if split.pixels is None:
        dataset = ImageFiles(split, training=True, flip=flip)
        keys = [
            [
                (step_seed(seed, epoch, step) + i, int(plan[step][i]))
                for i in own(torch.arange(len(plan[step]))).tolist()
            ]
            for step in range(start, len(plan))
        ]
        yield from stream(split, dataset, keys, device)
        return
    mean, std = normalisation(split, device)
    for step in range(start, len(plan)):
        generator = torch.Generator().manual_seed(step_seed(seed, epoch, step))
        moves = draw_moves(len(plan[step]), split.pixels.shape[-1], flip, generator)
        moves = [own(move).to(device) for move in moves]
        indices = own(plan[step]).to(split.pixels.device)
        images = augment(split.pixels[indices].to(device).float(), *moves)
        yield images.sub_(mean).div_(std), split.labels[indices.cpu()].to(device)


def evaluation_batches(
    split: Split, batch_size: int = 500, device: torch.device | str = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images, labels) in order, normalised, without augmentation."""
    if split.pixels is None:
        items = [
            [(0, index) for index in part.tolist()] for part in torch.arange(len(split)).split(batch_size)
        ]
        yield from stream(split, ImageFiles(split, training=False, flip=False), items, device)
        return
    mean, std = normalisation(split, device)
    for pixels, labels in zip(split.pixels.split(batch_size), split.labels.split(batch_size), strict=True):
        yield pixels.to(device).float().sub_(mean).div_(std), labels.to(device)


def normalisation(split: Split, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (3, 1, 1) of the preprocessing, in units of uint8."""
    mean, std = (255 * torch.tensor(split.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    return mean.to(device), std.to(device)


def draw_moves(
    count: int, size: int, flip: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw rows and columns of crops, in 0 … 2·(size // 8), and which images are mirrored."""
    rows, columns = torch.randint(0, 2 * (size // 8) + 1, (2, count), generator=generator)
    return rows, columns, (torch.rand(count, generator=generator) < 0.5) & flip


def augment(
    images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, mirrored: torch.Tensor
) -> torch.Tensor:
    """Crop images (B, C, S, S) out of themselves padded by reflection by S // 8, and mirror some of them.

    ``rows`` and ``columns`` (B,) are the crops' upper left corners, ``mirrored`` (B,) is boolean.

    >>> images = torch.arange(16.0).view(1, 1, 4, 4).repeat(1, 1, 2, 2)
    >>> torch.equal(augment(images, torch.tensor([1]), torch.tensor([1]), torch.tensor([False])), images)
    True
    """
    size = images.shape[-1]
    windows = F.pad(images, (size // 8,) * 4, mode="reflect").unfold(2, size, 1).unfold(3, size, 1)
    batch = torch.arange(len(images), device=images.device)
    crops = windows.permute(0, 2, 3, 1, 4, 5)[batch, rows, columns]
    return torch.where(mirrored[:, None, None, None], crops.flip(-1), crops)


class ImageFiles(Dataset):
    """A split read on demand: items are (image, label), or (name, None) for a file that cannot be read.

    Its keys are (seed, index) pairs, so that an item's augmentation does not depend on the worker.
    """

    def __init__(self, split: Split, *, training: bool, flip: bool) -> None:
        self.files, self.labels = split.files, split.labels
        augmentation = {"hflip": 0.5 * flip, "color_jitter": None, "scale": (0.35, 1.0)} if training else {}
        self.transform = create_transform(**split.preprocessing, is_training=training, **augmentation)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int | None]:
        seed, index = key
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        image = read_image(self.files[index])
        return (
            (str(self.files[index]), None)
            if image is None
            else (self.transform(image), int(self.labels[index]))
        )


def stream(
    split: Split, dataset: ImageFiles, items: list[list[tuple[int, int]]], device: torch.device | str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of files read by workers; files that cannot be read are left out and noted."""
    workers = min(8, os.cpu_count() or 1)
    loader = DataLoader(dataset, batch_sampler=items, num_workers=workers, collate_fn=collate_readable)
    for images, labels, unreadable in loader:
        split.unreadable += [name for name in unreadable if name not in split.unreadable]
        if not len(labels):
            raise FourierBiasError(f"a whole batch of images cannot be read (first: {unreadable[0]})")
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def collate_readable(items: list[tuple[Any, int | None]]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Stack the items that could be read, and name the others."""
    readable = [(image, label) for image, label in items if label is not None]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    labels = torch.tensor([label for _, label in readable], dtype=torch.long)
    return images, labels, [name for name, label in items if label is None]


# ---------------------------------------------------------------------------------------------- sources


def load_photographs(preprocessing: dict[str, Any]) -> tuple[Split, Split, list[str]]:
    """Return patches of scikit-image's photographs; the class of a patch is its photograph.

    Training patches come from the left three quarters of each, test patches from the right quarter, on
    regular grids. Photographs are scaled so that their shorter side has four to eight patches.
    """
    size = preprocessing["input_size"][-1]
    found: dict[str, list[torch.Tensor]] = {"train": [], "test": []}
    for name in PHOTOS:
        photograph = decode(photo_path(name))
        for part, patches in photograph_patches(photograph, size).items():
            found[part].append(patches)
    splits = []
    for part, patches in found.items():
        names = [f"{name}/{part}-{i:03d}" for name in PHOTOS for i in range(len(patches[0]))]
        labels = torch.arange(len(PHOTOS)).repeat_interleave(len(patches[0]))
        splits.append(Split(labels, names, preprocessing, pixels=torch.cat(patches)))
    return splits[0], splits[1], list(PHOTOS)


def photograph_patches(photograph: Image.Image, size: int) -> dict[str, torch.Tensor]:
    """Return ``train`` and ``test`` patches (N, 3, size, size) uint8 of the two regions of a photograph.

    >>> {part: len(patches) for part, patches in photograph_patches(Image.new("RGB", (99, 70)), 16).items()}
    {'train': 300, 'test': 60}
    """
    width, height = photograph.size
    shorter = min(width, height)
    scale = min(max(shorter, 4 * size), 8 * size) / shorter
    cut = width * 3 // 4
    patches = {}
    for part, left, right, grid in (("train", 0, cut, TRAIN_GRID), ("test", cut, width, TEST_GRID)):
        # Cut before scaling: the filter of a resize would carry pixels across the border.
        shape = [max(size, round(scale * side)) for side in (right - left, height)]
        region = photograph.crop((left, 0, right, height)).resize(shape, Image.Resampling.BICUBIC)
        patches[part] = cut_patches(to_pixels(region), size, grid)
    return patches


def cut_patches(pixels: torch.Tensor, size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Cut (rows · columns, 3, size, size) patches out of an image (3, H, W), evenly spaced.

    >>> cut_patches(torch.zeros(3, 40, 50, dtype=torch.uint8), 32, (2, 3)).shape
    torch.Size([6, 3, 32, 32])
    """
    tops, lefts = (
        np.linspace(0, extent - size, count).round().astype(int).tolist()
        for extent, count in zip(pixels.shape[1:], grid, strict=True)
    )
    return torch.stack([pixels[:, top : top + size, left : left + size] for top in tops for left in lefts])


def load_cifar(name: str, preprocessing: dict[str, Any]) -> tuple[Split, Split, list[str]]:
    """Return CIFAR-10 or CIFAR-100 by torchvision, downloaded on first use into the user's cache folder."""
    from torchvision.datasets import CIFAR10, CIFAR100

    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fourierbias"
    dataset_class = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    splits = []
    for training in (True, False):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root):
                dataset = dataset_class(str(root), train=training, download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FourierBiasError(
                f"{name} could not be downloaded to {root} ({reason}); get it where there is a "
                "network, or name an image folder or `photos`"
            ) from None
        pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
        size = preprocessing["input_size"][-1]
        if size != pixels.shape[-1]:
            parts = [
                F.interpolate(part.float(), size=(size, size), mode="bicubic", antialias=True)
                for part in pixels.split(1000)
            ]
            pixels = torch.cat([part.round().clamp(0, 255).byte() for part in parts])
        names = [f"{i:05d}" for i in range(len(pixels))]
        splits.append(Split(torch.tensor(dataset.targets), names, preprocessing, pixels=pixels.contiguous()))
    return splits[0], splits[1], list(dataset.classes)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes waiting that would download into ``folder``, where the system has such locks."""
    with open(folder / ".lock", "w") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def list_folder(
    root: Path, preprocessing: dict[str, Any], say: Callable[[str], None]
) -> tuple[Split, Split, list[str]]:
    """Return the files of an image folder, sorted by name; one folder per class."""
    if not root.exists():
        raise FourierBiasError(
            f"no data at {root}; give an image folder with train/ and test/, or photos, cifar10 or cifar100"
        )
    if not root.is_dir():
        raise FourierBiasError(f"{root} is not a folder; give the folder that holds train/ and test/")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    classes = [
        entry.name
        for entry in sorted(train_root.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    ]
    if train_root == root and test_root is not None:
        raise FourierBiasError(
            f"{root} has {test_root.name}/ but no train/; add train/ with a folder per class"
        )
    train = list_classes(train_root, classes, preprocessing)
    if not len(train):
        raise FourierBiasError(f"no images in {train_root}; it needs a folder per class with images in it")
    if len(set(train.labels.tolist())) < 2:
        raise FourierBiasError(
            f"one class of images in {train_root}; training needs a folder for each of two or more"
        )
    if test_root is not None:
        strange = sorted(
            {entry.name for entry in test_root.iterdir() if entry.is_dir() and entry.name[0] != "."}
            - set(classes)
        )
        if strange:
            raise FourierBiasError(
                f"{test_root} has classes that {train_root} lacks: {', '.join(strange[:3])}"
            )
        test = list_classes(test_root, classes, preprocessing)
        if not len(test):
            raise FourierBiasError(f"no images in {test_root}; it needs a folder per class with images in it")
        return train, test, classes
    tenth = max(len(classes), round(0.1 * len(train)))
    kept, held = balanced_choice(train.labels, train.names, 1.0, tenth)
    say(f"no test/ in {root}: {len(held)} of {len(train)} images, balanced over classes, are set apart")
    return train.take(kept), train.take(held), classes


def list_classes(root: Path, classes: Sequence[str], preprocessing: dict[str, Any]) -> Split:
    """List the image files below each class's folder, at any depth."""
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    names = [path.relative_to(root).as_posix() for path in files]
    return Split(torch.tensor(labels, dtype=torch.long), names, preprocessing, files=files)


# ---------------------------------------------------------------------------------------------- decoding


def decode_split(
    split: Split, what: str, memory_limit: int, progress: bool, say: Callable[[str], None]
) -> Split:
    """Decode a split of files into memory if it fits ``memory_limit`` bytes, without those unreadable."""
    size = split.preprocessing["input_size"]
    if split.files is None or len(split) * int(np.prod(size)) > memory_limit:
        return split
    transform = create_transform(**split.preprocessing, is_training=False, normalize=False)
    pixels = torch.empty((len(split), *size), dtype=torch.uint8)
    readable = torch.zeros(len(split), dtype=torch.bool)

    def fill(index: int) -> None:
        image = read_image(split.files[index])
        if image is not None:
            exact = image.size == (size[2], size[1]) and split.preprocessing.get("crop_pct", 1.0) == 1.0
            pixels[index] = to_pixels(image) if exact else transform(image)
            readable[index] = True

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        work: Iterable[None] = pool.map(fill, range(len(split)), chunksize=64)
        if progress:
            console = Console(stderr=True)
            work = track(work, f"decoding {what} images", len(split), console=console, transient=True)
        for _ in work:
            pass
    unreadable = [split.names[i] for i in torch.nonzero(~readable).flatten().tolist()]
    if len(unreadable) == len(split):
        raise FourierBiasError(f"none of the {len(split)} {what} images can be read (first: {unreadable[0]})")
    if unreadable:
        named = ", ".join(unreadable[:3]) + (" …" if len(unreadable) > 3 else "")
        say(f"skipped {len(unreadable)} of {len(split)} {what} images that cannot be read: {named}")
    kept = torch.nonzero(readable).flatten()
    names = [split.names[i] for i in kept.tolist()]
    kept_pixels = pixels if not unreadable else pixels[kept]
    return Split(split.labels[kept], names, split.preprocessing, kept_pixels, unreadable=unreadable)


def read_image(path: Path) -> Image.Image | None:
    """Return an image file as RGB, turned as its EXIF says, or None if it cannot be decoded."""
    try:
        return decode(path)
    except FourierBiasError:
        return None


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return an RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
