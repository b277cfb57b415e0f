"""What file names say: which are images, their order, their classes and splits."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import FourierBiasError

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
_EVALUATION = ("val", "validation", "valid", "test", "testing", "eval", "evaluation")
_TRAINING = ("train", "training")


def natural_key(name: str) -> tuple[list[Any], str]:
    """A key that sorts numbers in names as numbers; the name itself decides between equals.

    >>> sorted(["a10.png", "a9.png", "a09.png"], key=natural_key)
    ['a09.png', 'a9.png', 'a10.png']
    """
    parts = re.split(r"([0-9]{1,18})", name.lower())
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], name


def is_image_name(name: str) -> bool:
    """Whether a file is to be read: an image's suffix, and nothing hidden on the way."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and os.path.splitext(name)[1].lower() in SUFFIXES


def shared_folder(names: Iterable[str]) -> str:
    """The folders that all names begin with, with a slash at the end, or nothing.

    >>> shared_folder(["a/b/c.png", "a/b/d/e.png"]), shared_folder(["a.png"])
    ('a/b/', '')
    """
    levels = zip(*(name.split("/")[:-1] for name in names), strict=False)
    same = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    return "".join(f"{level[0]}/" for level in same)


def nothing_in(path: str) -> FourierBiasError:
    """The error for a folder or archive without images: which endings are read."""
    suffixes = " ".join(sorted(SUFFIXES))
    return FourierBiasError(f"no images in {path}: it has no files ending in {suffixes}")


def split_order(folders: Iterable[str]) -> list[str]:
    """Folders that are splits of a data set, evaluation first; none if they are classes.

    >>> split_order(["train", "val", "docs"]), split_order(["cat", "dog", "test"]), split_order(["test"])
    (['val', 'train'], [], ['test'])
    """
    ranks = {name: rank for rank, name in enumerate((*_EVALUATION, *_TRAINING))}
    folders = list(folders)
    splits = sorted((f for f in folders if f.lower() in ranks), key=lambda f: (ranks[f.lower()], f))
    trained = any(split.lower() in _TRAINING for split in splits)
    return splits if (trained and len(splits) > 1) or len(splits) == len(folders) else []


def folder_labels(names: Sequence[str]) -> list[str] | None:
    """The first folder on the way to each image, or None if there are no folders."""
    if not any("/" in name for name in names):
        return None
    return [name.split("/")[0] if "/" in name else "" for name in names]
