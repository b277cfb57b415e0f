"""The trainer: one loop, read from top to bottom; `train` at the end is the whole of it.

The weights that are evaluated and saved are an exponential average of those being trained. A training can be
stopped at any moment, killed too, and goes on to the same bits on a CPU: see `data` for how.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.data import resolve_data_config, resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from ..distributed import anyone, by_first, is_first, local_device, together, usable_device, world_size
from ..errors import FourierBiasError
from ..models.checkpoint import check_arch, check_rebuilds, create, read_checkpoint, save_checkpoint
from ..models.weights import one_line
from ..progress import stop_signals
from .data import Data, load_data, step_seed
from .learner import Classifier, Learner, evaluate, logits_of
from .output import Files, check_output, epoch_line, output_path, progress_bar, say, write_csv
from .recipe import Recipe
from .run import Run, compare_identity, identity

__all__ = [
    "Classifier",
    "Learner",
    "Recipe",
    "Result",
    "Run",
    "TrainingInterruptedError",
    "evaluate",
    "train",
]

StepHook = Callable[[Run], None]
EpochHook = Callable[[int, dict[str, nn.Module]], None]


class TrainingInterruptedError(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved its state; the message says how to go on."""


@dataclass
class Result:
    """What a training ends with: the checkpoint's path, the last epoch's log row, and all rows."""

    path: Path
    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------- train


def train(
    model: str | nn.Module = "cnn",
    data: str | Path | Data = "photos",
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    model_args: Mapping[str, Any] | None = None,
    recast: Mapping[str, Any] | None = None,
    learner: Callable[[nn.Module, Recipe], Learner] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
    half: bool = False,
    on_step: Sequence[StepHook] = (),
    on_epoch_end: Sequence[EpochHook] = (),
) -> Result:
    """Train a network and write ``output`` (NAME.ckpt) with NAME.best.ckpt and the log NAME.csv beside it.

    ``model`` is a timm name (with ``model_args``, and ``recast`` as for `create`, the layers that switch if
    the recipe has a schedule) or a network that timm built; ``data`` as for `load_data`; ``learner`` makes
    the `Learner` of a model (default: `Classifier`). While under way all is kept in NAME.state; ``resume``
    goes on from it (or starts, if there is none) and ends with the same weights as without interruption (on
    one CPU to the bit, with as many threads; on another machine in the same arithmetic, but for rounding).
    ``on_step`` are called after every update with the `Run`, ``on_epoch_end`` with the number of epochs done
    (0 before the first) and the averaged networks; after a kill that may be the same epoch again. ``half``
    stores the checkpoints' weights in half precision. Sets torch's and numpy's random state.

    Within `distributed.session` several processes train together, all calling this with the same arguments.
    The recipe's batch is then that of all of them; the first process says and writes what there is to, and
    calls ``on_epoch_end``; ``on_step`` are called on each.

    Raises FourierBiasError for bad input and for a loss that is not finite; TrainingInterruptedError after
    Ctrl-C, with the state saved.
    """
    recipe = recipe or Recipe()
    console = Console(stderr=True, quiet=not (progress and is_first()))
    name = model if isinstance(model, str) else type(model).__name__.lower()
    files = by_first(lambda: files_of(name, output, resume, overwrite))
    arguments = (model, data, recipe, dict(model_args or {}), recast, learner, device, console)
    run = together(lambda: set_up(*arguments))
    run.follow_first()
    if resume and by_first(files.state.exists):
        run.load_state(files.state)
        place = f"epoch {run.epoch + 1}, step {run.step + 1}, {run.arithmetic}"
        say(console, f"going on from {files.state}: {place}")
    elif resume and by_first(files.checkpoint.exists):
        return by_first(lambda: finished(files, run))
    elif resume or overwrite:
        by_first(files.clear)
    if run.schedule is not None:
        say(console, run.schedule.table())
    if run.updates_done == 0:
        by_first(lambda: call_all(on_epoch_end, run))

    bar = progress_bar(console, run.updates, run.updates_done)
    with closing(run), stop_signals() as stop, bar as show:
        while run.epoch < recipe.epochs:
            run.switch_due()
            run.run_epoch(after_step=[show, *on_step, saver(files, stop, recipe.save_every)])
            row = run.finish_epoch()
            say(console, epoch_line(row, recipe.epochs))
            by_first(lambda: call_all(on_epoch_end, run))
            by_first(lambda: write_outputs(files, run, torch.float16 if half else torch.float32))
            by_first(lambda: run.save_state(files.state))
    by_first(lambda: files.state.unlink(missing_ok=True))
    return Result(files.checkpoint, run.history[-1], run.history)


def files_of(name: str, output: str | Path | None, resume: bool, overwrite: bool) -> Files:
    """Return the files of a training that may begin, or go on; FourierBiasError if one would be lost."""
    files = Files(output_path(name, output))
    check_output(files, resume, overwrite)
    return files


def saver(files: Files, stop: threading.Event, seconds: float) -> StepHook:
    """Return a function that saves a run's state every so many seconds, and when any process is to stop."""
    saved = time.monotonic()

    def save(run: Run) -> None:
        nonlocal saved
        stopping = anyone(stop.is_set())
        due = time.monotonic() - saved >= seconds
        if stopping:
            by_first(lambda: run.save_state(files.state))
        elif due and is_first():
            run.save_state(files.state)
        if due:
            saved = time.monotonic()
        if stopping:
            raise TrainingInterruptedError(
                f"stopped in epoch {run.epoch + 1} of {run.recipe.epochs}; --resume goes on from here"
            )

    return save


def call_all(hooks: Sequence[EpochHook], run: Run) -> None:
    """Call the hooks of an epoch's end with the averaged networks."""
    for hook in hooks:
        hook(run.epoch, run.networks)


def set_up(
    model: str | nn.Module,
    data: str | Path | Data,
    recipe: Recipe,
    model_args: dict[str, Any],
    recast: Mapping[str, Any] | None,
    learner: Callable[[nn.Module, Recipe], Learner] | None,
    device: torch.device | str | None,
    console: Console,
) -> Run:
    """Load the data as the model wants it, build the model with as many classes, and make a run of them."""
    device = training_device(device)
    if isinstance(model, str):
        preprocessing, model_args = as_named(model, recipe, model_args)
    else:
        check_given(recipe, model_args, recast)
        preprocessing = resolve_model_data_config(model)
    if not isinstance(data, Data):
        data = load_data(
            data,
            preprocessing,
            fraction=recipe.fraction,
            holdout=recipe.holdout,
            progress=console.is_terminal and not console.quiet,
            say=lambda line: say(console, line),
        )
    torch.manual_seed(step_seed(recipe.seed, 0))
    if isinstance(model, str):
        if recast is not None and recipe.schedule is not None:
            recast = {**recast, "form": "conv"}
        model = create(model, num_classes=len(data.classes), recast=recast, **model_args)
    else:
        check_rebuilds(model, len(data.classes))
    made = Classifier(model, recipe.smoothing) if learner is None else learner(model, recipe)
    run = Run(made, data, recipe, device)
    size = data.train.preprocessing["input_size"]
    with one_line(f"the network fails on images of {size[1]}×{size[2]} pixels"):
        for network in made.networks.values():
            logits_of(network, torch.zeros(2, *size, device=device))
    counts = f"{len(data.train)} images to train on, {len(data.evaluation)} to evaluate on"
    arithmetic = "float32" if run.dtype is None else "bfloat16 where it is safe"
    processes = f"{world_size()} processes, " if world_size() > 1 else ""
    say(
        console,
        f"{data.description['source']}: {counts}, {len(data.classes)} classes; "
        f"{processes}{device}, {arithmetic}",
    )
    return run


def as_named(
    arch: str, recipe: Recipe, model_args: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return preprocessing and arguments of a network that timm builds by name, with what a recipe says."""
    check_arch(arch)
    with one_line(f"{arch} cannot be had"):
        config = get_pretrained_cfg(arch)
    preprocessing, model_args = resolve_data_config(pretrained_cfg=config.to_dict()), dict(model_args)
    if recipe.image_size is not None:
        preprocessing["input_size"] = (3, recipe.image_size, recipe.image_size)
        if config.fixed_input_size:
            model_args = {"img_size": recipe.image_size, **model_args}
    if recipe.drop_path:
        model_args["drop_path_rate"] = recipe.drop_path
    return preprocessing, model_args


def check_given(recipe: Recipe, model_args: Mapping[str, Any], recast: Mapping[str, Any] | None) -> None:
    """Raise FourierBiasError for what only a network that is given by name can be built with."""
    given = {"model_args": model_args, "recast": recast}
    given |= {"drop_path": recipe.drop_path, "image_size": recipe.image_size}
    name = next((name for name, value in given.items() if value), None)
    if name:
        raise FourierBiasError(f"{name} is for a network given by name; build it into the one that is given")


def training_device(wanted: torch.device | str | None) -> torch.device:
    """Return the device that is named, or this process's own, which one of several also means by ``cuda``.

    Raises FourierBiasError for one that cannot be used.

    >>> training_device("cpu")
    device(type='cpu')
    """
    device = local_device() if wanted is None else usable_device(wanted)
    several = world_size() > 1 and torch.cuda.is_available()
    return local_device() if several and device == torch.device("cuda") else device


def write_outputs(files: Files, run: Run, dtype: torch.dtype) -> None:
    """Write the log, and after an evaluation the checkpoints, their weights stored as ``dtype``."""
    write_csv(files.beside(".csv"), run.history)
    if run.layer_history:
        write_csv(files.beside(".layers.csv"), run.layer_history)
    accuracy = run.history[-1]["test_accuracy"]
    if accuracy == "":
        return
    for suffix in run.networks:
        path = files.beside(f".{suffix}.ckpt") if suffix else files.checkpoint
        save_checkpoint(path, run.checkpoint(suffix), dtype=dtype)
    if accuracy > run.best:
        run.best = accuracy
        save_checkpoint(files.best, run.checkpoint(""), dtype=dtype)


def finished(files: Files, run: Run) -> Result:
    """Return the result of a training that has come to its end, if it is the one asked for."""
    checkpoint = read_checkpoint(files.checkpoint)
    if checkpoint.epoch < checkpoint.recipe.get("epochs", 0):
        raise FourierBiasError(
            f"{files.checkpoint} is of epoch {checkpoint.epoch}, its .state is gone: --overwrite starts anew"
        )
    compare_identity(files.checkpoint, identity(vars(checkpoint), checkpoint.recipe), run.identity())
    return Result(files.checkpoint, checkpoint.metrics)
