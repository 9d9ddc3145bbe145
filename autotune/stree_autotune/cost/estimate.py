"""Estimate a runtime table for a GPU nobody measured it on, with a band or not at all.

Every measured time is multiplied by what the roofline says of the two GPUs. The roofline is fitted
to the tables of the measured GPU; how well it describes a model that it was not fitted to
(leave one shape out) says how far the result can be trusted:

- `own`, of each group of terms: the errors within a shape left out, times the logarithm of the
  largest over the smallest ratio of the two GPUs' published rates. Where all rates differ alike it
  does not matter to which of them a time is attributed.
- `common`, of all times: the same, and the mean error of a shape left out, once for another GPU (up
  to SAME_KERNELS) and once more for another architecture: its efficiencies may differ as those of
  another model do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stree_autotune.cost.layout import Layouts
from stree_autotune.cost.roofline import FEWEST_SAMPLES, Efficiencies, fit, log_errors
from stree_autotune.cost.tree_shape import shape_of
from stree_autotune.cost.work import (
    Sample,
    Work,
    all_samples,
    pass_models,
    pass_work,
    plain_size,
    point_size,
)
from stree_autotune.store import GpuSpec, PairWords, Point, RulePoint, RuntimeTable, Step
from stree_core.errors import MissingMeasurement

WIDEST = math.log(2.5)
"""The widest half band, as a logarithm: beyond this factor nothing is promised."""

TWO_SIDED = 1.96
SAME_KERNELS = 0.1
"""The most that a GPU of one architecture may run the same kernels differently: a guess, beyond
what a shape left out shows of models that no roofline describes."""

NORMAL = 1.4826
"""The standard deviation of a normal distribution over the median of its absolute values."""


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
        return TWO_SIDED * math.hypot(self.own, self.common)


@dataclass(frozen=True, slots=True)
class Fit:
    """The roofline of one GPU and how it errs on shapes left out (logarithms).

    `between` is of a shape's mean error (robustly), `within` of errors about it, `median` of
    all errors.
    """

    spec: GpuSpec
    found: Efficiencies
    between: float
    within: float
    median: float
    num_shapes: int


def estimate_table(
    table: RuntimeTable,
    measured: GpuSpec,
    wanted: GpuSpec,
    others: Sequence[RuntimeTable] = (),
    words: PairWords | None = None,
    layouts: Layouts | None = None,
) -> Estimate:
    """Carry `table`, measured on GPU `measured`, to GPU `wanted`.

    `others` are further tables of the measured GPU, dtype and backend to fit to, `layouts` those of
    all their models whose shapes are known. Raises MissingMeasurement when the band would be wider
    than a factor of 2.5 either way.
    """
    layouts = layouts or Layouts()
    samples = all_samples([table, *(o for o in others if is_like(o, table))], layouts)
    roofline = fit_shapes(samples, measured, table, words)
    own, common = transfer_spreads(roofline, wanted)
    carried = _carried(table, roofline, wanted, layouts)
    estimate = Estimate(carried, table, own, common, _rule(roofline, wanted, own, common))
    if estimate.band > WIDEST:
        raise MissingMeasurement(
            f"times measured on {measured.name} say those of {wanted.name} only within a factor of "
            f"{math.exp(estimate.band):.1f}, the limit is {math.exp(WIDEST):g}; measure with "
            f"`{table.model_copy(update={'gpu': wanted.name}).probe_command(words)}`"
        )
    return estimate


def is_like(other: RuntimeTable, table: RuntimeTable) -> bool:
    """True when the passes of both tables ran on one GPU, in one precision and backend."""
    return (other.gpu, other.dtype, other.backend) == (table.gpu, table.dtype, table.backend)


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
    found = fit(samples, spec)
    means, deviations, sizes = [], [], []
    for left_out in groups:
        rest = [sample for group in groups if group is not left_out for sample in group]
        errors = log_errors(left_out, fit(rest, spec, found), spec)
        means.append(float(errors.mean()))
        deviations.append(float(errors.std()))
        sizes += np.abs(errors).tolist()
    # the median, since one model of another kind must not forbid estimates of all others
    between = NORMAL * float(np.median(np.abs(means)))
    within = float(np.sqrt(np.mean(np.square(deviations))))
    median = float(np.median(sizes))
    return Fit(spec, found, between, within, median, len(models))


def transfer_spreads(roofline: Fit, wanted: GpuSpec) -> tuple[float, float]:
    """Return the spread of each group of terms and of all together; see the module."""
    if roofline.spec.name == wanted.name:
        return 0.0, 0.0
    rates = [math.log(ratio) for ratio in rate_ratios(roofline.spec, wanted)]
    own = roofline.within * (max(rates) - min(rates))
    alike = roofline.spec.architecture == wanted.architecture
    kernels = min(roofline.between, SAME_KERNELS)
    return own, math.hypot(own, kernels, 0.0 if alike else roofline.between)


def rate_ratios(measured: GpuSpec, wanted: GpuSpec) -> tuple[float, float, float]:
    """Return how much longer memory, arithmetic and launches take on the wanted GPU."""
    return (
        measured.memory_bandwidth_tb_per_s / wanted.memory_bandwidth_tb_per_s,
        measured.matrix_tflop_per_s_bf16 / wanted.matrix_tflop_per_s_bf16,
        wanted.launch_us / measured.launch_us,
    )


def _carried(table: RuntimeTable, roofline: Fit, wanted: GpuSpec, layouts: Layouts) -> RuntimeTable:
    """Return the table with every time multiplied by its ratio."""
    memory, _, launch = rate_ratios(roofline.spec, wanted)

    points = [_point_works(point, table, layouts) for point in table.points]
    steps_works = [_step_works(step, table, layouts) for step in table.steps]
    passes, steps = (_ratios_of(works, roofline, wanted) for works in (points, steps_works))

    def point(p: Point, ratio: float | None) -> Point:
        if p.term == "host":
            return p
        return p._replace(ms=p.ms * (memory if ratio is None else ratio))

    def step(s: Step, ratio: float | None) -> Step:
        assert ratio is not None
        return s._replace(ms=s.ms * ratio)

    return table.model_copy(
        update={
            "gpu": wanted.name,
            "gpu_name": wanted.full_name,
            "points": tuple(map(point, table.points, passes)),
            "steps": tuple(map(step, table.steps, steps)),
            "rules": carried_rules(table.rules, launch, memory),
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


def carried_rules(
    rules: Sequence[RulePoint], launch: float, memory: float
) -> tuple[RulePoint, ...]:
    """Return rules with what one row takes multiplied as launches are, and the rest as memory."""
    least: dict[str, float] = {}
    for rule in sorted(rules, key=lambda rule: rule.rows):
        least.setdefault(rule.work, rule.ms)
    moved = []
    for rule in rules:
        fixed = min(rule.ms, least[rule.work])
        moved.append(rule._replace(ms=fixed * launch + (rule.ms - fixed) * memory))
    return tuple(moved)


def _point_works(point: Point, table: RuntimeTable, layouts: Layouts) -> list[Work]:
    """Return the pass of a point, none for terms that the roofline does not describe."""
    if point.term not in ("verify", "draft", "draft_root"):
        return []
    target, draft = pass_models(table, layouts)
    size = point_size(point.term, point.batch_size, point.size, table.context / 2)
    return [pass_work(target if point.term == "verify" else draft, size)]


def _step_works(step: Step, table: RuntimeTable, layouts: Layouts) -> list[Work]:
    """Return the passes of a whole step."""
    target, draft = pass_models(table, layouts)
    batch_size, context = step.batch_size, table.context / 2
    if step.is_off:
        return [pass_work(target, plain_size(batch_size, context))]
    shape = shape_of(table.trees[step.tree].build())
    works = [pass_work(target, point_size("verify", batch_size, shape.num_tokens, context))]
    works.append(pass_work(draft, point_size("draft_root", batch_size, 1, context)))
    widths = (point_size("draft", batch_size, width, context) for width in shape.widths)
    return works + [pass_work(draft, size) for size in widths]


def _rule(roofline: Fit, wanted: GpuSpec, own: float, common: float) -> str:
    measured = roofline.spec
    band = TWO_SIDED * math.hypot(own, common)
    guess = ", launch cost a guess" if wanted.launch_is_guess else ""
    return (
        f"measured on {measured.name}; each time is multiplied by a roofline's ratio for bandwidth "
        f"{measured.memory_bandwidth_tb_per_s:g} to {wanted.memory_bandwidth_tb_per_s:g} TB/s, "
        f"matrix rate {measured.matrix_tflop_per_s_bf16:g} to {wanted.matrix_tflop_per_s_bf16:g} "
        f"TFLOP/s{guess}; {spread_words(band)}"
    )


def spread_words(band: float) -> str:
    """Say how far true times may be from estimated ones, `band` being half of it (logarithm)."""
    return f"true times lie within x{math.exp(-band):.2f} and x{math.exp(band):.2f} (95 %)"
