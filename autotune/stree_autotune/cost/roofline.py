"""The time of a pass from what it launches, moves and computes, with fitted efficiencies.

    t = launches * (a + b * [more than 8 rows]) * launch_us
        + (weights / w + states / s + rows / r) / bandwidth + flops / f / matrix rate

a and b are in multiples of an empty kernel: one that waits for its operands takes longer, and
beyond 8 rows projections are products with row-wise kernels around them. w, s, r and f are shares
of the published rates. All six are fitted to measured passes, bounded and robustly (soft L1 of the
logarithm of the ratio). What comes of it is always an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stree_autotune.store import GpuSpec, ModelCost, RuntimeTable, StepRule
from stree_core.tree import OFF

Floats = NDArray[np.float64]

FEW_ROWS = 8
FEWEST_SAMPLES = 12
_LOGIT_BYTES = 4
_LOWEST = (1.0, 0.0, 0.3, 0.1, 0.05, 0.02)
_HIGHEST = (15.0, 45.0, 1.0, 1.0, 1.0, 1.0)
_START = (4.0, 2.0, 0.8, 0.7, 0.4, 0.4)
_SOFT = 0.05


class Work(NamedTuple):
    """What a pass asks of a GPU; `many` is 1 beyond FEW_ROWS, else 0. Sizes are bytes."""

    launches: float
    many: float
    weights: float
    states: float
    rows: float
    flops: float


class Sample(NamedTuple):
    """A measured pass: which model, at which batch size, of which term, its work and its time."""

    model: str
    batch_size: int
    term: str
    work: Work
    ms: float


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """The fitted numbers of the module's formula, in its order: a, b, w, s, r, f."""

    vector: tuple[float, ...]

    def ms(self, works: Sequence[Work], spec: GpuSpec) -> Floats:
        """Return the estimated times of passes on a GPU."""
        works_NF = np.array(works, dtype=np.float64).reshape(-1, len(Work._fields))
        return _times(works_NF, spec, np.array(self.vector))


def pass_work(
    model: ModelCost, batch_size: int, num_tokens: int, context: float, logit_rows: int,
    element_bytes: int,
) -> Work:  # fmt: skip
    """Return the work of a pass over `num_tokens` rows of each slot, `logit_rows` with logits.

    Weights, states, keys and values are read once; rows and logits are written and read.
    """
    rows = batch_size * num_tokens
    head_bytes = model.vocab_size * model.hidden_size * element_bytes
    logits = batch_size * logit_rows
    body_flops = 2 * (model.weight_bytes - head_bytes) / element_bytes * rows
    return Work(
        launches=model.num_launches,
        many=float(rows > FEW_ROWS),
        weights=model.weight_bytes,
        states=batch_size * (model.state_bytes_per_sequence + context * model.kv_bytes_per_token),
        rows=rows * model.row_bytes + logits * model.vocab_size * 2 * _LOGIT_BYTES,
        flops=body_flops + 2 * head_bytes / element_bytes * logits,
    )


def element_bytes(dtype: str) -> int:
    """Return the bytes of one value."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def point_work(term: str, batch_size: int, size: int, table: RuntimeTable) -> Work:
    """Return the work of a verify or draft pass of a table, of slots half full."""
    width, middle = element_bytes(table.dtype), table.context / 2
    if term == "verify":
        return pass_work(table.target, batch_size, size, middle, size, width)
    if term == "draft_root":
        return pass_work(table.draft, batch_size, 2, middle, 1, width)
    return pass_work(table.draft, batch_size, size, middle, size, width)


def samples_of(table: RuntimeTable) -> list[Sample]:
    """Return the passes of a table, one token of the target (a whole step) among them."""
    target, draft = table.target.name, table.draft.name
    samples = [
        Sample(
            target if point.term == "verify" else draft, point.batch_size, point.term,
            point_work(point.term, point.batch_size, point.size, table), point.ms,
        )
        for point in table.points
        if point.term in ("verify", "draft", "draft_root")
    ]  # fmt: skip
    samples += [
        Sample(target, s.batch_size, OFF.kind, point_work("verify", s.batch_size, 1, table), s.ms)
        for s in table.steps
        if s.is_off and s.rule == StepRule.GREEDY
    ]
    return samples


def fit(samples: Sequence[Sample], spec: GpuSpec) -> Efficiencies:
    """Fit the efficiencies to measured passes on one GPU."""
    # scipy.optimize takes most of a second to import, and most commands never fit
    from scipy.optimize import least_squares

    works = np.array([sample.work for sample in samples], dtype=np.float64)
    log_ms = np.log([sample.ms for sample in samples])

    def residuals(vector: Floats) -> Floats:
        errors: Floats = np.log(_times(works, spec, vector)) - log_ms
        return errors

    found = least_squares(
        residuals, _START, bounds=(_LOWEST, _HIGHEST), loss="soft_l1", f_scale=_SOFT
    )
    return Efficiencies(tuple(found.x.tolist()))


def log_errors(samples: Sequence[Sample], found: Efficiencies, spec: GpuSpec) -> Floats:
    """Return the logarithms of estimated over measured times."""
    measured_ms = np.array([sample.ms for sample in samples])
    errors: Floats = np.log(found.ms([sample.work for sample in samples], spec) / measured_ms)
    return errors


def _times(works_NF: Floats, spec: GpuSpec, vector: Floats) -> Floats:
    """Return the times (ms) of works [N, F]."""
    launch, more, weights, states, rows, matrix = vector
    launches, many, *sizes, flops = works_NF.T
    # a terabyte a second is 1e9 bytes a millisecond
    moved = sum(size / share for size, share in zip(sizes, (weights, states, rows), strict=True))
    times: Floats = launches * (launch + more * many) * spec.launch_us / 1e3
    times += moved / (spec.memory_bandwidth_tb_per_s * 1e9)
    times += flops / (matrix * spec.matrix_tflop_per_s_bf16 * 1e9)
    return times
