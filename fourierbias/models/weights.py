"""Weights as found: from a file on disk to named tensors, without running anything that is in the file."""

import argparse
import codecs
import contextlib
import hashlib
import io
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from ..errors import FourierBiasError

# What a file is by its first bytes, and what to do with it.
_SIGNATURES = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, not weights; a capture is drawn with `fourierbias plot`"),
    (b"\xff\xd8\xff", "a JPEG image, not weights; images are given with --data"),
    (b"\x89PNG", "a PNG image, not weights; images are given with --data"),
    (b"GIF8", "a GIF image, not weights; images are given with --data"),
    (b"II*\x00", "a TIFF image, not weights; images are given with --data"),
    (b"MM\x00*", "a TIFF image, not weights; images are given with --data"),
    (b"\x93NUMPY", "a single numpy array; save the named tensors with safetensors or torch.save"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ\x00", "compressed with xz; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"%PDF", "a PDF document, not weights"),
)
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number every torch file before 1.6 begins with

# Segments that wrappers put inside the names of parameters; no module of a network is called so.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged|shadow|swa|teacher)(?:[._]|$)", re.IGNORECASE)


@dataclass
class StateDict:
    """Named tensors found in a file, ``where`` being the keys that lead to them (``"checkpoint.model"``)."""

    where: str
    tensors: dict[str, torch.Tensor]


def is_averaged(name: str) -> bool:
    """Return whether a key or a prefix of a weights file says "average of weights" (EMA, SWA, teacher).

    >>> is_averaged("state_dict_ema"), is_averaged("model"), is_averaged("schema")
    (True, False, False)
    """
    return bool(_AVERAGED.search(name))


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of(path: str | os.PathLike[str]) -> str:
    """Return "torch", "safetensors" or "npz", by what is in the file and not by its name.

    Raises FourierBiasError, saying what the file seems to be and what to do, for everything else.
    """
    path = Path(path)
    head = _head(path)
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return "safetensors"
    if head[:1] == b"\x80" and _LEGACY_TORCH in head[:32]:
        return "torch"
    if head[:1] == b"\x80":
        raise FourierBiasError(
            f"{path} is a plain Python pickle, no torch file{_naming(_globals_of(path))}; nothing of it was "
            "run: where it was made, save its tensors with safetensors or torch.save"
        )
    raise FourierBiasError(f"{path} is {_describe(head)}")


def read_weights(path: str | os.PathLike[str], *, unsafe_pickle: bool = False) -> tuple[Any, list[str]]:
    """Return what a torch or safetensors file holds, on the CPU, and what must be said about reading it.

    Torch files are read with ``weights_only=True``: tensors, plain values, ``argparse.Namespace`` and numpy's
    numbers, nothing that could run code. ``unsafe_pickle`` allows code where that is refused, with a warning.
    Raises FourierBiasError for a file that is damaged, refused, or no weights file.
    """
    path = Path(path)
    if kind_of(path) == "safetensors":
        return _load(safetensors.torch.load_file, path), []
    try:
        with torch.serialization.safe_globals(_plain_globals()):
            return _load(torch.load, path, map_location="cpu", weights_only=True), []
    except FourierBiasError as error:
        refused = _refused(path, error.__cause__)
        if refused is None:
            raise
        if not unsafe_pickle:
            raise FourierBiasError(
                f"{path} {_refusal(refused)}; nothing of it was run. Where it was made, save the state dict "
                "alone (torch.save(model.state_dict(), …)), or ask its author for safetensors; a file that "
                "you trust as your own code can be unpickled with --unsafe-pickle"
            ) from None
    warning = f"warning: {path} was unpickled with --unsafe-pickle: any code in it has run on this machine"
    return _load(torch.load, path, map_location="cpu", weights_only=False), [warning]


@contextlib.contextmanager
def one_line(message: str) -> Iterator[None]:
    """Make whatever fails inside an error of ours, with its reason behind ``message``.

    For code of others that checks its input by assertion, indexing and arithmetic.
    """
    try:
        yield
    except FourierBiasError:
        raise
    except Exception as error:
        raise FourierBiasError(f"{message} ({reason(error)})") from None


def reason(error: BaseException) -> str:
    """Return the kind and the message of an exception in one line of at most about 200 characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:197] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def find_state_dicts(values: Any, *, depth: int = 4) -> list[StateDict]:
    """Return every mapping of names to tensors in what a weights file holds, outermost first.

    Whatever the keys that wrap them ("model", "state_dict_ema", …) are called. Names are freed of the
    segments that torch.compile, FSDP and activation checkpointing insert.
    """
    return list(_walk(values, "", depth))


def _walk(values: Any, where: str, depth: int) -> Iterator[StateDict]:
    if isinstance(values, nn.Module):  # only ever reached with unsafe_pickle
        values = values.state_dict()
    if isinstance(values, (list, tuple)):
        values = {str(index): value for index, value in enumerate(values[:8])}
    if not isinstance(values, Mapping):
        return
    named = {key: value for key, value in values.items() if isinstance(key, str)}
    tensors = {
        _WRAPPERS.sub("", key): value for key, value in named.items() if isinstance(value, torch.Tensor)
    }
    if tensors:
        yield StateDict(where, tensors)
    if depth > 0:
        for key, value in named.items():
            yield from _walk(value, f"{where}.{key}" if where else key, depth - 1)


def _load(function: Callable[..., Any], path: Path, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to whoever wrote the file
            return function(path, **options)
    except PermissionError:
        raise FourierBiasError(f"cannot read {path}: permission denied") from None
    except Exception as error:  # damaged bytes surface as whatever the reader happens to trip over
        raise FourierBiasError(
            f"{path} is damaged or incomplete ({_first_line(error)}); copy or download it again"
        ) from error


def _refused(path: Path, error: BaseException | None) -> list[str] | None:
    """The objects for which safe loading refused a file, or None if it failed for another reason."""
    message = str(error)
    if "weights_only" not in message and "Weights only" not in message:
        return None
    imported = _globals_of(path)
    try:
        with torch.serialization.safe_globals(_plain_globals()):
            refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it reads zip files of pickle protocol 2 only
        refused = {name for name in imported if not _is_plain(name)}
    names = [name for name in imported if name in refused] or re.findall(r"GLOBAL (\w+(?:\.\w+)+)", message)
    return names or ([] if "Unsupported operand" in message else None)


def _refusal(names: list[str]) -> str:
    if names:
        return f"needs objects beyond tensors{_naming(names)}"
    return "holds a pickle that weights-only loading cannot read (damaged, or of protocol 3 or later)"


def _plain_globals() -> list[Any]:
    """What training scripts store beside tensors that can run nothing: options, and numpy's numbers."""
    scalar = np.float64(0).__reduce__()[0]
    reconstruct = np.zeros(1).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}
    both = [
        (function, f"numpy.{core}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (reconstruct, "_reconstruct"))
        for core in ("core", "_core")  # before and after numpy 2
    ]
    encode = (codecs.encode, "_codecs.encode")  # how pickle protocol 2 spells bytes
    return [argparse.Namespace, np.ndarray, np.dtype, encode, *dtypes, *both]


def _globals_of(path: Path) -> list[str]:
    """The names that a file's pickles import, read without unpickling."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                return _imports(io.BytesIO(archive.read(name)))
        with open(path, "rb") as file:
            return _imports(file, pickles=4)  # a file of torch before 1.6 has three small ones in front
    except Exception:
        return []


def _imports(stream: Any, pickles: int = 1) -> list[str]:
    found: dict[str, None] = {}
    try:
        for _ in range(pickles):
            strings: list[str] = []
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    found[argument.replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL":
                    found[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:
        pass  # what was seen before the damage is still worth naming
    return list(found)


def _is_plain(name: str) -> bool:
    return name.startswith(("torch._utils._rebuild", "collections.OrderedDict")) or (
        name.startswith("torch.") and name.endswith("Storage")
    )


def _naming(names: list[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"


def _head(path: Path) -> bytes:
    if not os.path.exists(path):
        raise FourierBiasError(f"no such file: {path}{_near_files(path)}")
    if path.is_dir() and (path / "config.json").is_file():
        raise FourierBiasError(f"{path} is a folder in timm's layout; type local-dir:{path}")
    if path.is_dir():
        raise FourierBiasError(f"{path} is a folder; name the weights file in it")
    if not path.is_file():
        raise FourierBiasError(f"{path} is no regular file; name a weights file")
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise FourierBiasError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise FourierBiasError(f"{path} is empty (0 bytes); copy or download it again")
    return head


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:
        raise FourierBiasError(
            f"{path} is a torch or zip file cut short or damaged ({_first_line(error)}); "
            "copy or download it again"
        ) from None
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        raise FourierBiasError(
            f"{path} is a TorchScript program; save its weights alone: "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), …)"
        )
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    listed = ", ".join(names[:3])
    raise FourierBiasError(f"{path} is a zip archive with no weights at its root ({listed}); unpack it first")


def _describe(head: bytes) -> str:
    for signature, meaning in _SIGNATURES:
        if head.startswith(signature):
            return meaning
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    text = head.decode("utf-8", "ignore")
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    if text.lstrip()[:9].lower().startswith(("<!doctype", "<html")):
        return "a web page, not weights; the download went wrong"
    if len(text.encode()) >= len(head) - 3 and all(c.isprintable() or c.isspace() for c in text):
        return "a text file, not weights"
    return "no weights file that is known here (torch, safetensors or .npz)"


def _near_files(path: Path) -> str:
    import difflib

    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    except (OSError, ValueError):
        return ""
    return f"; nearest: {', '.join(near)}" if near else ""


def _first_line(error: BaseException) -> str:
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # torch's advice comes before it
    text = " ".join(text.split("\n")[0].split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "…"
