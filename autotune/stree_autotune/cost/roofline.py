"""The time of a pass from what it launches, moves and computes, with fitted efficiencies.

    t = launch_us * (a * launches + b * library + n * narrow + t * trees + w * tiles)
        + both(body / read, body_flops / products) + both(head / read, head_flops / products)
        + both(experts / read, expert reads from L2) + both(states / scanned, scan_flops / scans)
        + both(keys / kept, score_flops / scans) + rows / written + logits / scored

`both` is a smoothed maximum, since a kernel moves and computes at the same time. The launch factors
are in multiples of an empty kernel, the others are shares of the published rates; one row reads
weights and states at shares of its own. All are fitted to measured passes, robustly (soft L1 of the
logarithm of the ratio), each held near its nominal value: the shapes that were measured do not tell
all of them apart. What comes of it is always an estimate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from stree_autotune.cost.work import Sample, Work
from stree_autotune.store import GpuSpec

Floats = NDArray[np.float64]

FEWEST_SAMPLES = 12
L2_RATE = 1.5
"""At which multiple of memory's bandwidth rows read an expert that others read before them; by the
draft passes of an MTP head with 128 experts on an H200 (benchmarks/results/draft-h200.json)."""

_POWER = 3.0
_SOFT = 0.05
_PASSES_OF_A_MODEL = 30.0
"""How many passes each model counts as, whatever was measured of it."""


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """The fitted numbers of the module's formula; the defaults are nominal."""

    launch: float = 3.5
    library: float = 4.0
    narrow: float = 1.0
    tree: float = 2.3
    tile: float = 4.0
    read_one: float = 0.88
    read: float = 0.8
    scanned_one: float = 0.5
    scanned: float = 0.4
    products: float = 0.8
    scans: float = 0.12
    kept: float = 0.85
    written: float = 0.4
    scored: float = 0.5

    def ms(self, works: Sequence[Work], spec: GpuSpec) -> Floats:
        """Return the estimated times of passes on a GPU."""
        return _times(_columns(works), spec, self)


NAMES = tuple(each.name for each in fields(Efficiencies))
NUM_FACTORS = 5
"""The first five are launch factors, which may be any size; shares of a rate end at 1."""

TOLERANCES = Efficiencies(
    launch=0.5, library=0.7, narrow=0.7, tree=0.7, tile=0.7, read_one=0.1, read=0.1,
    scanned_one=0.3, scanned=0.3, products=0.05, scans=0.5, kept=0.1, written=0.3, scored=0.3,
)  # fmt: skip
"""How far each may be from its nominal value, as a logarithm, before that counts as an error."""


def fit(samples: Sequence[Sample], spec: GpuSpec) -> Efficiencies:
    """Fit the efficiencies to measured passes on one GPU; every model counts alike."""
    # scipy.optimize takes most of a second to import, and most commands never fit
    from scipy.optimize import least_squares

    columns = _columns([sample.work for sample in samples])
    log_ms = np.log([sample.ms for sample in samples])
    count = Counter(sample.model for sample in samples)
    weights = np.sqrt([_PASSES_OF_A_MODEL / count[sample.model] for sample in samples])
    nominal, tolerance = (np.array(_values(each)) for each in (Efficiencies(), TOLERANCES))
    most = np.full(len(NAMES), 3.0)
    most[NUM_FACTORS:] = -np.log(nominal[NUM_FACTORS:])

    def residuals(moved: Floats) -> Floats:
        found = Efficiencies(*(nominal * np.exp(moved)).tolist())
        errors = weights * (np.log(_times(columns, spec, found)) - log_ms)
        return np.concatenate([errors, moved / tolerance])

    start = np.zeros(len(NAMES))
    found = least_squares(
        residuals, start, bounds=(-3.0, most), loss="soft_l1", f_scale=_SOFT, x_scale=tolerance
    )
    return Efficiencies(*(nominal * np.exp(found.x)).tolist())


def log_errors(samples: Sequence[Sample], found: Efficiencies, spec: GpuSpec) -> Floats:
    """Return the logarithms of estimated over measured times."""
    measured_ms = np.array([sample.ms for sample in samples])
    errors: Floats = np.log(found.ms([sample.work for sample in samples], spec) / measured_ms)
    return errors


def _values(found: Efficiencies) -> list[float]:
    return [getattr(found, name) for name in NAMES]


def _columns(works: Sequence[Work]) -> Floats:
    """Return works as columns [F, N]."""
    return np.array(works, dtype=np.float64).reshape(-1, len(Work._fields)).T


def _times(columns: Floats, spec: GpuSpec, found: Efficiencies) -> Floats:
    """Return the times (ms) of works [F, N]."""
    work = dict(zip(Work._fields, columns, strict=True))
    # a terabyte a second is 1e9 bytes a millisecond
    moved, done = spec.memory_bandwidth_tb_per_s * 1e9, spec.matrix_tflop_per_s_bf16 * 1e9
    one = np.asarray(work["one_row"], dtype=bool)
    read = moved * np.where(one, found.read_one, found.read)
    plain = np.asarray(work["trees"]) == 0
    scanned = moved * np.where(plain, found.scanned_one, found.scanned)
    launches = (
        found.launch * work["launches"]
        + found.library * work["library"]
        + found.narrow * work["narrow"]
        + found.tree * work["trees"]
        + found.tile * work["tiles"]
    )
    times: Floats = spec.launch_us / 1e3 * launches
    times += _both(work["body"] / read, work["body_flops"] / (found.products * done))
    times += _both(work["head"] / read, work["head_flops"] / (found.products * done))
    times += _both(work["expert_bytes"] / read, work["expert_reads"] / (L2_RATE * moved))
    times += _both(work["states"] / scanned, work["scan_flops"] / (found.scans * done))
    times += _both(work["keys"] / (found.kept * moved), work["score_flops"] / (found.scans * done))
    times += work["rows"] / (found.written * moved) + work["logits"] / (found.scored * moved)
    return times


def _both(first: Floats, second: Floats) -> Floats:
    """Return the smoothed maximum of two times."""
    whole: Floats = (first**_POWER + second**_POWER) ** (1 / _POWER)
    return whole
