"""Which modules to watch, and how what they put out becomes feature maps (B, C, H, W).

A `Probe` names a module and the side of it to tap.  `choose_probes` turns ``"blocks"``, ``"sublayers"``,
``"stages"`` or glob patterns into probes by the structure of the model; `Recorder` hooks them, reads the
form of each output (tokens with a prefix, channels first or last) from the tensor and from what the model
says of itself, reduces it inside the hook, and leaves the model as it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .errors import FourierBiasError
from .spectra import tokens_to_maps

CHOICES = ("blocks", "sublayers", "stages")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Names that timm gives the token-mixing half of a residual block; the other half is its `mlp`.
_MIXERS = ("attn", "token_mixer", "mlp_tokens", "mixer", "attention", "self_attn")
_MLPS = ("mlp", "mlp_channels", "ffn")
# What torch's own modules take for channels, in outputs of four axes.
_FIRST, _LAST = frozenset({"NCHW"}), frozenset({"NHWC"})
_LAYOUTS = {
    **dict.fromkeys((nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.MaxPool2d, nn.AvgPool2d), _FIRST),
    **dict.fromkeys((nn.Linear, nn.LayerNorm), _LAST),
}


@dataclass(frozen=True)
class Probe:
    """A point of the network to watch: the output of ``module``, or its first input.

    ``name`` is the layer's name in the results: the module's path for an output, ``"blocks.0:attn"`` for
    the state after a residual sublayer.  With ``widen`` it gives way to the smallest module around it whose
    output is a map, where its own is none (it works on windows or patches).
    """

    name: str
    module: str
    kind: str
    side: str = "output"
    widen: bool = False


@dataclass(frozen=True)
class Form:
    """How to view an output tensor as (B, C, H, W): ``layout`` NCHW, NHWC, NLC (tokens) or NCL."""

    layout: str
    height: int
    width: int
    prefix: int = 0

    def view(self, x: Tensor) -> Tensor:
        """``x`` as feature maps (B, C, H, W), without a copy; prefix tokens dropped."""
        if self.layout == "NHWC":
            return x.permute(0, 3, 1, 2)
        if self.layout == "NLC":
            return tokens_to_maps(x[:, self.prefix :], (self.height, self.width))
        if self.layout == "NCL":
            return x[:, :, self.prefix :].unflatten(2, (self.height, self.width))
        return x


@dataclass
class Layer:
    """A watched point as it was met: its place in the order of execution and the shape of its maps."""

    name: str
    kind: str
    index: int
    channels: int
    height: int
    width: int
    stride: float
    attrs: dict[str, Any] = field(default_factory=dict)


def choose_probes(model: nn.Module, layers: str | Sequence[str] = "blocks") -> list[Probe]:
    """The probes that ``layers`` names on ``model``.

    ``"blocks"``: every residual or transformer block; ``"sublayers"``: for blocks with a token mixer and
    an MLP the state after each residual (Park & Kim's points), whole blocks elsewhere; ``"stages"``: what
    timm lists in ``feature_info``; otherwise a glob pattern on module names (see `glob_names`); or a list of
    these, of which a layer named twice is taken once.  Raises `FourierBiasError` for a pattern that matches
    nothing.

    >>> import timm
    >>> [p.name for p in choose_probes(timm.create_model("test_vit"), "sublayers")][:2]
    ['blocks.0:attn', 'blocks.0:mlp']
    """
    choosers = {"blocks": _block_probes, "sublayers": _sublayer_probes, "stages": _stage_probes}
    probes: dict[str, Probe] = {}
    for entry in [layers] if isinstance(layers, str) else layers:
        chooser = choosers.get(entry)
        found = chooser(model) if chooser else _pattern_probes(model, entry)
        for probe in found:
            probes.setdefault(probe.name, replace(probe, widen=chooser is not None))
    return list(probes.values())


def kind_of(module: nn.Module) -> str:
    """What a module does: conv, attention, split (some channels each), mlp, pool, embed, or other.

    A block that holds attention is ``"attention"`` whatever else it holds; a module may say its own kind
    in an attribute ``fourierbias_kind``.
    """
    declared = [m.fourierbias_kind for m in module.modules() if hasattr(m, "fourierbias_kind")]
    if hasattr(module, "fourierbias_kind"):
        return module.fourierbias_kind
    if "attention" in declared or any(_is_attention(m) for m in module.modules()):
        return "attention"
    own = type(module).__name__
    if re.search(r"pool|downsampl|patchmerging", own, re.I):
        return "pool"
    if re.search(r"embed|stem", own, re.I):
        return "embed"
    parts = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    if any(isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 for m in parts) or "conv" in declared:
        return "conv"
    if any(isinstance(m, nn.Linear | nn.Conv2d) for m in parts):
        return "mlp" if "mlp" in own.lower() or any(isinstance(m, nn.Linear) for m in parts) else "conv"
    return "other"


def _is_attention(module: nn.Module) -> bool:
    """Spatial self-attention, by its class's name; gates over channels bear the name too, and are not it."""
    if getattr(module, "is_attention", False):  # a convolution that has become attention
        return True
    return _names_attention(type(module).__name__)


@lru_cache(maxsize=1024)
def _names_attention(name: str) -> bool:
    if re.search(r"channel|spatialattn|squeeze|eca|cbam|splitattn|pool|radix|ge?c|drop", name, re.I):
        return False
    return bool(re.search(r"atten|attn|gpsa|mhsa|mhca", name, re.I))


def _weights(module: nn.Module) -> int:
    return sum(p.ndim >= 2 for p in module.parameters())


def _blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Innermost repeated composites: members of a Sequential or ModuleList with two or more weights each.

    A member that itself holds such a list (a stage) is entered, not taken.
    """
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        inner = list(_blocks(child, f"{path}."))
        if inner:
            yield from inner
        elif isinstance(model, _CONTAINERS) and not isinstance(child, _CONTAINERS) and _weights(child) >= 2:
            yield path, child


def _block_probes(model: nn.Module) -> list[Probe]:
    blocks = list(_blocks(model))
    if len(blocks) < 2:
        return _stage_probes(model)
    return [Probe(path, path, kind_of(block)) for path, block in blocks]


def _sublayer_probes(model: nn.Module) -> list[Probe]:
    probes: list[Probe] = []
    split: list[str] = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        mixer = next((name for name in _MIXERS if name in children), None)
        mlp = next((name for name in _MLPS if name in children), None)
        if mixer is None or mlp is None or isinstance(module, _CONTAINERS):
            continue
        after = _after_mixer(list(children), mixer, mlp)
        if after is None:
            continue
        split.append(path)
        mixer_kind = getattr(module, "mixer_kind", None) or kind_of(children[mixer])
        probes.append(Probe(f"{path}:{mixer}", f"{path}.{after}", mixer_kind, side="input"))
        probes.append(Probe(f"{path}:{mlp}", path, "mlp"))
    if not split:
        return _block_probes(model)
    whole = [(path, m) for path, m in _blocks(model) if not any(_related(path, other) for other in split)]
    return [Probe(path, path, kind_of(module)) for path, module in whole] + probes


def _after_mixer(children: Sequence[str], mixer: str, mlp: str) -> str | None:
    """Child whose input is the state after the mixer's residual, from the order the block declares.

    Pre-norm: the norm between mixer and MLP, or the second of two.  Post-norm, or no norms: the MLP itself.
    None, so that the block is taken whole, where the two run side by side, where one norm stands between
    them alone (mixer, norm and MLP share one residual), and where the order says nothing.
    """
    order = list(children)
    if order.index(mixer) > order.index(mlp):
        return None
    norms = [name for name in order if "norm" in name]
    before = [name for name in norms if order.index(name) < order.index(mixer)]
    after = [name for name in norms if order.index(name) > order.index(mlp)]
    between = [name for name in norms if name not in (*before, *after)]
    if before or len(between) > 1:
        return between[-1] if between else None
    return mlp if bool(between) == bool(after) else None


def _related(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def _stage_probes(model: nn.Module) -> list[Probe]:
    modules = dict(model.named_modules())
    infos = getattr(model, "feature_info", None) or []
    listed = [info["module"] for info in (infos if isinstance(infos, list) else infos.get_dicts())]
    names = [_called(name, modules) for name in listed if name]
    if not names or None in names:  # timm lists nothing, or names that are no modules: the end of each run
        names = list({path.rpartition(".")[0]: path for path, _ in _blocks(model)}.values())
    names = names or [name for name, child in model.named_children() if _weights(child)] or [""]
    return [
        Probe(name or type(model).__name__, name, kind_of(modules[name])) for name in dict.fromkeys(names)
    ]


def _called(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The module that ``name`` means, with a list of modules, which is never called, standing for its last.

    Where the network is wrapped in another (an encoder in a classifier) its names lack the wrapper's.
    """
    matches = [name] if name in modules else [path for path in modules if path.endswith(f".{name}")]
    if len(matches) != 1:
        return None
    path = matches[0]
    while isinstance(modules[path], nn.ModuleList):
        if not len(modules[path]):
            return None
        path = f"{path}.{len(modules[path]) - 1}"
    return path


def glob_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The module names that a pattern matches: ``*`` stands for one component or part of it, ``**`` for any.

    >>> glob_names("blocks.*", ["blocks", "blocks.0", "blocks.0.attn"])
    ['blocks.0']
    >>> glob_names("**.attn", ["blocks.0", "blocks.0.attn"])
    ['blocks.0.attn']
    """
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    expression = re.compile("".join(wild.get(part, re.escape(part)) for part in parts))
    return [name for name in names if expression.fullmatch(name)]


def _pattern_probes(model: nn.Module, pattern: str) -> list[Probe]:
    modules = {name: module for name, module in model.named_modules() if name}
    matches = glob_names(pattern, modules)
    if not matches:
        near = get_close_matches(pattern, modules, n=3, cutoff=0.3) or list(modules)[:3]
        raise FourierBiasError(
            f"layers {pattern!r} matches no module of this model: try {', '.join([*near, *CHOICES])}"
        )
    return [Probe(name, name, kind_of(modules[name])) for name in matches]


class Recorder:
    """Context manager that watches ``probes`` on ``model`` and reduces their maps inside the hooks.

    ``reduce(layer, maps)`` is called with each map tensor (B, C, H, W), a view of the live output: it must
    not keep it.  Its result lands in ``values[layer.name]`` until `take` is called.  ``layers`` fills in the
    order of execution, ``skipped`` with a reason for each probe that gave no map.  On exit hooks are gone and
    every module is back in the mode it was in, also after an exception.

    A module called several times in one forward counts once, by its last call, unless ``calls="each"``,
    which names the later ones ``name#2``, ``name#3``, …

    Maps with as many channels as pixels on a side may be channels first or last.  They are read as the
    modules of the same class are elsewhere in the network, or as all others are; where that leaves it open
    they are skipped.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[Probe],
        reduce: Callable[[Layer, Tensor], Any],
        *,
        input_size: tuple[int, int],
        calls: str = "last",
    ) -> None:
        if calls not in ("last", "each"):
            raise FourierBiasError(f"calls={calls!r} is not known: use 'last' or 'each'")
        self.model, self.probes, self.reduce, self.calls = model, list(probes), reduce, calls
        self.input_size = input_size
        self.layers: dict[str, Layer] = {}
        self.skipped: dict[str, str] = {}
        self.repeated: dict[str, int] = {}
        self.values: dict[str, Any] = {}
        self._settled = False
        self._forms: dict[tuple[type, torch.Size], Form | str] = {}
        self._layouts: dict[type, set[str]] | None = None  # by class of module, once a map leaves it open
        self._open = False
        self._counts: dict[str, int] = {}
        self._batch = 0
        modules = list(model.modules())  # a walk through them costs about as much as a hook
        self._grids, self._pyramid = _model_grids(model, modules, input_size), _pyramid_grids(input_size)
        self._prefix = _prefix_tokens(model, modules)
        self._blocked = _blocked_grids(modules)
        self._reroll = getattr(model, "reroll", None)

    def __enter__(self) -> Recorder:
        self._modules = dict(self.model.named_modules())
        self._modes = [(module, module.training) for module in self._modules.values()]
        if any(training for _, training in self._modes):
            self.model.eval()
        self._attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self._detach()
        for module, training in self._modes:
            if module.training != training:
                module.training = training

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Run ``model`` on ``images`` (B, C, H, W) and return what ``reduce`` made of each layer."""
        self._run(images)
        while not self._settled:  # by the first batch
            if self._open and self._layouts is None:
                self._layouts = self._find_layouts(images)
                self._restart(self.probes)
            elif widened := self._widened():
                self._restart(widened)
            else:
                self._settled = True
                uncalled = (probe.name for probe in self.probes if probe.name not in self._counts)
                self.skipped |= dict.fromkeys(uncalled, "it is not called in a forward pass")
                break
            self._run(images)
        values, self.values = self.values, {}
        return values

    def _run(self, images: Tensor) -> None:
        self._batch, self._counts, self.values = len(images), {}, {}
        self.model(images)

    def _attach(self) -> None:
        self._handles = [self._hook(self._modules[probe.module], probe) for probe in self.probes]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _restart(self, probes: Sequence[Probe]) -> None:
        """Forget what was found, and watch ``probes``."""
        self._detach()
        self.probes = list(probes)
        self.layers, self.skipped, self._forms = {}, {}, {}
        self._attach()

    def _widened(self) -> list[Probe] | None:
        """The probes with the enclosing module in place of each that gave no map; None if nothing changes."""
        skipped = [probe for probe in self.probes if probe.widen and probe.name in self.skipped]
        around = {probe.name: self._enclosing(probe) for probe in skipped}
        if not any(around.values()):
            return None
        widened = [around.get(probe.name) or probe for probe in self.probes]
        return list({probe.name: probe for probe in widened}.values())

    def _find_layouts(self, images: Tensor) -> dict[type, set[str]]:
        """In which layouts each class of modules puts out maps, as far as their shapes tell."""
        layouts: dict[type, set[str]] = {}

        def note(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and len(output) == len(images):
                fitting = _LAYOUTS.get(type(module)) or self._fitting(tuple(output.shape))
                if len(fitting) == 1:
                    layouts.setdefault(type(module), set()).update(fitting)

        self._detach()
        self._handles = [module.register_forward_hook(note) for module in self._modules.values()]
        self.model(images)
        return layouts

    def _enclosing(self, probe: Probe) -> Probe | None:
        path = probe.module.rpartition(".")[0]
        while path and isinstance(self._modules[path], _CONTAINERS):
            path = path.rpartition(".")[0]
        return Probe(path, path, kind_of(self._modules[path]), widen=True) if path else None

    def _hook(self, module: nn.Module, probe: Probe) -> torch.utils.hooks.RemovableHandle:
        if probe.side == "input":
            return module.register_forward_pre_hook(
                lambda _, args: self._see(probe, module, args[0] if args else None)
            )
        return module.register_forward_hook(lambda _, __, output: self._see(probe, module, output))

    def _see(self, probe: Probe, module: nn.Module, output: Any) -> None:
        count = self._counts[probe.name] = self._counts.get(probe.name, 0) + 1
        name = probe.name
        if count > 1:
            self.repeated[name] = max(count, self.repeated.get(name, 0))
            name = name if self.calls == "last" else f"{name}#{count}"
        if self._reroll is not None:
            output = self._in_raster_order(probe, output)
        found = output if isinstance(output, str) else self._interpret(output, type(module))
        if isinstance(found, str):
            if name not in self.layers:
                self.skipped[name] = found
            return
        for branch, maps in enumerate(found):
            self._take(f"{name}[{branch}]" if branch else name, probe.kind, maps)

    def _take(self, name: str, kind: str, maps: Tensor) -> None:
        layer = self.layers.get(name) or self._new_layer(name, kind, maps)
        if (layer.channels, layer.height, layer.width) != tuple(maps.shape[1:]):
            raise FourierBiasError(
                f"layer {name} gave maps of {tuple(maps.shape[1:])} after {layer.channels}×{layer.height}×"
                f"{layer.width}: images must share one size"
            )
        self.values[name] = self.reduce(layer, maps)

    def _new_layer(self, name: str, kind: str, maps: Tensor) -> Layer:
        _, channels, height, width = maps.shape
        stride = self.input_size[0] / height
        self.skipped.pop(name, None)
        layer = self.layers[name] = Layer(name, kind, len(self.layers), channels, height, width, stride)
        return layer

    def _interpret(self, output: Any, source: type) -> list[Tensor] | str:
        """The first tensor in ``output`` that is a map (B, C, H, W), as such; or why there is none.

        An output that is nothing but maps of one layout, on different grids, is that of a network of several
        branches (HRNet, CrossViT): then all of them.
        """
        if isinstance(output, Tensor):  # the common case, in the hot path
            form = self._cached_form(output, source)
            return [form.view(output.detach())] if isinstance(form, Form) else form
        tensors = list(_tensors(output))
        forms = [self._cached_form(tensor, source) for tensor in tensors]
        found = [
            (tensor, form) for tensor, form in zip(tensors, forms, strict=True) if isinstance(form, Form)
        ]
        if not found:
            return str(forms[-1]) if forms else "its output holds no tensor"
        grids = {(form.height, form.width) for _, form in found}
        layouts = {form.layout for _, form in found}
        branches = len(found) == len(tensors) == len(grids) and len(layouts) == 1
        return [form.view(tensor.detach()) for tensor, form in (found if branches else found[:1])]

    def form_of(self, output: Any, batch: int, source: type) -> Form | str:
        """How the first tensor of an output for ``batch`` images is viewed as maps, or why it cannot be.

        ``source`` is the class of the module that puts it out, or takes it in.
        """
        self._batch = batch
        tensor = next(_tensors(output), None)
        return "its output holds no tensor" if tensor is None else self._cached_form(tensor, source)

    def _cached_form(self, x: Tensor, source: type) -> Form | str:
        form = self._forms.get((source, x.shape))
        if form is None:
            form = self._forms[source, x.shape] = self._form(x, source)
        return form

    def _in_raster_order(self, probe: Probe, output: Any) -> Any:
        """Hiera's tokens, which it keeps in the order of its mask units, put back by its own `reroll`."""
        if not isinstance(output, Tensor) or output.ndim != 3:
            return output
        block = re.match(r"blocks\.(\d+)", probe.module)
        if block is None:
            return output
        _, size = self._reroll.schedule[int(block[1])]
        if output.shape[1] != math.prod(size):
            return f"{output.shape[1]} tokens that are not in the order of the {size[0]}×{size[1]} grid"
        return self._reroll(output, int(block[1]))

    def _form(self, x: Tensor, source: type) -> Form | str:
        shape = tuple(x.shape)
        if not x.is_floating_point():
            return f"its output is {x.dtype}, not a feature map"
        if x.ndim not in (3, 4) or 0 in shape:
            return f"an output of shape {shape} is not a spatial map"
        if shape[0] != self._batch:
            return f"an output of shape {shape} is not one map per image (windows or patches in the batch)"
        if x.ndim == 3:
            return self._token_form(shape)
        if self._is_attention(x):
            return f"an output of shape {shape} is attention between tokens, not a spatial map"
        return self._map_form(shape, source)

    def _is_attention(self, x: Tensor) -> bool:
        """Whether x (B, heads, N, N) is between tokens: rows that sum to one, as many as the model has."""
        if x.shape[2] != x.shape[3] or not self._token_grid(x.shape[2], self._grids):
            return False
        first = x[:1].detach().float()
        return bool(first.min() >= 0 and (first.sum(-1) - 1).abs().max() < 1e-2)

    def _map_form(self, shape: tuple[int, ...], source: type) -> Form | str:
        _, a, b, c = shape
        if (a, b) in self._blocked:
            return f"an output of shape {shape} is {a} windows of {b} tokens"
        layouts = self._fitting(shape)
        if len(layouts) == 2:
            layouts = self._layouts_of(source)
        if len(layouts) == 2:
            self._open = True
            return f"an output of shape {shape} may have its channels first or last"
        if not layouts:
            return f"an output of shape {shape} has no side that fits the {self._size_text()} input"
        return Form("NHWC", a, b) if layouts == _LAST else Form("NCHW", b, c)

    def _fitting(self, shape: tuple[int, ...]) -> Set[str]:
        """The layouts in which an output of some shape can be a map."""
        _, a, b, c = shape
        fits = {"NCHW": self._fits(b, c), "NHWC": self._fits(a, b)}
        if fits["NHWC"] and str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC"):
            return {"NHWC"}
        return {layout for layout, fit in fits.items() if fit}

    def _layouts_of(self, source: type) -> Set[str]:
        """The layouts of a class of modules, if not known by itself then from where their shapes tell."""
        found = self._layouts or {}
        own = _LAYOUTS.get(source) or found.get(source, set())
        return own or set().union(*found.values()) or {"NCHW", "NHWC"}

    def _fits(self, height: int, width: int) -> bool:
        """Whether a grid can be the input, downscaled: both sides by one factor, up to rounding."""
        image_h, image_w = self.input_size
        return (
            height <= image_h
            and width <= image_w
            and abs(height / image_h - width / image_w) < max(1 / image_h, 1 / image_w) * 1.5
        )

    def _token_form(self, shape: tuple[int, ...]) -> Form | str:
        _, length, channels = shape
        if length == 1:
            return "one token per image (a class token or a pooled vector) is not a spatial map"
        grid = self._token_grid(length, self._grids) or self._token_grid(length, self._pyramid)
        if grid:
            return Form("NLC", *grid)
        # Channels first only on a grid that the model names, where it names one: many widths are squares.
        grid = self._token_grid(channels, self._grids or self._pyramid)
        return Form("NCL", *grid) if grid else f"{length} tokens fit no grid of the {self._size_text()} input"

    def _token_grid(self, length: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int, int] | None:
        """The first of ``grids`` that ``length`` tokens fill, and how many prefix tokens that leaves."""
        for prefix in range(self._prefix + 1):
            for height, width in grids:
                if height * width == length - prefix:
                    return height, width, prefix
        return None

    def _size_text(self) -> str:
        return f"{self.input_size[0]}×{self.input_size[1]}"


def _tensors(output: Any) -> Iterator[Tensor]:
    """Tensors in an output that may be a tensor, a tuple, a list, a dict or a Hugging Face model output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _said(module: nn.Module, name: str) -> Any:
    """What a module says of itself in an attribute, else None; getattr is slow to find none."""
    places = (vars(module), module._parameters, module._buffers, module._modules)
    if any(name in place for place in places) or hasattr(type(module), name):
        return getattr(module, name, None)
    return None


def _model_grids(
    model: nn.Module, modules: Sequence[nn.Module], input_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Token grids that the model says it has at this input size, most trusted first."""
    grids = []
    for module in modules:
        if _said(module, "dynamic_img_size"):
            embed = _said(module, "patch_embed")
            if hasattr(embed, "dynamic_feat_size"):
                grids.append(tuple(embed.dynamic_feat_size(input_size)))
        grids += _embedding_grid(module)
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if isinstance(patch, int):  # Hugging Face vision transformers
        grids.append((input_size[0] // patch, input_size[1] // patch))
    return list(dict.fromkeys(grids))


def _embedding_grid(module: nn.Module) -> list[tuple[int, int]]:
    """The grid that a patch embedding has, or that follows from its image and patch sizes."""
    if "embed" not in type(module).__name__.lower():
        return []
    grid, image, patch = (getattr(module, name, None) for name in ("grid_size", "img_size", "patch_size"))
    if _is_pair(grid):
        return [tuple(grid)]
    if _is_pair(image) and _is_pair(patch):
        return [(image[0] // patch[0], image[1] // patch[1])]
    return []


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int) for v in value)


def _pyramid_grids(input_size: tuple[int, int]) -> list[tuple[int, int]]:
    """The grids that are the input downscaled by a whole factor, up to rounding; finest first."""
    height, width = input_size
    grids = []
    for factor in range(1, min(height, width) + 1):
        grids += [(height // factor, width // factor), (-(-height // factor), -(-width // factor))]
    # One token is a class token or a pooled vector, never a map worth a spectrum.
    return [grid for grid in dict.fromkeys(grids) if grid[0] * grid[1] > 1]


def _prefix_tokens(model: nn.Module, modules: Sequence[nn.Module]) -> int:
    """The largest number of tokens that may stand before those of the image; one where nothing is said."""
    registers = getattr(getattr(model, "config", None), "num_register_tokens", None) or 0
    said = [_said(module, "num_prefix_tokens") for module in modules]
    return max((count for count in said if isinstance(count, int)), default=1 + registers)


def _blocked_grids(modules: Sequence[nn.Module]) -> set[tuple[int, int]]:
    """(windows, tokens in each) of NesT, whose outputs (B, windows, tokens, C) may pass for channels last."""
    return {
        tuple(module.pos_embed.shape[1:3])
        for module in modules
        if _said(module, "block_size") is not None and isinstance(_said(module, "pos_embed"), Tensor)
    }
