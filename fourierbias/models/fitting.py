"""Weights onto networks: which state dict of a file, under which prefix, and what does not fit."""

import contextlib
import difflib
import inspect
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from torch import nn

from ..errors import FourierBiasError
from .checkpoint import first_three
from .weights import StateDict, is_averaged, one_line

HEADS = ("fc", "head", "heads", "head_dist", "classifier", "last_linear", "linear", "projector", "predictor")
_NO_PART_IN_FEATURES = ("n_averaged",)  # torch's AveragedModel counts its updates in a buffer
# What timm calls its converters of published weights of other naming, in the module of the architecture.
_FILTERS = ("checkpoint_filter_fn", "pretrained_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")


class Build(Protocol):
    """Builds a network of an architecture, and returns it with the arguments it was built with."""

    def __call__(
        self, arch: str, *, meta: bool = False, **changes: Any
    ) -> tuple[nn.Module, dict[str, Any]]: ...


@dataclass
class Fit:
    """A state dict laid onto a network's names: prefix ``strip`` taken off, prefix ``add`` put before."""

    found: StateDict
    strip: str = ""
    add: str = ""
    matched: int = 0

    @property
    def label(self) -> str:
        return f"{self.found.where}.{self.strip}".strip(".")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            self.add + key.removeprefix(self.strip): value
            for key, value in self.found.tensors.items()
            if key.startswith(self.strip)
        }


@dataclass
class Misfit:
    """What keeps weights from a network: names on either side, and names with shapes."""

    matched: int
    total: int
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]


def fit_weights(
    path: Path,
    found: Sequence[StateDict],
    arch: str,
    build: Build,
    *,
    ema: bool = True,
    open_arguments: Collection[str] = ("num_classes", "img_size"),
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Return the network ``arch`` with the weights among ``found`` that fit it best, its arguments, notes.

    The number of classes and the input size are taken from the file where ``open_arguments`` has them. The
    head may differ, no other weight may. Raises FourierBiasError with how many weights match and the first
    three that do not on each side.
    """
    notes: list[str] = []
    outline = _outline(arch, build)
    built = build(arch) if outline is None else None
    outline = outline if built is None else built[0]
    fit = best_fit(found, outline, ema=ema)
    tensors = fit.tensors()
    changes = {key: value for key, value in _changes(tensors, outline).items() if key in open_arguments}
    module, arguments = build(arch, **changes) if changes or built is None else built
    with one_line(f"the weights of {path} cannot be copied into {arch}"):  # no data, no numbers, …
        misfit = lay_on(module, tensors, notes)
    if misfit is None:
        _say_fit(fit, found, ema, notes)
    elif _convert_and_lay_on(module, [fit, *_whole(found, ema)], notes):
        notes.append("weights converted by timm's own filter for this architecture")
    else:
        raise FourierBiasError(_explain(path, arch, misfit, fit, build))
    if "img_size" in changes:
        size = "×".join(str(side) for side in changes["img_size"])
        notes.append(f"input of {size} pixels, to which the file's positions belong")
    if "num_classes" in changes:
        notes.append(f"head of {changes['num_classes']} classes, as in the file")
    return module, arguments, notes


def best_fit(found: Sequence[StateDict], module: nn.Module, *, ema: bool = True) -> Fit:
    """Return the state dict and prefix with most weights of right name and shape.

    Between equals ``ema`` decides whether averaged weights come first, then the shorter prefix, then the
    order in the file.
    """
    own = _shapes(module.state_dict())
    fits = [fit for one in found for fit in _fits(one, own)]

    def merit(fit: Fit) -> tuple[int, bool, int]:
        return fit.matched, is_averaged(fit.label) == ema, -len(fit.strip + fit.add)

    return max(fits, key=merit)


def lay_on(module: nn.Module, tensors: Mapping[str, torch.Tensor], notes: list[str]) -> Misfit | None:
    """Load weights that must fit in all but the head; return what does not, or None and add to ``notes``."""
    own = _shapes(module.state_dict())
    tensors = {name: value for name, value in tensors.items() if name not in _NO_PART_IN_FEATURES}
    theirs = _shapes(tensors)
    differing = [name for name, shape in theirs.items() if name in own and own[name] != shape]
    replaced = [name for name in differing if is_head(name, module)]
    reshaped = [
        f"{name} {list(theirs[name])} for {list(own[name])}" for name in differing if name not in replaced
    ]
    rest = {name: value for name, value in tensors.items() if name not in differing}
    # Not strict: layers may take names they did not have before (a switched convolution does).
    result = module.load_state_dict(rest, strict=False)
    gone = [name for name in result.missing_keys if name not in differing]
    absent = [name for name in gone if is_head(name, module)]
    missing = [name for name in gone if name not in absent]
    heads = [name for name in result.unexpected_keys if _top(name) in HEADS or is_head(name, module)]
    unexpected = [name for name in result.unexpected_keys if name not in heads]
    if missing or unexpected or reshaped:
        matched = len(rest) - len(result.unexpected_keys)
        return Misfit(matched, len(own), missing, unexpected, reshaped)
    if replaced:
        name = replaced[0]
        notes.append(head_replaced(own[name][0], next(iter(theirs[name]), None)))
    elif absent:
        notes.append(head_absent(absent))
    if heads:
        notes.append(f"heads of the file that this network has not are left out ({first_three(heads)})")
    return None


def converted(tensors: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return what timm's filter for this class of networks makes of weights, None if it fails or distorts.

    The filters resample positions to the network's grid, as wanted, and patch kernels too, which would let a
    file of one architecture pass for another: only positions may change their size.
    """
    home = sys.modules[type(module).__module__]
    convert = next((getattr(home, name) for name in _FILTERS if hasattr(home, name)), None)
    if convert is None:
        return None
    try:
        taken = len(inspect.signature(convert).parameters)
        result = convert(*(dict(tensors), module)[:taken])
        resampled = [
            name
            for name, value in result.items()
            if name in tensors and tensors[name].numel() != value.numel()
        ]
    except Exception:  # written for files of known naming, it trips over any other
        return None
    return result if all(re.search(r"pos|rel", name) for name in resampled) else None


def is_head(name: str, module: nn.Module) -> bool:
    """Return whether a weight belongs to the classifier, which no feature map passes through."""
    return _top(name) in ({_top(classifier) for classifier in _classifiers(module)} or HEADS)


def head_replaced(mine: int | None, theirs: int | None) -> str:
    """Say that the head of a file was of no use."""
    return f"head of {mine} classes replaced: {theirs} in the file; it stays random"


def head_absent(names: Sequence[str]) -> str:
    """Say that a file has no head."""
    return f"the head is not in the file ({first_three(names)}) and stays random"


def timm_config(module: nn.Module) -> dict[str, Any]:
    """Return what timm records of a network (input, head, source), empty for networks of other making."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    return dict(config) if isinstance(config, Mapping) else {}


def named_after(path: Path) -> str | None:
    """Return the timm name with which a file's name begins, if there is one.

    >>> named_after(Path("resnet50_a1_0-14fe96d1.pth"))
    'resnet50'
    """
    stem = path.name.lower().replace("-", "_")
    return max((name for name in timm.list_models() if stem.startswith(name)), key=len, default=None)


def _fits(found: StateDict, own: Mapping[str, tuple[int, ...]]) -> Iterator[Fit]:
    """All prefixes under which a state dict has names in common with a network."""
    shapes = _shapes(found.tensors)
    counts: dict[tuple[str, str], int] = {("", ""): 0}
    for key, shape in shapes.items():
        for strip, name in _splits(key):
            if name in own:
                counts[strip, ""] = counts.get((strip, ""), 0) + (own[name] == shape)
    for name, shape in own.items():
        for add, key in _splits(name):
            if add and key in shapes:
                counts["", add] = counts.get(("", add), 0) + (shapes[key] == shape)
    for (strip, add), matched in counts.items():
        yield Fit(found, strip, add, matched)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Ways to part a dotted name into a prefix, with its dot, and the rest.

    >>> list(_splits("model.fc.bias"))
    [('', 'model.fc.bias'), ('model.', 'fc.bias'), ('model.fc.', 'bias')]
    """
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def _changes(tensors: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, Any]:
    """Arguments with which the network would be that of the file: its classes, its input size."""
    own = _shapes(module.state_dict())
    changes: dict[str, Any] = {}
    for name in _classifiers(module)[:1]:
        theirs, mine = tensors.get(f"{name}.weight"), own.get(f"{name}.weight")
        if theirs is not None and theirs.ndim >= 2 and mine and theirs.shape[0] != mine[0]:
            changes["num_classes"] = int(theirs.shape[0])
    positions, mine = tensors.get("pos_embed"), own.get("pos_embed", ())
    patches = getattr(module, "patch_embed", None)
    if positions is not None and positions.ndim == len(mine) == 3 and hasattr(patches, "grid_size"):
        tokens = positions.shape[1] - (mine[1] - math.prod(patches.grid_size))
        side = math.isqrt(max(tokens, 0))
        if positions.shape[1] != mine[1] and side and side * side == tokens:
            changes["img_size"] = tuple(side * patch for patch in patches.patch_size)
    return changes


def _say_fit(fit: Fit, found: Sequence[StateDict], ema: bool, notes: list[str]) -> None:
    if is_averaged(fit.label):
        notes.append(f"EMA weights used ({fit.label})")
    elif any(is_averaged(key) for one in found for key in (one.where, *_tops(one))):
        why = "the averaged ones in the file do not fit whole" if ema else "as asked"
        notes.append(f"raw weights used ({fit.label or 'outermost'}), {why}")
    if fit.strip.replace("module.", ""):
        notes.append(f"prefix {fit.strip!r} of the file's names taken off")
    if fit.add:
        notes.append(f"prefix {fit.add!r} put before the file's names")
    outside = [key for key in fit.found.tensors if not key.startswith(fit.strip)]
    if outside:
        notes.append(f"{len(outside)} tensors outside {fit.strip!r} left out ({first_three(outside)})")


def _whole(found: Sequence[StateDict], ema: bool) -> Iterator[Fit]:
    """Each state dict as it is, and without the prefix that all its names share."""
    for one in sorted(found, key=lambda one: is_averaged(one.where) != ema):
        yield Fit(one)
        tops = _tops(one)
        if len(tops) == 1:
            yield Fit(one, strip=f"{tops.pop()}.")


def _convert_and_lay_on(module: nn.Module, fits: Sequence[Fit], notes: list[str]) -> bool:
    for fit in fits:
        tensors = converted(fit.tensors(), module)
        with contextlib.suppress(Exception):
            if tensors is not None and lay_on(module, tensors, notes) is None:
                return True
    return False


def _explain(path: Path, arch: str, misfit: Misfit, fit: Fit, build: Build) -> str:
    parts = [f"{path} does not fit {arch}: {misfit.matched} of {misfit.total} weights match"]
    for label, names in (
        ("not in the file", misfit.missing),
        ("not in the network", misfit.unexpected),
        ("of other shape", misfit.reshaped),
    ):
        if names:
            parts.append(f"{len(names)} {label} ({first_three(names)})")
    if fit.strip and misfit.matched:
        parts.append(f"that is with prefix {fit.strip!r} of the file's names taken off")
    other = None if ":" in arch else _other_arch(path, arch, fit.found, build)
    parts.append(f"it fits --arch {other}" if other else "give the architecture it was made with as --arch")
    return "; ".join(parts)


def _other_arch(path: Path, arch: str, found: StateDict, build: Build) -> str | None:
    """An architecture with just these weights: the one the file is called after, or a near variant."""
    near = difflib.get_close_matches(arch, timm.list_models(), n=8, cutoff=0.5)
    for name in [named_after(path), *near]:
        if name is None or name == arch:
            continue
        module = _outline(name, build)
        if module is None:
            continue
        own = {key: shape for key, shape in _shapes(module.state_dict()).items() if not is_head(key, module)}
        for fit in _fits(found, own):
            if fit.matched == len(own) == sum(not is_head(key, module) for key in fit.tensors()):
                return name
    return None


def _outline(arch: str, build: Build) -> nn.Module | None:
    """The network without memory for its weights, for its names and shapes; not all can be built so."""
    if ":" in arch:
        return None
    try:
        return build(arch, meta=True)[0]
    except Exception:
        return None


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def _classifiers(module: nn.Module) -> list[str]:
    names = timm_config(module).get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _top(name: str) -> str:
    return name.partition(".")[0]


def _tops(found: StateDict) -> set[str]:
    return {_top(key) for key in found.tensors}
