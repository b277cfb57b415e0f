"""Images through a model, past the probes, into spectra: the main job, streaming.

Nothing that grows with the number of images is kept: each hook reduces its maps to a short vector per
image, and the accumulators hold sums.  Maps are stored only on request, and go to the file as they come.
Each process works on its `Part` of the images; what is done can be saved, resumed and merged.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from .distributed import (
    Tally,
    broadcast,
    by_first,
    gather,
    is_first,
    local_device,
    rank,
    together,
    usable_device,
    world_size,
)
from .errors import FourierBiasError
from .files import go_on_or_anew
from .images import ImageSource, open_images
from .measures import ATTENTION_MEASURES, AttentionRecorder
from .models.loading import LoadedModel, load_model
from .models.weights import one_line
from .parts import Part, compare, merge_parts, missing, order_key, read_part, reducer_of
from .probes import Layer, Probe, Recorder, choose_probes
from .progress import progress_bar, stop_signals
from .spectra import Projection
from .store import Capture, load
from .writing import Writer

MEASURES = ("feature_variance", "high_frequency_share", *ATTENTION_MEASURES)

Progress = Callable[[int, int], None]


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
    resume: bool = False,
    save_every: float = 60.0,
    shard: tuple[int, int] | None = None,
    consolidate: bool = False,
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
    Every ``save_every`` seconds the state is kept beside it: after an interruption the same call with
    ``resume`` goes on from there (or starts), and ends with the same numbers.  ``shard=(k, n)`` takes the
    k-th of n parts of the images, k = 1 … n, for `merge`.  Under ``torchrun`` each rank takes its part and
    all return the whole; the maps are then in a file for each rank, to which the output refers, or copied
    into it with ``consolidate``.

    ``progress``: True for a bar on stderr, or a function called with (done, total) images.  Memory does not
    grow with the number of images.  The model runs in eval mode without gradients and is left as it was:
    mode, weights, hooks, device, also after an exception.

    Raises `FourierBiasError` for input that does not fit, before anything is written, and KeyboardInterrupt
    after Ctrl-C or SIGTERM, with the state saved.  Images whose maps hold NaN or Inf are left out of that
    layer, with a warning.

    >>> import torch, timm
    >>> c = capture(timm.create_model("test_vit"), torch.rand(3, 3, 160, 160), layers="sublayers")
    >>> [name for name in c][:2], c["blocks.0:attn"].count
    (['blocks.0:attn', 'blocks.0:mlp'], 3)
    """
    chosen = _chosen_measures(measures)
    for asked, name in ((features, "features=True stores the maps in"), (resume, "resume=True goes on with")):
        if asked and output is None:
            raise FourierBiasError(f"{name} a file: name it with output=")
    go_on_or_anew(resume, overwrite)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, seed=seed)
    whole = open_images(
        images, loaded.preprocessing, images=limit, batch_size=batch_size, workers=workers, seed=seed
    )
    shared = whole if shard is None else whole.shard(*_shard(shard))
    job = _Job(
        loaded,
        probes=choose_probes(loaded.module, layers),
        source=shared.shard(rank(), world_size()),
        identity={
            "model": loaded.arch,
            "weights": _weights_key(loaded, hashed=output is not None),
            "layers": layers,
            "paths": list(paths),
            "measures": sorted(chosen),
            "eps": eps,
            "dead_channels": dead_channels,
            "calls": calls,
            "preprocessing": loaded.preprocessing,
            "images": whole.description,
            "order": order_key(whole.names),
            "fingerprint": (whole.fingerprint or None) if output is not None else None,
            "features": feature_dtype if features else None,
            "batch_size": batch_size,
        },
        seed=seed,
    )
    part = job.fresh()
    with contextlib.ExitStack() as stack:
        writer, stop = None, threading.Event()
        if output is not None:
            options = {"overwrite": overwrite, "resume": resume, "feature_dtype": feature_dtype}
            options |= {"compression": compression, "rank": rank(), "world_size": world_size()}
            finished = _finished(Path(output), job.part_of(shared)) if resume else None
            writer = stack.enter_context(together(lambda: Writer(output, **options)))
            if finished is not None:
                writer.forget()  # what a kill at the very end has left
                return finished
            part = _resumed(writer, part)
            stop = stack.enter_context(stop_signals())
        report = stack.enter_context(_progress(progress, len(shared), part.done))
        keep = _keeper(writer, stop, save_every)
        given = isinstance(model, nn.Module)
        device = stack.enter_context(_on_device(loaded.module, device, keep=given))
        batches = stack.enter_context(contextlib.closing(job.work(part, device)))
        try:
            for maps in batches:
                if features:
                    writer.expect(len(job.source), maps)
                    writer.append_maps(maps)
                report(part.done)
                keep(part)
        except FourierBiasError:  # Ctrl-C reaches the workers that read images too
            if stop.is_set():
                keep(part)
            raise
        batches.close()  # hooks go before the file is written
        return _completed(part, writer, consolidate=consolidate, keep_part=shard is not None)


def merge(
    parts: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    consolidate: bool = False,
) -> Capture:
    """The shards of one capture, files made with ``capture(..., shard=(k, n))``, as one file and `Capture`.

    Feature maps stay in the shards' files, to which the output refers (HDF5 virtual datasets, by relative
    path), or are copied with ``consolidate``.  Raises `FourierBiasError` for files that overlap, do not make
    a whole, or differ in model, weights, layers, images or preprocessing, naming which.

    >>> import torch, timm, tempfile
    >>> model, folder = timm.create_model("test_resnet"), tempfile.mkdtemp()
    >>> files = [f"{folder}/{k}.h5" for k in (1, 2)]
    >>> for k, file in enumerate(files, start=1):
    ...     _ = capture(model, torch.ones(4, 3, 64, 64), output=file, shard=(k, 2))
    >>> merge(files, f"{folder}/all.h5")
    Capture('test_resnet', 4 layers, 4 images)
    """
    if not parts:
        raise FourierBiasError("name the parts to merge")
    if Path(output).resolve() in {Path(path).resolve() for path in parts}:
        raise FourierBiasError(f"{output} is one of the parts: choose another output")
    whole = merge_parts([read_part(path) for path in parts], [str(path) for path in parts])
    for start, stop in ((0, whole.start), (whole.stop, whole.total)):
        if start < stop:
            raise FourierBiasError(missing(start, stop))
    with Writer(output, overwrite=overwrite) as writer:
        if whole.maps:
            writer.refer_to_maps(whole.maps, consolidate=consolidate)
        return writer.finish(whole.capture())


@dataclass
class _Job:
    """One capture with its settings resolved: what runs, on which images, and what is made of the maps."""

    loaded: LoadedModel
    probes: list[Probe]
    source: ImageSource
    identity: dict[str, Any]
    seed: int

    def __post_init__(self) -> None:
        self.reducer = reducer_of(self.identity)
        self.overflowed: set[str] = set()

    def fresh(self) -> Part:
        """The share of this process, nothing done yet."""
        return self.part_of(self.source)

    def part_of(self, source: ImageSource) -> Part:
        """The part of the capture that the images of ``source`` make, nothing done yet."""
        start = source.indices[0] if len(source) else 0
        return Part(self.identity, start, start + len(source), len(source.names))

    def work(self, part: Part, device: torch.device) -> Iterator[dict[str, np.ndarray]]:
        """Take the images that ``part`` still lacks through the model.

        Yields after each batch, with the maps (B, C, H, W) of each layer if they are to be stored.
        """
        source = self.source.subset(self.source.indices[part.done :])
        earlier, done, seen = list(part.failures), part.done, 0
        part.images = [source.names[index] for index in part.indices]
        wanted = set(self.identity["measures"]) & set(ATTENTION_MEASURES)
        calls = self.identity["calls"]
        with (
            torch.no_grad(),
            AttentionRecorder(self.loaded.module, wanted, calls=calls) as attention,
            contextlib.ExitStack() as stack,
        ):
            recorder: Recorder | None = None
            for batch in source:
                first = recorder is None
                if first:
                    recorder = stack.enter_context(self._recorder(tuple(batch.images.shape[-2:])))
                reduced = _forward(recorder, batch.images.to(device))
                self._add(part, recorder, attention, reduced)
                if first:
                    if not recorder.layers:
                        raise FourierBiasError(_no_maps(recorder.skipped))
                    self._describe(part, recorder, attention, device)
                seen += len(batch.indices)
                part.indices += batch.indices
                part.images += [source.names[index] for index in batch.indices]
                if source.labels is not None:
                    part.labels = part.labels or []
                    part.labels += [source.labels[index] for index in batch.indices]
                part.failures = earlier + source.failures
                part.done = done + seen + len(source.failures)
                yield {name: maps.cpu().numpy() for name, (_, maps) in reduced.items() if maps is not None}
            part.failures, part.done = earlier + source.failures, part.stop - part.start
            if recorder is not None:
                self._describe(part, recorder, attention, device)

    def _recorder(self, input_size: tuple[int, int]) -> Recorder:
        dtype = self.identity["features"] and getattr(torch, self.identity["features"])

        def reduce(layer: Layer, maps: Tensor) -> tuple[Projection, Tensor | None]:
            return self.reducer.project(maps), self._stored(layer, maps, dtype) if dtype else None

        return Recorder(
            self.loaded.module, self.probes, reduce, input_size=input_size, calls=self.identity["calls"]
        )

    def _stored(self, layer: Layer, maps: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of the maps in the type they are stored in; a warning, once per layer, if they overflow."""
        stored = maps.to(dtype, copy=True)
        if layer.name not in self.overflowed and (stored.isinf() & maps.isfinite()).any():
            self.overflowed.add(layer.name)
            warnings.warn(
                f"layer {layer.name}: values beyond {torch.finfo(dtype).max:g} are stored as infinite: "
                "--feature-dtype float32 keeps them",
                stacklevel=2,
            )
        return stored

    def _add(
        self, part: Part, recorder: Recorder, attention: AttentionRecorder, reduced: Mapping[str, Any]
    ) -> None:
        values = self.reducer.finish([projection for projection, _ in reduced.values()])
        attended = attention.take_layers(recorder)
        for name, rows in zip(reduced, values, strict=True):
            part.sums.update(recorder.layers[name], rows | attended.get(name, {}))

    def _describe(
        self, part: Part, recorder: Recorder, attention: AttentionRecorder, device: torch.device
    ) -> None:
        loaded, identity = self.loaded, self.identity
        present = {quantity for moments in part.sums.moments.values() for quantity in moments}
        part.about = {name: attention.layer_attrs(layer) for name, layer in recorder.layers.items()}
        part.attrs = {
            "model": loaded.arch,
            "arch": loaded.arch,
            "weights": loaded.weights,
            "weights_sha256": loaded.weights_sha256,
            "images": identity["images"],
            "preprocessing": loaded.preprocessing,
            "layers": identity["layers"],
            "input_size": list(recorder.input_size),
            "skipped": recorder.skipped,
            "skipped_measures": attention.missing(present),
            "skipped_attention": attention.skipped,
            "repeated_calls": recorder.repeated,
            "notes": list(loaded.notes),
            "seed": self.seed,
            "device": str(device),
            "torch_version": str(torch.__version__),
            "timm_version": timm.__version__,
        }


def _shard(shard: tuple[int, int]) -> tuple[int, int]:
    number, count = shard
    if not 1 <= number <= count:
        raise FourierBiasError(f"shard {number}/{count}: the first is 1/{count}, the last {count}/{count}")
    return number - 1, count


def _weights_key(loaded: LoadedModel, *, hashed: bool) -> str:
    """What tells one model's weights from another's; of a module that was given, a checksum of them."""
    if loaded.weights_sha256 is not None or loaded.weights != "as given" or not hashed:
        return loaded.weights_sha256 or loaded.weights
    checksum = 0
    for tensor in loaded.module.state_dict().values():
        values = tensor.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy(), checksum)
    return f"{loaded.weights}, crc32 {checksum:08x}"


def _finished(output: Path, asked: Part) -> Capture | None:
    """The capture that an earlier call has finished, if it is the one asked for; None while it is not."""
    if not output.is_file():
        return None
    capture = load(output)
    difference = compare(capture.attrs.get("identity", {}), asked.identity, free=set())
    place, held = capture.attrs.get("part"), capture.attrs["count"] + capture.attrs["failed_images"]
    if difference is None and (place, held) != (asked.place, asked.stop - asked.start):
        difference = f"images ({place or f'all {held}'}, not {asked.place or f'all {asked.total}'})"
    if difference is None:
        return capture
    if any(output.parent.glob(f"{glob.escape(output.name)}*.state")):
        return None  # a capture that is to replace this one
    raise FourierBiasError(
        f"{output} is another capture, it differs in {difference}: choose another output or --overwrite"
    )


def _resumed(writer: Writer, fresh: Part) -> Part:
    """What the writer has kept of an earlier capture, if it is the one asked for; else ``fresh``."""
    part = together(writer.resumed)
    if part is None:
        return fresh
    difference = compare(part.identity, fresh.identity, free=set())
    if difference is None and part.place != fresh.place:
        difference = f"images ({part.place or 'all'}, not {fresh.place or 'all'})"
    if difference:
        raise FourierBiasError(
            f"{writer.state} is of another capture, it differs in {difference}: give the same options, or "
            "--overwrite to start anew"
        )
    return part


def _keeper(writer: Writer | None, stop: threading.Event, seconds: float) -> Callable[[Part], None]:
    """A function that saves a part every so many seconds, and when the capture is asked to stop."""
    saved = time.monotonic()

    def keep(part: Part) -> None:
        nonlocal saved
        if writer is None:
            return
        if stop.is_set() or time.monotonic() - saved >= seconds:
            writer.save(part)
            saved = time.monotonic()
        if stop.is_set():
            raise KeyboardInterrupt(
                f"Stopped after {part.done} of {part.stop - part.start} images, which are kept: "
                "to go on, repeat the command (capture with --resume)."
            )

    return keep


def _completed(part: Part, writer: Writer | None, *, consolidate: bool, keep_part: bool) -> Capture:
    """The capture of all ranks together, which the first of them writes."""
    several = world_size() > 1
    if writer is not None:
        writer.leave_maps(part) if several else writer.join_maps(part)
    parts = gather(part)
    results: list[Capture] = []

    def finish() -> None:
        whole = merge_parts(parts)
        if not whole.sums.layers and not keep_part:
            raise FourierBiasError(
                "not one image could be read: " + "; ".join(map(": ".join, whole.failures[:3]))
            )
        if writer is None:
            results.append(whole.capture())
        else:
            if several and whole.maps:
                writer.refer_to_maps(whole.maps, consolidate=consolidate)
            results.append(writer.finish(whole.capture(), whole if keep_part else None))
            for path in whole.maps if several and consolidate else ():
                path.unlink()
        _warn_rejected(results[0])

    by_first(finish)
    if writer is not None:
        writer.forget()
    return broadcast(results[0] if results else None)


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
        device = own if keep and world_size() == 1 else local_device()
    device = usable_device(device)
    try:
        if device != own:
            with one_line(f"the model cannot be put on {device}"):
                network.to(device)
        yield device
    finally:
        if device != own:
            network.to(own)


@contextlib.contextmanager
def _progress(progress: bool | Progress | None, total: int, done: int) -> Iterator[Progress]:
    """A function to call with what this process has done, of which ``done`` was there; one bar for all."""
    if not progress or not is_first():
        show, bar = (lambda count: None), contextlib.nullcontext()
    elif callable(progress):
        show, bar = (lambda count: progress(count, total)), contextlib.nullcontext()
    else:
        show, bar = None, progress_bar("capture", total, unit="images", done=done)
    with bar as advance:
        show, before, tally = show or advance, 0, Tally()

        def report(count: int) -> None:
            nonlocal before
            everyone, before = tally.add(count - before), count
            show(everyone)

        if done:
            report(done)
        yield report


def _warn_rejected(result: Capture) -> None:
    for name, spectrum in result.items():
        if spectrum.rejected:
            warnings.warn(
                f"layer {name}: {spectrum.rejected} of {spectrum.rejected + spectrum.count} images gave NaN "
                "or Inf and are left out of its mean",
                stacklevel=3,
            )


def _no_maps(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return "no layer of this model was reached: choose others with layers="
    name, reason = next(iter(skipped.items()))
    return f"none of the {len(skipped)} layers gave a spatial map (first: {name}: {reason})"
