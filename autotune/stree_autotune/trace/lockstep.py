"""Walks of many trees over one trace, side by side.

A walk of a single tree is a loop of a few short numpy calls per step, which spends its time on
calls. Here every call serves all trees. The *entries* are the places sorted by their position in
the prompt, so that a position of all prompts is a slice. Shape letters: S places, E entries,
C trees, K starts of all trees together. A *spot* is an entry of one tree: entry * C + tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stree_autotune.trace.tree_walk import BURST_STEPS, FlatTrace, Ints


@dataclass(frozen=True, slots=True, eq=False)
class Lockstep:
    """The order of a trace's places.

    place_E: the place of each entry, end marks last. entry_S: the reverse. ends: where the entries
    of each position end.
    """

    place_E: Ints
    entry_S: Ints
    ends: tuple[int, ...]

    @classmethod
    def of(cls, flat: FlatTrace) -> Lockstep:
        """Sort the places by their position in the prompt."""
        num_places = len(flat.positions_S)
        place = np.flatnonzero(flat.positions_S >= 0)
        within_S = np.full(num_places, num_places)
        within_S[place] = place - np.repeat(flat.first_P, flat.positions_P)
        place_E = np.argsort(within_S, kind="stable")
        entry_S = np.empty_like(place_E)
        entry_S[place_E] = np.arange(num_places)
        ends = np.cumsum(np.bincount(within_S[place]))
        return cls(place_E, entry_S, tuple(ends.tolist()))

    def walk(self, advance_EC: Ints) -> tuple[Ints, Ints]:
        """Return the spots where steps start [K], unordered, and the starts to go [E, C].

        `advance_EC` tells how far a step moves on, 0 at end marks. From an entry so many steps lead
        past the prompt's end, the one from there included.
        """
        num_trees = advance_EC.shape[1]
        next_EC = self.entry_S.take(self.place_E[:, None] + advance_EC)
        next_EC *= num_trees
        next_EC += np.arange(num_trees)
        return self._starts(next_EC), self._to_go(next_EC)

    def _starts(self, next_EC: Ints) -> Ints:
        end = (self.ends[-1] if self.ends else 0) * next_EC.shape[1]
        spot = np.arange((self.ends[0] if self.ends else 0) * next_EC.shape[1])
        visited = [spot]
        while len(spot):
            for _ in range(BURST_STEPS):
                spot = next_EC.take(spot)
                visited.append(spot)
            spot = spot[spot < end]
        spots = np.concatenate(visited)
        starts: Ints = spots[spots < end]
        return starts

    def _to_go(self, next_EC: Ints) -> Ints:
        to_go_EC = np.zeros(next_EC.shape, np.intp)
        for begin, end in reversed(list(pairwise((0, *self.ends)))):
            np.add(to_go_EC.take(next_EC[begin:end]), 1, out=to_go_EC[begin:end])
        return to_go_EC
