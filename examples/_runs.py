"""What the experiments share: trainings and captures that are made once and kept, and common options."""

import ast
import csv
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click
import matplotlib
import numpy as np
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from scipy.stats import ttest_ind
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg

import fourierbias
from fourierbias import FourierBiasError
from fourierbias.models.checkpoint import check_arch, read_checkpoint
from fourierbias.models.loading import load_model
from fourierbias.training import Recipe, train
from fourierbias.training.bootstrap import bootstrap
from fourierbias.training.data import Data, evaluation_batches, load_data
from fourierbias.training.output import write_csv
from fourierbias.training.trainer import TrainingInterruptedError

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


# ----------------------------------------------------------------------------------------------- options


def experiment(function: Callable) -> click.Command:
    """Make a function a program with the options of all experiments; errors and Ctrl-C end in one line."""

    @functools.wraps(function)
    def program(output: Path, runs: Path | None, **options):
        runs = runs or output / "runs"
        try:
            for needed in (output, runs):
                needed.mkdir(parents=True, exist_ok=True)
            with matplotlib.rc_context(STYLE):
                function(output=output, runs=runs, **options)
            if options["quick"]:
                click.echo(
                    "So short a training decides nothing; the full form is in the program's first lines."
                )
        except FourierBiasError as error:
            raise click.ClickException(str(error)) from None
        except TrainingInterruptedError:
            raise click.ClickException("stopped; the same command goes on from here") from None
        except OSError as error:
            raise click.ClickException(f"{error.filename}: {error.strerror}") from None

    name, folder = Path(function.__code__.co_filename).stem, click.Path(path_type=Path, file_okay=False)
    for option in (
        click.option("--change", multiple=True, metavar="NAME=VALUE", help="Any setting of the recipe."),
        click.option(
            "--runs", type=folder, help="Trainings, which experiments can share.  [default: OUTPUT/runs]"
        ),
        click.option("--output", type=folder, default=name, show_default=True, help="Folder for all files."),
        click.option("--quick", is_flag=True, help="A small version: about two minutes on two cores."),
        click.option(
            "--data",
            default="photos",
            show_default=True,
            help="photos, cifar10, cifar100 or an image folder.",
        ),
    ):
        program = option(program)
    return click.command(help=function.__doc__)(program)


def settings(defaults: dict, change: tuple[str, ...], own: Sequence[str] = (), **given) -> dict:
    """Settings of a recipe: ``defaults``, changed by texts like ``lr=0.002`` and by whatever is not None.

    What is ``given``, and names in ``own``, the program sets itself: a text for one of these is an error.
    """
    changed = {}
    given = {name: value for name, value in given.items() if value is not None}
    for text in change:
        name, _, value = text.partition("=")
        if not value or name not in Recipe().as_dict():
            raise FourierBiasError(f"{text!r} is no NAME=VALUE with the name of a recipe's setting")
        if name in given or name in own:
            raise FourierBiasError(f"{text!r}: this program sets {name} itself; see --help")
        try:
            changed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changed[name] = value
    return {**defaults, **changed, **given}


# ---------------------------------------------------------------------------------------- kept on the disk


class Table:
    """A CSV file that grows by the rows of one training at a time; what is in it is not made again.

    So an experiment that was stopped goes on where only its table is left, too, without the trainings.
    Several programs may write to one table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_table(path) if path.exists() else []

    def of(self, run: str, make: Callable[[], Iterable[dict]]) -> list[dict]:
        """The rows of a training by its name: found in the file, or made and written to it."""
        if not any(row["run"] == run for row in self.rows):
            made = [{"run": run, **row} for row in make()]
            with FileLock(self.path.with_suffix(".lock")):
                there = read_table(self.path) if self.path.exists() else []
                if not any(row["run"] == run for row in there):
                    write_csv(self.path, [*there, *made])
                self.rows = read_table(self.path)  # with the digits that the file has, whenever they are read
        return [row for row in self.rows if row["run"] == run]


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file, with numbers and truth values as such, and None for nothing."""

    def value(text: str) -> str | float | int | bool | None:
        if not text:
            return None
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return float(text) if text in ("nan", "inf", "-inf") else text

    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "run" not in rows[0]:
        raise FourierBiasError(f"{path} has no column 'run': it is not a table of these trainings; move it")
    return [{key: value(text) for key, text in row.items()} for row in rows]


def over_updates(epochs: int) -> dict:
    """Settings of a training by how long it is: warm-up over its fifteenth, evaluated at its end alone.

    That is two epochs of warm-up in thirty; two of any number would not be the same for all.
    """
    return {"epochs": epochs, "warmup_epochs": epochs / 15, "evaluate_every": epochs}


def run_name(arch: str, source: str, recipe: Recipe) -> str:
    """The name of a training: what it is, and a digest of all its settings.

    Trainings with other settings can so lie in one folder, and experiments share those they have in common.
    """
    schedule = re.sub(r"[^\w.]+", "-", recipe.schedule or "").strip("-")
    words = [arch, schedule, f"{recipe.fraction:g}", f"seed{recipe.seed}"]
    words.append(digest(arch, Path(source).resolve().name, recipe))
    return "-".join(filter(None, words))


@functools.lru_cache(maxsize=2)
def load_once(source: str, fraction: float, holdout: int, image_size: int | None, limit: int) -> Data:
    """`load_data` for the reference networks, which all want the same images."""
    check_arch("cnn")
    wanted = resolve_data_config(pretrained_cfg=get_pretrained_cfg("cnn").to_dict())
    if image_size:
        wanted["input_size"] = (3, image_size, image_size)
    return load_data(source, wanted, fraction=fraction, holdout=holdout, memory_limit=limit, progress=True)


def data_of(source: str, recipe: Recipe, listed: bool = False) -> Data:
    """The images of a training, loaded once for many; if only ``listed``, files are not decoded."""
    return load_once(source, recipe.fraction, recipe.holdout, recipe.image_size, 0 if listed else 2 << 30)


def trained(folder: Path, arch: str, source: str, recipe: Recipe) -> Path:
    """The checkpoint of a training: found done, gone on with, or done from the start.

    ``arch`` is a network's name, or vit-bootstrapped.
    """
    path = folder / f"{run_name(arch, source, recipe)}.ckpt"
    if unfinished(path):
        with FileLock(path.with_suffix(".lock")):  # another program may be at the same training
            if unfinished(path):
                click.echo(f"Training {path}")
                network, _, bootstrapped = arch.partition("-")
                learner = bootstrap("joint") if bootstrapped else None
                train(network, data_of(source, recipe), path, recipe, learner=learner, resume=True)
                path.with_suffix(".best.ckpt").unlink()  # what counts is the last epoch
    return path


def outcome(checkpoint: Path) -> dict:
    """Accuracy of a training, and the arithmetic that its machine chose (None if its version kept none)."""
    metrics = read_checkpoint(checkpoint).metrics
    return {"arithmetic": metrics.get("arithmetic"), "accuracy": metrics["test_accuracy"]}


def unfinished(path: Path) -> bool:
    """Whether there is no checkpoint, or one that is still being trained."""
    return not path.exists() or path.with_suffix(".state").exists()


def captured(
    folder: Path, checkpoint: Path, source: str, recipe: Recipe, images: int, **options
) -> fourierbias.Capture:
    """The capture of a checkpoint on images it was not trained on, evenly from all classes; made once."""
    loaded = load_model(checkpoint)
    what = digest(loaded.weights_sha256, Path(source).resolve().name, recipe.holdout, images, options)
    file = folder / f"{checkpoint.stem}-{what}.h5"
    if file.exists():
        return fourierbias.load(file)
    held = data_of(source, recipe).evaluation
    chosen = held.take(torch.linspace(0, len(held) - 1, min(images, len(held))).long())
    tensors = torch.cat([batch for batch, _ in evaluation_batches(chosen)])
    return fourierbias.capture(loaded, tensors, output=file, overwrite=True, **options)


def learning_curve(checkpoint: Path) -> np.ndarray:
    """Epochs, and test accuracy after each (2, E), from the log beside a checkpoint."""
    log = checkpoint.with_suffix(".csv")
    if not log.exists():
        raise FourierBiasError(f"no log {log}: give a folder that holds each MODEL.ckpt with its MODEL.csv")
    with open(log) as file:
        rows = [row for row in csv.DictReader(file) if row["test_accuracy"]]
    return np.array([[float(row[key]) for row in rows] for key in ("epoch", "test_accuracy")])


def mean_and_spread(values: np.ndarray, alone: np.ndarray | float = np.nan) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over seeds, the last axis; for a single seed ``alone`` is the spread."""
    mean = values.mean(axis=-1)
    return mean, values.std(axis=-1, ddof=1) if values.shape[-1] > 1 else np.broadcast_to(alone, mean.shape)


def difference(values: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """Difference of two means over seeds, its standard error, and Welch's p; nan for a single seed."""
    gain = values.mean() - others.mean()
    if min(len(values), len(others)) < 2:
        return gain, np.nan, np.nan
    doubt = np.sqrt(sum(group.var(ddof=1) / len(group) for group in (values, others)))
    return gain, doubt, ttest_ind(values, others, equal_var=False).pvalue if doubt else float(gain == 0)


def digest(*parts) -> str:
    """A short name for anything that prints the same when it is the same."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def save(figure: Figure, path: Path) -> None:
    """Write a figure and say so."""
    figure.savefig(path, dpi=200)
    click.echo(f"Wrote {path} and the numbers in it, {path.with_suffix('.csv')}.")
