"""Where images come from: photographs that are at hand, folders, lists, archives, arrays, data sets, tensors.

Every source has one deterministic order.  A *reader* gives the image at one place of it, as a PIL image to be
preprocessed as the model wants, or as a tensor; `ImageSource` reads ahead, makes batches, and keeps account
of the images that could not be read.  Pixels stay 8-bit integers until a batch is complete and is normalised
in one go, which is bit for bit what timm's transform does image by image.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import io
import itertools
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torchvision.transforms import Compose

from .errors import FourierBiasError

PHOTOS = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "grass"),
    *("gravel", "hubble_deep_field", "ihc", "moon", "motorcycle_left", "retina", "rocket"),
)
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
# Named, because Pillow would hand anything else that it knows to its plugins: PostScript, for one, it runs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
DATASETS = ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist", "qmnist")
_DATASET_PREFIXES = ("torch", "hfds", "hfids", "tfds")
_LISTS, _HDF5, _NUMPY = (".txt", ".lst"), (".h5", ".hdf5", ".hdf", ".he5", ".nxs"), (".npy", ".npz")
_EVALUATION = ("val", "validation", "valid", "test", "testing", "eval", "evaluation")
_TRAINING = ("train", "training")
_LARGEST = 1 << 30  # bytes or values; a larger "image" in an archive or array is damage or malice
_HDF5_CACHE = 64 << 20  # bytes; the default of 1 MiB unpacks a whole chunk again for each image in it
_HELP = "a folder, an image, a .txt list, a .zip, file.h5:/dataset, .npy, .npz, photos, or a data set's name"


@dataclass
class Batch:
    """Images (B, C, H, W) float32, preprocessed, and their places in the source's order (B)."""

    images: Tensor
    indices: list[int]


# ------------------------------------------------------------------------------------------- decoding


def decode(image: str | os.PathLike[str] | bytes, mode: str = "RGB") -> Image.Image:
    """Decode an image file, or its bytes, to 8-bit ``"RGB"`` or ``"L"``, upright.

    16-bit greyscale is scaled (65535 → 255), as are floats (1, 255 or 65535 → 255, the first that holds all);
    transparency is composited on white; the EXIF orientation is applied; of several frames the first is
    taken.  Raises `FourierBiasError` for what is absent, empty, truncated, no image, or too large to be true.

    >>> decode(photo_path("astronaut")).size, decode(photo_path("coins"), "L").mode
    ((512, 512), 'L')
    """
    try:
        return _decode(image, mode)
    except Exception as error:  # plugins raise OSError, SyntaxError, ValueError, struct.error and more
        name = "image" if isinstance(image, bytes) else _printable(os.fspath(image))
        raise FourierBiasError(f"{name} cannot be read: {_reason(error)}") from error


def _decode(image: str | os.PathLike[str] | bytes, mode: str) -> Image.Image:
    if isinstance(image, bytes):
        if not image:
            raise OSError("empty file")
        image = io.BytesIO(image)
    else:
        status = os.stat(image)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(0, "is a folder")
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise OSError("not a regular file")
        if not status.st_size:
            raise OSError("empty file")
    with Image.open(image, formats=_formats()) as opened:
        opened.load()
        return _convert(opened, mode)


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """The image upright, in 8 bits, without transparency, in ``mode``."""
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip them to white
        values = np.asarray(image)
        limit = 65535 if image.mode.startswith("I") else _limit(values)
        image = Image.fromarray(_to_uint8(values, limit))
    elif image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image if image.mode == mode else image.convert(mode)


def _limit(values: np.ndarray) -> int:
    """The white of an array of pixels: 1, 255 or 65535, by its type, else by its values."""
    known = {"bool": 1, "uint8": 255, "uint16": 65535}
    if values.dtype.name in known:
        return known[values.dtype.name]
    low, high = float(values.min()), float(values.max())
    scales = (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535)
    for scale in scales:
        if low >= 0 and high <= scale:
            return scale
    raise ValueError(f"values from {low:g} to {high:g}, which is no range of pixels (0…1, 0…255 or 0…65535)")


def _to_uint8(values: np.ndarray, limit: int) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    values = values.astype(np.float32) * np.float32(255 / limit)
    if not (values.min() >= 0 and values.max() <= 255.5):  # so put, NaN is refused too
        raise ValueError(f"values outside 0…{limit}")
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _reason(error: BaseException) -> str:
    """What went wrong with one image, in few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that is read"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    lines = text.strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _printable(name: str) -> str:
    r"""A file name as one line of text that can be written anywhere; what cannot be is escaped.

    >>> print(_printable("Gr\xf6\xdfe.png"), _printable("caf\udce9\n.png"))
    Größe.png caf\xe9\n.png
    """
    if name.isprintable():
        return name
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Preprocess:
    """A model's evaluation transform (timm's): as far as 8-bit pixels, and the rest for a whole batch."""

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        config = {key: tuple(v) if isinstance(v, list) else v for key, v in preprocessing.items()}
        self.channels, self.height, self.width = config["input_size"]
        self.mode = "L" if self.channels == 1 else "RGB"
        self.interpolation = config.get("interpolation", "bilinear")
        *resize, _to_tensor = create_transform(**config, is_training=False, normalize=False).transforms
        self.resize = Compose(resize)
        self.mean = self._per_channel(config.get("mean", IMAGENET_DEFAULT_MEAN))
        self.std = self._per_channel(config.get("std", IMAGENET_DEFAULT_STD))

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        if len(values) != self.channels:  # as timm does for a model of other channels than its weights were
            values = [sum(values) / len(values)] * self.channels
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)

    def check_channels(self) -> None:
        """Raise `FourierBiasError` for a model that takes no photographs."""
        if self.channels not in (1, 3):
            raise FourierBiasError(
                f"the model takes {self.channels} channels, images have 1 or 3: give it a tensor (N, C, H, W)"
            )

    def pixels(self, image: Image.Image) -> Tensor:
        """An image in any mode to (C, H, W) uint8 at the model's input size."""
        self.check_channels()
        return _to_pixels(self.resize(_convert(image, self.mode)))

    def crop(self, image: Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        """A box of an image, scaled to the model's input size, (C, H, W) uint8."""
        resampling = str_to_pil_interp(self.interpolation)
        return _to_pixels(image.resize((self.width, self.height), resampling, box=box))

    def finish(self, images: Tensor) -> Tensor:
        """Normalise pixels (…, C, H, W) uint8; floats are taken as preprocessed already."""
        if images.dtype != torch.uint8:
            return images.detach().float()
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def _to_pixels(image: Image.Image) -> Tensor:
    """An image to (C, H, W) uint8; by numpy, since to torch the reordering costs more than the decoding."""
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.array(pixels, order="C"))


# -------------------------------------------------------------------------------------------- readers
#
# A reader has `title` (what it is), `names` (of all its images, in order), `labels`, and `read(place)` →
# (PIL image, or pixels (C, H, W) uint8, or preprocessed (C, H, W) float; label or None).


class _Reader:
    title: str
    names: Sequence[str]
    labels: Sequence[Any] | None = None
    listed: bool = False  # in an order of our making, so that a limit is spread over it, not cut off
    threads: int = 4  # how many may call `read` at once

    def read(self, place: int) -> tuple[Image.Image | Tensor, Any]:
        raise NotImplementedError


class _Photos(_Reader):
    """Photograph i % 16; the first round as the model's transform has it, later ones in seeded crops."""

    title = "photographs of scikit-image"

    def __init__(self, count: int, preprocess: _Preprocess, seed: int) -> None:
        self.preprocess, self.seed = preprocess, seed
        rounds = (divmod(i, len(PHOTOS)) for i in range(count))
        self.names = [f"{PHOTOS[k]}#{n + 1}" if n else PHOTOS[k] for n, k in rounds]
        self.labels = [PHOTOS[i % len(PHOTOS)] for i in range(count)]

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
    return _decode(photo_path(name), mode)


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


class _Files(_Reader):
    """Image files: ``paths`` below ``folder``."""

    def __init__(
        self,
        title: str,
        folder: str,
        paths: Sequence[str],
        labels: Sequence[Any] | None,
        preprocess: _Preprocess,
    ) -> None:
        self.title, self.folder, self.paths, self.labels = title, folder, paths, labels
        self.names = [_printable(path) for path in paths]
        self.mode = preprocess.mode

    def read(self, place: int) -> tuple[Image.Image, None]:
        return _decode(os.path.join(self.folder, self.paths[place]), self.mode), None


class _PerProcess:
    """A file opened once in each process: file positions must not be shared with forked workers."""

    def __init__(self, opener: Callable[..., Any], *arguments: Any) -> None:
        self.opener, self.arguments, self.process = opener, arguments, -1
        self.get()

    def get(self) -> Any:
        if self.process != os.getpid():
            self.file, self.process = self.opener(*self.arguments), os.getpid()
        return self.file

    def __getstate__(self) -> dict[str, Any]:
        return {"opener": self.opener, "arguments": self.arguments, "process": -1}


class _Zip(_Reader):
    """Images in a zip archive; nothing is unpacked to disk."""

    listed = True

    def __init__(self, path: str, preprocess: _Preprocess) -> None:
        self.mode = preprocess.mode
        try:
            self.archive = _PerProcess(zipfile.ZipFile, path)
        except Exception as error:  # damage shows itself in any form
            raise FourierBiasError(f"{path} is not a readable zip archive: {_reason(error)}") from error
        members = {name for name in self.archive.get().namelist() if _is_image_name(name)}
        if not members:
            raise _nothing_in(path)
        root = _shared_folder(members)
        inside = [name[len(root) :] for name in members]
        tops = {name.split("/")[0] for name in inside if "/" in name}
        split = next(iter(_split_order(tops)), None)
        if split is not None:
            inside = [name for name in inside if name.startswith(f"{split}/")]
        inside.sort(key=_natural)
        self.members = [root + name for name in inside]
        self.names = [_printable(name) for name in self.members]
        self.title = f"zip archive {path}" + (f", {split}/" if split else "")
        self.labels = _folder_labels([name[len(split) + 1 :] if split else name for name in inside])

    def read(self, place: int) -> tuple[Image.Image, None]:
        archive: zipfile.ZipFile = self.archive.get()
        member = archive.getinfo(self.members[place])
        if member.file_size > _LARGEST:
            raise OSError(f"{member.file_size} bytes when unpacked, too large for an image")
        return _decode(archive.read(member), self.mode), None


class _Array(_Reader):
    """Images in an array (N, H, W), (N, H, W, C) or (N, C, H, W) that may be larger than memory."""

    def __init__(self, title: str, array: _PerProcess, layout: str) -> None:
        self.title, self.array, self.layout = title, array, layout
        pixels = array.get()
        self.names = [str(i) for i in range(len(pixels))]
        spread = np.unique(np.linspace(0, len(pixels) - 1, 16).astype(int))
        try:
            samples = [np.asarray(pixels[int(i)]) for i in spread]
        except Exception as error:
            raise FourierBiasError(f"{title} cannot be read: {_reason(error)}") from error
        try:  # of all images one scale, or a dark one would be taken for a light one
            self.limit = _limit(np.stack([[sample.min(), sample.max()] for sample in samples]))
        except ValueError as error:
            raise FourierBiasError(
                f"{title} holds {error}; preprocessed images go in from Python, as a tensor (N, C, H, W)"
            ) from error

    def read(self, place: int) -> tuple[Image.Image, None]:
        return _array_image(np.asarray(self.array.get()[place]), self.layout[1:], self.limit), None


def _array_image(pixels: np.ndarray, layout: str, limit: int) -> Image.Image:
    """One image (H, W), (H, W, C) or (C, H, W) as PIL's."""
    if layout == "CHW":
        pixels = pixels.transpose(1, 2, 0)
    pixels = np.ascontiguousarray(_to_uint8(pixels, limit))
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


def _layout(shape: Sequence[int]) -> str | None:
    """Which axis of an array of images is which, or None if it is no such array.

    >>> _layout((10, 8, 8, 3)), _layout((10, 3, 8, 8)), _layout((10, 8, 8)), _layout((8, 8, 3))
    ('NHWC', 'NCHW', 'NHW', None)
    """
    if 0 in shape or len(shape) not in (3, 4):
        return None
    if len(shape) == 3:
        return "NHW" if shape[-1] > 4 or shape[-1] == shape[-2] else None
    if shape[-1] in (1, 3, 4):
        return "NHWC"
    return "NCHW" if shape[1] in (1, 3, 4) else None


class _Items(_Reader):
    """Anything with a length and items: a data set, a list; see `_item`."""

    threads = 1  # nobody promised that it may be read from several

    def __init__(self, title: str, items: Any, preprocess: _Preprocess, count: int) -> None:
        self.title, self.items, self.preprocess = title, items, preprocess
        named = isinstance(items, list | tuple) and all(isinstance(i, str | os.PathLike) for i in items)
        self.names = [_printable(os.fspath(i)) for i in items] if named else [str(i) for i in range(count)]

    def read(self, place: int) -> tuple[Image.Image | Tensor, Any]:
        return _item(self.items[place], self.preprocess)


class _Encoded(_Items):
    """What timm's readers give: (file object, label).

    The data set round them would put the next image in the place of an unreadable one.
    """

    def read(self, place: int) -> tuple[Image.Image, Any]:
        file, label = self.items[place][:2]
        with file:
            return _decode(file.read(), self.preprocess.mode), _label(label)


def _item(item: Any, preprocess: _Preprocess) -> tuple[Image.Image | Tensor, Any]:
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


def _item_image(image: Any, preprocess: _Preprocess) -> Image.Image | Tensor:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | os.PathLike | bytes):
        return _decode(image, preprocess.mode)
    if not isinstance(image, Tensor | np.ndarray):
        raise TypeError(f"{type(image).__name__} is no image")
    if _is_floating(image):
        if image.ndim != 3:
            raise TypeError(f"shape {tuple(image.shape)}, where (C, H, W) is wanted")
        return _as_float(image)
    layout = _layout((1, *image.shape))
    if layout is None:
        raise TypeError(f"shape {tuple(image.shape)}, where (C, H, W) or (H, W, C) is wanted")
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
    return _array_image(pixels, layout[1:], _limit(pixels))


def _is_floating(array: Tensor | np.ndarray) -> bool:
    return array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"


def _as_float(array: Tensor | np.ndarray) -> Tensor:
    if isinstance(array, np.ndarray):
        return torch.from_numpy(np.array(array, dtype=np.float32))  # a copy: theirs may be read-only
    return array.detach().float()


def _label(label: Any) -> int | str | None:
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.item() if math.prod(label.shape) == 1 else None
    return label if isinstance(label, int | str) else None


class _Preprocessed(_Reader):
    """A tensor or array (N, C, H, W) of floats that needs no more than slicing."""

    title = "tensor"

    def __init__(self, tensor: Tensor | np.ndarray) -> None:
        self.tensor = tensor
        self.names = [str(i) for i in range(len(tensor))]

    def take(self, places: Sequence[int]) -> Tensor:
        run = slice(places[0], places[-1] + 1) if places[-1] - places[0] + 1 == len(places) else list(places)
        return _as_float(self.tensor[run])


class _Stream(_Reader):
    """What can only be gone through in its own order: a DataLoader, or an iterable data set."""

    def __init__(self, title: str, items: Iterable[Any], preprocess: _Preprocess, count: int) -> None:
        self.title, self.items, self.preprocess = title, items, preprocess
        self.names = [str(i) for i in range(count)]
        self.shuffled = isinstance(getattr(items, "sampler", None), RandomSampler)

    def chunks(self, batch_size: int) -> Iterator[list[Any]]:
        """Lists of (image, label), or of an exception in the place of one that cannot be used."""
        iterator = iter(self.items)
        loader = isinstance(self.items, DataLoader)
        collated = loader and (self.items.batch_size is not None or self.items.batch_sampler is not None)
        while items := list(itertools.islice(iterator, 1 if loader else batch_size)):
            parts = [part for item in items for part in _uncollate(item, collated)]
            yield [_attempt(lambda part=part: _item(part, self.preprocess)) for part in parts]


def _uncollate(item: Any, collated: bool) -> list[Any]:
    """The items of a batch (N, C, H, W), with labels or without; what is no batch is one item."""
    if not collated and not (isinstance(image := _parts(item)[0], Tensor | np.ndarray) and image.ndim == 4):
        return [item]
    images, labels = _parts(item)
    if not isinstance(images, Tensor | np.ndarray | list | tuple):
        raise TypeError(f"its batches hold a {type(images).__name__} where a tensor (N, C, H, W) is wanted")
    fitting = isinstance(labels, Tensor | np.ndarray | list | tuple) and len(labels) == len(images)
    return list(zip(images, labels if fitting else [None] * len(images), strict=True))


def _attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or the exception that it raises."""
    try:
        return function()
    except Exception as error:
        return error


# --------------------------------------------------------------------------------------------- source


class ImageSource:
    """Images in a fixed order, in batches; made by `open_images`, or as a part of another by `subset`.

    ``names`` and ``labels`` (None where there are none) are those of the whole source, in order, and
    ``indices`` the places of this part in it, as are those in each `Batch`.  Each batch stands for
    ``batch_size`` places: an image that cannot be read makes its batch smaller and leaves the others as they
    are.  ``failures`` has (name, reason) for each, and fills up while iterating.  Labels that only come with
    the images, a data set's, are filled in then too.  Iterating again starts anew.

    Raises `FourierBiasError` at the end if not one image could be read (of a part: another may have some).
    """

    def __init__(
        self,
        reader: _Reader,
        preprocess: _Preprocess,
        places: Sequence[int],
        *,
        batch_size: int,
        workers: int,
        note: str = "",
    ) -> None:
        self._reader, self._preprocess, self._places = reader, preprocess, places
        self.batch_size, self.workers = batch_size, workers
        self.indices: Sequence[int] = range(len(places))
        self.names: list[str] = [reader.names[place] for place in places]
        labels = reader.labels
        self.labels: list[Any] | None = None if labels is None else [labels[place] for place in places]
        self.failures: list[tuple[str, str]] = []
        noun = "image" if len(places) == 1 else "images"
        self.description = f"{reader.title}: {len(places)} {noun}{note}"

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        part = "" if len(self) == len(self.names) else f", {len(self)} of them"
        return f"<ImageSource {self.description}{part}>"

    def subset(self, indices: Iterable[int]) -> ImageSource:
        """The part of the source at these places of the whole order, sorted.

        Raises `FourierBiasError` if a place is not in it, or the order is drawn anew each time.
        """
        indices = indices if isinstance(indices, range) and indices.step > 0 else sorted(set(indices))
        known = self.indices if isinstance(self.indices, range) else set(self.indices)
        strange = next((index for index in indices if index not in known), None)
        if strange is not None:
            raise FourierBiasError(f"image {strange} is not among the {len(self)} of {self.description}")
        if isinstance(self._reader, _Stream) and self._reader.shuffled and len(indices) < len(self.names):
            raise FourierBiasError("a shuffled DataLoader cannot be divided: make it with shuffle=False")
        part = object.__new__(ImageSource)
        part.__dict__.update(self.__dict__)
        part.indices, part.failures = indices, []
        return part

    def shard(self, index: int, count: int) -> ImageSource:
        """Part ``index`` (0 … count − 1) of ``count`` contiguous parts, as equal in size as can be.

        >>> import torch
        >>> source = open_images(torch.rand(10, 3, 8, 8), {"input_size": (3, 8, 8)})
        >>> [list(source.shard(k, 3).indices) for k in range(3)]
        [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
        """
        if not 0 <= index < count:
            raise FourierBiasError(f"shard {index} of {count}: the first is 0, the last {count - 1}")
        start, stop = (len(self) * k // count for k in (index, index + 1))
        return self.subset(self.indices[start:stop])

    def __iter__(self) -> Iterator[Batch]:
        self.failures = []
        read_any = False
        for read in self._chunks():
            if read.error is not None:
                raise FourierBiasError(read.error)
            self.failures += [(self.names[index], reason) for index, reason in read.failures]
            for index, label in read.labels:
                if self.labels is None:
                    self.labels = [None] * len(self.names)
                self.labels[index] = label
            if read.indices:
                read_any = True
                yield Batch(self._preprocess.finish(read.images), read.indices)
        if not read_any and self.failures and len(self) == len(self.names):
            name, reason = self.failures[0]
            raise FourierBiasError(
                f"none of the {len(self)} images ({self._reader.title}) can be read; first {name}: {reason}"
            )

    def _chunks(self) -> Iterator[_Read]:
        if isinstance(self._reader, _Stream):
            return self._stream()
        size = self.batch_size
        chunks = [self.indices[start : start + size] for start in range(0, len(self), size)]
        if isinstance(self._reader, _Preprocessed):
            return (_Read(self._reader.take([self._places[i] for i in c]), list(c)) for c in chunks)
        return self._by_workers(chunks) if self.workers else self._by_threads(chunks)

    def _by_threads(self, chunks: list[Sequence[int]]) -> Iterator[_Read]:
        """Read one batch ahead, while whoever takes them is at work on the last."""
        pending: deque[tuple[Sequence[int], list[Future[Any]]]] = deque()

        def next_read() -> _Read:
            indices, futures = pending.popleft()
            return _collect(indices, [future.result() for future in futures], self._preprocess)

        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(min(self._reader.threads, processors)) as pool:
            try:
                for indices in chunks:
                    pending.append((indices, [pool.submit(self._read, index) for index in indices]))
                    if len(pending) > 1:
                        yield next_read()
                while pending:
                    yield next_read()
            finally:
                for _, futures in pending:
                    for future in futures:
                        future.cancel()

    def _by_workers(self, chunks: list[Sequence[int]]) -> Iterator[_Read]:
        loader = DataLoader(_Chunks(self), batch_size=None, sampler=chunks, num_workers=self.workers)
        try:
            yield from loader
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise FourierBiasError(f"{_reason(error)}: use fewer workers, or none") from error

    def _stream(self) -> Iterator[_Read]:
        wanted = set(self.indices) if not isinstance(self.indices, range) else self.indices
        stop = max(self.indices, default=-1) + 1
        start = 0
        chunks = self._reader.chunks(self.batch_size)
        while start < stop:
            results = _attempt(lambda: next(chunks, None))
            if results is None:
                return
            if isinstance(results, Exception):
                raise FourierBiasError(f"{self._reader.title} stopped: {_reason(results)}") from results
            here = range(start, start + len(results))
            start = here.stop
            kept = [(index, result) for index, result in zip(here, results, strict=True) if index in wanted]
            if kept:
                values = [_attempt(lambda result=result: self._pixels(result)) for _, result in kept]
                yield _collect([index for index, _ in kept], values, self._preprocess)

    def _read(self, index: int) -> Any:
        """(tensor, label) of one image, or the exception that stands in its way."""
        return _attempt(lambda: self._pixels(self._reader.read(self._places[index])))

    def _pixels(self, result: Any) -> tuple[Tensor, Any]:
        if isinstance(result, Exception):
            raise result
        image, label = result
        return (self._preprocess.pixels(image) if isinstance(image, Image.Image) else image), label


@dataclass
class _Read:
    """One batch as it comes from threads or workers, not yet normalised."""

    images: Tensor | None
    indices: list[int]
    labels: Sequence[tuple[int, Any]] = ()
    failures: Sequence[tuple[int, str]] = ()
    error: str | None = None  # not raised where it arises: it would come out of a worker as a traceback


class _Chunks:
    """The batches of a source as a data set, for the workers of a DataLoader."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitem__(self, indices: Sequence[int]) -> _Read:
        results = [self.source._read(index) for index in indices]
        return _collect(indices, results, self.source._preprocess)


def _collect(indices: Sequence[int], results: list[Any], preprocess: _Preprocess) -> _Read:
    """One batch out of what reading each of its images gave."""
    good = [(i, result) for i, result in zip(indices, results, strict=True) if isinstance(result, tuple)]
    failures = [(i, _reason(r)) for i, r in zip(indices, results, strict=True) if isinstance(r, Exception)]
    labels = [(index, label) for index, (_, label) in good if label is not None]
    images = [image for _, (image, _) in good]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        error = (
            f"images of one batch differ in shape, {shapes[0]} and {shapes[-1]}: resize or crop them to one"
        )
        return _Read(None, [], error=error)
    if len({image.dtype for image in images}) > 1:
        images = [preprocess.finish(image[None])[0] for image in images]
    return _Read(_stack(images) if images else None, [index for index, _ in good], labels, failures)


def _stack(images: list[Tensor]) -> Tensor:
    if images[0].dtype == torch.uint8:  # see `_to_pixels`
        return torch.from_numpy(np.stack([image.numpy() for image in images]))
    return torch.stack(images)


# -------------------------------------------------------------------------------------------- opening


def open_images(
    data: Any,
    preprocessing: Mapping[str, Any],
    *,
    images: int | None = None,
    batch_size: int = 32,
    workers: int = 0,
    seed: int = 0,
) -> ImageSource:
    """Open images of any kind for a model, in batches preprocessed as it wants them.

    ``data`` may be

    * ``"photos"``: the 16 photographs that scikit-image carries, then seeded crops of them, any number;
    * a folder, nested or flat, sorted naturally; with train/ and val/ or test/ in it, the latter;
    * an image file; a ``.txt`` or ``.lst`` file with one path per line, relative to its folder, each followed
      by a number (the label) or none; ``"-"``: such a list from standard input; a zip archive;
    * ``file.h5:/dataset``, ``.npy``, ``file.npz:name``: images (N, H, W), (N, H, W, C) or (N, C, H, W) of 1,
      3 or 4 channels, integer or float, which are read as they are needed;
    * ``cifar10``, ``torch/NAME``, ``hfds/NAME``, ``tfds/NAME``, with ``:split`` or without: a data set, got
      by timm, into the user's cache folder;
    * a tensor or array (N, C, H, W) of floats: preprocessed already; one of integers: images, as in a file;
    * a ``DataLoader``; a ``Dataset`` or list with items image, (image, label) or a mapping, where floats
      (C, H, W) are preprocessed already, and PIL images, integers, paths and encoded bytes are not.

    ``preprocessing`` is the model's (`timm.data.resolve_model_data_config`).  Of ``images`` fewer than there
    are, those of folders and archives are spread evenly over the order (which is by class as a rule), others
    are the first.  Without ``workers`` (processes), threads decode one batch ahead.

    Raises `FourierBiasError` for what is not there, holds no images, or cannot be told from one; images
    that cannot be read are skipped and counted (`ImageSource`).

    >>> source = open_images("photos", {"input_size": (3, 32, 32)}, images=40)
    >>> source.description, source.names[:2], source.names[-1]
    ('photographs of scikit-image: 40 images', ['astronaut', 'brick'], 'coins#3')
    """
    for name, value, least in (("images", images, 1), ("batch size", batch_size, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise FourierBiasError(f"{name} is {value}: it must be {least} or more")
    if isinstance(data, ImageSource):
        return data if images is None else data.subset(data.indices[:images])
    preprocess = _Preprocess(preprocessing)
    reader = _open(data, preprocess, images, seed)
    total = len(reader.names)
    places: Sequence[int] = range(total)
    note = ""
    if images is not None and images > total:
        note = f", all there are ({images} asked for)"
    elif images is not None and images < total:
        places = [k * total // images for k in range(images)] if reader.listed else range(images)
        note = f" of {total}" + (", evenly spread" if reader.listed else ", the first")
    return ImageSource(reader, preprocess, places, batch_size=batch_size, workers=workers, note=note)


def _open(data: Any, preprocess: _Preprocess, images: int | None, seed: int) -> _Reader:
    if isinstance(data, str | os.PathLike):
        return _open_named(os.fspath(data), preprocess, images, seed)
    if isinstance(data, Tensor | np.ndarray | h5py.Dataset):
        return _open_array(data)
    if isinstance(data, Image.Image):
        data = [data]
    kind = type(data).__name__
    if isinstance(data, DataLoader | IterableDataset):
        return _Stream(kind, data, preprocess, _stream_length(data, images))
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, Mapping):
        raise FourierBiasError(
            f"a {kind} is no source of images: give a tensor (N, C, H, W), a Dataset, {_HELP}"
        )
    if not len(data):
        raise FourierBiasError(f"the {kind} of images is empty")
    return _Items(kind, data, preprocess, len(data))


def _stream_length(data: DataLoader[Any] | IterableDataset[Any], images: int | None) -> int:
    try:
        length = _length(data)
    except TypeError:
        length = 0
    if not length and images is None:
        raise FourierBiasError("the data set does not tell its length: say images=N")
    return min(length or images, images or length)


def _length(data: DataLoader[Any] | IterableDataset[Any]) -> int:
    """How many images a stream has, 0 or a TypeError if that is not known."""
    if not isinstance(data, DataLoader):
        return len(data)
    if data.batch_size is None:  # whether an item is an image or a batch of them, nobody knows beforehand
        return sum(map(len, data.batch_sampler)) if data.batch_sampler is not None else 0
    if data.drop_last:
        return len(data) * data.batch_size
    return len(data.dataset if isinstance(data.dataset, IterableDataset) else data.sampler)


def _open_array(data: Tensor | np.ndarray | h5py.Dataset) -> _Reader:
    if not isinstance(data, h5py.Dataset) and _is_floating(data):
        if data.ndim == 3:
            raise FourierBiasError(
                f"a tensor {tuple(data.shape)} lacks the axis of images: give images[None]"
            )
        if data.ndim != 4 or 0 in data.shape:
            raise FourierBiasError(f"a tensor {tuple(data.shape)} is given where (N, C, H, W) is wanted")
        return _Preprocessed(data)
    return _array_reader(
        "array", _PerProcess(_same, data.cpu().numpy() if isinstance(data, Tensor) else data)
    )


def _same(value: Any) -> Any:
    return value


def _array_reader(title: str, array: _PerProcess) -> _Array:
    shape, dtype = array.get().shape, array.get().dtype
    layout = _layout(shape)
    if layout is None or dtype.kind not in "buif":
        raise FourierBiasError(
            f"{title} has shape {tuple(shape)} of {dtype}: images are numbers (N, H, W), or (N, H, W, C) or "
            "(N, C, H, W) of 1, 3 or 4 channels"
        )
    if math.prod(shape[1:]) > _LARGEST:
        raise FourierBiasError(f"{title} has images of shape {tuple(shape[1:])}: too large to be true")
    return _Array(title, array, layout)


def _open_named(name: str, preprocess: _Preprocess, images: int | None, seed: int) -> _Reader:
    """What a word on the command line stands for."""
    preprocess.check_channels()
    if name == "photos":
        return _Photos(images or len(PHOTOS), preprocess, seed)
    if name == "-":
        return _list_reader("list on standard input", sys.stdin.buffer.read(), ".", preprocess)
    path, key = os.path.expanduser(name), None
    if not os.path.lexists(path) and ":" in path:
        head, _, tail = path.rpartition(":")
        if os.path.lexists(head):
            path, key = head, tail
    if os.path.lexists(path):
        try:
            return _open_path(path, key, preprocess)
        except OSError as error:
            raise FourierBiasError(f"{path}: {_reason(error)}") from error
    known, _, split = name.partition(":")
    prefix, _, rest = known.lower().partition("/")
    if known in DATASETS or (prefix in _DATASET_PREFIXES and rest):
        return _open_dataset(known, split or "validation", preprocess, images)
    raise FourierBiasError(_not_there(name, path))


def _not_there(name: str, path: str) -> str:
    folder = os.path.dirname(path.rstrip("/"))
    with_folder = os.path.isdir(folder or ".")
    siblings = []
    if with_folder and os.access(folder or ".", os.R_OK):
        siblings = [os.path.join(folder, entry) for entry in os.listdir(folder or ".")]
    words = [*siblings, *(() if folder else ("photos", *DATASETS))]
    nearest = difflib.get_close_matches(path.rstrip("/"), words, n=1)
    hint = f"did you mean {_printable(nearest[0])}?" if nearest else f"--data takes {_HELP}"
    missing = "" if with_folder else f" (there is no folder {_printable(folder)})"
    return f"no images at {_printable(name)}{missing}: {hint}"


def _open_path(path: str, key: str | None, preprocess: _Preprocess) -> _Reader:
    if not os.path.exists(path):
        raise FourierBiasError(f"{path} is a link to a file that is not there")
    if os.path.isdir(path) and key is None:
        return _folder_reader(path, preprocess)
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _NUMPY:
        return _numpy_reader(path, key)
    if suffix in _HDF5 or (suffix not in SUFFIXES and h5py.is_hdf5(path)):
        return _hdf5_reader(path, key)
    if key is not None:
        raise FourierBiasError(f"{path} is neither HDF5 nor .npz: leave :{key} out")
    if suffix in _LISTS:
        return _list_reader(f"list {path}", Path(path).read_bytes(), os.path.dirname(path), preprocess)
    if suffix == ".zip" or (suffix not in SUFFIXES and zipfile.is_zipfile(path)):
        return _Zip(path, preprocess)
    return _single_reader(path, preprocess)


def _single_reader(path: str, preprocess: _Preprocess) -> _Files:
    """One image; its suffix may be anything, and is not asked for."""
    reader = _Files("image", "", [path], None, preprocess)
    try:
        reader.read(0)
    except Exception as error:
        hint = "" if os.path.splitext(path)[1].lower() in SUFFIXES else f"; --data takes {_HELP}"
        raise FourierBiasError(f"{_printable(path)} cannot be read: {_reason(error)}{hint}") from error
    return reader


# ---- folders, lists


def _natural(name: str) -> tuple[list[Any], str]:
    """A key that sorts numbers in names as numbers; the name itself decides between equals.

    >>> sorted(["a10.png", "a9.png", "a09.png"], key=_natural)
    ['a09.png', 'a9.png', 'a10.png']
    """
    parts = re.split(r"([0-9]{1,18})", name.lower())
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], name


def _is_image_name(name: str) -> bool:
    """Whether a file is to be read: an image's suffix, and nothing hidden on the way."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and os.path.splitext(name)[1].lower() in SUFFIXES


def _shared_folder(names: Iterable[str]) -> str:
    """The folders that all names begin with, with a slash at the end, or nothing.

    >>> _shared_folder(["a/b/c.png", "a/b/d/e.png"]), _shared_folder(["a.png"])
    ('a/b/', '')
    """
    levels = zip(*(name.split("/")[:-1] for name in names), strict=False)
    same = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    return "".join(f"{level[0]}/" for level in same)


def _nothing_in(path: str) -> FourierBiasError:
    suffixes = " ".join(sorted(SUFFIXES))
    return FourierBiasError(f"no images in {path}: it has no files ending in {suffixes}")


def _split_order(folders: Iterable[str]) -> list[str]:
    """Folders that are splits of a data set, evaluation first; none if they are classes.

    >>> _split_order(["train", "val", "docs"]), _split_order(["cat", "dog", "test"]), _split_order(["test"])
    (['val', 'train'], [], ['test'])
    """
    ranks = {name: rank for rank, name in enumerate((*_EVALUATION, *_TRAINING))}
    folders = list(folders)
    splits = sorted((f for f in folders if f.lower() in ranks), key=lambda f: (ranks[f.lower()], f))
    trained = any(split.lower() in _TRAINING for split in splits)
    return splits if (trained and len(splits) > 1) or len(splits) == len(folders) else []


def _folder_labels(names: Sequence[str]) -> list[str] | None:
    """The first folder on the way to each image, or None if there are no folders."""
    if not any("/" in name for name in names):
        return None
    return [name.split("/")[0] if "/" in name else "" for name in names]


def _folder_reader(folder: str, preprocess: _Preprocess) -> _Files:
    with os.scandir(folder) as entries:
        tops = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    for split in [*_split_order(tops), ""]:
        unlisted: list[str] = []
        found = _walk(os.path.join(folder, split), unlisted)
        if not found:
            continue
        found.sort(key=_natural)
        title = f"folder {_printable(folder)}"
        title += f", {_printable(split)}/" if split else ""
        title += f" ({len(unlisted)} of its folders cannot be listed)" if unlisted else ""
        paths = [os.path.join(split, name) for name in found] if split else found
        labels = _folder_labels([_printable(name) for name in found])
        reader = _Files(title, folder, paths, labels, preprocess)
        reader.listed = True
        return reader
    raise _nothing_in(_printable(folder))


def _walk(folder: str, unlisted: list[str]) -> list[str]:
    """The image files below a folder, relative to it; links are followed, but to no folder twice."""
    found, seen = [], set()
    for here, folders, files in os.walk(
        folder, followlinks=True, onerror=lambda error: unlisted.append(error.filename)
    ):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        below = os.path.relpath(here, folder)
        prefix = "" if below == "." else f"{below}/"
        found += [prefix + file for file in files if _is_image_name(file)]
    return found


def _list_reader(title: str, content: bytes, folder: str, preprocess: _Preprocess) -> _Files:
    """One path per line; if every line ends in a number after the image's suffix, those are the labels."""
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    lines = [line.strip("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise FourierBiasError(f"{title} is empty: it should have one path per line")
    labels = None
    labelled = [re.fullmatch(r"(.+\.[A-Za-z0-9]+)[ \t,]+([0-9]{1,18})\s*", line) for line in lines]
    if all(labelled):
        labels = [int(match[2]) for match in labelled]
        lines = [match[1] for match in labelled]
    return _Files(_printable(title), folder, lines, labels, preprocess)


# ---- arrays


def _numpy_reader(path: str, key: str | None) -> _Array:
    try:
        if path.lower().endswith(".npy"):
            if key is not None:
                raise FourierBiasError(f"{path} holds one array: leave :{key} out")
            return _array_reader(path, _PerProcess(np.lib.format.open_memmap, path, "r"))
        with zipfile.ZipFile(path) as archive:
            arrays = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if key is None:
                shapes = {name: _npz_shape(archive, name) for name in arrays}
                fitting = [name for name, shape in shapes.items() if shape and _layout(shape)]
                key = _only(path, fitting, arrays)
            elif key not in arrays:
                raise FourierBiasError(f"{path} has no array {key!r}: it has {', '.join(arrays) or 'none'}")
            return _array_reader(f"{path}:{key}", _unpacked(archive, key))
    except FourierBiasError:
        raise
    except Exception as error:
        raise FourierBiasError(f"{path} is not a readable {path[-4:]} file: {_reason(error)}") from error


def _npz_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...] | None:
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(member)[0]


def _unpacked(archive: zipfile.ZipFile, key: str) -> _PerProcess:
    """An array of an archive, mapped from a nameless temporary file: it may be larger than memory."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file, archive.open(f"{key}.npy") as member:
        shutil.copyfileobj(member, file)
        file.flush()
        return _PerProcess(_same, np.lib.format.open_memmap(file.name, mode="r"))


def _only(path: str, fitting: Sequence[str], others: Sequence[str]) -> str:
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        named = ", ".join(f"{path}:{name}" for name in fitting[:5])
        raise FourierBiasError(f"{path} holds {len(fitting)} arrays of images: name one, as in {named}")
    held = f"it holds {', '.join(others[:5])}" if others else "it holds no arrays"
    raise FourierBiasError(f"{path} holds no array of images, (N, H, W, C) or the like: {held}")


def _hdf5_reader(path: str, key: str | None) -> _Array:
    try:
        with h5py.File(path, "r") as file:
            held: dict[str, tuple[int, ...]] = {}

            def note(name: str, node: h5py.Dataset | h5py.Group) -> None:
                if isinstance(node, h5py.Dataset):
                    held[f"/{name}"] = node.shape or ()

            file.visititems(note)
            fitting = [name for name, shape in held.items() if _layout(shape)]
            if not key:
                key = _only(path, fitting, list(held))
            elif not isinstance(file.get(key), h5py.Dataset):
                near = difflib.get_close_matches(key, fitting, n=5, cutoff=0) or list(held)[:5]
                raise FourierBiasError(f"{path} has no dataset {key}: it has {', '.join(near) or 'none'}")
            _check_size(f"{path}:{key}", file[key])
        return _array_reader(f"{path}:{key}", _PerProcess(_open_hdf5, path, key))
    except FourierBiasError:
        raise
    except Exception as error:
        raise FourierBiasError(f"{path} is not a readable HDF5 file: {_reason(error)}") from error


def _check_size(title: str, dataset: h5py.Dataset) -> None:
    """Refuse a damaged number of images, which there would be no memory to list."""
    count, held = (dataset.shape or (0,))[0], dataset.id.get_storage_size()
    elsewhere = dataset.is_virtual or dataset.external
    if count > max(held, 1_000_000) and not elsewhere:
        raise FourierBiasError(f"{title} claims {count} images in {held} bytes")


def _open_hdf5(path: str, key: str) -> h5py.Dataset:
    return h5py.File(path, "r", rdcc_nbytes=_HDF5_CACHE)[key]


# ---- data sets by name


def _open_dataset(name: str, split: str, preprocess: _Preprocess, images: int | None) -> _Reader:
    """A data set that timm knows to get; it is kept in the user's cache folder."""
    timm_name = f"torch/{name}" if name in DATASETS else name
    prefix, _, rest = timm_name.partition("/")
    if prefix.lower() == "torch" and rest.lower() not in (*DATASETS, "imagenet", "inaturalist", "places365"):
        nearest = difflib.get_close_matches(rest.lower(), DATASETS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(DATASETS)}"
        raise FourierBiasError(f"no data set {name} in torchvision: {hint}")
    package = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets"}.get(prefix.lower())
    if package and importlib.util.find_spec(package) is None:
        raise FourierBiasError(f"{name} needs a package that is missing: pip install {package}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fourierbias"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        root = None if prefix.lower().startswith("hf") else str(cache)
        dataset = create_dataset(timm_name, root=root, split=split, download=True)
    except Exception as error:  # each source has its own
        raise FourierBiasError(
            f"{name} could not be had ({_reason(error)}): it needs a network the first time; "
            "or name a folder of images, or photos"
        ) from error
    title = f"data set {name}, {split}"
    if isinstance(dataset, IterableDataset):
        return _Stream(title, dataset, preprocess, _stream_length(dataset, images))
    if hasattr(dataset, "reader"):
        return _Encoded(title, dataset.reader, preprocess, len(dataset))
    return _Items(title, dataset, preprocess, len(dataset))
