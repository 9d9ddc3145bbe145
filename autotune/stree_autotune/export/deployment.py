"""A profile on its way to a server: what it says, and what any other setting is worth.

What a server's format can say is taken over from the profile as it is. In place of what it cannot
say stands the fastest of the settings that it can: each is judged by the profile's own acceptance,
walked over its trace or added up from typed rates, and timed with its own step cost. Where one
setting has to do for several batch sizes, fastest means the largest geometric mean of tokens/s,
every row of the profile counting the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from stree_autotune.cost import StepCost
from stree_autotune.export.acceptance import Acceptance, acceptance_of
from stree_autotune.search import profile_cost, profile_trace
from stree_autotune.store import Library, digits, percent, title
from stree_autotune.trace import Trace
from stree_core.errors import MissingMeasurement, NoFeasibleTree
from stree_core.models import MTP
from stree_core.profile import PolicyRow, Profile
from stree_core.tree import MAX_NODES, OFF, Tree

LONGEST_CHAIN = 8
"""The longest chain that is tried in place of a tree."""

RATES_NOTE = (
    "tokens/s are predicted for stree's own decoder; a server's differ, and may rank otherwise"
)


@dataclass(frozen=True, slots=True)
class Exported:
    """The bytes of a server's file, and what it says otherwise than the profile."""

    content: bytes
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deployment:
    """A profile, where its sources may lie, and the names by which a server loads the models.

    `batch_size` is the one batch size to serve, 0 for all of the profile's. Trace and step cost are
    read when something has to be judged, so that a profile a format can say needs no sources.
    """

    profile: Profile
    library: Library
    target: str
    draft: str
    batch_size: int = 0
    walked: dict[Tree, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def trace(self) -> Trace:
        """The profile's trace; raises MissingMeasurement when it is not at hand."""
        return profile_trace(self.profile, self.library)

    @cached_property
    def acceptance(self) -> Acceptance:
        """What the profile was tuned with; raises MissingMeasurement when it is not at hand."""
        return acceptance_of(self.profile, self.library)

    @cached_property
    def cost(self) -> StepCost:
        """The profile's step cost; raises MissingMeasurement when it is not at hand."""
        return profile_cost(self.profile, self.library, self.target, self.draft)

    @cached_property
    def rows(self) -> tuple[PolicyRow, ...]:
        """The rows to serve: all of them, or the one in use at `batch_size`."""
        if self.batch_size:
            return (self.profile.row_for(self.batch_size),)
        return self.profile.policy

    @property
    def title(self) -> str:
        """Pair, GPU, dataset and rule, and what of it is estimated."""
        return title(self.profile)

    @property
    def method(self) -> str:
        """How the server drafts: as the profile does, or what it was measured with."""
        if self.profile.server is not None:
            return self.profile.server.method
        return "mtp" if self.profile.draft.name == MTP else "draft_model"

    @property
    def drafts_with_model(self) -> bool:
        """True when the draft is a model of its own, which the server has to load."""
        return self.method in ("draft_model", "eagle3")

    def tokens_per_s(self, batch_size: int, tree: Tree) -> float:
        """Return the rate of all sequences together, as tuning predicts it."""
        if tree not in self.walked:
            self.walked[tree] = self.acceptance.tokens_per_step(tree)
        step_ms = self.cost.step_ms(batch_size, tree, self.walked[tree])
        return 1000 * batch_size * self.walked[tree] / step_ms

    def mean_log_rate(self, chosen: Mapping[int, Tree]) -> float:
        """Return the mean over batch sizes of the logarithm of the rate."""
        rates = [self.tokens_per_s(batch_size, tree) for batch_size, tree in chosen.items()]
        return sum(map(math.log, rates)) / len(rates)

    def best(self, candidates: Iterable[Tree], rows: Sequence[PolicyRow]) -> Tree:
        """Return the candidate with the largest geometric mean rate; of equals the smallest.

        Candidates that nobody timed or recorded are left out; raises MissingMeasurement when none
        remains.
        """
        rated: list[tuple[float, int, Tree]] = []
        untimed: MissingMeasurement | None = None
        for tree in candidates:
            if not self.acceptance.covers(tree):
                continue
            try:
                rate = self.mean_log_rate({row.batch_size: tree for row in rows})
            except MissingMeasurement as err:
                untimed = err
                continue
            rated.append((rate, -tree.num_nodes, tree))
        if not rated:
            assert untimed is not None
            raise untimed
        return max(rated, key=lambda item: item[:2])[2]

    def chains(self) -> dict[int, Tree]:
        """Return a chain, or off, by batch size: the profile's own, the fastest in a tree's place.

        Raises NoFeasibleTree when all of them are off.
        """
        chosen = {row.batch_size: row.tree.build() for row in self.rows}
        for row in self.rows:
            if not chosen[row.batch_size].is_chain:
                chosen[row.batch_size] = self.best(chains(LONGEST_CHAIN), (row,))
        if not any(tree.num_nodes for tree in chosen.values()):
            raise self.nothing_to_set()
        return chosen

    def one_setting(self, can_say: Callable[[Tree], bool], candidates: Iterable[Tree]) -> Tree:
        """Return the tree of all rows where it is one and can be said, else the best for all.

        That is one of the candidates or of the rows' own trees. Raises NoFeasibleTree when it is
        off.
        """
        own = list(dict.fromkeys(row.tree.build() for row in self.rows))
        sayable = [tree for tree in own if can_say(tree)]
        if len(own) == len(sayable) == 1:
            (tree,) = own
        else:
            tree = self.best(dict.fromkeys((*candidates, *sayable)), self.rows)
        if tree == OFF:
            raise self.nothing_to_set()
        return tree

    def changes(self, chosen: Mapping[int, Tree], reason: str) -> tuple[str, ...]:
        """Say why and where `chosen` differs from the profile, and what that is worth."""
        notes = []
        for row in self.rows:
            own, other = row.tree.build(), chosen[row.batch_size]
            if other == own:
                continue
            before, after = (self.tokens_per_s(row.batch_size, tree) for tree in (own, other))
            notes.append(
                f"batch size {row.batch_size}: {other.label} in place of {own.label}, "
                f"{digits(after)} instead of {digits(before)} tokens/s "
                f"({percent(after / before - 1, signed=True)})"
            )
        return (reason, RATES_NOTE, *notes) if notes else ()

    def rule_note(self, server: str) -> tuple[str, ...]:
        """Say so when `server` drafts likeliest tokens and the profile was tuned for sampled."""
        if self.profile.sampling.rule != "mss":
            return ()
        return (
            f"the profile was tuned for sampled drafts (rule mss); {server} drafts the likeliest "
            "tokens, so a profile tuned with --rule naive fits it",
        )

    def nothing_to_set(self) -> NoFeasibleTree:
        """Return the error that says so, because off is fastest."""
        sizes = [row.batch_size for row in self.rows]
        where = f"at batch size {sizes[0]}"
        if len(sizes) > 1:
            where = f"over batch sizes {sizes[0]} to {sizes[-1]}"
        # A chain is what every format can say.
        sayable = [row.batch_size for row in self.profile.policy if row.verdict == "chain"]
        others = [size for size in sayable if size not in sizes or len(sizes) > 1]
        remedy = "start the server without speculation"
        if others:
            remedy += f", or export for one that speculates, as with --batch-size {others[0]}"
        return NoFeasibleTree(
            f"{where} decoding without speculation is the fastest that this format can say, so "
            f"there is nothing to set; {remedy}"
        )


def chains(longest: int) -> list[Tree]:
    """Return off and every chain of up to `longest` nodes."""
    return [Tree.chain(length) for length in range(longest + 1)]


def stars(widest: int) -> list[Tree]:
    """Return the trees of one level with 2 to `widest` nodes."""
    widths = range(2, min(widest, MAX_NODES) + 1)
    return [Tree.from_paths([[rank] for rank in range(width)]) for width in widths]


def ranges(chosen: Mapping[int, Tree]) -> list[tuple[int, int, Tree]]:
    """Return (first, last, tree) of active sequences, neighbours with one tree joined.

    A profile's row is in use for up to its batch size, and the last one for all above.
    """
    joined: list[tuple[int, int, Tree]] = []
    first = 1
    for last, tree in sorted(chosen.items()):
        if joined and joined[-1][2] == tree:
            joined[-1] = (joined[-1][0], last, tree)
        else:
            joined.append((first, last, tree))
        first = last + 1
    return joined


def comments(lines: Iterable[str]) -> str:
    """Return comments of a shell script or of YAML: whatever a line holds, it stays one line."""
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)
