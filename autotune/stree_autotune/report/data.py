"""What a report shows and a profile does not hold, computed again from the profile's sources.

The search is repeated with the profile's seed: the same sources give the same trials, so no profile
needs to hold its history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stree_autotune.cost import StepCost, runtime_cost
from stree_autotune.search import (
    PairedBootstrap,
    TreeSpace,
    Trial,
    interval,
    profile_runtime,
    profile_trace,
    search_batch,
)
from stree_autotune.store import Library, RuntimeTable
from stree_autotune.trace import (
    RATES,
    FlatTrace,
    Ints,
    Trace,
    longest_paths,
    rates_of,
    walk,
)
from stree_core.errors import StreeError
from stree_core.profile import PolicyRow, Profile
from stree_core.tree import OFF, Tree

NUM_RESAMPLES = 400
NUM_COST_DRAWS = 50
MOST_NODES = 64
MOST_DEPTHS, MOST_RANKS = 8, 8


@dataclass(frozen=True, slots=True)
class SizePoint:
    """The fastest tree of one size, and the 95 % interval of its tokens/s, paired with off."""

    trial: Trial
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scan:
    """Every tree that the search tried for one row, in order, and the fastest of each size."""

    row: PolicyRow
    off: Trial
    trials: tuple[Trial, ...]
    best: tuple[SizePoint, ...]

    @property
    def fastest_speculation(self) -> Trial:
        """The fastest trial that speculates."""
        return max((trial for trial in self.trials if trial.tree != OFF), key=_rate)


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """Where the target's tokens stood among the draft's choices, by depth below a step's start.

    shares: per depth and rank, of the steps whose tokens before that depth were all recorded
    choices. The last two columns are the ranks beyond MOST_RANKS together, and none.
    """

    shares: NDArray[np.float64]
    num_steps: tuple[int, ...]


def scan(profile: Profile, trace: Trace, cost: StepCost) -> tuple[Scan, ...]:
    """Repeat the search of every row; raise MissingMeasurement when the cost knows too little."""
    batch_sizes = [row.batch_size for row in profile.policy]
    seed, most = profile.provenance.seed, cost.most_nodes(batch_sizes, MOST_NODES) or 1
    space = TreeSpace.of(trace, most)
    spoken_P = walk(space.flat, OFF).starts_P > 0
    bootstrap = PairedBootstrap.of(
        int(spoken_P.sum()),
        cost,
        num_resamples=NUM_RESAMPLES,
        num_draws=NUM_COST_DRAWS,
        seed=seed,
    )
    paired = _PairedTimes(space.flat, spoken_P, bootstrap, {})
    scans = []
    for row in profile.policy:
        result = search_batch(space, cost, row.batch_size, seed=seed)
        best: dict[int, Trial] = {}
        for trial in sorted(result.trials, key=_rate):
            best[trial.tree.num_nodes] = trial
        points = paired.points(row.batch_size, [best[n] for n in sorted(best)], result.off)
        scans.append(Scan(row, result.off, result.trials, points))
    return tuple(scans)


def reach_shares(trace: Trace, tree: Tree) -> tuple[float, ...]:
    """Return per node the share of the walk's steps that accept it; 1 for the root."""
    flat = FlatTrace.of(trace)
    ends_S = longest_paths(flat, np.asarray(tree.parents, np.intp))
    ends = ends_S[_start_places(flat, trace, tree)]
    counts = np.bincount(ends, minlength=tree.num_tokens)
    for node in range(tree.num_nodes, 0, -1):
        counts[tree.parents[node]] += counts[node]
    return tuple((counts / max(1, counts[0])).tolist())


def rank_shares(trace: Trace, tree: Tree) -> Ranks:
    """Return where the target's tokens stood at the steps that `tree` takes over the trace."""
    flat = FlatTrace.of(trace)
    num_children = flat.num_children
    place = _start_places(flat, trace, tree)
    columns = MOST_RANKS + 2
    shares, num_steps = [], []
    for depth in range(min(MOST_DEPTHS, flat.max_depth)):
        place = place[flat.positions_S[place + depth] >= 0]
        if not len(place):
            break
        ranks = flat.ranks_at(depth)[place]
        kinds = np.where(ranks < MOST_RANKS, ranks, MOST_RANKS)
        kinds = np.where(ranks == num_children, MOST_RANKS + 1, kinds)
        shares.append(np.bincount(kinds, minlength=columns) / len(place))
        num_steps.append(len(place))
        place = place[ranks < num_children]
    return Ranks(np.array(shares), tuple(num_steps))


def trial_of(trace: Trace, cost: StepCost, batch_size: int, tree: Tree) -> Trial:
    """Return what is predicted of any tree."""
    tokens_per_step = walk(trace, tree).tokens_per_step
    return Trial.at(
        batch_size, tree, tokens_per_step, cost.step_ms(batch_size, tree, tokens_per_step)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _PairedTimes:
    """Times of trees on the resamples of prompts with output; each tree is walked once."""

    flat: FlatTrace
    spoken_P: NDArray[np.bool_]
    bootstrap: PairedBootstrap
    starts: dict[Tree, Ints]

    def points(self, batch_size: int, trials: Sequence[Trial], off: Trial) -> tuple[SizePoint, ...]:
        """Return trials with the intervals of their gains over off, in tokens/s."""
        off_ms_R, found = self._ms_R(batch_size, OFF), []
        for trial in trials:
            low, high = interval(off_ms_R / self._ms_R(batch_size, trial.tree))
            found.append(SizePoint(trial, low * off.tokens_per_s, high * off.tokens_per_s))
        return tuple(found)

    def _ms_R(self, batch_size: int, tree: Tree) -> NDArray[np.float64]:
        if tree not in self.starts:
            self.starts[tree] = walk(self.flat, tree).starts_P[self.spoken_P]
        starts_P = self.starts[tree]
        rate = self.flat.num_positions / float(starts_P.sum())
        return self.bootstrap.times_R(starts_P, batch_size, tree, rate)


def _start_places(flat: FlatTrace, trace: Trace, tree: Tree) -> NDArray[np.intp]:
    """Return the places where steps with `tree` start."""
    place_of_position = np.flatnonzero(flat.positions_S >= 0)
    return place_of_position[walk(trace, tree).starts]


def _rate(trial: Trial) -> float:
    return trial.tokens_per_s


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Evidence:
    """The very files that a profile names, and why some are missing; typed rates need no file."""

    trace: Trace | None
    rates: tuple[float, ...]
    table: RuntimeTable | None
    cost: StepCost | None
    missing: tuple[str, ...]


def find_evidence(profile: Profile, library: Library) -> Evidence:
    """Return what can be found of the files that a profile was made from."""
    missing: list[str] = []
    source, rates = profile.sources.trace, None
    if source.name == RATES:
        rates = _attempt(lambda: rates_of(source), [])
    trace = _attempt(lambda: profile_trace(profile, library), missing)
    inputs = _attempt(lambda: profile_runtime(profile, library), missing)
    if inputs is None:
        return Evidence(trace, rates or (), None, None, tuple(missing))
    cost = _attempt(lambda: runtime_cost(inputs, profile.sampling, profile.context)[0], missing)
    return Evidence(trace, rates or (), inputs.table, cost, tuple(missing))


def _attempt(load: Callable[[], T], missing: list[str]) -> T | None:
    try:
        return load()
    except StreeError as err:
        sentence = str(err)
        missing.append(f"{sentence[0].upper()}{sentence[1:]}.")
        return None
