"""Numbers have one spelling, and text wraps where it may."""

from __future__ import annotations

import pytest
from rich.console import Console

from stree_autotune.store.terminal import digits, make_table, percent, say, show_table


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0893541, "0.0894"), (1, "1.00"), (9.996, "10.0"), (123.4, "123"),
     (11_200.4, "11,200"), (1_234_567, "1,230,000"), (-2.5, "-2.50")],
)  # fmt: skip
def test_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("share", "signed", "text"),
    [(0.0123, False, "1.2 %"), (0.123, True, "+12 %"), (-0.00001, True, "+0.0 %"),
     (0.0996, False, "10 %"), (-0.5, True, "-50 %"), (12.5, False, "1,250 %")],
)  # fmt: skip
def test_per_cent(share: float, signed: bool, text: str) -> None:
    assert percent(share, signed=signed) == text


def test_a_number_stays_with_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=20, highlight=False)
    say(console, "it takes all of the 12 % and 3.5 ms of a step")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["it takes all of the", "12 % and 3.5 ms of a", "step"]


def test_a_wide_table_keeps_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=20, highlight=False)
    table = make_table(("name", "a long header here"))
    table.add_row("x" * 30, "12,345")
    show_table(console, table)
    out = capsys.readouterr().out
    assert "x" * 30 in out
    assert "a long header here" in out
    assert console.width == 20
