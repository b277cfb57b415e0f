"""Files that are whole under their names, and what to say when there is no room for them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from .errors import FourierBiasError


def write_atomic(path: str | os.PathLike, data: bytes | memoryview) -> None:
    """Write ``data`` beside ``path`` and rename: under its own name a file is always whole.

    Raises FourierBiasError where it cannot be written, and leaves nothing behind.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise cannot_write(path, error, len(data)) from None


def go_on_or_anew(resume: bool, overwrite: bool) -> None:
    """Raise FourierBiasError where both are asked of a long work and its file."""
    if resume and overwrite:
        raise FourierBiasError(
            "--resume goes on from what is there, --overwrite starts anew: give one of them"
        )


def cannot_write(
    path: str | os.PathLike[str], error: BaseException, needed: float = 0, hint: str = ""
) -> FourierBiasError:
    """What to say when a file could not be written; for want of room, how much there is.

    ``needed`` bytes, where they are known, ``hint`` after the message of a full disk.

    >>> str(cannot_write("a.h5", OSError(errno.EROFS, "Read-only file system")))
    'cannot write a.h5: Read-only file system'
    """
    if not _wants_room(error):
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        return FourierBiasError(f"cannot write {path}: {reason}")
    folder = Path(path).resolve().parent
    size = f"about {_in_units(needed)}" if needed else "a few megabytes"
    free = _in_units(shutil.disk_usage(folder).free)
    return FourierBiasError(f"no room to write {path}: it needs {size}, {free} are free in {folder}{hint}")


_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def _wants_room(error: BaseException) -> bool:
    """Whether an error is of a full disk, a quota or a limit on files; HDF5 says so in its text only."""
    number = getattr(error, "errno", None)
    return number in _NO_ROOM or any(f"errno = {code}," in str(error) for code in _NO_ROOM)


def _in_units(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
