"""What a profile says a step should do, by the number of sequences that run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stree_core.profile import Profile
from stree_core.tree import Tree


@dataclass(frozen=True, slots=True)
class Policy:
    """Distinct trees and, for every number of active sequences, which of them a step takes.

    The tree without nodes is decoding without speculation.
    """

    trees: tuple[Tree, ...]
    rows: tuple[tuple[int, int], ...]

    @classmethod
    def always(cls, trees: Sequence[Tree]) -> Policy:
        """Return the policy of engines that were given trees alone: the first, whatever runs."""
        return cls(tuple(trees), ((1, 0),))

    def choose(self, num_active: int) -> int:
        """Return the tree of the smallest batch size that is not below, else of the largest."""
        fitting = (which for batch_size, which in self.rows if batch_size >= num_active)
        return next(fitting, self.rows[-1][1])


def policy_of(profile: Profile) -> Policy:
    """Return the policy of a profile's rows."""
    trees: list[Tree] = []
    rows = []
    for row in sorted(profile.policy, key=lambda row: row.batch_size):
        tree = row.tree.build()
        if tree not in trees:
            trees.append(tree)
        rows.append((row.batch_size, trees.index(tree)))
    return Policy(tuple(trees), tuple(rows))
