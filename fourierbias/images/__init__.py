"""Where images come from: photographs at hand, folders, lists, archives, arrays, data sets, tensors."""

from .decoding import FORMATS, decode
from .names import SUFFIXES
from .opening import DATASETS, open_images
from .readers import PHOTOS, photo_path
from .source import Batch, ImageSource

__all__ = [
    "DATASETS",
    "FORMATS",
    "PHOTOS",
    "SUFFIXES",
    "Batch",
    "ImageSource",
    "decode",
    "open_images",
    "photo_path",
]
