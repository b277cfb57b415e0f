"""Readers: the image at one place of a source, as a PIL image to be preprocessed or as a tensor."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from ..errors import FourierBiasError
from .decoding import Preprocess, decoded, printable, reason, to_uint8, value_limit
from .names import folder_labels, is_image_name, natural_key, nothing_in, shared_folder, split_order

PHOTOS = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "grass"),
    *("gravel", "hubble_deep_field", "ihc", "moon", "motorcycle_left", "retina", "rocket"),
)
LARGEST = 1 << 30  # bytes or values; a larger "image" in an archive or array is damage or malice


class Reader:
    """What all readers have: ``title`` says what it is, ``names`` and ``labels`` are of all its images.

    ``read(place)`` gives (image, label or None), the image as a PIL image, as pixels (C, H, W) uint8, or as
    preprocessed (C, H, W) floats; `Preprocessed` and `Stream` give several at once in its place.
    """

    title: str
    names: Sequence[str]
    labels: Sequence[Any] | None = None
    listed: bool = False  # in an order of our making, so that a limit is spread over it, not cut off
    threads: int = 4  # how many may call `read` at once

    def fingerprint(self, places: Sequence[int]) -> str:
        """What tells the images at some places from others of the same names; nothing where names do."""
        return ""

    def files(self, places: Sequence[int]) -> list[str]:
        """The files that the images at some places are in, where they are in files of the user's."""
        return []


class Photos(Reader):
    """Photograph i % 16; the first round as the model's transform has it, later ones in seeded crops."""

    title = "photographs of scikit-image"

    def __init__(self, count: int, preprocess: Preprocess, seed: int) -> None:
        self.preprocess, self.seed = preprocess, seed
        rounds = (divmod(i, len(PHOTOS)) for i in range(count))
        self.names = [f"{PHOTOS[k]}#{n + 1}" if n else PHOTOS[k] for n, k in rounds]
        self.labels = [PHOTOS[i % len(PHOTOS)] for i in range(count)]

    def fingerprint(self, places: Sequence[int]) -> str:
        """The seed, where there are crops among the photographs."""
        return f"seed {self.seed}" if max(places) >= len(PHOTOS) else ""

    def read(self, place: int) -> tuple[Image.Image | Tensor, None]:
        photograph = _photograph(PHOTOS[place % len(PHOTOS)], self.preprocess.mode)
        if place < len(PHOTOS):
            return photograph, None
        return self.preprocess.crop(photograph, self._box(photograph, place)), None

    def _box(self, image: Image.Image, place: int) -> tuple[int, int, int, int]:
        # A quarter of the area at least: smaller crops would be magnified at usual input sizes, and a
        # magnified photograph has no high frequencies of its own.
        random = np.random.default_rng((self.seed, place))
        area = image.width * image.height * random.uniform(0.25, 1)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        ratio *= self.preprocess.width / self.preprocess.height
        width = min(image.width, max(1, round(np.sqrt(area * ratio))))
        height = min(image.height, max(1, round(np.sqrt(area / ratio))))
        left = int(random.integers(image.width - width + 1))
        top = int(random.integers(image.height - height + 1))
        return left, top, left + width, top + height


@functools.lru_cache(maxsize=2 * len(PHOTOS))
def _photograph(name: str, mode: str) -> Image.Image:
    return decoded(photo_path(name), mode)


def photo_path(name: str) -> Path:
    """The file of one of the photographs (`PHOTOS`) that scikit-image carries in its wheel.

    Raises `FourierBiasError` if there is no such photograph, or no scikit-image.

    >>> photo_path("retina").name
    'retina.jpg'
    """
    if name not in PHOTOS:
        raise FourierBiasError(f"no photograph {name!r}: choose from {', '.join(PHOTOS)}")
    package = importlib.util.find_spec("skimage")  # importing it would take a second and load half of scipy
    if package is None or not package.submodule_search_locations:
        raise FourierBiasError("the photographs come with scikit-image: pip install scikit-image")
    folder = Path(package.submodule_search_locations[0]) / "data"
    for suffix in (".png", ".jpg"):
        if (path := folder / (name + suffix)).is_file():
            return path
    raise FourierBiasError(f"photograph {name} is not in {folder}: reinstall scikit-image")


class Files(Reader):
    """Image files: ``paths`` below ``folder``."""

    def __init__(
        self,
        title: str,
        folder: str,
        paths: Sequence[str],
        labels: Sequence[Any] | None,
        preprocess: Preprocess,
    ) -> None:
        self.title, self.folder, self.paths, self.labels = title, folder, paths, labels
        self.names = [printable(path) for path in paths]
        self.mode = preprocess.mode

    def files(self, places: Sequence[int]) -> list[str]:
        """The image files themselves."""
        return [self._path(place) for place in places]

    def read(self, place: int) -> tuple[Image.Image, None]:
        return decoded(self._path(place), self.mode), None

    def _path(self, place: int) -> str:
        return os.path.join(self.folder, self.paths[place])


class PerProcess:
    """A file opened once in each process: file positions must not be shared with forked workers."""

    def __init__(self, opener: Callable[..., Any], *arguments: Any) -> None:
        self.opener, self.arguments, self.process = opener, arguments, -1
        self.get()

    def get(self) -> Any:
        """The file, opened in this process."""
        if self.process != os.getpid():
            self.file, self.process = self.opener(*self.arguments), os.getpid()
        return self.file

    def __getstate__(self) -> dict[str, Any]:
        return {"opener": self.opener, "arguments": self.arguments, "process": -1}


class Zip(Reader):
    """Images in a zip archive; nothing is unpacked to disk."""

    listed = True

    def __init__(self, path: str, preprocess: Preprocess) -> None:
        self.path, self.mode = path, preprocess.mode
        try:
            self.archive = PerProcess(zipfile.ZipFile, path)
        except Exception as error:  # damage shows itself in any form
            raise FourierBiasError(f"{path} is not a readable zip archive: {reason(error)}") from error
        members = {name for name in self.archive.get().namelist() if is_image_name(name)}
        if not members:
            raise nothing_in(path)
        root = shared_folder(members)
        inside = [name[len(root) :] for name in members]
        tops = {name.split("/")[0] for name in inside if "/" in name}
        split = next(iter(split_order(tops)), None)
        if split is not None:
            inside = [name for name in inside if name.startswith(f"{split}/")]
        inside.sort(key=natural_key)
        self.members = [root + name for name in inside]
        self.names = [printable(name) for name in self.members]
        self.title = f"zip archive {path}" + (f", {split}/" if split else "")
        self.labels = folder_labels([name[len(split) + 1 :] if split else name for name in inside])

    def files(self, places: Sequence[int]) -> list[str]:
        """The archive."""
        return [self.path]

    def read(self, place: int) -> tuple[Image.Image, None]:
        archive: zipfile.ZipFile = self.archive.get()
        member = archive.getinfo(self.members[place])
        if member.file_size > LARGEST:
            raise OSError(f"{member.file_size} bytes when unpacked, too large for an image")
        return decoded(archive.read(member), self.mode), None


class Array(Reader):
    """Images in an array (N, H, W), (N, H, W, C) or (N, C, H, W), of a file (``path``) or of Python.

    It may be larger than memory.
    """

    def __init__(self, title: str, array: PerProcess, layout: str, path: str | None = None) -> None:
        self.title, self.array, self.layout, self.path = title, array, layout, path
        pixels = array.get()
        self.names = [str(i) for i in range(len(pixels))]
        spread = np.unique(np.linspace(0, len(pixels) - 1, 16).astype(int))
        try:
            samples = [np.asarray(pixels[int(i)]) for i in spread]
        except Exception as error:
            raise FourierBiasError(f"{title} cannot be read: {reason(error)}") from error
        try:  # of all images one scale, or a dark one would be taken for a light one
            self.limit = value_limit(np.stack([[sample.min(), sample.max()] for sample in samples]))
        except ValueError as error:
            raise FourierBiasError(
                f"{title} holds {error}; preprocessed images go in from Python, as a tensor (N, C, H, W)"
            ) from error

    def fingerprint(self, places: Sequence[int]) -> str:
        """A checksum of values, which of an array that has no name are all there is."""
        return "" if self.path else _checksum(self.array.get(), places)

    def files(self, places: Sequence[int]) -> list[str]:
        """The file that holds the array, if one does."""
        return [self.path] if self.path else []

    def read(self, place: int) -> tuple[Image.Image, None]:
        return _array_image(np.asarray(self.array.get()[place]), self.layout[1:], self.limit), None


def _array_image(pixels: np.ndarray, layout: str, limit: int) -> Image.Image:
    """One image (H, W), (H, W, C) or (C, H, W) as PIL's."""
    if layout == "CHW":
        pixels = pixels.transpose(1, 2, 0)
    pixels = np.ascontiguousarray(to_uint8(pixels, limit))
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


def array_layout(shape: Sequence[int]) -> str | None:
    """Which axis of an array of images is which, or None if it is no such array.

    >>> [array_layout(shape) for shape in ((10, 8, 8, 3), (10, 3, 8, 8), (10, 8, 8), (8, 8, 3))]
    ['NHWC', 'NCHW', 'NHW', None]
    """
    if 0 in shape or len(shape) not in (3, 4):
        return None
    if len(shape) == 3:
        return "NHW" if shape[-1] > 4 or shape[-1] == shape[-2] else None
    if shape[-1] in (1, 3, 4):
        return "NHWC"
    return "NCHW" if shape[1] in (1, 3, 4) else None


class Items(Reader):
    """Anything with a length and items: a data set, a list; see `_item`."""

    threads = 1  # nobody promised that it may be read from several

    def __init__(self, title: str, items: Any, preprocess: Preprocess, count: int) -> None:
        self.title, self.items, self.preprocess = title, items, preprocess
        named = isinstance(items, list | tuple) and all(isinstance(i, str | os.PathLike) for i in items)
        self.names = [printable(os.fspath(i)) for i in items] if named else [str(i) for i in range(count)]

    def read(self, place: int) -> tuple[Image.Image | Tensor, Any]:
        return _item(self.items[place], self.preprocess)


class Encoded(Items):
    """What timm's readers give: (file object, label).

    The data set round them would put the next image in the place of an unreadable one.
    """

    def read(self, place: int) -> tuple[Image.Image, Any]:
        file, label = self.items[place][:2]
        with file:
            return decoded(file.read(), self.preprocess.mode), _label(label)


def _item(item: Any, preprocess: Preprocess) -> tuple[Image.Image | Tensor, Any]:
    """(image, label) of an item of somebody's data set."""
    image, label = _parts(item)
    return _item_image(image, preprocess), _label(label)


def _parts(item: Any) -> tuple[Any, Any]:
    """Image and label of an item that is an image, (image, label, …), or a mapping; the same of a batch."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in ("image", "pixel_values", "img", "images") if key in item), None)
        label = next((item[key] for key in ("label", "labels", "target") if key in item), None)
        if image is None:
            raise TypeError(f"the item has no image among its keys {', '.join(map(str, item))}")
        return image, label
    if isinstance(item, tuple | list) and item:
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _item_image(image: Any, preprocess: Preprocess) -> Image.Image | Tensor:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | os.PathLike | bytes):
        return decoded(image, preprocess.mode)
    if not isinstance(image, Tensor | np.ndarray):
        raise TypeError(f"{type(image).__name__} is no image")
    if is_floating(image):
        if image.ndim != 3:
            raise TypeError(f"shape {tuple(image.shape)}, where (C, H, W) is wanted")
        return _as_float(image)
    layout = array_layout((1, *image.shape))
    if layout is None:
        raise TypeError(f"shape {tuple(image.shape)}, where (C, H, W) or (H, W, C) is wanted")
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
    return _array_image(pixels, layout[1:], value_limit(pixels))


def is_floating(array: Tensor | np.ndarray) -> bool:
    """Whether a tensor or array holds floating-point numbers."""
    return array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"


def _as_float(array: Tensor | np.ndarray) -> Tensor:
    if isinstance(array, np.ndarray):
        return torch.from_numpy(np.array(array, dtype=np.float32))  # a copy: theirs may be read-only
    return array.detach().float()


def _label(label: Any) -> int | str | None:
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.item() if math.prod(label.shape) == 1 else None
    return label if isinstance(label, int | str) else None


class Preprocessed(Reader):
    """A tensor or array (N, C, H, W) of floats that needs no more than slicing."""

    title = "tensor"

    def __init__(self, tensor: Tensor | np.ndarray) -> None:
        self.tensor = tensor
        self.names = [str(i) for i in range(len(tensor))]

    def fingerprint(self, places: Sequence[int]) -> str:
        """A checksum of values."""
        return _checksum(self.tensor, places)

    def take(self, places: Sequence[int]) -> Tensor:
        """The images at some places, (B, C, H, W) float32."""
        run = slice(places[0], places[-1] + 1) if places[-1] - places[0] + 1 == len(places) else list(places)
        return _as_float(self.tensor[run])


def _checksum(images: Any, places: Sequence[int], most: int = 256) -> str:
    """Of the values of up to ``most`` images, evenly spread, so that it takes no pass through all."""
    places = [places[k * len(places) // min(most, len(places))] for k in range(min(most, len(places)))]
    checksum = 0
    for place in places:
        image = images[place]
        values = image.detach().cpu().float().numpy() if isinstance(image, Tensor) else np.asarray(image)
        checksum = zlib.crc32(np.ascontiguousarray(values).view(np.uint8), checksum)
    return f"crc32 {checksum:08x}"


class Stream(Reader):
    """What can only be gone through in its own order: a DataLoader, or an iterable data set."""

    def __init__(self, title: str, items: Iterable[Any], preprocess: Preprocess, count: int) -> None:
        self.title, self.items, self.preprocess = title, items, preprocess
        self.names = [str(i) for i in range(count)]
        self.shuffled = isinstance(items, DataLoader) and not _in_fixed_order(items)

    def chunks(self, batch_size: int) -> Iterator[list[Any]]:
        """Lists of (image, label), or of an exception in the place of one that cannot be used."""
        iterator = iter(self.items)
        loader = isinstance(self.items, DataLoader)
        collated = loader and (self.items.batch_size is not None or self.items.batch_sampler is not None)
        while items := list(itertools.islice(iterator, 1 if loader else batch_size)):
            parts = [part for item in items for part in _uncollate(item, collated)]
            yield [attempt(lambda part=part: _item(part, self.preprocess)) for part in parts]


def _in_fixed_order(loader: DataLoader[Any]) -> bool:
    """Whether a loader is known to give the same order each time; one of an iterable data set is taken to."""
    if isinstance(loader.dataset, IterableDataset):
        return True
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sampler = sampler.sampler if isinstance(sampler, BatchSampler) else sampler
    return isinstance(sampler, SequentialSampler | Sequence) or getattr(sampler, "shuffle", None) is False


def _uncollate(item: Any, collated: bool) -> list[Any]:
    """The items of a batch (N, C, H, W), with labels or without; what is no batch is one item."""
    if not collated and not (isinstance(image := _parts(item)[0], Tensor | np.ndarray) and image.ndim == 4):
        return [item]
    images, labels = _parts(item)
    if not isinstance(images, Tensor | np.ndarray | list | tuple):
        raise TypeError(f"its batches hold a {type(images).__name__} where a tensor (N, C, H, W) is wanted")
    fitting = isinstance(labels, Tensor | np.ndarray | list | tuple) and len(labels) == len(images)
    return list(zip(images, labels if fitting else [None] * len(images), strict=True))


def attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or the exception that it raises."""
    try:
        return function()
    except Exception as error:
        return error
