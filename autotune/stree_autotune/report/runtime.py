"""Figures of time: what a verify pass costs by size, and whole steps against their prediction."""

from __future__ import annotations

import math

from stree_autotune.cost import StepCost
from stree_autotune.report.figure import Figure, Marks, Panel, about, panel_rows
from stree_autotune.report.svg_chart import XY, Chart, linear_axis, log_axis
from stree_autotune.store import RuntimeTable, StepRule, digits, percent
from stree_core.profile import PolicyRow, Profile
from stree_core.tree import OFF

TWO_SIDED = 1.96
"""Standard deviations on either side that hold 95 % of a normal distribution."""


def staircase_figure(
    profile: Profile, table: RuntimeTable, cost: StepCost, marks: Marks
) -> Figure | None:
    """Draw the target's pass against tree tokens: measured points, the fit, an estimate's band.

    None when no row of the profile has a batch size that was measured.
    """
    shown = [row for row in panel_rows(profile.policy) if row.batch_size in cost.times]
    if not shown:
        return None
    used = {row.batch_size: dict(_verify_curve(cost, row.batch_size)) for row in shown}
    rows = tuple(
        (
            str(point.batch_size),
            str(point.size),
            digits(point.ms),
            f"{point.spread_ms:.2g}",
            digits(used[point.batch_size][point.size]),
        )
        for point in table.points
        if point.term == "verify" and point.batch_size in used
    )
    where = f"on {table.gpu_name}, {table.number_types}"
    lead = (
        "Milliseconds of the target’s pass over the draft tokens and the root. It rises in steps, "
        "where tiles and kernels change: a token that starts a new step costs far more than the "
        f"next one. Points are medians measured {where}."
    )
    legend = [("point", "measured"), ("curve", "used: never falling, straight between points")]
    if marks.times:
        lead += (
            f" Times for {profile.gpu.name} are estimated from them; the true ones lie in the "
            "band with a probability of 95 %."
        )
        legend[1] = ("curve", f"estimated for {profile.gpu.name}")
        legend.append(("band", "estimate band"))
    legend += [("off", "one token, no speculation"), ("mark", "chosen size")]
    return Figure(
        key="runtime",
        title="What a verify pass costs",
        lead=lead,
        panels=tuple(_staircase_panel(row, table, cost, marks) for row in shown),
        headers=("batch size", "tokens", "measured ms", "spread ms", "used ms"),
        rows=rows,
        legend=tuple(legend),
        estimated=marks.times,
    )


def _staircase_panel(row: PolicyRow, table: RuntimeTable, cost: StepCost, marks: Marks) -> Panel:
    batch_size = row.batch_size
    curve = _verify_curve(cost, batch_size)
    band = _verify_band(cost, curve, marks)
    points = [p for p in table.points if p.term == "verify" and p.batch_size == batch_size]
    one_token = cost.step_ms(batch_size, OFF)
    tops = [one_token, *(value for _, value in curve), *(point.ms for point in points)]
    tops += [value for _, value in band[1]]
    spoken = "Estimated. " if marks.times else ""
    description = (
        f"{spoken}Batch size {batch_size}: the target’s pass takes {digits(curve[0][1])} ms for "
        f"{curve[0][0]:.0f} tokens and {digits(curve[-1][1])} ms for {curve[-1][0]:.0f}; a step of "
        f"one token without speculation {digits(one_token)} ms."
    )
    sizes_axis = linear_axis(
        "tokens in the pass (draft tokens + root)", [curve[-1][0]], ends_round=False
    )
    chart = Chart(sizes_axis, linear_axis("ms", tops), description)
    chart.band(*band, "band")
    chart.level(one_token, "off-line")
    chosen = row.tree.build()
    if chosen.num_nodes:
        chart.upright(chosen.num_tokens, "mark", f"chosen: {chosen.num_tokens}")
    chart.line(curve, "curve")
    for point in points:
        words = f"{point.size} tokens: {digits(point.ms)} ms, spread {point.spread_ms:.2g} ms"
        chart.dot((point.size, point.ms), "point", words)
    return Panel(
        f"Batch size {batch_size}",
        f"one token: {about(digits(one_token), estimated=marks.times)} ms",
        chart.svg(),
    )


def _verify_curve(cost: StepCost, batch_size: int) -> list[XY]:
    """Return the time that prediction uses for every number of tokens."""
    curve = cost.times[batch_size].curves["verify"]
    return [(float(curve.first + i), value) for i, value in enumerate(curve.ms)]


def _verify_band(cost: StepCost, curve: list[XY], marks: Marks) -> tuple[list[XY], list[XY]]:
    """Return between what an estimated curve truly lies with 95 %; nothing for a measured one."""
    if not marks.times:
        return [], []
    factor = math.exp(TWO_SIDED * math.hypot(cost.common, cost.spreads.verify))
    return [(size, ms / factor) for size, ms in curve], [(size, ms * factor) for size, ms in curve]


def steps_figure(table: RuntimeTable) -> Figure | None:
    """Draw whole measured steps against what the sum of the terms and its overhead say."""
    measured_cost = StepCost.from_table(table)
    built = {name: tree.build() for name, tree in table.trees.items()}
    steps = [step for step in table.steps if not step.is_off and step.rule == StepRule.GREEDY]
    pairs = [
        (step, measured_cost.step_ms(step.batch_size, built[step.tree], step.tokens_per_step))
        for step in steps
    ]
    if not pairs:
        return None
    both = [value for step, predicted in pairs for value in (step.ms, predicted)]
    axis_x, axis_y = log_axis("measured ms", both), log_axis("predicted ms", both)
    worst = max(abs(predicted / step.ms - 1) for step, predicted in pairs)
    chart = Chart(
        axis_x,
        axis_y,
        f"{len(pairs)} whole steps, predicted against measured milliseconds; the largest "
        f"difference is {100 * worst:.1f} per cent.",
    )
    chart.line([(axis_x.low, axis_x.low), (axis_x.high, axis_x.high)], "off-line")
    for step, predicted in pairs:
        which = f"batch size {step.batch_size}, {step.tree}"
        words = f"{which}: {digits(step.ms)} ms, predicted {digits(predicted)}"
        chart.dot((step.ms, predicted), "point", words)
    return Figure(
        key="steps",
        title="Whole steps, predicted against measured",
        lead=f"{len(pairs)} speculative steps that the probe timed as a whole on {table.gpu_name}, "
        "against the sum of their separately measured parts. On the dashed line both agree. Steps "
        "that were left out of the fit are predicted with an error of "
        f"{percent(measured_cost.fit_error)}.",
        panels=(Panel(f"{len(pairs)} steps", f"largest difference {percent(worst)}", chart.svg()),),
        headers=("batch size", "tree", "measured ms", "predicted ms", "difference"),
        rows=tuple(
            (
                str(step.batch_size),
                step.tree,
                digits(step.ms),
                digits(predicted),
                percent(predicted / step.ms - 1, signed=True),
            )
            for step, predicted in pairs
        ),
        narrow=True,
    )
