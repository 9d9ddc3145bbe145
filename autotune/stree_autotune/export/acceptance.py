"""What a profile knows of acceptance: a trace, or the rates of a chain that were typed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stree_autotune.search import profile_trace
from stree_autotune.store import Library
from stree_autotune.trace import RATES, Trace, marginal_rates, rates_of, walk
from stree_core.profile import Profile
from stree_core.tree import Tree


class Acceptance(Protocol):
    """What a server's settings are judged by."""

    @property
    def max_depth(self) -> int:
        """The longest chain whose acceptance is known."""

    def covers(self, tree: Tree) -> bool:
        """True when it is known what a step of the tree keeps."""

    def tokens_per_step(self, tree: Tree) -> float:
        """Return the mean of tokens per step, the bonus token counted."""

    def rates(self, length: int) -> list[float]:
        """Return the marginal rates of a chain: the shares of steps that keep 1, 2, ... tokens."""


@dataclass(frozen=True, slots=True)
class TracedAcceptance:
    """That of a trace, which every tree can be walked over that it is wide and deep enough for."""

    trace: Trace

    @property
    def max_depth(self) -> int:
        """The depth of the trace's ranks."""
        return self.trace.meta.max_depth

    def covers(self, tree: Tree) -> bool:
        """True for trees no wider and no deeper than what was recorded."""
        return tree.max_children <= self.trace.meta.num_children and tree.depth <= self.max_depth

    def tokens_per_step(self, tree: Tree) -> float:
        """Return those of a walk."""
        return walk(self.trace, tree).tokens_per_step

    def rates(self, length: int) -> list[float]:
        """Return those of a walk of the chain."""
        return marginal_rates(self.trace, length)


@dataclass(frozen=True, slots=True)
class TypedAcceptance:
    """That of typed rates, which say nothing of siblings and nothing beyond the last rate."""

    typed: Sequence[float]

    @property
    def max_depth(self) -> int:
        """The number of rates."""
        return len(self.typed)

    def covers(self, tree: Tree) -> bool:
        """True for off and for chains no longer than the rates."""
        return tree.is_chain and tree.num_nodes <= self.max_depth

    def tokens_per_step(self, tree: Tree) -> float:
        """Return 1 and the rates of the chain's positions."""
        return 1 + sum(self.rates(tree.num_nodes))

    def rates(self, length: int) -> list[float]:
        """Return the first `length` rates."""
        return list(self.typed[:length])


def acceptance_of(profile: Profile, library: Library) -> Acceptance:
    """Return the acceptance that a profile was tuned with.

    Raises MissingMeasurement when its trace is not at hand.
    """
    if profile.sources.trace.name == RATES:
        return TypedAcceptance(rates_of(profile.sources.trace))
    return TracedAcceptance(profile_trace(profile, library))
