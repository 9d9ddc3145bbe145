"""The time of a pass from what it launches, moves and computes, with fitted efficiencies.

    t = launch_us * (a * launches + b * library + n * narrow + t * trees + w * tiles)
        + both(body / read, body_flops / products) + both(head / read, head_flops / products)
        + both(experts / read, expert reads from L2) + both(states / scanned, scan_flops / scans)
        + both(keys / kept, score_flops / scans) + rows / written + logits / scored
        + grouped / gathered + grouped_flops / grouped_products

`both` is a smoothed maximum (the cube root of the sum of cubes), since a kernel moves and computes
at the same time; kernels of grouped experts do not. The launch factors are in multiples of an empty
kernel, the others are shares of the published rates; one row reads weights and states at shares of
its own. All are fitted to measured passes, robustly (soft L1 of the logarithm of the ratio), each
held near its nominal value: the shapes that were measured do not tell all of them apart. What comes
of it is always an estimate.
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
L2_RATE = 2.5
"""At which multiple of memory's bandwidth rows read an expert that others read before them. Like
the nominal values of grouped experts by the H200's table of Nemotron 3 Nano, the only one with
experts."""

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
    gathered: float = 0.62
    grouped_products: float = 0.36

    def ms(self, works: Sequence[Work], spec: GpuSpec) -> Floats:
        """Return the estimated times of passes on a GPU."""
        times, _ = times_and_slopes(_columns(works), spec, self)
        return times


NAMES = tuple(each.name for each in fields(Efficiencies))
_COUNTED = {
    "launch": "launches", "library": "library", "narrow": "narrow", "tree": "trees",
    "tile": "tiles",
}  # fmt: skip
"""What each launch factor multiplies."""
NUM_FACTORS = len(_COUNTED)
"""The first five are launch factors, which may be any size; shares of a rate end at 1."""

TOLERANCES = Efficiencies(
    launch=0.5, library=0.7, narrow=0.7, tree=0.7, tile=0.7, read_one=0.1, read=0.1,
    scanned_one=0.3, scanned=0.3, products=0.05, scans=0.1, kept=0.1, written=0.3, scored=0.3,
    gathered=0.1, grouped_products=0.1,
)  # fmt: skip
"""How far each may be from its nominal value, as a logarithm, before that counts as an error."""


def fit(
    samples: Sequence[Sample], spec: GpuSpec, start: Efficiencies | None = None
) -> Efficiencies:
    """Fit the efficiencies to measured passes on one GPU; every model counts alike.

    `start` is where to begin, a fit to nearly the same passes; the nominal ones otherwise.
    """
    # scipy.optimize takes most of a second to import, and most commands never fit
    from scipy.optimize import least_squares

    columns = _columns([sample.work for sample in samples])
    log_ms = np.log([sample.ms for sample in samples])
    count = Counter(sample.model for sample in samples)
    weights = np.sqrt([_PASSES_OF_A_MODEL / count[sample.model] for sample in samples])
    nominal, tolerance = (np.array(_values(each)) for each in (Efficiencies(), TOLERANCES))
    most = np.full(len(NAMES), 3.0)
    most[NUM_FACTORS:] = -np.log(nominal[NUM_FACTORS:])

    def moved_to(moved: Floats) -> Efficiencies:
        return Efficiencies(*(nominal * np.exp(moved)).tolist())

    def residuals(moved: Floats) -> Floats:
        times, _ = times_and_slopes(columns, spec, moved_to(moved))
        return np.concatenate([weights * (np.log(times) - log_ms), moved / tolerance])

    def jacobian(moved: Floats) -> Floats:
        times, slopes = times_and_slopes(columns, spec, moved_to(moved))
        return np.concatenate([(slopes * (weights / times)).T, np.diag(1 / tolerance)])

    begin = np.zeros(len(NAMES))
    if start is not None:
        begin = np.clip(np.log(np.array(_values(start)) / nominal), -3.0, most)
    found = least_squares(
        residuals, begin, jacobian, (-3.0, most), loss="soft_l1", f_scale=_SOFT, x_scale=tolerance
    )
    return moved_to(found.x)


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


def times_and_slopes(columns: Floats, spec: GpuSpec, found: Efficiencies) -> tuple[Floats, Floats]:
    """Return the times (ms) of works [F, N], and their slopes [E, N].

    A slope is the derivative of a time by the logarithm of an efficiency.
    """
    work = dict(zip(Work._fields, columns, strict=True))
    # a terabyte a second is 1e9 bytes a millisecond
    moved, done = spec.memory_bandwidth_tb_per_s * 1e9, spec.matrix_tflop_per_s_bf16 * 1e9
    is_one = np.asarray(work["one_row"], dtype=bool)
    is_plain = np.asarray(work["trees"]) == 0
    read = moved * np.where(is_one, found.read_one, found.read)
    scanned = moved * np.where(is_plain, found.scanned_one, found.scanned)
    slopes = {name: np.zeros(columns.shape[1]) for name in NAMES}

    launch_ms = spec.launch_us / 1e3
    for name, counted in _COUNTED.items():
        slopes[name] += launch_ms * getattr(found, name) * work[counted]
    times: Floats = np.sum(list(slopes.values()), axis=0)
    for first, rate, second, other in (
        (work["body"] / read, "read", work["body_flops"] / (found.products * done), "products"),
        (work["head"] / read, "read", work["head_flops"] / (found.products * done), "products"),
        (work["expert_bytes"] / read, "read", work["expert_reads"] / (L2_RATE * moved), None),
        (work["states"] / scanned, "scanned", work["scan_flops"] / (found.scans * done), "scans"),
        (work["keys"] / (found.kept * moved), "kept", work["score_flops"] / (found.scans * done),
         "scans"),
    ):  # fmt: skip
        cubes = first * first * first, second * second * second
        whole = np.cbrt(cubes[0] + cubes[1])
        times += whole
        square = np.square(np.where(whole > 0, whole, 1.0))
        slopes[rate] -= cubes[0] / square
        if other is not None:
            slopes[other] -= cubes[1] / square
    for rate, ms in (
        ("written", work["rows"] / (found.written * moved)),
        ("scored", work["logits"] / (found.scored * moved)),
        ("gathered", work["grouped_bytes"] / (found.gathered * moved)),
        ("grouped_products", work["grouped_flops"] / (found.grouped_products * done)),
    ):
        times += ms
        slopes[rate] -= ms
    for alone, name, mask in (("read_one", "read", is_one), ("scanned_one", "scanned", is_plain)):
        slopes[alone] = np.where(mask, slopes[name], 0.0)
        slopes[name] = np.where(mask, 0.0, slopes[name])
    return times, np.array([slopes[name] for name in NAMES])
