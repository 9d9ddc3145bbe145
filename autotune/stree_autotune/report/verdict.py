"""What a profile decides, in the words and bars that stand first in its report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.etree import ElementTree

from markupsafe import Markup

from stree_autotune.report.figure import Marks
from stree_autotune.report.svg_chart import svg_root, to_markup
from stree_autotune.store import answer
from stree_core.profile import Interval, PolicyRow, Profile

BAR_WIDTH, BAR_HEIGHT = 120, 18


ALTERNATIVE = re.compile(
    r"off: (?P<tree>.+?) would change speed by (?P<value>-?[\d.]+) % "
    r"\[(?P<low>-?[\d.]+), (?P<high>-?[\d.]+)\]"
)
"""What the reason of a row that is off begins with, see stree_autotune.search.verdict."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """The best that was not chosen where off was: its speed over off with the interval."""

    tree: str
    speedup: float
    low: float
    high: float

    @classmethod
    def of(cls, row: PolicyRow) -> Alternative | None:
        """Read it from the reason of a row; None where that names none."""
        told = ALTERNATIVE.match(row.reason)
        if row.verdict != "off" or told is None:
            return None
        value, low, high = (1 + float(told[key]) / 100 for key in ("value", "low", "high"))
        return cls(told["tree"], value, low, high)


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One row of the policy with its interval drawn, off's with that of the best alternative."""

    row: PolicyRow
    tree: str
    bar: Markup
    other: Alternative | None = None


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The headline, the sentence below it, and a line per batch size."""

    headline: str
    answer: str
    summary: str
    best: PolicyRow
    best_label: str
    rows: tuple[VerdictRow, ...]
    reasons: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, profile: Profile) -> Verdicts:
        """Put a profile's policy into words."""
        rows = profile.policy
        best = max(rows, key=lambda row: row.predicted.speedup)
        limits = _limits(rows)
        lines = []
        for row in rows:
            tree = row.tree.build()
            words = tree.full_label
            other = Alternative.of(row)
            if row.verdict != "off":
                bar = _bar(
                    row.predicted.speedup, row.predicted.speedup_interval, row.verdict, limits
                )
            elif other is not None:
                bar = _bar(other.speedup, other, "off", limits)
            else:
                bar = Markup("")
            lines.append(VerdictRow(row, words, bar, other))
        reasons = tuple(
            (_sizes([row.batch_size for row in group]), reason)
            for reason, group in groupby(rows, key=lambda row: row.reason)
        )
        about = "about " if Marks.of(profile).speed else ""
        return cls(
            _headline(rows),
            answer(profile),
            _summary(rows, best, about),
            best,
            best.tree.build().full_label,
            tuple(lines),
            reasons,
        )


def _headline(rows: Sequence[PolicyRow]) -> str:
    on = [row for row in rows if row.verdict != "off"]
    if not on:
        return "Do not speculate."
    kinds = {row.verdict for row in on}
    how = f"with a {next(iter(kinds))}" if len(kinds) == 1 else "with chains and trees"
    if len(on) == len(rows):
        counts = sorted({row.tree.build().num_nodes for row in on})
        nodes = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"Speculate {how} of {nodes} draft token{'s' if counts[-1] > 1 else ''}."
    return f"Speculate {how} at {_sizes([row.batch_size for row in on]).lower()}, not otherwise."


def _summary(rows: Sequence[PolicyRow], best: PolicyRow, about: str) -> str:
    where = _sizes([row.batch_size for row in rows]).lower()
    if best.verdict == "off":
        return f"Nothing that was tried is reliably faster than one token at a time, at {where}."
    interval = best.predicted.speedup_interval
    return (
        f"At its best, at batch size {best.batch_size}, this gives "
        f"{about}{best.predicted.speedup:.2f} times the tokens per second of decoding without "
        "speculation (95 % interval "
        f"{interval.low:.2f} to {interval.high:.2f})."
    )


def _sizes(sizes: Sequence[int]) -> str:
    """Return batch sizes in words: Batch size 4; Batch sizes 1, 2 and 4."""
    if len(sizes) == 1:
        return f"Batch size {sizes[0]}"
    return f"Batch sizes {', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"


def _limits(rows: Sequence[PolicyRow]) -> tuple[float, float]:
    intervals = [Alternative.of(row) or row.predicted.speedup_interval for row in rows]
    low = min([0.9, *(interval.low for interval in intervals)])
    high = max([1.1, *(interval.high for interval in intervals)])
    return low, high


def _bar(
    speedup: float, interval: Interval | Alternative, style: str, limits: tuple[float, float]
) -> Markup:
    """Draw a speedup with its interval on the scale that all rows share; the rule is 1."""
    low, high = limits
    middle = BAR_HEIGHT / 2

    def at(value: float) -> float:
        return 5 + (BAR_WIDTH - 10) * (value - low) / (high - low)

    root = svg_root(
        BAR_WIDTH,
        BAR_HEIGHT,
        f"Speedup {speedup:.2f}, between {interval.low:.2f} and {interval.high:.2f}",
    )
    one = {"d": f"M{at(1):.1f} 1V{BAR_HEIGHT - 1}", "class": "one"}
    ElementTree.SubElement(root, "path", one)
    span = {"d": f"M{at(interval.low):.1f} {middle}H{at(interval.high):.1f}", "class": "span"}
    ElementTree.SubElement(root, "path", {**span, "class": f"span {style}-line"})
    dot = {"cx": f"{at(speedup):.1f}", "cy": f"{middle}", "r": "4", "class": style}
    ElementTree.SubElement(root, "circle", dot)
    return to_markup(root)
