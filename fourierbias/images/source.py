"""The source: one deterministic order, read ahead, in batches, with account of what could not be read.

Pixels stay 8-bit integers until a batch is complete and is normalised in one go, which is bit for bit what
timm's transform does image by image.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import FourierBiasError
from .decoding import Preprocess, reason
from .readers import Preprocessed, Reader, Stream, attempt


@dataclass
class Batch:
    """Images (B, C, H, W) float32, preprocessed, and their places in the source's order (B)."""

    images: Tensor
    indices: list[int]


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
        reader: Reader,
        preprocess: Preprocess,
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

    @property
    def fingerprint(self) -> str:
        """What tells the images of the whole source from others of the same names; nothing where names do.

        >>> import torch
        >>> from fourierbias.images import open_images
        >>> open_images(torch.zeros(2, 3, 8, 8), {"input_size": (3, 8, 8)}).fingerprint
        'crc32 ...'
        """
        return self._reader.fingerprint(self._places)

    @property
    def files(self) -> list[str]:
        """The files that the images of the whole source are in, where they are in files of the user's."""
        return self._reader.files(self._places)

    def subset(self, indices: Iterable[int]) -> ImageSource:
        """The part of the source at these places of the whole order, sorted.

        Raises `FourierBiasError` if a place is not in it, or the order is drawn anew each time.
        """
        indices = indices if isinstance(indices, range) and indices.step > 0 else sorted(set(indices))
        known = self.indices if isinstance(self.indices, range) else set(self.indices)
        strange = next((index for index in indices if index not in known), None)
        if strange is not None:
            raise FourierBiasError(f"image {strange} is not among the {len(self)} of {self.description}")
        if isinstance(self._reader, Stream) and self._reader.shuffled and len(indices) < len(self.names):
            raise FourierBiasError(
                "a shuffled DataLoader cannot be divided: make it with shuffle=False or a list as sampler"
            )
        part = object.__new__(ImageSource)
        part.__dict__.update(self.__dict__)
        part.indices, part.failures = indices, []
        return part

    def shard(self, index: int, count: int) -> ImageSource:
        """Part ``index`` (0 … count − 1) of ``count`` contiguous parts, as equal in size as can be.

        >>> import torch
        >>> from fourierbias.images import open_images
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
        if isinstance(self._reader, Stream):
            return self._stream()
        size = self.batch_size
        chunks = [self.indices[start : start + size] for start in range(0, len(self), size)]
        if isinstance(self._reader, Preprocessed):
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
            raise FourierBiasError(f"{reason(error)}: use fewer workers, or none") from error

    def _stream(self) -> Iterator[_Read]:
        wanted = set(self.indices) if not isinstance(self.indices, range) else self.indices
        stop = max(self.indices, default=-1) + 1
        start = 0
        chunks = self._reader.chunks(self.batch_size)
        while start < stop:
            results = attempt(lambda: next(chunks, None))
            if results is None:
                return
            if isinstance(results, Exception):
                raise FourierBiasError(f"{self._reader.title} stopped: {reason(results)}") from results
            here = range(start, start + len(results))
            start = here.stop
            kept = [(index, result) for index, result in zip(here, results, strict=True) if index in wanted]
            if kept:
                values = [attempt(lambda result=result: self._pixels(result)) for _, result in kept]
                yield _collect([index for index, _ in kept], values, self._preprocess)

    def _read(self, index: int) -> Any:
        """(tensor, label) of one image, or the exception that stands in its way."""
        return attempt(lambda: self._pixels(self._reader.read(self._places[index])))

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


def _collect(indices: Sequence[int], results: list[Any], preprocess: Preprocess) -> _Read:
    """One batch out of what reading each of its images gave."""
    good = [(i, result) for i, result in zip(indices, results, strict=True) if isinstance(result, tuple)]
    failures = [(i, reason(r)) for i, r in zip(indices, results, strict=True) if isinstance(r, Exception)]
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
    if images[0].dtype == torch.uint8:  # see `to_pixels`
        return torch.from_numpy(np.stack([image.numpy() for image in images]))
    return torch.stack(images)
