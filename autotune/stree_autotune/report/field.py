"""The picture of an analysis: what a tree brings and costs by its size, and where that pays.

Per batch size three panels: tokens per step and step time against nodes, and one against the other,
where speed over off is a line through the origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from markupsafe import Markup

from stree_autotune.report.figure import Figure, Marks, Panel, about, template
from stree_autotune.report.sizes import Banded, Scaling
from stree_autotune.report.svg_chart import (
    HEIGHT,
    WIDTH,
    XY,
    Chart,
    add_text,
    linear_axis,
    nodes_axis,
    svg_root,
)
from stree_autotune.search import Trial
from stree_autotune.store import digits, percent, version_of
from stree_core.extras import DISTRIBUTION

SPEEDS = (0.5, 0.75, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Speeds over off whose lines are drawn, as far as trees come near them; that of 1 always is."""
LEGEND = (
    ("tree-line", "trees, the fastest of each size"),
    ("chain-line", "chains"),
    ("band", "95 % interval"),
    ("off", "off, and its speed"),
    ("chosen", "fastest"),
)
GAP, CAPTION = 12, 26

Value = Callable[[Trial], float]


@dataclass(frozen=True, slots=True)
class Field:
    """One batch size: what was found, with bands, and whole steps that were measured (nodes, ms).

    `trees` and `chains` ascend in size and start with off.
    """

    scaling: Scaling
    trees: tuple[Banded, ...]
    chains: tuple[Banded, ...]
    measured: tuple[XY, ...]


def field_figure(field: Field, marks: Marks) -> Figure:
    """Draw one batch size."""
    trees, batch_size = field.trees, field.scaling.batch_size
    sentence = field.scaling.sentence()
    measured = (("measured", "measured steps of the probe’s trees"),) if field.measured else ()
    return Figure(
        key=f"field-{batch_size}",
        title=(sentence[0].upper() + sentence[1:]).replace(" %", "\u00a0%"),
        lead="",
        panels=(
            _tokens_panel(field, marks),
            _time_panel(field, marks),
            _speed_panel(field, marks),
        ),
        headers=(
            "nodes", "depth", "tokens/step", "95 % interval", "step ms", "95 % interval",
            "speed over off", "next node brings", "costs",
        ),
        rows=tuple(
            (
                str(size.nodes),
                str(size.depth),
                about(digits(size.tokens_per_step), estimated=marks.tokens and size.nodes > 0),
                f"{digits(banded.tokens[0])} to {digits(banded.tokens[1])}",
                about(digits(size.step_ms), estimated=marks.times),
                f"{digits(banded.step_ms[0])} to {digits(banded.step_ms[1])}",
                about(f"{size.speedup:.2f}×", estimated=marks.speed and size.nodes > 0),
                "" if size.gain is None else percent(size.gain, signed=True),
                "" if size.cost is None else percent(size.cost, signed=True),
            )
            for size, banded in zip(field.scaling.sizes, trees, strict=True)
        ),
        legend=(*LEGEND, *measured),
        estimated=marks.speed,
    )  # fmt: skip


def _nodes(banded: Banded) -> float:
    return float(banded.trial.tree.num_nodes)


def _draw(chart: Chart, field: Field, value: Value, ends: Callable[[Banded], XY]) -> None:
    """Draw the bands of trees and chains, then the lines over them."""
    kinds = ((field.chains, "chain"), (field.trees, "tree"))
    for some, _ in kinds:
        low, high = ([(_nodes(each), ends(each)[end]) for each in some] for end in (0, 1))
        chart.band(low, high, "band")
    for some, kind in kinds:
        chart.line([(_nodes(each), value(each.trial)) for each in some], f"{kind}-line")
        for each in some[1:]:
            words = f"{each.trial.tree.full_label}: {digits(value(each.trial))}"
            chart.dot((_nodes(each), value(each.trial)), kind, words, radius=1.8)


def _tokens_panel(field: Field, marks: Marks) -> Panel:
    both = (*field.trees, *field.chains)
    most = field.trees[-1].trial.tree.num_nodes
    last = field.trees[-1].trial
    description = (
        f"{'Estimated. ' * marks.tokens}Tokens per step against nodes, from 1 without speculation "
        f"to {digits(last.tokens_per_step)} with {most} nodes."
    )
    tops = linear_axis("tokens per step", [banded.tokens[1] for banded in both])
    chart = Chart(nodes_axis("nodes", most), tops, description)
    _draw(chart, field, lambda trial: trial.tokens_per_step, lambda each: each.tokens)
    return Panel("What a node brings", _mark(marks.tokens, "borrowed"), chart.svg())


def _time_panel(field: Field, marks: Marks) -> Panel:
    both = (*field.trees, *field.chains)
    most = max(
        field.trees[-1].trial.tree.num_nodes, *(int(x) for x, _ in field.measured or [(0, 0)])
    )
    off_ms = field.trees[0].trial.step_ms
    description = (
        f"{'Estimated. ' * marks.times}Milliseconds of a step against nodes, from {digits(off_ms)} "
        f"without speculation to {digits(field.trees[-1].trial.step_ms)}."
    )
    tops = [*(banded.step_ms[1] for banded in both), *(y for _, y in field.measured)]
    chart = Chart(nodes_axis("nodes", most), linear_axis("step ms", tops), description)
    chart.level(off_ms, "off-line")
    _draw(chart, field, lambda trial: trial.step_ms, lambda each: each.step_ms)
    for nodes, value in field.measured:
        chart.dot(
            (nodes, value), "measured", f"measured with {nodes:.0f} nodes: {digits(value)} ms"
        )
    return Panel("What it costs", _mark(marks.times, "estimated"), chart.svg())


def _speed_panel(field: Field, marks: Marks) -> Panel:
    trials = [each.trial for each in (*field.trees, *field.chains)]
    off, best = field.trees[0].trial, field.scaling.best
    most = max(trial.tokens_per_s for trial in trials) / off.tokens_per_s
    across = linear_axis("step ms", [trial.step_ms for trial in trials])
    up = linear_axis("tokens per step", [1.05 * trial.tokens_per_step for trial in trials])
    description = (
        f"{'Estimated. ' * marks.speed}Tokens per step against milliseconds of a step, with lines "
        f"of equal speed over off. The fastest, {best.nodes} nodes, is at {best.speedup:.2f} times."
    )
    chart = Chart(across, up, description)
    chart.ray(1 / off.step_ms, "off-line", "1×")
    for speed in SPEEDS:
        if speed <= 1.3 * most:
            chart.ray(speed / off.step_ms, "ray", f"{speed:g}×")
    for some, kind in ((field.chains, "chain"), (field.trees, "tree")):
        chart.line([(e.trial.step_ms, e.trial.tokens_per_step) for e in some[1:]], f"{kind}-line")
        for each in some[1:]:
            trial = each.trial
            speed = trial.tokens_per_s / off.tokens_per_s
            words = f"{trial.tree.full_label}: {speed:.2f}× off"
            chart.dot((trial.step_ms, trial.tokens_per_step), kind, words, radius=1.8)
    chart.dot((off.step_ms, 1.0), "off", "off", radius=4)
    words = f"fastest: {best.nodes} nodes, {best.speedup:.2f}× off"
    chart.dot((best.step_ms, best.tokens_per_step), "chosen", words, radius=5)
    return Panel("Where it pays", _mark(marks.speed, "estimated"), chart.svg())


def _mark(estimated: bool, word: str) -> str:
    return f"≈ {word}" if estimated else ""


@dataclass(frozen=True, slots=True)
class FieldPage:
    """All that a page of an analysis shows.

    `notes` say where numbers come from; `cases` is the table of other GPUs and samplings, and
    `case_notes` what is estimated about those.
    """

    title: str
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]
    headers: tuple[str, ...]
    cases: tuple[tuple[str, ...], ...]
    case_notes: tuple[str, ...]


def page_of(page: FieldPage) -> str:
    """Return the HTML page, which needs no network and runs no script."""
    return template("analyze.html").render(page=page, version=version_of(DISTRIBUTION))


def svg_of(page: FieldPage) -> str:
    """Return all panels as one drawing, a row per batch size, with the page's colours."""
    rows = len(page.figures)
    width, row_height = 3 * WIDTH + 4 * GAP, HEIGHT + 2 * CAPTION
    height = CAPTION + rows * (row_height + GAP) + CAPTION * len(page.notes)
    root = svg_root(width, height, page.title)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    css = template("report.css").render()
    ElementTree.SubElement(root, "style").text = css + "svg text { font-family: var(--sans); }"
    ElementTree.SubElement(root, "rect", {"width": "100%", "height": "100%", "class": "ground"})
    add_text(root, GAP, 18, page.title, "strong", "start")
    top = float(CAPTION)
    for figure in page.figures:
        add_text(root, GAP, top + 16, figure.title, "label", "start")
        for number, panel in enumerate(figure.panels):
            left = GAP + number * (WIDTH + GAP)
            name = f"{panel.title} {panel.note}".strip()
            add_text(root, left, top + 16 + CAPTION, name, "label", "start")
            drawing = ElementTree.fromstring(panel.svg)
            drawing.set("x", str(left))
            drawing.set("y", f"{top + 2 * CAPTION:g}")
            root.append(drawing)
        top += row_height + GAP
    for note in page.notes:
        add_text(root, GAP, top + 14, note, "tick", "start")
        top += CAPTION
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def written(page: FieldPage, path: Path) -> str:
    """Return the text of the picture in the format of its file's ending."""
    return page_of(page) if path.suffix == ".html" else svg_of(page)
