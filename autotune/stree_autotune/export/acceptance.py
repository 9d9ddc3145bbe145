"""What a profile knows of acceptance: a trace, typed rates of a chain, or a server's counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stree_autotune.search import find_source_file, is_of_server, profile_trace
from stree_autotune.server import ServerAcceptance, load_server_acceptance
from stree_autotune.store import SERVERS, Library
from stree_autotune.trace import RATES, Trace, marginal_rates, rates_of, walk
from stree_core.errors import MissingMeasurement
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


@dataclass(frozen=True, slots=True)
class CountedAcceptance:
    """That which a server counted, of the chains that ran there."""

    counted: ServerAcceptance

    @property
    def max_depth(self) -> int:
        """The longest chain that ran."""
        return max(self._lengths)

    def covers(self, tree: Tree) -> bool:
        """True for off and for chains that ran."""
        return tree.is_chain and tree.num_nodes in {0, *self._lengths}

    def tokens_per_step(self, tree: Tree) -> float:
        """Return what was counted over all loads."""
        return self.counted.tokens_per_step(tree.num_nodes) if tree.num_nodes else 1.0

    def rates(self, length: int) -> list[float]:
        """Return what was counted by position; raise MissingMeasurement where it was not."""
        rates = self.counted.marginal_rates(length)
        if len(rates) < length:
            raise MissingMeasurement(
                f"this needs the acceptance of a chain of {length} by position, which the server "
                "did not count; tune again with --rates"
            )
        return list(rates)

    @property
    def _lengths(self) -> set[int]:
        return {run.draft_tokens for run in self.counted.runs}


def acceptance_of(profile: Profile, library: Library) -> Acceptance:
    """Return the acceptance that a profile was tuned with.

    Raises MissingMeasurement when its trace is not at hand.
    """
    source = profile.sources.trace
    if source.name == RATES:
        return TypedAcceptance(rates_of(source))
    if is_of_server(source):
        path = find_source_file(source, SERVERS, library)
        return CountedAcceptance(load_server_acceptance(path))
    return TracedAcceptance(profile_trace(profile, library))
