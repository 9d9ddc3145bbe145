"""A profile that was measured on a server, on its way back there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from stree_autotune.export.deployment import RATES_NOTE, Deployment
from stree_autotune.search import find_source_file
from stree_autotune.server import NAMES, exact, load_server_table, rates_by_size
from stree_autotune.store import SERVERS, Library
from stree_core.errors import MissingMeasurement
from stree_core.profile import PolicyRow, Profile
from stree_core.tree import OFF, Tree

OWN_TIMES_NOTE = (
    "times are stree's; a server spends others on the same tree, so measure there with the "
    "verb plan before you rely on these settings"
)


def deployment_of(
    profile: Profile, library: Library, target: str, draft: str, batch_size: int
) -> Deployment:
    """Return the deployment of a profile, by whose times it was tuned."""
    made = ServedDeployment if profile.server is not None else Deployment
    return made(profile, library, target, draft, batch_size)


class ServedDeployment(Deployment):
    """A deployment whose rates are the server's own, of the chains that ran there."""

    @cached_property
    def rates(self) -> dict[int, dict[int, float]]:
        """Tokens/s by batch size and K; raises MissingMeasurement without the profile's files."""
        table = load_server_table(
            find_source_file(self.profile.sources.runtime, SERVERS, self.library)
        )
        ran = map(Tree.chain, sorted({cell.draft_tokens for cell in table.cells}))
        values = {
            chain.num_nodes: self.acceptance.tokens_per_step(chain)
            for chain in ran
            if self.acceptance.covers(chain)
        }
        return rates_by_size(table, exact(values, "the profile's"))

    def tokens_per_s(self, batch_size: int, tree: Tree) -> float:
        """Return the measured rate of a chain; raise MissingMeasurement where it did not run."""
        known = self.rates.get(batch_size, {})
        if not tree.is_chain or tree.num_nodes not in known:
            ran = ", ".join(map(str, known)) or "none"
            raise MissingMeasurement(
                f"chain {tree.num_nodes} did not run at batch size {batch_size} (K = {ran} did); "
                f"run the plan with KS={tree.num_nodes} SIZES={batch_size}"
            )
        return known[tree.num_nodes]

    def best(self, candidates: Iterable[Tree], rows: Sequence[PolicyRow]) -> Tree:
        """Return the chain with the largest geometric mean of measured rates, off included."""
        counts = set.intersection(*(set(self.rates.get(row.batch_size, {})) for row in rows))
        if not counts:
            raise MissingMeasurement(
                "no K ran at every batch size of the profile; export for one with --batch-size"
            )
        trees = [OFF, *(Tree.chain(count) for count in sorted(counts - {0}))]
        return max(
            trees, key=lambda tree: self.mean_log_rate({row.batch_size: tree for row in rows})
        )

    def changes(self, chosen: Mapping[int, Tree], reason: str) -> tuple[str, ...]:
        """Say why and where `chosen` differs from the profile, by the server's own rates."""
        notes = super().changes(chosen, reason)
        return tuple(note for note in notes if note != RATES_NOTE)


def times_notes(profile: Profile, server: str) -> list[str]:
    """Return whose times a profile has: what an export to `server` says first."""
    made = profile.server
    if made is None:
        return [OWN_TIMES_NOTE]
    name = f"{NAMES[made.name]} {made.version}"
    notes = [f"times were measured on {name}, {made.date}; another version may rank otherwise"]
    if made.name != server:
        notes.append(
            f"times are {NAMES[made.name]}'s, not {NAMES[server]}'s; measure there as well"
        )
    return notes
