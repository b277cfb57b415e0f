"""What a training leaves behind and what it says meanwhile: files, log, progress."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import FourierBiasError
from ..files import go_on_or_anew, write_atomic

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class Files:
    """The files of one training, named after its checkpoint."""

    checkpoint: Path

    def beside(self, suffix: str) -> Path:
        """Return NAME + ``suffix`` for a checkpoint NAME.ckpt."""
        return self.checkpoint.with_name(self.checkpoint.name.removesuffix(".ckpt") + suffix)

    @property
    def state(self) -> Path:
        """Where a training under way is kept."""
        return self.beside(".state")

    @property
    def best(self) -> Path:
        """Where the checkpoint of the best epoch on the evaluation images is kept."""
        return self.beside(".best.ckpt")

    @property
    def series(self) -> Path:
        """Where spectra through training are kept (`SpectrumProbe`)."""
        return self.beside(".probe.h5")

    def clear(self) -> None:
        """Remove what an earlier training left."""
        others = (self.beside(suffix) for suffix in (".csv", ".layers.csv", ".agent.ckpt"))
        for path in (self.state, self.checkpoint, self.best, self.series, *others):
            path.unlink(missing_ok=True)


def output_path(arch: str, output: str | Path | None) -> Path:
    """Return the checkpoint's path, ending in .ckpt, in a folder that is made if it is not there.

    >>> output_path("cnn", None)
    PosixPath('cnn.ckpt')
    """
    path = Path(output or f"{arch}.ckpt")
    if path.is_dir():
        raise FourierBiasError(f"{path} is a folder; name the checkpoint in it: {path / arch}.ckpt")
    path = path if path.suffix == ".ckpt" else path.with_name(path.name + ".ckpt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FourierBiasError(f"cannot write into {path.parent}: {error.strerror}") from None
    return path


def check_output(files: Files, resume: bool, overwrite: bool) -> None:
    """Raise FourierBiasError if an earlier training would be lost."""
    go_on_or_anew(resume, overwrite)
    if resume or overwrite:
        return
    if files.state.exists():
        raise FourierBiasError(
            f"a training of {files.checkpoint} is under way or was stopped: give --resume or --overwrite"
        )
    for path in (files.checkpoint, files.series):
        if path.exists():
            raise FourierBiasError(f"{path} exists: give --overwrite or another output")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a table, whole or not at all; columns are those of any row, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    )
    write_atomic(path, text.getvalue().encode())


def say(console: Console, line: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """Return a log row in one line for people.

    >>> epoch_line({"epoch": 1, "train_loss": 2.0, "test_accuracy": 0.5, "images_per_second": 800.0}, 30)
    'epoch 1/30  loss 2.000  test accuracy 50.0 %  800 images/s'
    """
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['train_loss']:.3f}"]
    for key, value in row.items():
        if key.endswith("test_accuracy") and value != "":
            parts.append(f"{key.replace('_', ' ')} {100 * value:.1f} %")
    if row.get("switched"):
        count, change = len(row["switched"].split()), row["logit_change"]
        parts.append(f"{count} layer{'s'[: count > 1]} switched (logits moved by at most {change:.1e})")
    return "  ".join([*parts, f"{row['images_per_second']:.0f} images/s"])


@contextmanager
def progress_bar(console: Console, total: int, done: int) -> Iterator[Callable[["Run"], None]]:
    """Show a bar of ``total`` updates on a terminal; yields a function that moves it to where a run is."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(compact=True),
    ]
    shown = console.is_terminal and not console.quiet
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("training", total=total, completed=done)

        def show(run: "Run") -> None:
            text = f"epoch {run.epoch + 1}/{run.recipe.epochs}  {run.speed:.0f} images/s"
            bar.update(task, completed=run.updates_done, description=text)

        yield show
