"""Figures of prompts: how fast they are read, and what is left of a gain in whole requests."""

from __future__ import annotations

from stree_autotune.report.figure import Figure, Panel
from stree_autotune.report.svg_chart import Chart, linear_axis, log_axis
from stree_autotune.store import PromptPoint, Reader, RuntimeTable, digits, percent
from stree_autotune.trace import Trace
from stree_core.profile import PolicyRow, Profile


def prompts_figure(table: RuntimeTable) -> Figure | None:
    """Draw prompt tokens per second by length; None where no prompt was measured."""
    if not table.prompts:
        return None
    rates = {point: _tokens_per_s(point) for point in table.prompts}
    both = [point for point in table.prompts if point.reader == "pair"]
    lengths = [point.prompt_tokens for point in table.prompts]
    axis_x = log_axis("tokens of a prompt", [float(length) for length in lengths])
    axis_y = linear_axis("prompt tokens/s", list(rates.values()))
    fastest = max(both or rates, key=lambda point: rates[point])
    chart = Chart(
        axis_x,
        axis_y,
        f"Prompt tokens per second by length; the most are {digits(rates[fastest])}, with "
        f"{fastest.batch_size} prompts of {fastest.prompt_tokens:,} tokens.",
    )
    for size in sorted({point.batch_size for point in both}):
        line = sorted((float(p.prompt_tokens), rates[p]) for p in both if p.batch_size == size)
        chart.line(line, "curve")
        words = f"{size} side by side"
        for length, rate in line:
            chart.dot((length, rate), "point", f"{words}, {length:.0f}: {digits(rate)} tokens/s")
    return Figure(
        key="prompts",
        title="How fast prompts are read",
        lead=f"Prompts of one length side by side, measured on {table.gpu_name}, "
        f"{table.number_types}: from their ids on the host to their first tokens. A line is one "
        "number of prompts, read by target and draft; speculation waits for both.",
        panels=(Panel("Target and draft", f"{len(both)} points", chart.svg()),),
        headers=("read by", "prompts", "tokens of each", "ms", "tokens/s"),
        rows=tuple(
            (
                "target and draft" if point.reader == "pair" else "target",
                str(point.batch_size),
                f"{point.prompt_tokens:,}",
                digits(point.ms),
                digits(rate),
            )
            for point, rate in rates.items()
        ),
        narrow=True,
    )


def requests_figure(profile: Profile, table: RuntimeTable, trace: Trace | None) -> Figure | None:
    """Say what whole requests gain, prompt included; None without prompts or speculation."""
    rows = [row for row in profile.policy if row.verdict != "off"]
    if not table.prompts or not rows or trace is None or not trace.num_prompts:
        return None
    # The first token of an output comes with the prompt.
    output = trace.num_positions / trace.num_prompts
    gains = {row: _whole_requests(row, table, output) for row in rows}
    lengths = sorted(set().union(*gains.values()))
    if not lengths:
        return None
    return Figure(
        key="requests",
        title="What whole requests gain",
        lead="Reading the prompt takes the same time with and without a tree, and a little more "
        "for the draft, so that a request as a whole gains less than its output alone. Counted "
        "is the device's time of a request: its prompt, read by itself or side by side as "
        f"measured, and {digits(output + 1)} tokens of output, which is the mean of the trace.",
        panels=(),
        headers=("batch size", "output alone", *(f"prompt of {n:,} tokens" for n in lengths)),
        rows=tuple(
            (
                str(row.batch_size),
                percent(row.predicted.speedup - 1, signed=True),
                *(percent(of[n], signed=True) if n in of else "-" for n in lengths),
            )
            for row, of in gains.items()
        ),
        narrow=True,
    )


def _whole_requests(row: PolicyRow, table: RuntimeTable, output: float) -> dict[int, float]:
    """Return gains over off by the prompt's length, where both readers were timed with it."""
    fast = row.predicted.tokens_per_s
    slow = fast / row.predicted.speedup
    alone, both = (_ms_of_one(table, reader, row.batch_size) for reader in ("target", "pair"))
    return {
        length: (alone[length] + 1e3 * output / slow) / (both[length] + 1e3 * output / fast) - 1
        for length in alone.keys() & both.keys()
    }


def _ms_of_one(table: RuntimeTable, reader: Reader, batch_size: int) -> dict[int, float]:
    """Return ms of one prompt by length, of as many side by side as a batch has, at most."""
    found: dict[int, tuple[int, float]] = {}
    for point in table.prompts:
        if point.reader == reader and point.batch_size <= batch_size:
            share = point.batch_size, point.ms / point.batch_size
            found[point.prompt_tokens] = max(share, found.get(point.prompt_tokens, (0, 0.0)))
    return {length: ms for length, (_, ms) in found.items()}


def _tokens_per_s(point: PromptPoint) -> float:
    return 1e3 * point.batch_size * point.prompt_tokens / point.ms
