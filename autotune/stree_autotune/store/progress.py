"""How far a long command has come: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


def working(what: str) -> AbstractContextManager[object]:
    """Return a context that says on a terminal's stderr what takes some seconds."""
    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else nullcontext()


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
            TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not self._has_bar,
        )  # fmt: skip
        self._task = self._bar.add_task(unit, total=total, completed=done)
        self._total, self._unit, self._first, self._clock = total, unit, done, clock
        self._start = self._last_line = clock()

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            "%s: %d of %d after %.0f s, about %.0f s left",
            self._unit, done, self._total, seconds, left,
        )  # fmt: skip
