"""One image: decoded whatever its kind, and preprocessed as a model wants it, bit for bit as timm does."""

from __future__ import annotations

import functools
import io
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torchvision.transforms import Compose

from ..errors import FourierBiasError

# Named, because Pillow would hand anything else that it knows to its plugins: PostScript, for one, it runs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")


def decode(image: str | os.PathLike[str] | bytes, mode: str = "RGB") -> Image.Image:
    """Decode an image file, or its bytes, to 8-bit ``"RGB"`` or ``"L"``, upright.

    16-bit greyscale is scaled (65535 → 255), as are floats (1, 255 or 65535 → 255, the first that holds all);
    transparency is composited on white; the EXIF orientation is applied; of several frames the first is
    taken.  Raises `FourierBiasError` for what is absent, empty, truncated, no image, or too large to be true.

    >>> from fourierbias.images import photo_path
    >>> decode(photo_path("astronaut")).size, decode(photo_path("coins"), "L").mode
    ((512, 512), 'L')
    """
    try:
        return decoded(image, mode)
    except Exception as error:  # plugins raise OSError, SyntaxError, ValueError, struct.error and more
        name = "image" if isinstance(image, bytes) else printable(os.fspath(image))
        raise FourierBiasError(f"{name} cannot be read: {reason(error)}") from error


def decoded(image: str | os.PathLike[str] | bytes, mode: str) -> Image.Image:
    """What `decode` does, with the decoder's own errors."""
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
        limit = 65535 if image.mode.startswith("I") else value_limit(values)
        image = Image.fromarray(to_uint8(values, limit))
    elif image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image if image.mode == mode else image.convert(mode)


def value_limit(values: np.ndarray) -> int:
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


def to_uint8(values: np.ndarray, limit: int) -> np.ndarray:
    """Pixel values 0…limit as 8-bit ones; ValueError for values outside."""
    if values.dtype == np.uint8:
        return values
    values = values.astype(np.float32) * np.float32(255 / limit)
    if not (values.min() >= 0 and values.max() <= 255.5):  # so put, NaN is refused too
        raise ValueError(f"values outside 0…{limit}")
    return np.rint(values).clip(0, 255).astype(np.uint8)


def reason(error: BaseException) -> str:
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


def printable(name: str) -> str:
    r"""A file name as one line of text that can be written anywhere; what cannot be is escaped.

    >>> print(printable("Gr\xf6\xdfe.png"), printable("caf\udce9\n.png"))
    Größe.png caf\xe9\n.png
    """
    if name.isprintable():
        return name
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Preprocess:
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
        return to_pixels(self.resize(_convert(image, self.mode)))

    def crop(self, image: Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        """A box of an image, scaled to the model's input size, (C, H, W) uint8."""
        resampling = str_to_pil_interp(self.interpolation)
        return to_pixels(image.resize((self.width, self.height), resampling, box=box))

    def finish(self, images: Tensor) -> Tensor:
        """Normalise pixels (…, C, H, W) uint8; floats are taken as preprocessed already."""
        if images.dtype != torch.uint8:
            return images.detach().float()
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def to_pixels(image: Image.Image) -> Tensor:
    """An image to (C, H, W) uint8; by numpy, since to torch the reordering costs more than the decoding."""
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.array(pixels, order="C"))
