"""Progress away from a terminal: a line now and then, with the time that is left."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from stree_autotune.store import progress
from stree_autotune.store.progress import ProgressBar, Working, time_left


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(caplog: pytest.LogCaptureFixture, *, quiet: bool = False, first: int = 0) -> list[str]:
    clock = Clock()
    caplog.set_level(logging.INFO)
    with ProgressBar(40, "prompts", first, quiet=quiet, clock=clock) as bar:
        for done, now in ((first + 1, 101), (first + 5, 110), (first + 6, 111), (40, 150)):
            clock.now = now
            bar(done)
    return [record.getMessage() for record in caplog.records]


def test_lines_come_now_and_then_and_estimate_the_time_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert lines_of(caplog) == [
        "prompts: 5 of 40 after 10 s, about 70 s left",
        "prompts: 40 of 40 after 50 s, about 0 s left",
    ]


def test_what_was_there_before_does_not_count_for_the_speed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert lines_of(caplog, first=30)[0] == "prompts: 35 of 40 after 10 s, about 10 s left"


def test_one_process_of_several_speaks(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of(caplog, quiet=True) == []


def test_a_short_command_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ProgressBar(2, "prompts") as bar:
        bar(1)
        bar(2)
    assert not caplog.records


def test_a_terminal_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "Console", lambda stderr: terminal)
    assert lines_of(caplog) == []
    assert "prompts" in screen.getvalue()
    assert "40/40" in screen.getvalue()


def test_work_is_said_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Working("searching"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Working("searching") as spinner:
        spinner.say("walking")
    assert "walking" in capsys.readouterr().err


def test_long_times_are_in_minutes() -> None:
    assert time_left(119.4) == "about 119 s left"
    assert time_left(200) == "about 3 min left"
