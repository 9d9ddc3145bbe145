"""Tokens per step of every K, and draws of them: counted by a server, walked on a trace, or typed.

A server's counts are resampled by load: a pair of batch size and round, which every K was given
alike, so that Ks are compared on the same prompts. Marginal rates typed by a user and traces give
tokens per step as one plus the sum of the rates; typed ones have no spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stree_autotune.server.tables import AcceptedRun, ServerAcceptance
from stree_autotune.trace import Trace, walk
from stree_core.errors import MissingMeasurement
from stree_core.tree import Tree

Floats = NDArray[np.float64]

NUM_DRAWS = 2000


@dataclass(frozen=True, slots=True, eq=False)
class TokensPerStep:
    """Tokens per step by K, off included, and draws [R] of each; `source` says where from."""

    values: dict[int, float]
    draws: dict[int, Floats]
    source: str

    def require(self, draft_tokens: Sequence[int]) -> list[int]:
        """Return those Ks whose tokens per step are known; raise ConfigError when no K is."""
        known = [count for count in draft_tokens if count in self.values]
        if not any(known) and any(draft_tokens):
            raise MissingMeasurement(
                f"no K of the server table ({_listed(draft_tokens)}) has an acceptance, there is "
                f"one for {_listed(sorted(set(self.values) - {0}))}; run these Ks as well"
            )
        return known


def from_server(acceptance: ServerAcceptance, rng: np.random.Generator) -> TokensPerStep:
    """Return what a server counted, with one resample of loads for all Ks."""
    loads = sorted({(run.batch_size, run.round) for run in acceptance.runs})
    picked_RL = rng.multinomial(len(loads), np.full(len(loads), 1 / len(loads)), NUM_DRAWS)
    values, draws = {0: 1.0}, {0: np.ones(NUM_DRAWS)}
    for count in sorted({run.draft_tokens for run in acceptance.runs}):
        runs = [run for run in acceptance.runs if run.draft_tokens == count]
        steps_L, accepted_L = _by_load(runs, loads)
        values[count] = acceptance.tokens_per_step(count)
        steps_R, accepted_R = picked_RL @ steps_L, picked_RL @ accepted_L
        share_R = np.divide(
            accepted_R, steps_R, out=np.full(NUM_DRAWS, values[count] - 1), where=steps_R > 0
        )
        draws[count] = 1 + share_R
    return TokensPerStep(values, draws, "counted by the server")


def _by_load(
    runs: Sequence[AcceptedRun], loads: Sequence[tuple[int, int]]
) -> tuple[Floats, Floats]:
    """Return steps and accepted tokens [L]; loads that a K has no run of stay 0."""
    steps_L, accepted_L = np.zeros(len(loads)), np.zeros(len(loads))
    for run in runs:
        place = loads.index((run.batch_size, run.round))
        steps_L[place] += run.steps
        accepted_L[place] += run.accepted
    return steps_L, accepted_L


def from_trace(trace: Trace, draft_tokens: Sequence[int]) -> TokensPerStep:
    """Return what chains of these lengths keep on a trace, by walking each."""
    values = {count: walk(trace, Tree.chain(count)).tokens_per_step for count in draft_tokens}
    return exact(values, "walked on a trace")


def from_rates(rates: Sequence[float]) -> TokensPerStep:
    """Return what marginal rates give, typed by a user for positions 1, 2, ..."""
    values = {count: 1 + sum(rates[:count]) for count in range(1, len(rates) + 1)}
    return exact(values, "typed")


def exact(values: Mapping[int, float], source: str) -> TokensPerStep:
    """Return tokens per step by K as known without a spread; off is added."""
    known = {0: 1.0} | {count: float(value) for count, value in values.items()}
    draws = {count: np.full(NUM_DRAWS, value) for count, value in known.items()}
    return TokensPerStep(known, draws, source)


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts)) or "none"
