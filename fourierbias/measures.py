"""Measures of attention beside the spectrum: how far heads look, how they differ, what gates let in.

Attention maps grow with the square of the tokens, so none is kept: `AttentionRecorder` reduces each inside
the hook that sees it, to one number per image and head.

*Attention distance* is the nonlocality of ConViT (d'Ascoli et al. 2021, arXiv 2103.10697, equation 8) per
head, D = 1/N Σ_ij A_ij |δ_ij|, with |δ_ij| the Euclidean distance of query i and key j in patches; the paper
averages it over heads.  To leave class and register tokens out of queries and keys and to renormalise the
rows is ours, and so are the forms for windows, pooled keys and strided queries.  *Head diversity*, the
dispersion of these distances over heads, is named without a formula by the EIT paper (arXiv 2203.07116);
the standard deviation is our reading.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from timm.models.convit import GPSA
from torch import Tensor, nn

from .errors import FourierBiasError
from .models.reparam import ReparamConv2d
from .probes import Form, Layer, Recorder, _is_attention

ATTENTION_MEASURES = ("attention_distance", "head_diversity", "gate", "content_share")

_OF_MAPS = {"attention_distance", "head_diversity"}
_OF_GATES = {"gate", "content_share"}
# Rows of a half-precision softmax sum to one only up to its rounding.
_ROW_TOLERANCE = 0.02


class Lattice(NamedTuple):
    """Tokens in raster order at ``offset + step · index`` along both sides, in patches."""

    height: int
    width: int
    step: float = 1.0
    offset: float = 0.0

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.height * self.width

    def positions(self) -> Tensor:
        """Vertical and horizontal coordinates of each token, (H·W, 2), float64."""
        y, x = (self.offset + self.step * torch.arange(n, dtype=torch.float64) for n in self[:2])
        return torch.cartesian_prod(y, x)


def attention_distance(
    attention: Tensor, grid: tuple[int, int], prefix: int = 0, *, queries: Lattice | None = None
) -> Tensor:
    """Mean distance in patches at which each head attends, (B, heads), from its maps (B, heads, N, N).

    Rows are queries; ``prefix`` leading tokens are taken out of queries and keys, and rows renormalised over
    the keys left.  ``grid`` (H, W), or a `Lattice`, holds the keys, ``queries`` the queries where they lie
    elsewhere (a strided layer).  A row without any mass on the keys (a tap that looks outside the map) is
    left out of the mean over queries.  Times the pixels per patch, it is in input pixels.

    Raises `FourierBiasError` when the maps are not of that many queries and keys.  Source: ConViT
    (arXiv 2103.10697), equation 8, per head; the treatment of prefix tokens is ours.

    >>> uniform = torch.full((1, 1, 4, 4), 1 / 4)  # on 2×2: distances 0, 1, 1, √2 from every corner
    >>> round(attention_distance(uniform, (2, 2)).item(), 4)
    0.8536
    """
    keys = Lattice(*grid)
    queries = queries or keys
    expected = (queries.size + prefix, keys.size + prefix)
    if attention.ndim != 4 or tuple(attention.shape[-2:]) != expected:
        raise FourierBiasError(
            f"attention of shape {tuple(attention.shape)} is not (B, heads, {expected[0]}, {expected[1]}), "
            f"{queries.size} queries and {keys.size} keys and {prefix} prefix tokens in both"
        )
    batch, heads = attention.shape[:2]
    if attention.dtype not in (torch.float32, torch.float64):
        attention = attention.float()
    # Distance and mass of all rows in one product, batched over queries: no temporary of the map's size.
    rows = attention.detach()[:, :, prefix:].flatten(0, 1).transpose(0, 1)
    weights = _distance_weights(keys, queries, prefix, attention.dtype, attention.device)
    with torch.autocast(attention.device.type, enabled=False):
        moved, mass = torch.bmm(rows, weights).unbind(-1)
    present = mass != 0
    distances = torch.where(present, moved / mass, 0).sum(dim=0) / present.sum(dim=0).clamp_min(1)
    return distances.view(batch, heads)


@lru_cache(maxsize=16)
def _distance_weights(
    keys: Lattice, queries: Lattice, prefix: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(queries, prefix + keys, 2): for each query the distance of every key, and 1; 0 for prefix keys."""
    # A product with an inference tensor would poison later autograd; this outlives the capture that made it.
    with torch.inference_mode(False):
        distances = torch.cdist(queries.positions(), keys.positions())
        weights = torch.zeros(queries.size, prefix + keys.size, 2, dtype=dtype, device=device)
        weights[:, prefix:, 0] = distances
        weights[:, prefix:, 1] = 1
        return weights


def head_diversity(distances: Tensor) -> Tensor:
    """Standard deviation over heads (population) of attention distances (B, heads), per image: (B, 1).

    Averaged over images afterwards, so it also counts how heads differ on one image but not on average.
    The heads are all there are, hence no Bessel correction; one head has no diversity, 0.  Our formula for
    the quantity that the EIT paper (arXiv 2203.07116) names.

    >>> head_diversity(torch.tensor([[1.0, 3.0]])).item()
    1.0
    """
    return distances.std(dim=-1, correction=0, keepdim=True)


class _View(NamedTuple):
    """How the maps of one module are read: where keys and queries lie, and what one patch is in pixels."""

    keys: Lattice
    queries: Lattice
    prefix: int = 0
    windows: int = 1
    stride: float | None = None

    def distances(self, attention: Tensor) -> Tensor:
        """Attention distance per image and head; windows averaged."""
        found = attention_distance(attention, self.keys, self.prefix, queries=self.queries)
        return found.unflatten(0, (-1, self.windows)).mean(dim=1)


def held_modules(modules: Iterable[str], recorder: Recorder) -> dict[str, list[str]]:
    """The layers of ``recorder`` that hold ``modules``, each the smallest around it: {layer: [module, …]}.

    A layer named ``block:attn`` holds what lies in ``block.attn``.  Modules outside all layers are left out.
    """
    regions = {
        probe.name: probe.name.replace(":", ".") if probe.side == "input" else probe.module
        for probe in recorder.probes
    }
    held: dict[str, list[str]] = {}
    for module in modules:
        path, _, call = module.partition("#")
        around = [
            layer
            for layer in recorder.layers
            if layer.partition("#")[2] == call and _inside(path, regions[_path(layer)])
        ]
        if around:
            held.setdefault(max(around, key=lambda layer: len(regions[_path(layer)])), []).append(module)
    return {layer: held[layer] for layer in recorder.layers if layer in held}


def _inside(path: str, region: str) -> bool:
    return not region or path == region or path.startswith(f"{region}.")


def _path(name: str) -> str:
    """The module of a later call: ``blocks.0#2`` is ``blocks.0``."""
    return name.partition("#")[0]


def _forms_map(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attn_drop", None), nn.Module) or isinstance(
        module, nn.MultiheadAttention
    )


def _is_innermost_attention(module: nn.Module) -> bool:
    parts = [part for part in module.modules() if part is not module]
    weighs = next(module.parameters(), None) is not None
    return weighs and _is_attention(module) and not any(_forms_map(p) or _is_attention(p) for p in parts)


class AttentionRecorder:
    """Context manager that measures the attention of ``model`` while it runs, module by module.

    It listens to every forward of ``model`` on images (B, C, H, W), whoever calls it; `take` then gives
    ``{module name: {measure: (B, K)}}`` for the last one: ``attention_distance`` (K = heads, in patches of
    that module, of ``stride[name]`` input pixels), ``head_diversity`` (K = 1), and for gated modules ``gate``
    and ``content_share`` (K = heads).  ``gate`` is the share that the gate lets through and ``gate_of[name]``
    says of what: position for ConViT's σ(λ), content for the linear gate of `ReparamConv2d`;
    ``content_share`` is that of content everywhere.  Window attention is measured inside each window and
    averaged over the windows of an image.

    Recognised are modules that hand the softmax to a child ``attn_drop`` (timm's), `nn.MultiheadAttention`,
    and `ReparamConv2d` in attention form (one head per tap, padding counted with its distance).  Others are
    named with a reason in ``skipped``.  For the time being fused attention, which forms no map, is off in the
    watched modules; on exit, also after an exception, it is as it was and hooks are gone.

    A module called several times in one forward counts by its last call, unless ``calls="each"``, which
    names the later ones ``name#2``, ``name#3``, …

    >>> import timm
    >>> model = timm.create_model("test_vit").eval()
    >>> with torch.no_grad(), AttentionRecorder(model) as recorder:
    ...     _ = model(torch.rand(2, 3, 160, 160))
    >>> {name: tuple(v.shape) for name, v in recorder.take()["blocks.0.attn"].items()}
    {'attention_distance': (2, 2), 'head_diversity': (2, 1)}
    """

    def __init__(
        self, model: nn.Module, measures: Iterable[str] = ATTENTION_MEASURES, *, calls: str = "last"
    ) -> None:
        unknown = set(measures) - set(ATTENTION_MEASURES)
        if unknown:
            raise FourierBiasError(
                f"measure {min(unknown)!r} is not of attention: choose from {', '.join(ATTENTION_MEASURES)}"
            )
        self.model, self.measures, self.calls = model, set(measures), calls
        self.skipped: dict[str, str] = {}
        self.stride: dict[str, float | None] = {}
        self.gate_of: dict[str, str] = {}
        self._mapped: list[str] = []
        self._reader: Recorder | None = None
        self._forms: dict[str, Form | str] = {}
        self._views: dict[tuple[Any, ...], _View | str] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._values: dict[str, dict[str, Tensor]] = {}
        self._held: dict[str, list[str]] = {}
        self._batch = 0

    def __enter__(self) -> AttentionRecorder:
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.callback(self._undo.close)
            if self.measures:
                self._hooked(self.model.register_forward_pre_hook(self._start))
                for name, module in self.model.named_modules():
                    self._watch(name, module)
            stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def take(self) -> dict[str, dict[str, Tensor]]:
        """What the last forward gave, module by module; nothing more until the next forward."""
        values, self._values = self._values, {}
        for name in self._mapped:
            # A module that was never called (a twin of another network's) has nothing to be skipped.
            if name in self._forms and "attention_distance" not in values.get(name, ()):
                self.skipped.setdefault(name, "no map passed its attn_drop")
        return values

    def take_layers(self, recorder: Recorder) -> dict[str, dict[str, Tensor]]:
        """`take`, for the layers of ``recorder``: heads of several modules in one layer side by side.

        Distances are in patches of the layer, and the diversity is over all its heads.  Only the measures
        asked for are given.
        """
        values = self.take()
        self._held = held_modules(values, recorder)
        return {
            layer: self._joined([(module, values[module]) for module in modules], recorder.layers[layer])
            for layer, modules in self._held.items()
        }

    def _joined(self, parts: Sequence[tuple[str, dict[str, Tensor]]], layer: Layer) -> dict[str, Tensor]:
        joined = {
            measure: torch.cat(rows, dim=1)
            for measure in ("gate", "content_share")
            if (rows := [values[measure] for _, values in parts if measure in values])
        }
        distances = [
            values["attention_distance"] * ((self.stride[_path(name)] or layer.stride) / layer.stride)
            for name, values in parts
            if "attention_distance" in values
        ]
        if distances:
            joined["attention_distance"] = torch.cat(distances, dim=1)
            joined["head_diversity"] = head_diversity(joined["attention_distance"])
        return {measure: rows for measure, rows in joined.items() if measure in self.measures}

    def layer_attrs(self, layer: Layer) -> dict[str, dict[str, Any]]:
        """What belongs beside each measure of a layer: units, the attention modules, what gates let in."""
        modules = self._held.get(layer.name, [])
        units = {"units": "patches", "pixels_per_patch": layer.stride, "modules": modules}
        gates = sorted({self.gate_of[_path(module)] for module in modules if _path(module) in self.gate_of})
        attrs = {"attention_distance": units, "head_diversity": units}
        attrs |= {"gate": {"share_of": " and ".join(gates)}, "content_share": {"share_of": "content"}}
        return attrs

    def missing(self, present: set[str]) -> dict[str, str]:
        """Why measures asked for are not ``present`` on any captured layer: {measure: reason}."""
        reasons = dict.fromkeys(_OF_GATES, "no attention of this model has a gate")
        reasons |= dict.fromkeys(_OF_MAPS, "this model has no attention")
        if self.stride:
            reasons |= dict.fromkeys(_OF_MAPS, "no captured layer holds attention")
        elif self.skipped:
            name, reason = next(iter(self.skipped.items()))
            reasons |= dict.fromkeys(_OF_MAPS, f"no attention could be read (first: {name}: {reason})")
        if self.gate_of:
            reasons |= dict.fromkeys(_OF_GATES, "no captured layer holds a gated attention")
        absent = self.measures - present
        return {name: reasons[name] for name in ATTENTION_MEASURES if name in absent}

    def _hooked(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._undo.callback(handle.remove)

    def _watch(self, name: str, module: nn.Module) -> None:
        if isinstance(module, ReparamConv2d):
            if module.is_attention:
                self._watch_reparam(name, module)
            return
        if isinstance(module, GPSA) and self.measures & _OF_GATES:
            self.gate_of[name] = "position"
            self._hooked(module.register_forward_hook(partial(self._see_gpsa, name)))
        if not self.measures & _OF_MAPS:
            return
        if _forms_map(module):
            self._mapped.append(name)
            watch = self._watch_torch if isinstance(module, nn.MultiheadAttention) else self._watch_timm
            watch(name, module)
        elif _is_innermost_attention(module):
            self.skipped[name] = f"how {type(module).__name__} forms its map is not known"

    def _watch_reparam(self, name: str, module: ReparamConv2d) -> None:
        """A reparameterised convolution forms no map of its own accord: it is asked for its distances."""
        self.gate_of[name] = "position" if module.gate_kind == "sigmoid" else "content"

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            position, content = module.shares()
            gate = position if self.gate_of[name] == "position" else content
            shares = {"gate": gate, "content_share": content}
            self._record(name, {m: share.detach().expand(self._batch, -1) for m, share in shares.items()})
            if self.measures & _OF_MAPS:
                self.stride[name] = self._reader.input_size[0] / args[0].shape[-2]
                self._see_distances(name, torch.stack([module.attention_distance(x[None]) for x in args[0]]))

        self._hooked(module.register_forward_pre_hook(see))

    def _watch_timm(self, name: str, module: nn.Module) -> None:
        """timm's attention: unless it is fused, the softmax goes through ``attn_drop``."""
        if getattr(module, "fused_attn", False):
            self._undo.callback(setattr, module, "fused_attn", module.fused_attn)
            module.fused_attn = False

        def see_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see_input(name, next(iter((*args, *kwargs.values())), None))

        def see_map(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._see_map(name, module, args[0])

        self._hooked(module.register_forward_pre_hook(see_input, with_kwargs=True))
        self._hooked(module.attn_drop.register_forward_pre_hook(see_map))

    def _watch_torch(self, name: str, module: nn.MultiheadAttention) -> None:
        """torch's attention returns its map when asked to; the caller gets what the caller asked for."""
        names = tuple(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]
        asked: dict[str, Any] = {}

        def ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            given = dict(zip(names, args, strict=False)) | kwargs
            asked.update(given)
            query = given["query"]
            self._see_input(name, query if module.batch_first else query.transpose(0, 1))
            return (), given | {"need_weights": True, "average_attn_weights": False}

        def see(_: nn.Module, __: tuple, ___: dict, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
            outputs, attention = output
            self._see_map(name, module, attention)
            if not asked.get("need_weights", True):
                attention = None
            elif asked.get("average_attn_weights", True):
                attention = attention.mean(dim=1)
            asked.clear()
            return outputs, attention

        self._hooked(module.register_forward_pre_hook(ask, with_kwargs=True))
        self._hooked(module.register_forward_hook(see, with_kwargs=True))

    def _start(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Before each forward: forget the last; the size of the images gives grids of tokens a meaning."""
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 4:
            raise FourierBiasError("attention is measured on images (B, C, H, W), the model's first argument")
        self._counts, self._values, self._batch = {}, {}, len(args[0])
        size = tuple(args[0].shape[-2:])
        if self._reader is None or self._reader.input_size != size:
            self._reader = Recorder(self.model, (), lambda layer, maps: None, input_size=size)
            self._views.clear()

    def _see_input(self, name: str, tokens: Any) -> None:
        self._forms[name] = self._reader.form_of(tokens, self._batch, type(self.model.get_submodule(name)))

    def _see_map(self, name: str, module: nn.Module, attention: Tensor) -> None:
        key = (name, len(attention) / self._batch, *attention.shape[1:])
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._view(name, module, attention)
        if isinstance(view, str):
            self.skipped[name] = view
            return
        self.stride[name] = view.stride
        self._see_distances(name, view.distances(attention))

    def _see_distances(self, name: str, distances: Tensor) -> None:
        self._record(name, {"attention_distance": distances, "head_diversity": head_diversity(distances)})

    def _see_gpsa(self, name: str, module: GPSA, *_: Any) -> None:
        gate = module.gating_param.detach().sigmoid().expand(self._batch, -1)
        self._record(name, {"gate": gate, "content_share": 1 - gate})

    def _record(self, name: str, values: dict[str, Tensor]) -> None:
        for measure, rows in values.items():
            count = self._counts[name, measure] = self._counts.get((name, measure), 0) + 1
            called = name if count == 1 or self.calls == "last" else f"{name}#{count}"
            self._values.setdefault(called, {})[measure] = rows

    def _view(self, name: str, module: nn.Module, attention: Tensor) -> _View | str:
        """How to read a map (B, heads, queries, keys), or why it cannot be read; looked at once per shape."""
        shape = tuple(attention.shape)
        if re.search(r"xca|crosscov|channel", type(module).__name__, re.I):
            return "it attends to channels, not to positions"
        if attention.ndim != 4:
            return f"a map of shape {shape} is not (images, heads, queries, keys)"
        first = attention[:1].detach().float()
        if first.min() < 0 or (first.sum(dim=-1) - 1).abs().max() > _ROW_TOLERANCE:
            return "the rows of its map are no shares that sum to one"
        if len(attention) != self._batch:
            return self._window_view(module, shape)
        form = self._forms[name]
        if isinstance(form, str):
            return form
        grid = Lattice(form.height, form.width)
        stride = self._reader.input_size[0] / form.height
        if shape[-2] != grid.size + form.prefix:
            return f"its {shape[-2]} queries are not the {form.height}×{form.width} positions of its input"
        if shape[-1] == shape[-2]:
            return _View(grid, grid, form.prefix, stride=stride)
        for pool in range(2, min(form.height, form.width) + 1):
            if shape[-1] * pool**2 == grid.size and not form.prefix:
                # A pooled key lies at the centre of the patches it stands for.
                keys = Lattice(form.height // pool, form.width // pool, float(pool), (pool - 1) / 2)
                return _View(keys, grid, stride=stride)
        return f"its {shape[-1]} keys are not the {form.height}×{form.width} positions of its input"

    def _window_view(self, module: nn.Module, shape: tuple[int, ...]) -> _View | str:
        window = getattr(module, "window_size", None)
        sides = (window, window) if isinstance(window, int) else tuple(window or ())
        windows, rest = divmod(shape[0], self._batch)
        if rest or len(sides) != 2 or shape[-2:] != (math.prod(sides),) * 2:
            return f"a map of shape {shape} over {self._batch} images is of windows of unknown shape"
        height, width = self._reader.input_size
        pitch = math.sqrt(height * width / (windows * math.prod(sides)))
        # Padded windows hold more positions than the map: then the pitch is not known from them.
        stride = pitch if pitch.is_integer() else None
        return _View(Lattice(*sides), Lattice(*sides), windows=windows, stride=stride)
