"""One progress bar for everything that takes long: on stderr, with rate and time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar that is moved by calling what it yields with the number done so far.

    On a terminal it is drawn; elsewhere (a log file) a plain line is written at most every 30 seconds.
    """
    if not sys.stderr.isatty():
        yield _line_reporter(label, total, unit)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total, rate="")

        def advance(done: int) -> None:
            rate = done / max(time.monotonic() - start, 1e-9)
            progress.update(task, completed=done, rate=f"{rate:.1f} {unit}/s")

        yield advance


def _line_reporter(label: str, total: int, unit: str, every: float = 30.0) -> Callable[[int], None]:
    start = last = time.monotonic()

    def advance(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every:
            return
        last = now
        rate = done / (now - start)
        left = (total - done) / rate if rate else float("nan")
        print(
            f"{label}: {done}/{total} {unit}, {rate:.1f} {unit}/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return advance
