"""Figures of speed: tokens/s against tree size, and the search that found it."""

from __future__ import annotations

from collections.abc import Sequence

from stree_autotune.report.data import Scan
from stree_autotune.report.figure import Figure, Marks, Panel, about
from stree_autotune.report.svg_chart import Chart, linear_axis, nodes_axis
from stree_autotune.search import Trial
from stree_autotune.store import digits

HISTORY_HEIGHT = 170
SPEED_LEAD = (
    "For every size the fastest tree that the search found. The curve rises while a further draft "
    "token is accepted often enough to pay for its time, and falls where it is not. The band is "
    "the 95 % interval of the gain over decoding without speculation, over the trace’s prompts and "
    "the spread of the times. Trees were grown on these prompts, so the curve lies a little high; "
    "the whisker of the choice is on prompts it was not grown on."
)


def speed_figure(scans: Sequence[Scan], marks: Marks) -> Figure:
    """Draw the fastest tree of every size with its interval, per batch size."""
    rows = tuple(
        (
            str(scan.row.batch_size),
            point.trial.tree.full_label,
            digits(point.trial.tokens_per_step),
            digits(point.trial.step_ms),
            digits(point.trial.tokens_per_s),
            f"{digits(point.low)} to {digits(point.high)}",
        )
        for scan in scans
        for point in scan.best
    )
    return Figure(
        key="speed",
        title="Tokens per second against draft tokens",
        lead=SPEED_LEAD,
        panels=tuple(_speed_panel(scan, marks) for scan in scans),
        headers=("batch size", "tree", "tokens/step", "step ms", "tokens/s", "95 % interval"),
        rows=rows,
        legend=(
            ("chosen", "chosen, with its 95 % interval"),
            ("chain", "chain"),
            ("tree", "tree"),
            ("off", "off: no speculation"),
            ("band", "95 % interval"),
        ),
        estimated=marks.speed,
    )


def _speed_panel(scan: Scan, marks: Marks) -> Panel:
    row, off, best = scan.row, scan.off, scan.best
    most = best[-1].trial.tree.num_nodes
    chosen, interval = row.tree.build(), row.predicted.speedup_interval
    low, high = (off.tokens_per_s * gain for gain in (interval.low, interval.high))
    tops = [*(point.high for point in best), high, off.tokens_per_s]
    words = chosen.full_label
    across = nodes_axis("draft tokens per step", most)
    chart = Chart(across, linear_axis("tokens/s", tops), marks.spoken + _spoken(scan, words))
    curve = [(float(point.trial.tree.num_nodes), point) for point in best]
    chart.band(
        [(size, point.low) for size, point in curve],
        [(size, point.high) for size, point in curve],
        "band",
    )
    chart.level(off.tokens_per_s, "off-line")
    chart.line([(size, point.trial.tokens_per_s) for size, point in curve], "curve")
    for size, point in curve:
        trial = point.trial
        chart.dot((size, trial.tokens_per_s), trial.tree.kind, _title(trial), radius=2.2)
    size = float(chosen.num_nodes)
    if chosen.num_nodes:
        chart.whisker(size, low, high, "whisker")
    title = f"Chosen: {words}, {digits(row.predicted.tokens_per_s)} tokens/s"
    chart.dot((size, row.predicted.tokens_per_s), "chosen", title, radius=5)
    gain = about(f"{row.predicted.speedup:.2f}× off’s speed", estimated=marks.speed)
    note = f"{row.verdict} of {chosen.num_nodes}: {gain}" if chosen.num_nodes else "off"
    return Panel(f"Batch size {row.batch_size}", note, chart.svg())


def _spoken(scan: Scan, words: str) -> str:
    """Return what the curve of a row says."""
    fastest = scan.fastest_speculation
    name = fastest.tree.full_label
    return (
        f"Batch size {scan.row.batch_size}: tokens per second against draft tokens, from 0 to "
        f"{scan.best[-1].trial.tree.num_nodes}. Without speculation "
        f"{digits(scan.off.tokens_per_s)}; the fastest with speculation, {name}, "
        f"{digits(fastest.tokens_per_s)}. Chosen: {words}, "
        f"{digits(scan.row.predicted.tokens_per_s)}."
    )


def history_figure(scans: Sequence[Scan], marks: Marks) -> Figure:
    """Draw every trial of the search in order, and the best so far."""
    return Figure(
        key="history",
        title="Search history",
        lead="Every tree that was evaluated, in order: first one grown tree per depth limit at all "
        "its sizes, then Optuna’s trials, then single leaves added, dropped and swapped. Repeated "
        "for this report with the profile’s seed and sources. The table lists what improved the "
        "best.",
        panels=tuple(_history_panel(scan, marks) for scan in scans),
        headers=("batch size", "trial", "tree", "tokens/step", "step ms", "tokens/s"),
        rows=tuple(
            (
                str(scan.row.batch_size),
                str(number),
                trial.tree.full_label,
                digits(trial.tokens_per_step),
                digits(trial.step_ms),
                digits(trial.tokens_per_s),
            )
            for scan in scans
            for number, trial in _improvements(scan.trials)
        ),
        legend=(("cloud", "a trial"), ("best-line", "best so far"), ("off", "off")),
        estimated=marks.speed,
        folded=True,
    )


def _history_panel(scan: Scan, marks: Marks) -> Panel:
    trials = scan.trials
    improved = _improvements(trials)
    number, best = improved[-1]
    name = best.tree.full_label
    description = (
        f"{marks.spoken}Batch size {scan.row.batch_size}: {len(trials)} trees evaluated; the "
        f"fastest, {name} with {digits(best.tokens_per_s)} tokens per second, was number {number}."
    )
    chart = Chart(
        linear_axis("trial", [len(trials)], ends_round=False),
        linear_axis("tokens/s", [trial.tokens_per_s for trial in trials]),
        description,
        height=HISTORY_HEIGHT,
    )
    chart.level(scan.off.tokens_per_s, "off-line")
    chart.cloud(((i, trial.tokens_per_s) for i, trial in enumerate(trials, start=1)), "cloud")
    steps = [(float(i), trial.tokens_per_s) for i, trial in improved]
    chart.line([*steps, (float(len(trials)), best.tokens_per_s)], "best-line", stairs=True)
    chart.dot((number, best.tokens_per_s), best.tree.kind, _title(best), radius=3.5)
    return Panel(
        f"Batch size {scan.row.batch_size}", f"best: trial {number} of {len(trials)}", chart.svg()
    )


def _improvements(trials: Sequence[Trial]) -> list[tuple[int, Trial]]:
    """Return the trials, numbered from 1, that were faster than all before them."""
    improved: list[tuple[int, Trial]] = []
    for number, trial in enumerate(trials, start=1):
        if not improved or trial.tokens_per_s > improved[-1][1].tokens_per_s:
            improved.append((number, trial))
    return improved


def _title(trial: Trial) -> str:
    words = trial.tree.full_label
    return (
        f"{words}: {digits(trial.tokens_per_s)} tokens/s, {digits(trial.tokens_per_step)} "
        f"tokens per step, {digits(trial.step_ms)} ms"
    )
