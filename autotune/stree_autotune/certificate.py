"""The certificate of a trace: the fewest starts that any static tree can have on it.

It lies beside its trace and names its sha256. Each bound is a list of lines: every tree with n
nodes has at least `starts - price * n` starts for each of them (cover_bound.py). Chains and
one-level trees are few, so their starts are listed as they are.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import Field

from stree_autotune.advice import command
from stree_core.errors import ConfigError
from stree_core.files import dump_yaml, load_yaml, sha256_of, write_atomically
from stree_core.profile import Provenance, Sha256, Strict
from stree_core.tree import MAX_NODES

Count = Annotated[int, Field(ge=0, le=1 << 40)]
Starts = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Price = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_NODES)]


class Line(NamedTuple):
    """Every tree with n nodes has at least starts - price * n starts."""

    starts: Starts
    price: Price


class DepthBound(Strict):
    """Lines for all trees of at most `max_depth` levels; without it, for all trees."""

    max_depth: Annotated[int, Field(ge=1, le=MAX_NODES)] | None = None
    lines: Annotated[tuple[Line, ...], Field(min_length=1, max_length=64)]

    def least_starts(self, num_nodes: int) -> float:
        """Return the fewest starts that a tree with this many nodes can have."""
        return max(line.starts - line.price * num_nodes for line in self.lines)


class LeastTime(Protocol):
    """What a step takes at least with any tree of some nodes and levels; 0 nodes means off."""

    def least_ms(
        self, batch_size: int, num_nodes: int, depth: int, tokens_per_step: float
    ) -> float:
        """Return the milliseconds of the quickest step, which more tokens per step may lengthen.

        Tokens per step over this time must not fall as the tokens grow.
        """


class Certificate(Strict):
    """Bounds for one trace; `chains` and `stars` hold the starts of those with 1, 2, ... nodes."""

    schema_version: Literal[1] = 1
    kind: Literal["stree-certificate"] = "stree-certificate"
    trace_sha256: Sha256
    num_positions: Count
    chains: Counts
    stars: Counts
    bounds: Annotated[tuple[DepthBound, ...], Field(min_length=1, max_length=16)]
    provenance: Provenance

    @cached_property
    def _sizes(self) -> dict[int, list[tuple[tuple[int, int], float]]]:
        return {}

    def least_starts(self, num_nodes: int, depth: int) -> float:
        """Return the fewest starts of any tree with exactly these nodes and levels.

        0 for shapes that no tree on the trace has.
        """
        if depth == num_nodes and num_nodes <= len(self.chains):
            return self.chains[num_nodes - 1]
        if depth == 1:
            return self.stars[num_nodes - 1] if num_nodes <= len(self.stars) else self.num_positions
        # a step covers its levels and the bonus token
        least = self.num_positions / (depth + 1)
        for bound in self.bounds:
            if bound.max_depth is None or bound.max_depth >= depth:
                least = max(least, bound.least_starts(num_nodes))
        return least

    @cached_property
    def most_tokens_per_step(self) -> tuple[float, ...]:
        """The most tokens per step of any static tree with at most 1, 2, ... nodes."""
        least = (
            min(self.least_starts(num_nodes, depth) for depth in range(1, num_nodes + 1))
            for num_nodes in range(1, MAX_NODES + 1)
        )
        return tuple(
            self.num_positions / starts if starts else 1.0 for starts in accumulate(least, min)
        )

    def most_tokens_per_s(self, cost: LeastTime, batch_size: int, max_nodes: int) -> float:
        """Return a rate that no tree of up to `max_nodes` nodes, nor off, is predicted to exceed.

        For every number of nodes and levels, the most tokens per step of such trees over the least
        time of such trees: the two need not be the same tree's, so the rate may be out of reach.
        """
        off_ms = cost.least_ms(batch_size, 0, 0, 1.0)
        if self.num_positions == 0:
            # a trace of prompts that ended at once: no tree emits anything more
            return 1000 * batch_size / off_ms
        least_ms = self.num_positions * off_ms
        for size, starts in self._sizes_up_to(max_nodes):
            if starts:
                rate = self.num_positions / starts
                least_ms = min(least_ms, starts * cost.least_ms(batch_size, *size, rate))
        return 1000 * batch_size * self.num_positions / least_ms

    def _sizes_up_to(self, max_nodes: int) -> list[tuple[tuple[int, int], float]]:
        """Return every number of nodes and levels with the least starts, computed once."""
        if max_nodes not in self._sizes:
            self._sizes[max_nodes] = [
                ((num_nodes, depth), self.least_starts(num_nodes, depth))
                for num_nodes in range(1, max_nodes + 1)
                for depth in range(1, num_nodes + 1)
            ]
        return self._sizes[max_nodes]


def certificate_path(trace: Path) -> Path:
    """Return where the certificate of a trace file lies."""
    return trace.with_suffix(".certificate.yaml")


def load_certificate(trace: Path) -> Certificate | None:
    """Return the certificate beside a trace file, None when there is none.

    Raises ConfigError when it is malformed or belongs to another trace.
    """
    path = certificate_path(trace)
    if not path.is_file():
        return None
    certificate = load_yaml(path, Certificate)
    if certificate.trace_sha256 != sha256_of(trace):
        raise ConfigError(
            f"{path} must belong to the trace beside it, which has changed since; "
            f"make it again with `{command('certify', trace)}`"
        )
    return certificate


def has_certificate(trace: Path) -> bool:
    """True when a sound certificate of this very trace lies beside it."""
    try:
        return load_certificate(trace) is not None
    except ConfigError:
        return False


def save_certificate(certificate: Certificate, trace: Path) -> Path:
    """Write a certificate atomically beside its trace file; return where."""
    path = certificate_path(trace)
    write_atomically(path, dump_yaml(certificate))
    return path
