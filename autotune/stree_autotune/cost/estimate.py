"""Estimate a runtime table for a GPU nobody measured it on, with a band or not at all.

Every measured time is multiplied by what the roofline says of the two GPUs. The roofline is fitted
to the tables of the measured GPU; how well it describes a model that it was not fitted to
(leave one shape out) says how far the result can be trusted:

- `own`, of each group of terms: the errors within a shape left out, times the logarithm of the
  largest over the smallest ratio of the two GPUs' published rates. Where all rates differ alike it
  does not matter to which of them a time is attributed.
- `common`, of all times: the same, and for another architecture the mean error of a shape left out
  as well, because its efficiencies may differ as those of another model do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stree_autotune.cost.roofline import (
    FEWEST_SAMPLES,
    Efficiencies,
    Sample,
    Work,
    fit,
    log_errors,
    point_work,
    samples_of,
)
from stree_autotune.cost.tree_shape import shape_of
from stree_autotune.store import GpuSpec, PairWords, Point, RulePoint, RuntimeTable, Step
from stree_core.errors import MissingMeasurement

WIDEST = math.log(2.5)
"""The widest half band, as a logarithm: beyond this factor nothing is promised."""

_TWO_SIDED = 1.96


@dataclass(frozen=True, slots=True)
class Estimate:
    """A table for a GPU nobody measured; spreads are standard deviations of logarithms."""

    table: RuntimeTable
    measured: RuntimeTable
    own: float
    common: float
    rule: str

    @property
    def band(self) -> float:
        """Half of the 95 % band of a time, as a logarithm."""
        return _TWO_SIDED * math.hypot(self.own, self.common)


@dataclass(frozen=True, slots=True)
class Fit:
    """The roofline of one GPU and how it errs on shapes left out (logarithms)."""

    spec: GpuSpec
    found: Efficiencies
    between: float
    within: float


def estimate_table(
    table: RuntimeTable,
    measured: GpuSpec,
    wanted: GpuSpec,
    others: Sequence[RuntimeTable] = (),
    words: PairWords | None = None,
) -> Estimate:
    """Carry `table`, measured on GPU `measured`, to GPU `wanted`.

    `others` are further tables of the measured GPU, dtype and backend to fit to. Raises
    MissingMeasurement when the band would be wider than a factor of 2.5 either way.
    """
    alike = [
        other
        for other in others
        if (other.gpu, other.dtype, other.backend) == (table.gpu, table.dtype, table.backend)
    ]
    samples = [s for each in (table, *alike) for s in samples_of(each)]
    roofline = fit_shapes(list(dict.fromkeys(samples)), measured, table, words)
    own, common = _spreads(roofline, wanted)
    estimate = Estimate(
        _carried(table, roofline, wanted), table, own, common, _rule(roofline, wanted, own, common)
    )
    if estimate.band > WIDEST:
        raise MissingMeasurement(
            f"times measured on {measured.name} say those of {wanted.name} only within a factor of "
            f"{math.exp(estimate.band):.1f}, the limit is {math.exp(WIDEST):g}; measure with "
            f"`{table.model_copy(update={'gpu': wanted.name}).probe_command(words)}`"
        )
    return estimate


def fit_shapes(
    samples: Sequence[Sample], spec: GpuSpec, table: RuntimeTable, words: PairWords | None = None
) -> Fit:
    """Fit the roofline and leave every shape out in turn.

    Raises MissingMeasurement for fewer than two shapes, or too few passes of one.
    """
    models = sorted({sample.model for sample in samples})
    groups = [[sample for sample in samples if sample.model == model] for model in models]
    if len(groups) < 2 or min(map(len, groups)) < FEWEST_SAMPLES:
        raise MissingMeasurement(
            f"estimates need {FEWEST_SAMPLES} measured passes of each of two models, the tables "
            f"of {spec.name} hold fewer; record them with `{table.probe_command(words)}`"
        )
    means, deviations = [], []
    for left_out in groups:
        rest = [sample for group in groups if group is not left_out for sample in group]
        errors = log_errors(left_out, fit(rest, spec), spec)
        means.append(float(errors.mean()))
        deviations.append(float(errors.std()))
    between = float(np.sqrt(np.mean(np.square(means))))
    within = float(np.sqrt(np.mean(np.square(deviations))))
    return Fit(spec, fit(samples, spec), between, within)


def _spreads(roofline: Fit, wanted: GpuSpec) -> tuple[float, float]:
    """Return the spread of each group of terms and of all together; see the module."""
    rates = [math.log(ratio) for ratio in _ratios(roofline.spec, wanted)]
    own = roofline.within * (max(rates) - min(rates))
    same = roofline.spec.architecture == wanted.architecture
    return own, math.hypot(own, 0.0 if same else roofline.between)


def _ratios(measured: GpuSpec, wanted: GpuSpec) -> tuple[float, float, float]:
    """Return how much longer memory, arithmetic and launches take on the wanted GPU."""
    return (
        measured.memory_bandwidth_tb_per_s / wanted.memory_bandwidth_tb_per_s,
        measured.matrix_tflop_per_s_bf16 / wanted.matrix_tflop_per_s_bf16,
        wanted.launch_us / measured.launch_us,
    )


def _carried(table: RuntimeTable, roofline: Fit, wanted: GpuSpec) -> RuntimeTable:
    """Return the table with every time multiplied by its ratio."""
    memory, _, launch = _ratios(roofline.spec, wanted)

    passes = _ratios_of([_point_works(p, table) for p in table.points], roofline, wanted)
    steps = _ratios_of([_step_works(s, table) for s in table.steps], roofline, wanted)

    def point(p: Point, ratio: float | None) -> Point:
        if p.term == "host":
            return p
        return p._replace(ms=p.ms * (memory if ratio is None else ratio))

    def step(s: Step, ratio: float | None) -> Step:
        assert ratio is not None
        return s._replace(ms=s.ms * ratio)

    least: dict[str, float] = {}
    for rule in sorted(table.rules, key=lambda rule: rule.rows):
        least.setdefault(rule.work, rule.ms)

    def rule_point(r: RulePoint) -> RulePoint:
        # What one row takes is launches, what more rows take is memory.
        fixed = min(r.ms, least[r.work])
        return r._replace(ms=fixed * launch + (r.ms - fixed) * memory)

    return table.model_copy(
        update={
            "gpu": wanted.name,
            "gpu_name": wanted.full_name,
            "points": tuple(map(point, table.points, passes)),
            "steps": tuple(map(step, table.steps, steps)),
            "rules": tuple(map(rule_point, table.rules)),
            "no_room": (),
            "steps_no_room": (),
        }
    )


def _ratios_of(
    groups: Sequence[Sequence[Work]], roofline: Fit, wanted: GpuSpec
) -> list[float | None]:
    """Return how much longer each group of passes takes on the wanted GPU; None without passes."""
    works = list(dict.fromkeys(work for group in groups for work in group))
    there, here = (
        dict(zip(works, roofline.found.ms(works, spec).tolist(), strict=True))
        for spec in (wanted, roofline.spec)
    )
    return [
        sum(there[work] for work in group) / sum(here[work] for work in group) if group else None
        for group in groups
    ]


def _point_works(point: Point, table: RuntimeTable) -> list[Work]:
    """Return the pass of a point, none for terms that the roofline does not describe."""
    if point.term not in ("verify", "draft", "draft_root"):
        return []
    return [point_work(point.term, point.batch_size, point.size, table)]


def _step_works(step: Step, table: RuntimeTable) -> list[Work]:
    """Return the passes of a whole step."""
    if step.is_off:
        return [point_work("verify", step.batch_size, 1, table)]
    shape = shape_of(table.trees[step.tree].build())
    works = [point_work("verify", step.batch_size, shape.num_tokens, table)]
    works.append(point_work("draft_root", step.batch_size, 1, table))
    return works + [point_work("draft", step.batch_size, width, table) for width in shape.widths]


def _rule(roofline: Fit, wanted: GpuSpec, own: float, common: float) -> str:
    measured = roofline.spec
    band = _TWO_SIDED * math.hypot(own, common)
    guess = ", launch cost a guess" if wanted.launch_is_guess else ""
    return (
        f"measured on {measured.name}; each time is multiplied by a roofline's ratio for bandwidth "
        f"{measured.memory_bandwidth_tb_per_s:g} to {wanted.memory_bandwidth_tb_per_s:g} TB/s, "
        f"matrix rate {measured.matrix_tflop_per_s_bf16:g} to {wanted.matrix_tflop_per_s_bf16:g} "
        f"TFLOP/s{guess}; true times lie within x{math.exp(-band):.2f} and x{math.exp(band):.2f} "
        "(95 %)"
    )
