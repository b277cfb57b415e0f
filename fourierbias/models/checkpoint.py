"""The .ckpt file: a network with all that is needed to use it, in a torch file that runs no code.

The file is a dictionary of plain values and tensors, so that ``torch.load(path, weights_only=True)`` reads it
without this package. Half-precision files are for storage only: they are read back as float32.
"""

import difflib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .._version import __version__
from ..errors import FourierBiasError
from ..files import write_atomic

FORMAT = "fourierbias"
FORMAT_VERSION = 1


@dataclass
class Checkpoint:
    """A network at rest.

    ``arch`` and ``arch_args`` are what `timm.create_model` takes, ``recast`` what `create` takes for the
    layers recast as attention, ``preprocessing`` the entries of `timm.data.resolve_model_data_config`,
    ``weights`` what the weights are ("average of …"), ``epoch`` the number of epochs trained.
    """

    arch: str
    state_dict: dict[str, torch.Tensor]
    classes: list[str]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    arch_args: dict[str, Any] = field(default_factory=dict)
    recast: dict[str, Any] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    weights: str = ""
    dtype: str = "float32"
    version: str = __version__


def save_torch(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write a dictionary of plain values and tensors as a torch file, whole or not at all."""
    buffer = io.BytesIO()  # in memory first: a full disk is then an OSError of ours, not torch's abort
    torch.save(dict(values), buffer)
    write_atomic(path, buffer.getbuffer())


def load_torch(path: str | os.PathLike, what: str = "checkpoint") -> dict[str, Any]:
    """Read a torch file holding a dictionary, without unpickling code.

    Raises FourierBiasError if the file is not there, is damaged, would run code, or is no dictionary.
    """
    path = Path(path)
    if not path.exists():
        raise FourierBiasError(f"no such {what}: {path}")
    if not path.is_file():
        raise FourierBiasError(f"{path} is a folder, not a {what}; name the file in it")
    try:
        with warnings.catch_warnings():  # torch warns of what is then refused
            warnings.simplefilter("ignore")
            values = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise FourierBiasError(f"cannot read {path}: permission denied") from None
    except Exception:  # torch.load has no one exception for damaged bytes: seven kinds were seen
        reason = "is damaged, is no torch file, or holds code besides weights"
        raise FourierBiasError(f"{path} {reason}; a {what} of plain tensors is needed") from None
    if not isinstance(values, dict):
        raise FourierBiasError(f"{path} holds {type(values).__name__}, not a {what}")
    return values


def storable(state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors on the CPU in ``dtype``; those that would overflow in it keep their own."""

    def store(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().cpu().clone()  # of its own storage: a view would drag its base into the file
        if not tensor.is_floating_point():
            return tensor
        small = tensor.to(dtype)
        return small if torch.isfinite(small).all() or not torch.isfinite(tensor).all() else tensor

    return {key: store(value) for key, value in state_dict.items()}


def save_checkpoint(
    path: str | os.PathLike, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a checkpoint, whole or not at all, its weights stored in ``dtype``.

    Raises FourierBiasError where the file cannot be written.
    """
    values = {entry.name: getattr(checkpoint, entry.name) for entry in fields(Checkpoint)}
    values["state_dict"] = storable(checkpoint.state_dict, dtype)
    values["dtype"] = str(dtype).removeprefix("torch.")
    save_torch(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **values})


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint; its weights come back as float32 whatever they are stored in.

    Raises FourierBiasError for a file that is missing, damaged, not ours, or from a later version.
    """
    values = load_torch(path)
    if values.get("format") != FORMAT or not isinstance(values.get("state_dict"), dict):
        raise FourierBiasError(f"{path} is no fourierbias checkpoint; name its architecture with --arch")
    version = values.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FourierBiasError(
            f"{path} has checkpoint format {version}, this fourierbias reads {FORMAT_VERSION}; upgrade it"
        )
    known = {entry.name for entry in fields(Checkpoint)}
    missing = {"arch", "classes"} - set(values)
    if missing or not isinstance(values["arch"], str) or not isinstance(values["classes"], (list, tuple)):
        raise FourierBiasError(f"{path} is no whole checkpoint: arch or classes are not there")
    checkpoint = Checkpoint(**{key: value for key, value in values.items() if key in known})
    if not all(isinstance(value, torch.Tensor) for value in checkpoint.state_dict.values()):
        raise FourierBiasError(f"{path} holds weights that are no tensors")
    checkpoint.state_dict = {
        key: value.float() if value.is_floating_point() else value
        for key, value in checkpoint.state_dict.items()
    }
    return checkpoint


def check_arch(arch: str) -> None:
    """Raise FourierBiasError for a name timm does not know, offering the nearest."""
    from . import cnn, vit  # noqa: F401  (a checkpoint names them, whatever the package's face imports)

    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=3)
        raise FourierBiasError(
            f"no architecture called {arch!r} in timm" + (f"; nearest: {', '.join(near)}" if near else "")
        )


def create(
    arch: str, *, num_classes: int, recast: Mapping[str, Any] | None = None, **arch_args: Any
) -> nn.Module:
    """Build a network with timm that knows how it was built (``model.built_from``).

    ``recast`` holds ``layers`` (names or glob patterns of convolutions) and the options of
    `fourierbias.recast`, or ``"form": "conv"`` for layers that are to become attention later. Raises
    FourierBiasError for a name timm does not know (offering the nearest) and for arguments the architecture
    does not take.

    >>> create("cnn", num_classes=3).built_from["arch"]
    'cnn'
    """
    check_arch(arch)
    try:
        model = timm.create_model(arch, pretrained=False, num_classes=num_classes, **arch_args)
    except TypeError as error:
        raise FourierBiasError(f"{arch} does not take these arguments: {error}") from None
    if recast is not None:
        from .reparam import make_reparameterizable
        from .reparam import recast as recast_layers

        options = {key: value for key, value in recast.items() if key not in ("layers", "form")}
        if recast.get("form") == "conv":
            make_reparameterizable(model, list(recast["layers"]))
        else:
            model = recast_layers(model, list(recast["layers"]), **options)
    model.built_from = {
        "arch": arch,
        "arch_args": dict(arch_args),
        "recast": None if recast is None else dict(recast),
    }
    return model


def built_from(network: nn.Module) -> dict[str, Any]:
    """Return arch, arch_args and recast of a network, from `create` or from timm's own record."""
    if hasattr(network, "built_from"):
        return dict(network.built_from)
    arch = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    if arch is None or not timm.is_model(arch):
        raise FourierBiasError(
            f"cannot tell how to rebuild {type(network).__name__} from a checkpoint; register it with timm "
            "and give its name"
        )
    return {"arch": arch, "arch_args": {}, "recast": None}


def check_rebuilds(network: nn.Module, num_classes: int) -> None:
    """Raise FourierBiasError for a network of other classes, or one that its record does not make again."""
    if network.num_classes != num_classes:
        raise FourierBiasError(f"the model has {network.num_classes} classes, the data have {num_classes}")
    record = built_from(network)
    arch_args = {key: value for key, value in record["arch_args"].items() if key != "num_classes"}
    with torch.random.fork_rng(devices=[]):
        again = create(record["arch"], num_classes=num_classes, recast=record["recast"], **arch_args)
    try:
        load_weights(again, network.state_dict())
    except FourierBiasError as error:
        raise FourierBiasError(
            f"a checkpoint of this {record['arch']} could not be read again, for it has other layers than "
            f"its name and arguments say; make it with models.checkpoint.create or by name ({error})"
        ) from None


def build(checkpoint: Checkpoint) -> nn.Module:
    """Return the network of a checkpoint with its weights, in evaluation mode.

    Raises FourierBiasError if the architecture is not known or its keys are not those of the weights.
    """
    arch_args = {key: value for key, value in checkpoint.arch_args.items() if key != "num_classes"}
    model = create(
        checkpoint.arch, num_classes=len(checkpoint.classes), recast=checkpoint.recast, **arch_args
    )
    load_weights(model, checkpoint.state_dict, name=checkpoint.arch)
    return model.eval()


def load_weights(model: nn.Module, state_dict: Mapping[str, torch.Tensor], name: str = "the model") -> None:
    """Load weights strictly; FourierBiasError says how many keys fit and the first three that do not."""
    own = model.state_dict()
    reshaped = [
        f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
        for key, value in state_dict.items()
        if key in own and own[key].shape != value.shape
    ]
    if reshaped:
        raise FourierBiasError(
            f"{len(reshaped)} of {len(state_dict)} weights have another shape in {name}: "
            f"{first_three(reshaped)}"
        )
    # Not strict: layers may take keys that they did not have before (a switched convolution does).
    result = model.load_state_dict(state_dict, strict=False)
    if result.missing_keys or result.unexpected_keys:
        matched = len(state_dict) - len(result.unexpected_keys)
        raise FourierBiasError(
            f"weights do not fit {name}: {matched} of {len(state_dict)} keys match; "
            f"{len(result.missing_keys)} missing ({first_three(result.missing_keys)}), "
            f"{len(result.unexpected_keys)} not in the model ({first_three(result.unexpected_keys)})"
        )


def first_three(names: Sequence[str]) -> str:
    """Join the first three names, and say how many follow.

    >>> first_three(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more
