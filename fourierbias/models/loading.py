"""From what a user names to a network ready for capture: a module, a timm name, a checkpoint, weights."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import math
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import timm
import timm.data
import timm.models
import torch
from torch import nn

from ..errors import FourierBiasError
from . import checkpoint as ours
from .fitting import (
    converted,
    fit_weights,
    head_absent,
    head_replaced,
    is_head,
    named_after,
    timm_config,
)
from .weights import find_state_dicts, kind_of, one_line, read_weights, reason, sha256

WEIGHT_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".tar", ".npz", ".safetensors", ".pkl", ".h5")
_FACTORY = re.compile(r"[A-Za-z_]\w+(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_CROP_MODES = ("center", "squash", "border")

Size = tuple[int, int]


@dataclass
class LoadedModel:
    """A network ready for capture, with all that its results must record.

    ``module`` is on the CPU in evaluation mode, unless it was given as a module, which is left as it is.
    ``arch`` and ``arch_args`` say how to build it again, ``weights`` what its weights are ("random seed=0",
    "pretrained timm/resnet50.a1_in1k", or a path), ``weights_sha256`` is of that file. ``preprocessing`` has
    the entries of `timm.data.resolve_data_config`: input_size (C, H, W), interpolation, mean, std, crop_pct,
    crop_mode. ``notes`` is everything that must be said plainly in the output.
    """

    module: nn.Module
    arch: str
    arch_args: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    weights_sha256: str | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Request:
    """What the caller asked for, and how to build the network it means."""

    arch: str | None
    seed: int
    ema: bool
    unsafe_pickle: bool
    size: Size | None
    num_classes: int | None
    model_args: dict[str, Any]

    def build(self, arch: str, *, meta: bool = False, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Return a network with seeded random weights and the arguments that it was built with."""
        if ":" in arch:
            arguments = dict(self.model_args)
        else:
            arguments = {
                "num_classes": self.num_classes,
                **_size_argument(arch, self.size),
                **self.model_args,
            }
            arguments = {key: value for key, value in {**arguments, **changes}.items() if value is not None}
        with _seeded(self.seed), torch.device("meta") if meta else contextlib.nullcontext():
            if ":" in arch:
                return _call_factory(arch, arguments), arguments
            with one_line(f"{arch} cannot be built with {_listed(arguments)}"):
                return ours.create(arch, **{"num_classes": None, **arguments}), arguments


def load_model(
    model: str | os.PathLike[str] | nn.Module,
    *,
    arch: str | None = None,
    pretrained: bool = False,
    seed: int = 0,
    ema: bool = True,
    unsafe_pickle: bool = False,
    image_size: int | Size | None = None,
    num_classes: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Return the network that ``model`` names, ready for capture.

    ``model`` is a module (passed through untouched); a checkpoint of ours; a timm name, also ``local-dir:…``
    and ``hf-hub:…``, which bring their weights; a weights file of torch, of safetensors or of JAX as timm
    reads it (``.npz``), with ``arch`` unless the file records it; or ``package.module:factory`` for code of
    the user's, which is imported and called with ``model_args``.

    ``arch`` is a timm name or such a factory. ``pretrained`` loads timm's weights; without it a name gets
    random ones, drawn under ``seed``, and the caller's generators stay as they were. ``ema`` prefers averaged
    weights where a file has both. ``unsafe_pickle`` lets a file run code where it cannot be read without.
    ``image_size`` is a side or (height, width) in pixels. ``num_classes`` sizes the head, ``model_args`` goes
    to the architecture.

    Raises FourierBiasError, in one line with the mend, for whatever cannot be loaded.

    >>> loaded = load_model("cnn", seed=1)
    >>> loaded.weights, loaded.preprocessing["input_size"]
    ('random seed=1', (3, 32, 32))
    """
    size = _as_size(image_size)
    request = _Request(arch, seed, ema, unsafe_pickle, size, num_classes, dict(model_args or {}))
    if isinstance(model, nn.Module):
        return _from_module(model, request, pretrained)
    if not isinstance(model, (str, os.PathLike)):
        raise FourierBiasError(f"a model is a name, a file or a torch module, not {type(model).__name__}")
    if not str(model):
        raise FourierBiasError("the name of the model is empty; give a timm name or a weights file")
    if isinstance(model, os.PathLike) or _is_file_name(model):
        if pretrained:
            raise FourierBiasError(f"{model} is a file with weights of its own; leave --pretrained out")
        return _from_file(Path(os.path.expanduser(model)), request)
    if _FACTORY.fullmatch(model) and not model.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        if pretrained:
            raise FourierBiasError(f"--pretrained is for timm names; {model} brings its own weights or none")
        return _from_factory(model, request)
    if arch is not None and arch != model:
        raise FourierBiasError(
            f"no such file: {model}; --arch {arch} names the architecture of a weights file"
        )
    return _from_name(model, request, pretrained)


def _is_file_name(name: str) -> bool:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return False
    path = os.path.expanduser(name)
    if os.path.isfile(path) or os.sep in name or name.lower().endswith(WEIGHT_SUFFIXES):
        return True
    return os.path.exists(path) and not timm.is_model(name)  # a folder does not hide a model of its name


# -- from a module, a factory, a name ---------------------------------------------------------------------


def _from_module(module: nn.Module, request: _Request, pretrained: bool) -> LoadedModel:
    if request.arch or pretrained:
        raise FourierBiasError("the model is a module already built; leave arch and pretrained out")
    notes: list[str] = []
    return LoadedModel(
        module,
        arch=timm_config(module).get("architecture") or type(module).__name__,
        arch_args=_plain_arguments(getattr(module, "_model_args", {})),
        weights="as given",
        preprocessing=_preprocessing(module, request.size, notes),
        classes=_label_names(module),
        notes=notes,
    )


def _from_factory(name: str, request: _Request) -> LoadedModel:
    module, arguments = request.build(name)
    notes = [_imported(name), f"weights as the factory leaves them (seed {request.seed})"]
    return LoadedModel(
        module.cpu().eval(),
        arch=name,
        arch_args=arguments,
        weights=f"as {name} returns them, seed={request.seed}",
        preprocessing=_preprocessing(module, request.size or _built_size(arguments), notes),
        classes=_label_names(module),
        notes=notes,
    )


def _from_name(name: str, request: _Request, pretrained: bool) -> LoadedModel:
    if ":" in name:
        return _from_timm_source(name, request)
    arch, tag = timm.models.split_model_name_tag(name)
    if not timm.is_model(arch):
        raise FourierBiasError(f"no model called {name!r}{_nearest(arch)}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{arch}.*")]
    if pretrained:
        return _from_pretrained(name, tags, request)
    if tag and tag not in tags:
        raise FourierBiasError(f"timm knows no tag {tag!r} of {arch}{_tags(tags)}")
    module, arguments = request.build(name)
    notes = [f"random weights, seed {request.seed}"]
    if tag:
        notes.append(f"the weights that {tag!r} names are loaded with --pretrained only")
    return LoadedModel(
        module.eval(),
        arch=name,
        arch_args=arguments,
        weights=f"random seed={request.seed}",
        preprocessing=_preprocessing(module, request.size or _built_size(arguments), notes),
        notes=notes,
    )


def _from_pretrained(name: str, tags: list[str], request: _Request) -> LoadedModel:
    arch, tag = timm.models.split_model_name_tag(name)
    if not tags:
        near = difflib.get_close_matches(arch, {known.partition(".")[0] for known in timm.list_pretrained()})
        raise FourierBiasError(
            f"{arch} has no pretrained weights; nearest that have: {', '.join(near) or 'none'}"
        )
    if tag and tag not in tags:
        raise FourierBiasError(f"no pretrained weights tagged {tag!r} for {arch}{_tags(tags)}")
    arguments = {
        "num_classes": request.num_classes,
        **_size_argument(name, request.size),
        **request.model_args,
    }
    arguments = {key: value for key, value in arguments.items() if value is not None}
    module = _fetch(name, arguments, request.seed)
    config = timm_config(module)
    notes: list[str] = []
    if arguments.get("num_classes") not in (None, config.get("num_classes")):
        notes.append(head_replaced(arguments["num_classes"], config.get("num_classes")))
    source = config.get("hf_hub_id") or config.get("url") or f"timm/{arch}.{config.get('tag', '')}"
    return LoadedModel(
        module.eval(),
        arch=name,
        arch_args=arguments,
        weights=f"pretrained {source}",
        preprocessing=_preprocessing(module, request.size or _built_size(arguments), notes),
        classes=_label_names(module),
        notes=notes,
    )


def _from_timm_source(name: str, request: _Request) -> LoadedModel:
    source, _, identity = name.partition(":")
    if source not in ("hf-hub", "hf_hub", "local-dir") or not identity:
        raise FourierBiasError(
            f"no model called {name!r}; besides timm names there are hf-hub:OWNER/NAME, local-dir:FOLDER and "
            "package.module:factory"
        )
    digest = None
    if source == "local-dir":
        folder = Path(os.path.expanduser(identity))
        name = f"{source}:{folder}"
        if not os.path.isfile(folder / "config.json"):
            raise FourierBiasError(
                f"{folder} has no config.json, so local-dir: cannot read it; name the file"
            )
        files = [path for path in folder.iterdir() if path.name.lower().endswith(WEIGHT_SUFFIXES)]
        digest = sha256(files[0]) if len(files) == 1 else None
    arguments = {"num_classes": request.num_classes, **request.model_args}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    module = _fetch(name, arguments, request.seed)
    arch = timm_config(module).get("architecture") or type(module).__name__
    if request.size is not None and _size_argument(arch, request.size):
        module = _fetch(name, {**arguments, "img_size": request.size}, request.seed)
    notes: list[str] = []
    return LoadedModel(
        module.eval(),
        arch=arch,
        arch_args=_plain_arguments(getattr(module, "_model_args", arguments)),
        weights=name,
        weights_sha256=digest,
        preprocessing=_preprocessing(module, request.size or _built_size(arguments), notes),
        classes=_label_names(module),
        notes=notes,
    )


def _fetch(name: str, arguments: dict[str, Any], seed: int) -> nn.Module:
    """Build with timm's own weights, from its cache where the hub cannot be reached."""
    local = name.startswith("local-dir:")
    with _seeded(seed), contextlib.nullcontext(True) if local else _hub() as reachable:
        try:
            return timm.create_model(name, pretrained=True, **arguments)
        except Exception as error:  # whatever the hub's client, the reader or the network's code raise
            failure = error
    if "weights_only" in str(failure):
        raise FourierBiasError(
            f"{name}: its weights file needs objects beyond tensors; nothing of it was run: where it was "
            "made, save the state dict alone, as safetensors"
        )
    if reachable or not isinstance(failure, OSError):
        raise FourierBiasError(f"cannot load {name}: {reason(failure)}")
    raise FourierBiasError(
        f"cannot fetch the weights of {name}: no connection to {_hub_host()}, and they are not in the local "
        "cache; fetch the file elsewhere and give it with --arch, or leave --pretrained out"
    )


@contextlib.contextmanager
def _hub() -> Iterator[bool]:
    """Spare the hub client's minute of retries where its host has no address; yields whether it has one."""
    constants = huggingface_hub.constants
    reachable = not constants.HF_HUB_OFFLINE
    if reachable and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(_hub_host(), 443)
        except OSError:
            reachable = False
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not reachable
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_host() -> str:
    return urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname or "the hub"


def _call_factory(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    package, _, attribute = name.partition(":")
    try:
        factory: Any = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise FourierBiasError(
            f"cannot import {package}: no module named {error.name}; install it, or put its folder on "
            "PYTHONPATH"
        ) from None
    except Exception as error:  # the user's code
        raise FourierBiasError(f"importing {package} failed: {reason(error)}") from None
    try:
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except AttributeError:
        public = [entry for entry in dir(factory) if not entry.startswith("_")]
        near = difflib.get_close_matches(attribute, public, cutoff=0.5)
        raise FourierBiasError(
            f"{package} has no {attribute}" + (f"; nearest: {', '.join(near)}" if near else "")
        ) from None
    if not callable(factory):
        raise FourierBiasError(f"{name} is no function or class that returns a network")
    try:
        module = factory(**arguments)
    except Exception as error:  # the user's code
        raise FourierBiasError(f"{name} failed: {reason(error)}") from None
    if not isinstance(module, nn.Module):
        raise FourierBiasError(f"{name} returned {type(module).__name__}, not a torch module")
    return module


# -- from a file ------------------------------------------------------------------------------------------


def _from_file(path: Path, request: _Request) -> LoadedModel:
    if not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FourierBiasError(f"no such file: {path}; a model of the hub is typed hf-hub:{path}")
    try:
        with one_line(f"{path} cannot be loaded"):
            loaded = _read(path, request)
            return dataclasses.replace(loaded, weights=str(path), weights_sha256=sha256(path))
    except FourierBiasError as error:  # names out of a damaged file may hold line ends
        text = " ".join(str(error).splitlines())
        raise FourierBiasError(text if str(path) in text else f"{path}: {text}") from None


def _read(path: Path, request: _Request) -> LoadedModel:
    if kind_of(path) == "npz":
        return _from_npz(path, request)
    values, notes = read_weights(path, unsafe_pickle=request.unsafe_pickle)
    if isinstance(values, Mapping) and values.get("format") == ours.FORMAT:
        loaded = _from_checkpoint(path, request)
    elif isinstance(values, nn.Module) and request.arch is None:
        loaded = _from_module(values.cpu().eval(), request, pretrained=False)
    else:
        loaded = _from_weights(path, values, request)
    return dataclasses.replace(loaded, notes=notes + loaded.notes)


def _from_checkpoint(path: Path, request: _Request) -> LoadedModel:
    checkpoint = ours.read_checkpoint(path)
    if request.arch not in (None, checkpoint.arch):
        raise FourierBiasError(
            f"{path} is a checkpoint of {checkpoint.arch}, not {request.arch}; leave --arch out"
        )
    notes = [f"weights: {checkpoint.weights}"] if checkpoint.weights else []
    with one_line(f"{path} is damaged or its architecture is not the one it names"):
        module = ours.build(checkpoint)
        arguments = {**checkpoint.arch_args, "num_classes": len(checkpoint.classes)}
        known = _preprocessing(module, _built_size(arguments), [])
        preprocessing = _checked({**known, **checkpoint.preprocessing}, str(path))
        if request.size not in (None, tuple(preprocessing["input_size"][1:])):
            preprocessing["input_size"] = (preprocessing["input_size"][0], *request.size)
            if fixed := _size_argument(checkpoint.arch, request.size):
                arguments |= fixed
                tensors = _resized(checkpoint, arguments)
                module = ours.build(dataclasses.replace(checkpoint, arch_args=arguments, state_dict=tensors))
                notes.append(f"positions interpolated to {_by(request.size)} pixels")
    return LoadedModel(
        module,
        arch=checkpoint.arch,
        arch_args=arguments,
        preprocessing=preprocessing,
        classes=[str(name) for name in checkpoint.classes],
        notes=notes,
    )


def _resized(checkpoint: ours.Checkpoint, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    if checkpoint.recast is not None:
        raise FourierBiasError(f"a recast {checkpoint.arch} keeps its input size; leave --image-size out")
    resized = converted(checkpoint.state_dict, ours.create(checkpoint.arch, **arguments))
    if resized is None:
        raise FourierBiasError(f"{checkpoint.arch} takes no other input size; leave --image-size out")
    return resized


def _from_npz(path: Path, request: _Request) -> LoadedModel:
    arch = request.arch or _no_arch(path, "arrays of JAX")
    with one_line(f"{path} is damaged or incomplete"), np.load(path, allow_pickle=False) as arrays:
        names = list(arrays.files)
        classes = next((arrays[name].size for name in names if name.endswith("head/bias")), None)
    changes = {} if ":" in arch or request.num_classes is not None else {"num_classes": classes}
    module, arguments = request.build(arch, **changes)
    notes = [_imported(arch)] if ":" in arch else []
    if not hasattr(module, "load_pretrained"):
        raise FourierBiasError(f"{arch} reads no .npz weights; give a torch or safetensors file")
    deep = len({match[0] for name in names if (match := re.search(r"encoderblock_\d+/", name))})
    if deep and deep != len(getattr(module, "blocks", ())):  # timm would leave the surplus out
        raise FourierBiasError(f"{path} does not fit {arch}: {deep} blocks for {len(module.blocks)}")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for value in module.parameters():
            value.fill_(math.nan)  # what the file does not hold stays so, and is found
    with one_line(f"{path} does not fit {arch}"):
        module.load_pretrained(str(path))
    absent = [name for name, value in module.named_parameters() if value.isnan().any()]
    body = [name for name in absent if not is_head(name, module)]
    if body:
        raise FourierBiasError(
            f"{path} does not fit {arch}: {len(body)} of {len(before)} weights are not in it or not numbers "
            f"({ours.first_three(body)})"
        )
    if absent:
        module.load_state_dict({name: before[name] for name in absent}, strict=False)
        notes.append(head_absent(absent))
    return LoadedModel(
        module.cpu().eval(),
        arch=arch,
        arch_args=arguments,
        preprocessing=_preprocessing(module, request.size or _built_size(arguments), notes),
        notes=notes,
    )


def _from_weights(path: Path, values: Any, request: _Request) -> LoadedModel:
    found = find_state_dicts(values)
    if not found:
        raise FourierBiasError(
            f"{path} holds {_summary(values)} and no named tensors; save the model's state dict"
        )
    options = _training_options(values)
    recorded = _recorded_arch(values, options)
    arch = request.arch or recorded or _no_arch(path, f"{len(found[0].tensors)} tensors")
    notes = [_imported(arch)] if ":" in arch else []
    if request.arch is None:
        notes.append(f"architecture {arch}, as recorded in the file")
    elif recorded and recorded != arch:
        notes.append(f"the file records architecture {recorded}, --arch names {arch}")
    if ":" not in arch and not timm.is_model(arch):
        raise FourierBiasError(f"no model called {arch!r}{_nearest(arch)}")
    if recorded == arch:
        with one_line(f"{path} records options that cannot be used"):
            request = _as_trained(request, options)
    fixed = {"num_classes": request.num_classes, "img_size": request.size, **request.model_args}
    module, arguments, fitting = fit_weights(
        path,
        found,
        arch,
        request.build,
        ema=request.ema,
        open_arguments=()
        if ":" in arch
        else [key for key in ("num_classes", "img_size") if not fixed.get(key)],
    )
    wanted = {key: options[key] for key in ("mean", "std", "interpolation", "crop_pct") if options.get(key)}
    return LoadedModel(
        module.cpu().eval(),
        arch=arch,
        arch_args=arguments,
        preprocessing=_preprocessing(module, request.size or _built_size(arguments), notes, wanted),
        notes=notes + fitting,
    )


def _no_arch(path: Path, what: str) -> str:
    named = named_after(path)
    raise FourierBiasError(
        f"{path} holds {what} and no word of their architecture; add --arch NAME"
        + (f", perhaps --arch {named}" if named else ", a timm name or package.module:factory")
    )


def _training_options(values: Any) -> dict[str, Any]:
    """The options of the training script, where a checkpoint keeps them under "args"."""
    options = values.get("args") if isinstance(values, Mapping) else None
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    return dict(options) if isinstance(options, Mapping) else {}


def _recorded_arch(values: Any, options: Mapping[str, Any]) -> str | None:
    """The timm name that a checkpoint records; timm writes a class name where it knew no better."""
    top = values.get("arch") if isinstance(values, Mapping) else None
    for name in (options.get("model"), top, options.get("arch"), options.get("model_name")):
        if isinstance(name, str) and name and timm.is_model(name):
            return name
    return None


def _as_trained(request: _Request, options: Mapping[str, Any]) -> _Request:
    """The request, with what the training script was told about the network and its input."""
    arguments = options.get("model_kwargs")
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    channels = options.get("in_chans") or next(iter(options.get("input_size") or ()), None)
    if isinstance(channels, int):
        arguments["in_chans"] = channels
    size = options.get("img_size") or tuple(options.get("input_size") or ())[1:] or None
    return dataclasses.replace(
        request,
        size=request.size or _as_size(size),
        model_args={**arguments, **request.model_args},
    )


# -- small things -----------------------------------------------------------------------------------------


def _preprocessing(
    module: nn.Module, size: Size | None, notes: list[str], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """How images are made ready for a network: what timm knows of it, else what is usual for ImageNet."""
    wanted = dict(options or {})
    if size is not None:
        _check_patches(module, size)
        wanted["img_size"] = size
    if not timm_config(module):
        notes.append(
            f"preprocessing unknown: ImageNet's mean and standard deviation, {_by(size or (224, 224))} pixels"
        )
    name = type(module).__name__
    with one_line(f"{name} does not take this preprocessing"):
        return _checked(timm.data.resolve_input_data_config(module, wanted), name)


def _check_patches(module: nn.Module, size: Size) -> None:
    """timm says only in the forward pass that a size is not made of whole patches."""
    patches = getattr(module, "patch_embed", None)
    patch, strict = getattr(patches, "patch_size", None), getattr(patches, "strict_img_size", True)
    if not isinstance(patch, tuple) or len(patch) != 2 or getattr(patches, "dynamic_img_pad", False):
        return
    whole = strict or not any(side % step for side, step in zip(size, patch, strict=True))
    if not whole or any(side < step for side, step in zip(size, patch, strict=True)):
        raise FourierBiasError(
            f"{_by(size)} pixels are not made of whole patches of {_by(patch)}; give a multiple as image size"
        )


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The preprocessing as plain values, each one that can be used, or FourierBiasError naming the first."""
    entry = ""
    try:
        entry = "input_size"
        channels, height, width = (int(number) for number in values[entry])
        if min(channels, height, width) < 1:
            raise ValueError
        plain: dict[str, Any] = {entry: (channels, height, width)}
        for entry in ("mean", "std"):
            numbers = tuple(float(number) for number in values[entry])
            numbers = numbers * channels if len(numbers) == 1 else numbers
            usable = len(numbers) == channels and all(math.isfinite(number) for number in numbers)
            if not usable or (entry == "std" and min(numbers) <= 0):
                raise ValueError
            plain[entry] = numbers
        entry = "crop_pct"
        plain[entry] = float(values[entry])
        if not 0 < plain[entry] < 10:
            raise ValueError
        for entry, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
            plain[entry] = values[entry]
            if plain[entry] not in known:
                raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise FourierBiasError(
            f"{where} has unusable preprocessing: {entry} is {values.get(entry)!r}"
        ) from None
    return plain


def _label_names(module: nn.Module) -> list[str] | None:
    names = timm_config(module).get("label_names")
    return [str(name) for name in names] if names else None


def _size_argument(arch: str, size: Size | None) -> dict[str, Any]:
    """``img_size`` for architectures whose input size is fixed when they are built; others take any."""
    config = timm.models.get_pretrained_cfg(arch)
    fixed = size is not None and config is not None and config.fixed_input_size
    return {"img_size": size} if fixed else {}


def _built_size(arguments: Mapping[str, Any]) -> Size | None:
    return _as_size(arguments.get("img_size"))


def _as_size(size: Any) -> Size | None:
    if size is None:
        return None
    try:
        pair = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    except (TypeError, ValueError):
        pair = ()
    if len(pair) != 2 or min(pair) < 1:
        raise FourierBiasError(
            f"an image size of {size!r} is none; give a side in pixels, or (height, width)"
        )
    return pair


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw random weights under ``seed`` on the CPU and leave every generator of the caller as it was."""
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators as well
        except (RuntimeError, TypeError, ValueError, OverflowError):
            raise FourierBiasError(f"{seed!r} is no seed; give a whole number below 2**63") from None
        yield


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else "; timm.list_models() lists those there are"


def _tags(tags: list[str]) -> str:
    return f"; there are {', '.join(tags)}" if tags else "; it has none"


def _imported(arch: str) -> str:
    return f"imported {arch.partition(':')[0]}, because {arch} was named"


def _by(size: Size | None) -> str:
    return "×".join(str(side) for side in size or ())


def _listed(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "its own arguments"


def _summary(values: Any) -> str:
    if isinstance(values, Mapping):
        return f"a dictionary ({ours.first_three([str(key) for key in values])})"
    return f"one object of type {type(values).__name__}"


def _plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str, tuple, list, type(None))
    return {key: value for key, value in arguments.items() if isinstance(value, plain)}
