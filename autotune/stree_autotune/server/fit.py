"""Step times of a server as one model of all runs, so that cells lend each other strength.

    log step time = surface(log batch size, K) + bend + cell + start + noise

The surface is a quadratic in the logarithm of the batch size times a quadratic in K, with an
offset for speculating at all. Bends are smooth deviations from it, shared with near cells (a
Gaussian process). Cells differ by what nothing smooth has (padding to graph sizes, other kernels);
all runs of one start of the server share a deviation. The four variances are fitted by restricted
maximum likelihood, so that rough tables keep their cells apart and smooth ones pool them. What
comes out are the cells without start and noise, with their covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from stree_autotune.server.tables import ServerTable
from stree_core.errors import ConfigError

Floats = NDArray[np.float64]

MAX_RUNS = 1500
SINGLE_RUN_NOISE = 0.03
"""Assumed standard deviation where no cell was run twice: nothing in the table tells it."""
REACH_SIZES, REACH_TOKENS = 2.5, 1.2
"""Over how many doublings of the batch size and of K + 1 a bend reaches."""
_SMALLEST, _LARGEST = 1e-4, 0.5

Deviations = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, eq=False)
class StepFit:
    """Fitted cells (batch size, K), the means [C] of log step ms and their covariance [C, C].

    noise, start, rough and bend are the standard deviations of a run, a start, a cell and the
    smooth part.
    """

    cells: tuple[tuple[int, int], ...]
    mean_C: Floats
    covariance_CC: Floats
    noise: float
    start: float
    rough: float
    bend: float

    def index(self, batch_size: int, draft_tokens: int) -> int:
        """Return the place of a cell."""
        return self.cells.index((batch_size, draft_tokens))

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        """Return draws [count, C] of log step ms."""
        return rng.multivariate_normal(self.mean_C, self.covariance_CC, count, method="eigh")


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """The observations: log times [N], their cells and starts as indices, and the surfaces."""

    log_ms_N: Floats
    cell_NC: Floats
    start_NS: Floats
    surface_CP: Floats
    near_CC: Floats
    repeated: bool


def fit_steps(table: ServerTable) -> StepFit:
    """Fit a table's cells; raise ConfigError when it holds more runs than can be fitted."""
    cells = tuple(sorted((cell.batch_size, cell.draft_tokens) for cell in table.cells))
    runs = _runs(table, cells)
    deviations = _fit_deviations(runs)
    rough, bend = deviations[2:]
    prior_CC = _prior(runs, rough, bend)
    covariance_NN = _covariance(runs, deviations)
    surface_NP = runs.cell_NC @ runs.surface_CP
    inverse_NN = np.linalg.inv(covariance_NN)
    normal_PP = np.linalg.pinv(surface_NP.T @ inverse_NN @ surface_NP)
    weights_P = normal_PP @ surface_NP.T @ inverse_NN @ runs.log_ms_N
    gain_CN = prior_CC @ runs.cell_NC.T @ inverse_NN
    left_N = runs.log_ms_N - surface_NP @ weights_P
    mean_C = runs.surface_CP @ weights_P + gain_CN @ left_N
    unexplained_CP = runs.surface_CP - gain_CN @ surface_NP
    covariance_CC = (
        prior_CC - gain_CN @ runs.cell_NC @ prior_CC + unexplained_CP @ normal_PP @ unexplained_CP.T
    )
    return StepFit(cells, mean_C, (covariance_CC + covariance_CC.T) / 2, *deviations)


def _runs(table: ServerTable, cells: tuple[tuple[int, int], ...]) -> _Runs:
    rows = [
        (cells.index((cell.batch_size, cell.draft_tokens)), (cell.draft_tokens, number), ms)
        for cell in table.cells
        for number, ms in zip(cell.rounds, cell.step_ms, strict=True)
    ]
    if len(rows) > MAX_RUNS:
        raise ConfigError(
            f"a server table is fitted with at most {MAX_RUNS} runs, it has {len(rows)}; import "
            "fewer rounds"
        )
    starts = sorted({row[1] for row in rows})
    cell_NC = np.zeros((len(rows), len(cells)))
    start_NS = np.zeros((len(rows), len(starts)))
    for place, (cell, start, _) in enumerate(rows):
        cell_NC[place, cell] = 1
        start_NS[place, starts.index(start)] = 1
    log_ms_N = np.log([row[2] for row in rows])
    repeated = len(rows) > len(cells)
    return _Runs(log_ms_N, cell_NC, start_NS, _surface(cells), _nearness(cells), repeated)


def _surface(cells: tuple[tuple[int, int], ...]) -> Floats:
    """Return the columns [C, P] of the surface, no more of them than the table can tell apart."""
    sizes = np.log2([float(size) for size, _ in cells])
    tokens = np.array([float(count) for _, count in cells])
    sizes = (sizes - sizes.mean()) / max(1.0, float(np.ptp(sizes)))
    drafted = (tokens > 0).astype(float)
    scaled = tokens / max(1.0, float(tokens.max()))
    by_size = [sizes**power for power in range(_num_powers(len({size for size, _ in cells})))]
    counts = {count for _, count in cells if count}
    by_tokens = [np.ones(len(cells))]
    if 0 in {count for _, count in cells} and counts:
        by_tokens.append(drafted)
    by_tokens += [drafted * scaled**power for power in range(1, _num_powers(len(counts)))]
    columns = np.stack([size * token for size in by_size for token in by_tokens], axis=1)
    # columns that repeat others would make the surface's weights arbitrary
    left, values, _ = np.linalg.svd(columns, full_matrices=False)
    kept: Floats = left[:, values > 1e-6 * values.max()]
    return kept


def _nearness(cells: tuple[tuple[int, int], ...]) -> Floats:
    """Return how alike the bends of two cells are, [C, C]: off is like no chain."""
    sizes = np.log2([float(size) for size, _ in cells])
    tokens = np.log2([1.0 + count for _, count in cells])
    drafted = tokens > 0
    far_CC = ((sizes[:, None] - sizes) / REACH_SIZES) ** 2
    far_CC += ((tokens[:, None] - tokens) / REACH_TOKENS) ** 2
    near: Floats = np.exp(-far_CC / 2) * (drafted[:, None] == drafted)
    return near


def _prior(runs: _Runs, rough: float, bend: float) -> Floats:
    """Return the covariance of cells around the surface."""
    prior: Floats = rough**2 * np.eye(len(runs.near_CC)) + bend**2 * runs.near_CC
    return prior


def _num_powers(count: int) -> int:
    """Return how many powers a curve through `count` places may have and still leave residuals."""
    return 3 if count > 3 else min(2, count)


def _covariance(runs: _Runs, deviations: Deviations) -> Floats:
    noise, start, rough, bend = deviations
    total: Floats = (
        noise**2 * np.eye(len(runs.log_ms_N))
        + start**2 * runs.start_NS @ runs.start_NS.T
        + runs.cell_NC @ _prior(runs, rough, bend) @ runs.cell_NC.T
    )
    return total


def _fit_deviations(runs: _Runs) -> Deviations:
    """Return the standard deviations that the runs make likeliest."""
    surface_NP = runs.cell_NC @ runs.surface_CP

    def deviations(logs: Floats) -> Deviations:
        noise, start, rough, bend = (float(value) for value in np.exp(logs))
        return (noise if runs.repeated else SINGLE_RUN_NOISE), start, rough, bend

    def loss(logs: Floats) -> float:
        total_NN = _covariance(runs, deviations(logs))
        lower = np.linalg.cholesky(total_NN)
        white_NP = np.linalg.solve(lower, surface_NP)
        white_N = np.linalg.solve(lower, runs.log_ms_N)
        normal_PP = white_NP.T @ white_NP
        weights = np.linalg.solve(normal_PP, white_NP.T @ white_N)
        left = white_N - white_NP @ weights
        fit = np.linalg.slogdet(normal_PP)[1] + 2 * np.log(np.diag(lower)).sum()
        return float(fit + left @ left)

    bounds = [(float(np.log(_SMALLEST)), float(np.log(_LARGEST)))] * 4
    guesses = [np.log([0.02, 0.005, 0.01, 0.02]), np.log([0.005, 0.005, 0.002, 0.005])]
    found = [minimize(loss, guess, method="L-BFGS-B", bounds=bounds) for guess in guesses]
    return deviations(min(found, key=lambda each: float(each.fun)).x)
