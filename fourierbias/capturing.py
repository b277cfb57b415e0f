"""Images through a model, past the probes, into spectra: the main job, streaming.

Nothing that grows with the number of images is kept: each hook reduces its maps to a short vector per
image, and the accumulators hold sums.  Maps are stored only on request, and go to the file as they come.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from .accumulate import Moments
from .errors import FourierBiasError
from .images import ImageSource, open_images
from .measures import ATTENTION_MEASURES, AttentionRecorder
from .models.loading import LoadedModel, load_model
from .probes import CHOICES, Layer, Recorder, choose_probes
from .spectra import MapReducer, Projection, make_spectrum
from .store import Capture, CapturedLayer, Measure, Writer

MEASURES = ("feature_variance", "high_frequency_share", *ATTENTION_MEASURES)

Progress = Callable[[int, int], None]


class LayerSums:
    """The accumulators of every layer of one capture; merge with those of other images, then `results`."""

    def __init__(self, reducer: MapReducer) -> None:
        self.reducer = reducer
        self.layers: dict[str, Layer] = {}
        self.moments: dict[str, dict[str, Moments]] = {}

    def update(self, layer: Layer, values: dict[str, Tensor]) -> None:
        """Add one batch of per-image values, as `MapReducer` gives them, and any others (B, K)."""
        if layer.name not in self.layers:
            self.layers[layer.name] = layer
            self.moments[layer.name] = self.reducer.moments(layer.height, layer.width)
        moments = self.moments[layer.name]
        for name, rows in values.items():
            if name not in moments:
                moments[name] = Moments(rows.shape[1])
            moments[name].update(rows.cpu().numpy())

    def merge(self, other: LayerSums) -> None:
        """Add what ``other`` accumulated over other images of the same model and layers."""
        if list(self.layers) != list(other.layers):
            raise FourierBiasError("cannot merge captures of different layers")
        for name, moments in self.moments.items():
            for quantity, sums in moments.items():
                sums.merge(other.moments[name][quantity])

    def results(
        self, about: Callable[[Layer], dict[str, Any]] = lambda layer: {}
    ) -> dict[str, CapturedLayer]:
        """Spectra and measures of each layer, in the order of execution, with its place and shape.

        ``about`` gives the attributes that belong beside a layer's measures, by measure.
        """
        last = max(len(self.layers) - 1, 1)
        return {
            name: self._result(layer, {"depth": layer.index / last}, about(layer))
            for name, layer in self.layers.items()
        }

    def _result(self, layer: Layer, place: dict[str, Any], about: dict[str, Any]) -> CapturedLayer:
        described = asdict(layer)
        attrs = {**described.pop("attrs"), **described, **place}
        grid = (layer.height, layer.width)
        moments = self.reducer.quantities(self.moments[layer.name], *grid)
        spectra = {
            path: make_spectrum(moments, path, grid, eps=self.reducer.eps, attrs=attrs)
            for path in self.reducer.paths
        }
        measures = {"feature_variance": _measure(moments["feature_variance"])}
        if "high_frequency_share" in moments:
            measures["high_frequency_share"] = _measure(
                moments["high_frequency_share"], axis=self.reducer.cutoffs, axis_name="cutoff"
            )
        for name in ATTENTION_MEASURES:
            if name in moments:
                heads = range(moments[name].size) if name != "head_diversity" else None
                measures[name] = _measure(moments[name], heads, "head" if heads else "", about.get(name, {}))
        return CapturedLayer(attrs, spectra, measures)


def _measure(
    moments: Moments,
    axis: Sequence[float] | None = None,
    axis_name: str = "",
    attrs: dict[str, Any] | None = None,
) -> Measure:
    axis = None if axis is None else np.asarray(axis)
    return Measure(moments.mean, moments.standard_error, moments.count, axis, axis_name, attrs or {})


def capture(
    model: nn.Module | LoadedModel | str | os.PathLike[str],
    images: Any = "photos",
    *,
    layers: str | Sequence[str] = "blocks",
    output: str | os.PathLike[str] | None = None,
    features: bool = False,
    paths: Sequence[str] = ("diagonal",),
    measures: str | Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    workers: int = 0,
    seed: int = 0,
    eps: float = 1e-6,
    dead_channels: str = "keep",
    calls: str = "last",
    feature_dtype: str = "float16",
    compression: str = "gzip",
    overwrite: bool = False,
    progress: bool | Progress | None = None,
) -> Capture:
    """Spectra of a model's feature maps, layer by layer, over a set of images.

    ``model``: a module, a timm name (seeded random weights), or a checkpoint; `models.load_model` has the
    options of the last two.  ``images``: a tensor (N, C, H, W) already preprocessed, a ``Dataset`` or
    ``DataLoader``, a folder or file, or ``"photos"``; ``limit`` of them.  ``layers``: ``"blocks"``,
    ``"sublayers"``, ``"stages"``, or glob patterns on module names.  ``paths``, ``eps`` and
    ``dead_channels`` are those of `spectrum`.  ``measures`` adds to each layer any of `MEASURES`, or
    ``"all"``: ``"high_frequency_share"``, and of layers that hold attention those of `AttentionRecorder`;
    what a model does not have is named with a reason in ``attrs["skipped_measures"]``.

    ``output`` also writes the HDF5 file, with ``features`` the maps themselves, (N, C, H, W) per layer.
    ``progress``: True for a bar on stderr, or a function called with (done, total) images.  Memory does not
    grow with the number of images.  The model runs in eval mode without gradients and is left as it was:
    mode, weights, hooks, device, also after an exception.

    Raises `FourierBiasError` for input that does not fit, before anything is written.  Images whose maps
    hold NaN or Inf are left out of that layer, with a warning.

    >>> import torch, timm
    >>> c = capture(timm.create_model("test_vit"), torch.rand(3, 3, 160, 160), layers="sublayers")
    >>> [name for name in c][:2], c["blocks.0:attn"].count
    (['blocks.0:attn', 'blocks.0:mlp'], 3)
    """
    measures = _chosen_measures(measures)
    if features and output is None:
        raise FourierBiasError("features=True stores the maps in a file: name it with output=")
    loaded = model if isinstance(model, LoadedModel) else load_model(model, seed=seed)
    network = loaded.module
    reducer = MapReducer(
        paths, eps=eps, dead_channels=dead_channels, high_frequency_share="high_frequency_share" in measures
    )
    probes = choose_probes(network, layers)
    source = open_images(
        images, loaded.preprocessing, images=limit, batch_size=batch_size, workers=workers, seed=seed
    )
    sums = LayerSums(reducer)
    seen: list[int] = []

    def reduce(layer: Layer, maps: Tensor) -> tuple[Projection, Tensor | None]:
        return reducer.project(maps), maps.to(getattr(torch, feature_dtype), copy=True) if features else None

    with contextlib.ExitStack() as stack:
        writer = None
        if output is not None:
            writer = Writer(output, overwrite=overwrite, feature_dtype=feature_dtype, compression=compression)
            stack.callback(writer.abandon)  # a no-op once the file has its final name
        report = stack.enter_context(_progress(progress, len(source)))
        device = stack.enter_context(_on_device(network, device, keep=isinstance(model, nn.Module)))
        stack.enter_context(torch.no_grad())
        attention = AttentionRecorder(network, measures & set(ATTENTION_MEASURES), calls=calls)
        stack.enter_context(attention)
        recorder: Recorder | None = None
        for batch in source:
            if recorder is None:
                recorder = stack.enter_context(
                    Recorder(
                        network,
                        probes,
                        reduce,
                        input_size=tuple(batch.images.shape[-2:]),
                        calls=calls,
                        widen=_is_choice(layers),
                    )
                )
            reduced = _forward(recorder, batch.images.to(device))
            values = reducer.finish([projection for projection, _ in reduced.values()])
            attended = attention.take_layers(recorder)
            for (name, (_, maps)), rows in zip(reduced.items(), values, strict=True):
                sums.update(recorder.layers[name], rows | attended.get(name, {}))
                if maps is not None:
                    writer.append_maps(name, maps.cpu().numpy())
            seen += batch.indices
            report(len(seen) + len(source.failures), len(source))
        if recorder is None or not recorder.layers:
            raise FourierBiasError(_no_maps(recorder))
        layer_results = sums.results(attention.layer_attrs)
        result = Capture(
            _describe(loaded, source, recorder, sums, layers=layers, device=device, seed=seed)
            | {"skipped_measures": attention.missing(layer_results), "skipped_attention": attention.skipped},
            layer_results,
            images=[source.names[index] for index in seen],
            labels=None if source.labels is None else [source.labels[index] for index in seen],
        )
        _warn_rejected(result)
        return writer.finish(result) if writer else result


def inspect(
    model: nn.Module | LoadedModel | str | os.PathLike[str], layers: str | Sequence[str] = "blocks"
) -> tuple[list[Layer], dict[str, str]]:
    """The layers a capture of ``model`` would take, in order, and why others would be skipped.

    Runs the model once on a blank image of its own input size.  Raises `FourierBiasError` as `capture` does.

    >>> import timm
    >>> found, skipped = inspect(timm.create_model("test_vit"), "blocks.0")
    >>> found[0].name, found[0].kind, found[0].height, skipped
    ('blocks.0', 'attention', 10, {})
    """
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    size = tuple(loaded.preprocessing["input_size"])
    with (
        torch.no_grad(),
        Recorder(
            loaded.module,
            choose_probes(loaded.module, layers),
            lambda layer, maps: None,
            input_size=size[-2:],
            widen=_is_choice(layers),
        ) as recorder,
    ):
        own = next((p.device for p in loaded.module.parameters()), torch.device("cpu"))
        _forward(recorder, torch.zeros(1, *size, device=own))
    return list(recorder.layers.values()), recorder.skipped


def _chosen_measures(measures: str | Sequence[str]) -> set[str]:
    chosen = {measures} if isinstance(measures, str) else set(measures)
    unknown = chosen - {*MEASURES, "all"}
    if unknown:
        raise FourierBiasError(
            f"measure {min(unknown)!r} is not known: choose from all, {', '.join(MEASURES)}"
        )
    return set(MEASURES) if "all" in chosen else chosen


def _is_choice(layers: str | Sequence[str]) -> bool:
    return isinstance(layers, str) and layers in CHOICES


def _forward(recorder: Recorder, images: Tensor) -> dict[str, Any]:
    try:
        return recorder.forward(images)
    except FourierBiasError:
        raise
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        raise FourierBiasError(
            f"the model fails on images of shape {tuple(images.shape)}: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def _on_device(
    network: nn.Module, device: str | torch.device | None, *, keep: bool
) -> Iterator[torch.device]:
    """The network on ``device`` for the time being; by default where it is, or on a GPU if it is ours."""
    own = next((p.device for p in network.parameters()), torch.device("cpu"))
    if device is None:
        device = own if keep or not torch.cuda.is_available() else "cuda"
    try:
        device = torch.device(device)
        if device != own:
            network.to(device)
    except (RuntimeError, AssertionError) as error:
        raise FourierBiasError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    try:
        yield device
    finally:
        if device != own:
            network.to(own)


@contextlib.contextmanager
def _progress(progress: bool | Progress | None, total: int) -> Iterator[Progress]:
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done, total: None
    else:
        from .progress import progress_bar

        with progress_bar("capture", total, unit="images") as advance:
            yield lambda done, total: advance(done)


def _describe(
    loaded: LoadedModel,
    source: ImageSource,
    recorder: Recorder,
    sums: LayerSums,
    *,
    layers: str | Sequence[str],
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    count = max(m["joint"].count + m["joint"].rejected for m in sums.moments.values())
    return {
        "model": loaded.arch,
        "arch": loaded.arch,
        "weights": loaded.weights,
        "weights_sha256": loaded.weights_sha256,
        "images": source.description,
        "count": count,
        "failed_images": len(source.failures),
        "failures": [f"{name}: {reason}" for name, reason in source.failures[:100]],
        "preprocessing": loaded.preprocessing,
        "layers": layers if isinstance(layers, str) else list(layers),
        "input_size": list(recorder.input_size),
        "skipped": recorder.skipped,
        "repeated_calls": recorder.repeated,
        "notes": list(loaded.notes),
        "seed": seed,
        "device": str(device),
        "torch_version": str(torch.__version__),
        "timm_version": timm.__version__,
    }


def _warn_rejected(result: Capture) -> None:
    for name, spectrum in result.items():
        if spectrum.rejected:
            warnings.warn(
                f"layer {name}: {spectrum.rejected} of {spectrum.rejected + spectrum.count} images gave NaN "
                "or Inf and are left out of its mean",
                stacklevel=3,
            )


def _no_maps(recorder: Recorder | None) -> str:
    if recorder is None or not recorder.skipped:
        return "no layer of this model was reached: choose others with layers="
    name, reason = next(iter(recorder.skipped.items()))
    return f"none of the {len(recorder.skipped)} layers gave a spatial map (first: {name}: {reason})"
