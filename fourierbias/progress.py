"""For all that takes long: one progress bar, on stderr, with rate and time left; and how to stop it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .distributed import world_size


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar that is moved by calling what it yields with the number done so far; ``done`` before it began.

    On a terminal it is drawn; elsewhere (a log file) a plain line is written at most every 30 seconds.
    """
    if not sys.stderr.isatty():
        yield _line_reporter(label, total, unit, done)
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
        task = progress.add_task(label, total=total, completed=done, rate="")

        def advance(count: int) -> None:
            rate = (count - done) / max(time.monotonic() - start, 1e-9)
            progress.update(task, completed=count, rate=f"{rate:.1f} {unit}/s")

        yield advance


def _line_reporter(
    label: str, total: int, unit: str, done: int, every: float = 30.0
) -> Callable[[int], None]:
    start = last = time.monotonic()

    def advance(count: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every:
            return
        last = now
        rate = (count - done) / (now - start)
        left = (total - count) / rate if rate else float("nan")
        print(
            f"{label}: {count}/{total} {unit}, {rate:.1f} {unit}/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return advance


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Within this context Ctrl-C and SIGTERM set an event; a second Ctrl-C interrupts at once.

    Not so with several processes: their launcher may pass on a Ctrl-C that they have had already.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.set()
        if world_size() == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
