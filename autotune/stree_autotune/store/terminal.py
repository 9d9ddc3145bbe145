"""Text, numbers and tables on the screen: within 80 columns, more where there are more.

Numbers have one spelling: three digits, commas between thousands, per cent with a space before.
"""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from stree_core.shown_text import shown

NARROWEST, WIDEST = 80, 1000
WORDY = ("verdict", "mode")
"""Headers of columns that hold words, which are not set to the right."""


_NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=(?:%|ms|µs|GB|TB/s|tokens/s)\b|%)")


def result_console() -> Console:
    """Return the console for results: stdout, at least 80 columns wide."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(NARROWEST, console.width)
    return console


def say(console: Console, text: str | Text) -> None:
    """Print text that wraps between words alone: a path or a number with its unit stays whole."""
    wrapped = Text(_wrapped(str(text), console.width))
    for span in () if isinstance(text, str) else text.spans:
        # wrapping puts a line's end where a space was: places stay
        wrapped.stylize(span.style, span.start, span.end)
    console.print(wrapped, soft_wrap=True)


def say_note(text: str) -> None:
    """Print a note to stderr, further lines indented."""
    width = max(NARROWEST, Console(stderr=True).width)
    sys.stderr.write(_wrapped(shown(f"note: {text}"), width, indent="  ") + "\n")


def _wrapped(text: str, width: int, indent: str = "") -> str:
    joined = _NUMBER_AND_UNIT.sub("\u00a0", text)
    lines = textwrap.fill(
        joined, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return lines.replace("\u00a0", " ")


def show_table(console: Console, table: Table) -> None:
    """Print a table, beyond the console's width where it would lose digits otherwise.

    Lines end with their last letter, so that one long name makes no other line wrap.
    """
    needed = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    width, console.width = console.width, max(console.width, needed)
    with console.capture() as captured:
        console.print(table, crop=False)
    console.width = width
    console.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def make_table(headers: Sequence[str]) -> Table:
    """Return an empty table without lines, two spaces between columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        words = header in WORDY
        table.add_column(header, justify="left" if words else "right", no_wrap=True)
    return table


def digits(value: float) -> str:
    """Return a number to three digits, whole ones from 100 on, with commas between thousands."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    places = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{places}f}"


def percent(share: float, *, signed: bool = False) -> str:
    """Return a share as per cent: one decimal below 10 %, whole ones from there on."""
    value = 100 * share
    # adding 0 turns -0.0 into 0.0
    places = 1 if abs(value) < 9.95 else 0
    value = round(value, places) + 0.0
    return f"{value:{'+' * signed},.{places}f} %"


def print_json(content: object) -> None:
    """Print one JSON document as one line."""
    sys.stdout.write(json.dumps(content) + "\n")


def report(text: str, summary: dict[str, object], as_json: bool) -> None:
    """Print lines for a reader, then, when asked, one line of JSON."""
    sys.stdout.write(text + "\n")
    if as_json:
        print_json(summary)
