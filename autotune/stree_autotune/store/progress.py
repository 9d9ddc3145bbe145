"""How far a long command has come: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Working:
    """A context that says on a terminal's stderr what takes some seconds; elsewhere nothing."""

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        self._status = console.status(what) if console.is_terminal else None

    def __enter__(self) -> Working:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, what: str) -> None:
        """Say something else from now on."""
        if self._status is not None:
            self._status.update(what)


def time_left(seconds: float) -> str:
    """Return an estimate of the time left, in minutes from two on."""
    if seconds < 120:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left"


class ProgressBar:
    """A bar on a terminal's stderr, else log lines; both estimate the time left.

    It is called with the number of `unit` that are done, of which `done` were there at the start.
    `quiet` shows nothing: of several processes one speaks.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        done: int = 0,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        console = Console(stderr=True)
        self._has_bar = console.is_terminal and not quiet
        self._has_lines = not console.is_terminal and not quiet
        self._bar = Progress(
            SpinnerColumn(), TextColumn(unit), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not self._has_bar,
        )  # fmt: skip
        self._task = self._bar.add_task(unit, total=total, completed=done)
        self._total, self._unit, self._first, self._clock = total, unit, done, clock
        self._start = self._last_line = clock()

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
        if self._has_lines:
            self._print_line(done)

    def _print_line(self, done: int) -> None:
        now = self._clock()
        # A short command needs no lines; a long one ends with one.
        due = now - self._last_line >= SECONDS_BETWEEN_LINES
        ends = done >= self._total and self._last_line > self._start
        if not (due or ends) or done <= self._first:
            return
        self._last_line = now
        seconds = now - self._start
        left = seconds / (done - self._first) * (self._total - done)
        logger.info(
            "%s: %d of %d after %.0f s, %s",
            self._unit, done, self._total, seconds, time_left(left),
        )  # fmt: skip
