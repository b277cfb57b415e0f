"""From what a user names to a source: folders, lists, archives, arrays, data sets, tensors, photographs."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import math
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import h5py
import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import FourierBiasError
from .decoding import Preprocess, printable, reason
from .names import SUFFIXES, folder_labels, is_image_name, natural_key, nothing_in, split_order
from .readers import (
    LARGEST,
    PHOTOS,
    Array,
    Encoded,
    Files,
    Items,
    PerProcess,
    Photos,
    Preprocessed,
    Reader,
    Stream,
    Zip,
    array_layout,
    is_floating,
)
from .source import ImageSource

DATASETS = ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist", "qmnist")
_DATASET_PREFIXES = ("torch", "hfds", "hfids", "tfds")
_LISTS, _HDF5, _NUMPY = (".txt", ".lst"), (".h5", ".hdf5", ".hdf", ".he5", ".nxs"), (".npy", ".npz")
_HDF5_CACHE = 64 << 20  # bytes; the default of 1 MiB unpacks a whole chunk again for each image in it
_HELP = "a folder, an image, a .txt list, a .zip, file.h5:/dataset, .npy, .npz, photos, or a data set's name"


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
    least = {"images": (images, 1), "batch size": (batch_size, 1), "workers": (workers, 0), "seed": (seed, 0)}
    for name, (value, bound) in least.items():
        if value is not None and value < bound:
            raise FourierBiasError(f"{name} is {value}: it must be {bound} or more")
    if seed >= 2**63:
        raise FourierBiasError(f"seed is {seed}: it must be below 2**63")
    if isinstance(data, ImageSource):
        return data if images is None else data.subset(data.indices[:images])
    preprocess = Preprocess(preprocessing)
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


def _open(data: Any, preprocess: Preprocess, images: int | None, seed: int) -> Reader:
    if isinstance(data, str | os.PathLike):
        return _open_named(os.fspath(data), preprocess, images, seed)
    if isinstance(data, Tensor | np.ndarray | h5py.Dataset):
        return _open_array(data)
    if isinstance(data, Image.Image):
        data = [data]
    kind = type(data).__name__
    if isinstance(data, DataLoader | IterableDataset):
        return Stream(kind, data, preprocess, _stream_length(data, images))
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, Mapping):
        raise FourierBiasError(
            f"a {kind} is no source of images: give a tensor (N, C, H, W), a Dataset, {_HELP}"
        )
    if not len(data):
        raise FourierBiasError(f"the {kind} of images is empty")
    return Items(kind, data, preprocess, len(data))


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


def _open_array(data: Tensor | np.ndarray | h5py.Dataset) -> Reader:
    if not isinstance(data, h5py.Dataset) and is_floating(data):
        if data.ndim == 3:
            raise FourierBiasError(
                f"a tensor {tuple(data.shape)} lacks the axis of images: give images[None]"
            )
        if data.ndim != 4 or 0 in data.shape:
            raise FourierBiasError(f"a tensor {tuple(data.shape)} is given where (N, C, H, W) is wanted")
        return Preprocessed(data)
    return _array_reader("array", PerProcess(_same, data.cpu().numpy() if isinstance(data, Tensor) else data))


def _same(value: Any) -> Any:
    return value


def _array_reader(title: str, array: PerProcess, path: str | None = None) -> Array:
    shape, dtype = array.get().shape, array.get().dtype
    layout = array_layout(shape)
    if layout is None or dtype.kind not in "buif":
        raise FourierBiasError(
            f"{title} has shape {tuple(shape)} of {dtype}: images are numbers (N, H, W), or (N, H, W, C) or "
            "(N, C, H, W) of 1, 3 or 4 channels"
        )
    if math.prod(shape[1:]) > LARGEST:
        raise FourierBiasError(f"{title} has images of shape {tuple(shape[1:])}: too large to be true")
    return Array(title, array, layout, path)


def _open_named(name: str, preprocess: Preprocess, images: int | None, seed: int) -> Reader:
    """What a word on the command line stands for."""
    preprocess.check_channels()
    if name == "photos":
        return Photos(images or len(PHOTOS), preprocess, seed)
    if name == "-":
        return _list_reader("list on standard input", _content(sys.stdin), ".", preprocess)
    path, key = os.path.expanduser(name), None
    if not os.path.lexists(path) and ":" in path:
        head, _, tail = path.rpartition(":")
        if os.path.lexists(head):
            path, key = head, tail
    if os.path.lexists(path):
        try:
            return _open_path(path, key, preprocess)
        except OSError as error:
            raise FourierBiasError(f"{path}: {reason(error)}") from error
    known, _, split = name.partition(":")
    prefix, _, rest = known.lower().partition("/")
    if known in DATASETS or (prefix in _DATASET_PREFIXES and rest):
        return _open_dataset(known, split or "validation", preprocess, images)
    raise FourierBiasError(_not_there(name, path))


@functools.lru_cache(maxsize=1)
def _content(stream: TextIO) -> bytes:
    """All of standard input, which is read once, and wanted once for each model of a comparison."""
    return stream.buffer.read()


def _not_there(name: str, path: str) -> str:
    folder = os.path.dirname(path.rstrip("/"))
    with_folder = os.path.isdir(folder or ".")
    siblings = []
    if with_folder and os.access(folder or ".", os.R_OK):
        siblings = [os.path.join(folder, entry) for entry in os.listdir(folder or ".")]
    words = [*siblings, *(() if folder else ("photos", *DATASETS))]
    nearest = difflib.get_close_matches(path.rstrip("/"), words, n=1)
    hint = f"did you mean {printable(nearest[0])}?" if nearest else f"--data takes {_HELP}"
    missing = "" if with_folder else f" (there is no folder {printable(folder)})"
    return f"no images at {printable(name)}{missing}: {hint}"


def _open_path(path: str, key: str | None, preprocess: Preprocess) -> Reader:
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
        return Zip(path, preprocess)
    return _single_reader(path, preprocess)


def _single_reader(path: str, preprocess: Preprocess) -> Files:
    """One image; its suffix may be anything, and is not asked for."""
    reader = Files("image", "", [path], None, preprocess)
    try:
        reader.read(0)
    except Exception as error:
        hint = "" if os.path.splitext(path)[1].lower() in SUFFIXES else f"; --data takes {_HELP}"
        raise FourierBiasError(f"{printable(path)} cannot be read: {reason(error)}{hint}") from error
    return reader


def _folder_reader(folder: str, preprocess: Preprocess) -> Files:
    with os.scandir(folder) as entries:
        tops = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    for split in [*split_order(tops), ""]:
        unlisted: list[str] = []
        found = _walk(os.path.join(folder, split), unlisted)
        if not found:
            continue
        found.sort(key=natural_key)
        title = f"folder {printable(folder)}"
        title += f", {printable(split)}/" if split else ""
        title += f" ({len(unlisted)} of its folders cannot be listed)" if unlisted else ""
        paths = [os.path.join(split, name) for name in found] if split else found
        labels = folder_labels([printable(name) for name in found])
        reader = Files(title, folder, paths, labels, preprocess)
        reader.listed = True
        return reader
    raise nothing_in(printable(folder))


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
        found += [prefix + file for file in files if is_image_name(file)]
    return found


def _list_reader(title: str, content: bytes, folder: str, preprocess: Preprocess) -> Files:
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
    return Files(printable(title), folder, lines, labels, preprocess)


def _numpy_reader(path: str, key: str | None) -> Array:
    try:
        if path.lower().endswith(".npy"):
            if key is not None:
                raise FourierBiasError(f"{path} holds one array: leave :{key} out")
            return _array_reader(path, PerProcess(np.lib.format.open_memmap, path, "r"), path)
        with zipfile.ZipFile(path) as archive:
            arrays = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if key is None:
                shapes = {name: _npz_shape(archive, name) for name in arrays}
                fitting = [name for name, shape in shapes.items() if shape and array_layout(shape)]
                key = _only(path, fitting, arrays)
            elif key not in arrays:
                raise FourierBiasError(f"{path} has no array {key!r}: it has {', '.join(arrays) or 'none'}")
            return _array_reader(f"{path}:{key}", _unpacked(archive, key), path)
    except FourierBiasError:
        raise
    except Exception as error:
        raise FourierBiasError(f"{path} is not a readable {path[-4:]} file: {reason(error)}") from error


def _npz_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...] | None:
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(member)[0]


def _unpacked(archive: zipfile.ZipFile, key: str) -> PerProcess:
    """An array of an archive, mapped from a nameless temporary file: it may be larger than memory."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file, archive.open(f"{key}.npy") as member:
        shutil.copyfileobj(member, file)
        file.flush()
        return PerProcess(_same, np.lib.format.open_memmap(file.name, mode="r"))


def _only(path: str, fitting: Sequence[str], others: Sequence[str]) -> str:
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        named = ", ".join(f"{path}:{name}" for name in fitting[:5])
        raise FourierBiasError(f"{path} holds {len(fitting)} arrays of images: name one, as in {named}")
    held = f"it holds {', '.join(others[:5])}" if others else "it holds no arrays"
    raise FourierBiasError(f"{path} holds no array of images, (N, H, W, C) or the like: {held}")


def _hdf5_reader(path: str, key: str | None) -> Array:
    try:
        with h5py.File(path, "r") as file:
            held: dict[str, tuple[int, ...]] = {}

            def note(name: str, node: h5py.Dataset | h5py.Group) -> None:
                if isinstance(node, h5py.Dataset):
                    held[f"/{name}"] = node.shape or ()

            file.visititems(note)
            fitting = [name for name, shape in held.items() if array_layout(shape)]
            if not key:
                key = _only(path, fitting, list(held))
            elif not isinstance(file.get(key), h5py.Dataset):
                near = difflib.get_close_matches(key, fitting, n=5, cutoff=0) or list(held)[:5]
                raise FourierBiasError(f"{path} has no dataset {key}: it has {', '.join(near) or 'none'}")
            _check_size(f"{path}:{key}", file[key])
        return _array_reader(f"{path}:{key}", PerProcess(_open_hdf5, path, key), path)
    except FourierBiasError:
        raise
    except Exception as error:
        raise FourierBiasError(f"{path} is not a readable HDF5 file: {reason(error)}") from error


def _check_size(title: str, dataset: h5py.Dataset) -> None:
    """Refuse a damaged number of images, which there would be no memory to list."""
    count, held = (dataset.shape or (0,))[0], dataset.id.get_storage_size()
    elsewhere = dataset.is_virtual or dataset.external
    if count > max(held, 1_000_000) and not elsewhere:
        raise FourierBiasError(f"{title} claims {count} images in {held} bytes")


def _open_hdf5(path: str, key: str) -> h5py.Dataset:
    return h5py.File(path, "r", rdcc_nbytes=_HDF5_CACHE)[key]


def _open_dataset(name: str, split: str, preprocess: Preprocess, images: int | None) -> Reader:
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
            f"{name} could not be had ({reason(error)}): it needs a network the first time; "
            "or name a folder of images, or photos"
        ) from error
    title = f"data set {name}, {split}"
    if isinstance(dataset, IterableDataset):
        return Stream(title, dataset, preprocess, _stream_length(dataset, images))
    if hasattr(dataset, "reader"):
        return Encoded(title, dataset.reader, preprocess, len(dataset))
    return Items(title, dataset, preprocess, len(dataset))
