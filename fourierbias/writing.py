"""The file of a capture while it is being made: locked, saved every so often, renamed when it is whole.

Beside ``out.h5`` there may stand, until it is whole: ``out.h5.lock``; ``out.h5.partial``, which nobody reads;
``out.h5.state``, from which a capture goes on; and with stored maps ``out.h5.maps-0``, …, those that the
state speaks of.  The files of rank 1 of 4 are called ``out.h5.1of4.state`` and so on.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
from filelock import FileLock, Timeout

from .errors import FourierBiasError
from .files import cannot_write, write_atomic
from .parts import Part
from .store import (
    COMPRESSIONS,
    Capture,
    checked_output,
    layer_groups,
    opened,
    seal,
    sealed_image,
    write_capture,
)

# Room for what HDF5 writes beside the data: indices of chunks, headers.
_SLACK = 2**16


class Writer:
    """Context manager: the output of one capture; maps stream in, `finish` adds the rest and renames.

    ``rank`` of ``world_size`` processes write one output together; the first makes the final file.  Leaving
    the context removes what is not whole, but for what `save` has kept.  Raises `FourierBiasError` at once
    when the place cannot be written, holds a file already, or is being written by another process.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        resume: bool = False,
        feature_dtype: str = "float16",
        compression: str = "gzip",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if feature_dtype not in ("float16", "float32"):
            raise FourierBiasError(f"feature dtype {feature_dtype!r} is not known: use float16 or float32")
        if compression not in COMPRESSIONS:
            raise FourierBiasError(
                f"compression {compression!r} is not known: choose from {', '.join(COMPRESSIONS)}"
            )
        self.path = checked_output(path, overwrite=overwrite or resume)
        self.rank, self.world_size = rank, world_size
        self.stem = self._stems()[rank]
        self.partial, self.state = (self._beside(suffix) for suffix in ("partial", "state"))
        self.feature_dtype = feature_dtype
        self.compression = None if compression == "none" else compression
        self.bytes_needed = 0
        self._lock = FileLock(f"{self.path if rank == 0 else self.path.with_name(self.stem)}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise FourierBiasError(
                f"another capture is writing {self.path}: wait for it, or choose another output"
            ) from None
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._file: h5py.File | None = None
        try:
            self._clear(resume, overwrite)
            with self._room():
                self.partial.touch()
        except BaseException:
            self.abandon()
            raise

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.stem}.{suffix}")

    def _clear(self, resume: bool, overwrite: bool) -> None:
        """See what an earlier capture left: go on with it, remove it, or refuse."""
        states = {Path(name) for name in glob.glob(f"{glob.escape(str(self.path))}*.state")}
        if states and not (resume or overwrite):
            raise FourierBiasError(
                f"a capture into {self.path} was interrupted: --resume goes on, --overwrite starts anew"
            )
        others = states - {self.path.with_name(f"{stem}.state") for stem in self._stems()}
        if others and resume:
            begun = re.search(r"of(\d+)\.state$", str(min(others)))
            raise FourierBiasError(
                f"the capture into {self.path} was begun by {begun[1] if begun else 1} processes: "
                "resume with as many, or --overwrite"
            )
        if not resume:
            for state in {self.state, *others}:
                state.unlink(missing_ok=True)
            self._remove_maps()

    def _stems(self) -> list[str]:
        """What the files beside the output begin with, by rank."""
        if self.world_size == 1:
            return [self.path.name]
        return [f"{self.path.name}.{rank}of{self.world_size}" for rank in range(self.world_size)]

    def _remove_maps(self, but: Sequence[Path] = ()) -> None:
        for name in glob.glob(f"{glob.escape(str(self._beside('maps')))}-*"):
            if Path(name) not in but:
                Path(name).unlink(missing_ok=True)

    def _reserve(self, count: int) -> None:
        """See to it that ``count`` bytes more find room in the open file, which is opened if it is not.

        HDF5 may bring the whole process down when a disk fills up under it, so it must not come to that.
        """
        count += _SLACK
        if self._file is None:
            with open(self.partial, "wb") as probe:
                _allocate(probe.fileno(), 0, count)
            self._file = h5py.File(self.partial, "w", track_order=True)
        with open(self.partial, "r+b") as probe:
            _allocate(probe.fileno(), self._file.id.get_filesize(), count)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Close and remove what is not whole; what `save` has kept stays."""
        with contextlib.suppress(Exception):
            if self._file is not None:
                self._file.close()
        self.partial.unlink(missing_ok=True)
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    # ---------------------------------------------------------------------------------- while it is made

    def resumed(self) -> Part | None:
        """What an earlier capture had done when it was saved, None if there is none."""
        if not self.state.exists():
            self._remove_maps()
            return None
        with opened(self.state) as handle:
            part = Part.read(handle["part"], self.state.parent)
        for path in part.maps:
            if not path.exists():
                raise FourierBiasError(f"{path} is gone, which {self.state} needs: --overwrite starts anew")
        self._remove_maps(but=part.maps)
        return part

    def append_maps(self, maps: Mapping[str, np.ndarray]) -> None:
        """Add the maps (B, C, H, W) of one batch, by layer; chunked by image."""
        with self._room():
            self._reserve(
                sum(values.size for values in maps.values()) * np.dtype(self.feature_dtype).itemsize
            )
            for name, values in maps.items():
                group = self._file.require_group("layers").require_group(name)
                if "feature_maps" not in group:
                    group.create_dataset(
                        "feature_maps",
                        shape=(0, *values.shape[1:]),
                        maxshape=(None, *values.shape[1:]),
                        chunks=(1, *values.shape[1:]),
                        dtype=self.feature_dtype,
                        compression=self.compression,
                        compression_opts=1 if self.compression == "gzip" else None,
                        shuffle=self.compression is not None,
                    )
                dataset = group["feature_maps"]
                dataset.resize(len(dataset) + len(values), axis=0)
                dataset[-len(values) :] = values

    def expect(self, images: int, maps: Mapping[str, np.ndarray]) -> None:
        """Note how much room the maps of so many images will take, from those of one batch."""
        size = np.dtype(self.feature_dtype).itemsize
        self.bytes_needed = images * size * sum(values[0].size for values in maps.values())

    def save(self, part: Part) -> None:
        """Keep what is done so far, so that `resumed` finds it whatever happens next."""
        with self._room():
            if self._file is not None:
                part.maps.append(self._close_maps(self._beside(f"maps-{len(part.maps)}")))
            image = sealed_image(lambda handle: part.write(handle.create_group("part")))
        write_atomic(self.state, image)

    def _close_maps(self, path: Path) -> Path:
        self._file.close()
        self._file = None
        os.replace(self.partial, path)
        return path

    # --------------------------------------------------------------------------------------- at the end

    def join_maps(self, part: Part) -> None:
        """Bring the maps that were saved in pieces into the open file."""
        if part.maps:
            with self._room():
                pieces = list(part.maps)
                if self._file is not None:
                    pieces.append(self._close_maps(self._beside(f"maps-{len(pieces)}")))
                self._reserve(sum(path.stat().st_size for path in pieces))
                _assemble(self._file, pieces, virtual=False)

    def leave_maps(self, part: Part) -> None:
        """Close this rank's maps as a file that stays beside the output, and keep the state of that."""
        path = self.path.with_name(f"{self.path.stem}.maps-{self.rank + 1}of{self.world_size}.h5")
        if part.maps == [path]:  # resumed after it was done
            return
        self.join_maps(part)
        if self._file is not None:
            with self._room():
                part.maps = [self._close_maps(path)]
        self.save(part)
        self._remove_maps()

    def refer_to_maps(self, paths: Sequence[Path], *, consolidate: bool) -> None:
        """Make the final maps from those in other files, in their order: referred to, or copied."""
        with self._room():
            self._reserve(sum(path.stat().st_size for path in paths) if consolidate else 0)
            _assemble(self._file, paths, virtual=not consolidate)

    def finish(self, capture: Capture, part: Part | None = None) -> Capture:
        """Write everything else and give the file its final name; returns the capture, knowing its file.

        With the ``part`` that it was made of, the file can be merged with others.
        """

        def fill(handle: h5py.File) -> None:
            write_capture(handle, capture)
            if part is not None:
                part.write(handle.create_group("part"))
            handle.attrs["complete"] = True

        with self._room():
            image = sealed_image(fill)
            if self._file is not None:
                self._reserve(len(image))
                fill(self._file)
                self._file.close()
                seal(self.partial)
                os.replace(self.partial, self.path)
        if self._file is None:
            write_atomic(self.path, image)
        self.forget()
        capture.file = self.path
        return capture

    def forget(self) -> None:
        """Remove what was kept for going on: the output is whole."""
        self.state.unlink(missing_ok=True)
        self._remove_maps()

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Whatever goes wrong with writing becomes one line."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            kept = "; what was saved is kept, --resume goes on with it" if self.state.exists() else ""
            raise cannot_write(self.path, error, self.bytes_needed, kept) from None


def _allocate(file: int, start: int, count: int) -> None:
    """Give a file room for ``count`` bytes from ``start``; OSError if there is none."""
    try:
        os.posix_fallocate(file, start, count)
    except AttributeError:  # not on this system
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # not on this file system
            raise


def _assemble(target: h5py.File, paths: Sequence[Path], *, virtual: bool) -> None:
    """Put the maps of several files one after another, layer by layer: by reference, or copied as stored."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(h5py.File(path, "r")) for path in paths]
        for name, group in layer_groups(files[0]["layers"]):
            if "feature_maps" not in group:
                continue
            pieces = [file["layers"][name]["feature_maps"] for file in files]
            count = sum(map(len, pieces))
            home = target.require_group("layers").require_group(name)
            if virtual:
                home.create_virtual_dataset("feature_maps", _references(target, paths, pieces, count))
            else:
                _copy_chunks(home, pieces, count)


def _references(
    target: h5py.File, paths: Sequence[Path], pieces: Sequence[h5py.Dataset], count: int
) -> h5py.VirtualLayout:
    folder = Path(target.filename).resolve().parent
    layout = h5py.VirtualLayout((count, *pieces[0].shape[1:]), pieces[0].dtype)
    start = 0
    for path, piece in zip(paths, pieces, strict=True):
        relative = os.path.relpath(path.resolve(), folder).replace("%", "%%")
        layout[start : start + len(piece)] = h5py.VirtualSource(relative, piece.name, piece.shape)
        start += len(piece)
    return layout


def _copy_chunks(home: h5py.Group, pieces: Sequence[h5py.Dataset], count: int) -> None:
    """Copy images as they are stored, without unpacking them."""
    first = pieces[0]
    dataset = home.create_dataset(
        "feature_maps",
        shape=(count, *first.shape[1:]),
        maxshape=first.maxshape,
        chunks=first.chunks,
        dtype=first.dtype,
        compression=first.compression,
        compression_opts=first.compression_opts,
        shuffle=first.shuffle,
    )
    start, rest = 0, (0,) * (first.ndim - 1)
    for piece in pieces:
        for index in range(len(piece)):
            mask, data = piece.id.read_direct_chunk((index, *rest))
            dataset.id.write_direct_chunk((start + index, *rest), data, mask)
        start += len(piece)
