"""The figure of what `stree-tune validate --write` measured live, beside what was predicted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from xml.etree import ElementTree

from stree_autotune.report.data import Evidence, trial_of
from stree_autotune.report.figure import Figure, Panel
from stree_autotune.report.svg_chart import WIDTH, add_text, svg_root, to_markup
from stree_autotune.store import digits, percent
from stree_core.errors import StreeError
from stree_core.profile import Measured, MeasuredBlock, Profile
from stree_core.tree import DEFAULT_TREE, OFF, Tree

ROW_HEIGHT = 34
_CHAIN = re.compile(r"(?:best )?chain \(?(\d{1,3})\)?")


@dataclass(frozen=True, slots=True)
class LiveRow:
    """One measured row; predicted_tokens_per_s is None where nothing at hand predicts it."""

    measured: Measured
    predicted_tokens_per_step: float | None
    predicted_step_ms: float | None
    predicted_tokens_per_s: float | None

    @property
    def error(self) -> float | None:
        """Relative error of the predicted tokens per second."""
        if self.predicted_tokens_per_s is None:
            return None
        return self.predicted_tokens_per_s / self.measured.tokens_per_s - 1


def live_rows(profile: Profile, evidence: Evidence) -> tuple[LiveRow, ...]:
    """Return the measured rows of a profile with what is predicted of each."""
    block = profile.measured
    return tuple(_live_row(row, profile, evidence) for row in block.rows) if block else ()


def live_figure(block: MeasuredBlock, rows: tuple[LiveRow, ...]) -> Figure:
    """Draw predicted and measured tokens/s of every mode, per batch size."""
    panels = [
        _panel(batch_size, tuple(group))
        for batch_size, group in groupby(rows, key=lambda row: row.measured.batch_size)
    ]
    return Figure(
        key="live",
        title="Live: predicted against measured",
        lead=f"Decoded live on {block.gpu} on {block.date[:10]}, with the profile’s choice and "
        "others. Predictions use the trace’s prompts; live prompts may be others, so tokens per "
        "step may differ.",
        panels=tuple(panels),
        headers=(
            "batch size",
            "mode",
            "tokens/step, predicted",
            "live",
            "step ms, predicted",
            "live",
            "tokens/s, predicted",
            "live",
            "difference",
        ),
        rows=tuple(_table_row(row) for row in rows),
        legend=(("chosen", "measured live"), ("predicted", "predicted")),
        narrow=True,
    )


def _live_row(row: Measured, profile: Profile, evidence: Evidence) -> LiveRow:
    for policy_row in profile.policy:
        if policy_row.batch_size == row.batch_size and row.mode == f"tuned {policy_row.verdict}":
            told = policy_row.predicted
            return LiveRow(row, told.tokens_per_step, told.step_ms, told.tokens_per_s)
    tree = _tree_of(row.mode)
    if tree is None or evidence.trace is None or evidence.cost is None:
        return LiveRow(row, None, None, None)
    try:
        trial = trial_of(evidence.trace, evidence.cost, row.batch_size, tree)
    except StreeError:
        # neither the table nor the trace need to cover what somebody ran
        return LiveRow(row, None, None, None)
    return LiveRow(row, trial.tokens_per_step, trial.step_ms, trial.tokens_per_s)


def _tree_of(mode: str) -> Tree | None:
    """Return the tree that `validate` ran under a name, None when the name alone does not tell."""
    if mode == OFF.kind:
        return OFF
    if mode == "published tree":
        return DEFAULT_TREE
    chain = _CHAIN.fullmatch(mode)
    return Tree.chain(int(chain[1])) if chain else None


def _panel(batch_size: int, rows: tuple[LiveRow, ...]) -> Panel:
    values = [row.measured.tokens_per_s for row in rows]
    values += [row.predicted_tokens_per_s or 0.0 for row in rows]
    known = [(row, error) for row in rows if (error := row.error) is not None]
    worst = max((abs(error) for _, error in known), default=0.0)
    spoken = "; ".join(
        f"{row.measured.mode} {digits(row.measured.tokens_per_s)}"
        + (
            f", predicted {digits(row.predicted_tokens_per_s)}"
            if row.predicted_tokens_per_s
            else ""
        )
        for row in rows
    )
    root = svg_root(
        WIDTH, ROW_HEIGHT * len(rows) + 4, f"Tokens per second measured live: {spoken}."
    )
    scale = (WIDTH - 16) / max(values)
    for index, row in enumerate(rows):
        _draw(root, row, ROW_HEIGHT * index, scale)
    note = f"largest difference {percent(worst)}" if known else "no prediction at hand"
    return Panel(f"Batch size {batch_size}", note, to_markup(root))


def _draw(root: ElementTree.Element, row: LiveRow, top: float, scale: float) -> None:
    live, predicted = row.measured.tokens_per_s, row.predicted_tokens_per_s
    tuned = row.measured.mode.startswith("tuned")
    add_text(root, 4, top + 13, row.measured.mode, "strong" if tuned else "label", "start")
    error = f", predicted {percent(row.error, signed=True)}" if row.error is not None else ""
    add_text(root, WIDTH - 4, top + 13, f"{digits(live)}{error}", "tick", "end")
    bar = {"x": "4", "y": f"{top + 19:.1f}", "height": "8", "rx": "2"}
    style = "bar bar-tuned" if tuned else "bar"
    ElementTree.SubElement(root, "rect", {**bar, "width": f"{scale * live:.1f}", "class": style})
    if predicted is not None:
        path = f"M{4 + scale * predicted:.1f} {top + 17:.1f}v12"
        ElementTree.SubElement(root, "path", {"d": path, "class": "predicted"})


def _table_row(row: LiveRow) -> tuple[str, ...]:
    live = row.measured

    def text(value: float | None, form: str) -> str:
        return "not known" if value is None else format(value, form)

    return (
        str(live.batch_size),
        live.mode,
        text(row.predicted_tokens_per_step, ".3f"),
        f"{live.tokens_per_step:.3f}",
        text(row.predicted_step_ms, ".3f"),
        f"{live.step_ms:.3f}",
        text(row.predicted_tokens_per_s, ",.0f"),
        digits(live.tokens_per_s),
        text(row.error, "+.1%"),
    )
