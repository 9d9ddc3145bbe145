"""A runtime table of a pair that nobody measured, from both models' shapes alone.

Every pass is the roofline's, fitted to the tables of the most alike measured GPU. How that errs on
a shape left out, and how two GPUs may differ, is the spread. Terms that the roofline lacks:

- A slot that stores its state writes it, at the share of bandwidth that one row reads it with.
- What choosing tokens costs is another pair's, the nearest vocabulary's, by the vocabulary.
- A whole step takes OVERHEAD launches beyond its passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stree_autotune.cost.estimate import (
    TWO_SIDED,
    WIDEST,
    Estimate,
    Fit,
    carried_rules,
    fit_shapes,
    rate_ratios,
    spread_words,
    transfer_spreads,
)
from stree_autotune.cost.layout import Layouts, find_layouts, layout_of
from stree_autotune.cost.roofline import Floats
from stree_autotune.cost.terms import PER_TOKENS, PLAIN, Load, term_times
from stree_autotune.cost.traffic import model_cost
from stree_autotune.cost.tree_shape import FEWEST_ROWS, shape_of
from stree_autotune.cost.work import (
    PassModel,
    PassSize,
    all_samples,
    element_bytes,
    pass_work,
    plain_size,
    point_size,
)
from stree_autotune.store import (
    GpuSpec,
    Library,
    PairWords,
    Point,
    RulePoint,
    RuntimeTable,
    Step,
    StepRule,
    Term,
)
from stree_core.errors import MissingMeasurement
from stree_core.files import read_yaml
from stree_core.models import ModelSource
from stree_core.profile import TreeText
from stree_core.tree import OFF, Tree

OVERHEAD = 10.0
"""Launches of a speculative step beyond its passes: accept and commit."""

UNMEASURED = math.log(1.5) / TWO_SIDED
"""The spread for a model with a kind of mixer that no table has; a guess."""

HARDLY_MEASURED = math.log(1.25) / TWO_SIDED
TIMED_ALONE = ("experts", "Delta layers")
"""Kinds in no table of which passes of one model were timed (benchmarks/results/draft-h200.json,
forward-h200.json) and lie about a tenth from the estimate; the spread for them is a guess too."""

DTYPE, BACKEND = "bfloat16", "triton"
_CHAINS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class MeasuredGpu:
    """A measured GPU, its tables and their digests, and the layouts of their models."""

    spec: GpuSpec
    tables: tuple[RuntimeTable, ...]
    sha256: tuple[str, ...]
    layouts: Layouts


@dataclass(frozen=True, slots=True)
class ShapeQuestion:
    """What a table of shapes is for: both models, the GPU, and the sizes that it covers."""

    target: ModelSource
    draft: ModelSource
    gpu: GpuSpec
    batch_sizes: tuple[int, ...]
    max_nodes: int
    context: int


def nearest_measured(library: Library, wanted: GpuSpec) -> MeasuredGpu | None:
    """Return the measured GPU that is most alike, None when no table of any is there."""
    specs = [library.gpu_spec(gpu) for gpu in sorted(library.gpu_names())]
    measured = [spec for spec in specs if spec is not None]
    for spec in sorted(measured, key=wanted.likeness):
        read = [read_yaml(path, RuntimeTable) for path in library.runtime_paths(spec.name)]
        fitting = [(t, digest) for t, digest in read if (t.dtype, t.backend) == (DTYPE, BACKEND)]
        if fitting:
            tables, digests = zip(*fitting, strict=True)
            return MeasuredGpu(spec, tables, digests, find_layouts(library, tables))
    return None


def estimate_shapes(
    question: ShapeQuestion, measured: MeasuredGpu, words: PairWords | None = None
) -> Estimate:
    """Return a table of a pair's shapes on a GPU, as far as it can be trusted.

    Raises MissingMeasurement when the tables are too few, or the band would be wider than a factor
    of 2.5 either way.
    """
    first = measured.tables[0]
    samples = all_samples(measured.tables, measured.layouts)
    roofline = fit_shapes(samples, measured.spec, first, words)
    table = table_of_shapes(question, roofline, measured)
    own, common = transfer_spreads(roofline, question.gpu)
    own, common = math.hypot(own, roofline.within), math.hypot(common, roofline.between)
    unmeasured = _unmeasured(question, measured)
    guesses = [HARDLY_MEASURED if kind in TIMED_ALONE else UNMEASURED for kind in unmeasured]
    common = math.hypot(common, *guesses)
    estimate = Estimate(table, table, own, common, "")
    if estimate.band > WIDEST:
        raise MissingMeasurement(
            f"times of {table.target.name} on {question.gpu.name} are known from its shape only "
            f"within a factor of {math.exp(estimate.band):.1f}, the limit is "
            f"{math.exp(WIDEST):g}; measure with `{table.probe_command(words)}`"
        )
    rule = _rule(question, roofline, estimate, unmeasured)
    return Estimate(table, table, own, common, rule)


def _rule(
    question: ShapeQuestion, roofline: Fit, estimate: Estimate, unmeasured: Sequence[str]
) -> str:
    spec, wanted = roofline.spec, question.gpu
    carried = "" if spec.name == wanted.name else f", carried to {wanted.name}"
    guess = ", launch cost a guess" if wanted.launch_is_guess else ""
    lacks = f"; {' and '.join(unmeasured)} are in no table" if unmeasured else ""
    return (
        f"from the models' shapes alone, by a roofline fitted to {roofline.num_shapes} shapes "
        f"on {spec.name}{carried}{guess}; shapes left out of it err by a median of "
        f"{100 * roofline.median:.0f} %{lacks}; {spread_words(estimate.band)}"
    )


def _unmeasured(question: ShapeQuestion, measured: MeasuredGpu) -> list[str]:
    known = frozenset[str]().union(*(layout.kinds for layout in measured.layouts.known.values()))
    asked = layout_of(question.target.shape).kinds | layout_of(question.draft.shape).kinds
    stored = {model.weights for table in measured.tables for model in (table.target, table.draft)}
    in_fp8 = {question.target.ref.weights, question.draft.ref.weights} - stored - {None}
    return sorted(asked - known) + sorted(f"weights in {kind}" for kind in in_fp8)


def table_of_shapes(question: ShapeQuestion, roofline: Fit, measured: MeasuredGpu) -> RuntimeTable:
    """Return the table that a roofline gives; `measured` says what choosing tokens takes."""
    width = element_bytes(DTYPE)
    target, draft = (
        PassModel(model_cost(source.shape, source.ref, width), layout_of(source.shape), width)
        for source in (question.target, question.draft)
    )
    passes = _Passes(question, roofline, target, draft)
    nearest = min(
        (table for table in measured.tables if table.rules),
        key=lambda table: abs(math.log(table.target.vocab_size / target.cost.vocab_size)),
        default=measured.tables[0],
    )
    trees = {OFF.kind: OFF} | {
        f"{Tree.chain(length).kind}-{length}": Tree.chain(length)
        for length in _CHAINS
        if length <= question.max_nodes
    }
    offs = [
        Step(size, OFF.kind, ms, 0.0)
        for size, ms in zip(question.batch_sizes, passes.plain_ms(), strict=True)
    ]
    table = measured.tables[0].model_copy(
        update={
            "gpu": question.gpu.name,
            "gpu_name": question.gpu.full_name,
            "target": target.cost,
            "draft": draft.cost,
            "context": question.context,
            "weights": "random" if question.target.folder is None else "real",
            "points": tuple(passes.points()),
            "rules": _rules(nearest, target, roofline.spec, question.gpu),
            "trees": {name: TreeText(paths=tree.paths) for name, tree in trees.items()},
            "steps": tuple(offs),
            "no_room": (),
            "steps_no_room": (),
        }
    )
    return table.model_copy(update={"steps": (*offs, *_steps(table, trees, question.gpu))})


def _steps(table: RuntimeTable, trees: dict[str, Tree], gpu: GpuSpec) -> Iterator[Step]:
    """Yield whole steps with chains: the sum of their terms and the overhead."""
    overhead_ms = OVERHEAD * gpu.launch_us / 1e3
    load = Load(StepRule.GREEDY, 0.0, 1.0)
    for size, times in term_times(table, StepRule.GREEDY, "").items():
        for name, tree in trees.items():
            if tree.num_nodes:
                sum_ms = times.sum_ms(shape_of(tree), load, PLAIN)
                yield Step(size, name, sum_ms + overhead_ms, 0.0)


def _rules(
    table: RuntimeTable, target: PassModel, measured: GpuSpec, wanted: GpuSpec
) -> tuple[RulePoint, ...]:
    memory, _, launch = rate_ratios(measured, wanted)
    larger = target.cost.vocab_size / table.target.vocab_size
    return carried_rules(table.rules, launch, memory * larger)


@dataclass(frozen=True, slots=True)
class _Passes:
    """The passes of a pair on a GPU, as a table holds them."""

    question: ShapeQuestion
    roofline: Fit
    target: PassModel
    draft: PassModel

    def plain_ms(self) -> list[float]:
        """Return the step without speculation of every batch size."""
        sizes = [plain_size(size, self._context) for size in self.question.batch_sizes]
        times: list[float] = self._ms(self.target, sizes).tolist()
        return times

    def points(self) -> Iterator[Point]:
        """Yield every size of every term, so that no cliff lies between two."""
        most = self.question.max_nodes
        for batch_size in self.question.batch_sizes:
            yield from self._sized(batch_size, "verify", range(2, most + 2))
            yield from self._sized(batch_size, "draft_root", (1,))
            yield from self._sized(batch_size, "draft", range(1, max(2, most // 2 + 1)))
            yield from self._further_rows(batch_size, range(FEWEST_ROWS + 1, most + 2))
            yield from self._stores(batch_size)
            if self.target.cost.kv_bytes_per_token:
                yield from self._contexts(batch_size, range(1, most + 2))

    @property
    def _context(self) -> float:
        return self.question.context / 2

    def _ms(self, model: PassModel, sizes: Sequence[PassSize]) -> Floats:
        works = [pass_work(model, size) for size in sizes]
        return self.roofline.found.ms(works, self.question.gpu)

    def _sized(self, batch_size: int, term: Term, sizes: Sequence[int]) -> Iterator[Point]:
        model = self.target if term == "verify" else self.draft
        asked = [point_size(term, batch_size, size, self._context) for size in sizes]
        for size, ms in zip(sizes, self._ms(model, asked).tolist(), strict=True):
            yield Point(term, batch_size, size, ms, 0.0)

    def _further_rows(self, batch_size: int, rows: Sequence[int]) -> Iterator[Point]:
        """Yield what a pass of one row takes longer with more rows of its block before it."""
        asked = [PassSize(batch_size, 1, last, 1, self._context) for last in rows]
        if not asked:
            return
        times = self._ms(self.draft, asked)
        for last, more in zip(rows, (times - times[0]).tolist(), strict=True):
            yield Point("draft_rows", batch_size, last, max(0.0, more), 0.0)

    def _stores(self, batch_size: int) -> Iterator[Point]:
        share = self.roofline.found.scanned_one
        rate = share * self.question.gpu.memory_bandwidth_tb_per_s * 1e9
        terms: tuple[tuple[Term, PassModel], ...] = (
            ("target_store", self.target), ("draft_store", self.draft),
        )  # fmt: skip
        for term, model in terms:
            for slots in sorted({1, batch_size}):
                ms = slots * model.cost.state_bytes_per_sequence / rate
                yield Point(term, batch_size, slots, ms, 0.0)

    def _contexts(self, batch_size: int, sizes: Sequence[int]) -> Iterator[Point]:
        more, less = (
            [PassSize(batch_size, size, size, size, self._context + moved) for size in sizes]
            for moved in (PER_TOKENS / 2, -self._context)
        )
        slope = (self._ms(self.target, more) - self._ms(self.target, less)) * (
            PER_TOKENS / (PER_TOKENS / 2 + self._context)
        )
        for size, ms in zip(sizes, slope.tolist(), strict=True):
            yield Point("context", batch_size, size, max(0.0, ms), 0.0)
