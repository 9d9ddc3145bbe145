"""How much memory decoding takes, by shapes alone, and which trees fit a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from stree_autotune.cost.tree_shape import shape_of
from stree_autotune.store import ModelCost, StepRule
from stree_core.tree import Tree

RESERVED_BYTES = 3 << 29
"""What a process takes on a GPU beside its tensors: context, libraries, graphs; a guess."""

_INT_BYTES = 4
_LOGIT_BYTES = 4
_COPIES = {
    StepRule.GREEDY: 1,
    StepRule.NAIVE: 5,
    StepRule.NAIVE_TRUNCATED: 10,
    StepRule.MSS: 6,
    StepRule.MSS_TRUNCATED: 10,
}
"""fp32 tensors as large as the logits that exist at one time, ids of a sort counted twice."""

_BRANCH_COPIES = 7
"""The same for choosing several children: logits, their bits, integer keys."""


@dataclass(frozen=True, slots=True)
class Needed:
    """Bytes of device memory by what they are for."""

    weights: int
    caches: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it, with what the process itself takes."""
        return self.weights + self.caches + self.scratch + RESERVED_BYTES


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What decoding with one pair needs of a GPU's memory, by slots of `context` positions each.

    Caches are counted as stree_core.engine allocates them; scratch is a bound, and what the process
    itself takes is a guess. In a GPU of unknown memory everything fits.
    """

    target: ModelCost
    draft: ModelCost
    context: int
    gpu: str
    rule: StepRule = StepRule.GREEDY
    memory_bytes: float = math.inf
    by_tree: dict[Tree, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    def needed(self, batch_size: int, trees: Sequence[Tree]) -> Needed:
        """Return what an engine with these trees takes; it has no draft unless one has nodes."""
        capacity = max(tree.depth for tree in trees) + 1
        models = [(self.target, max(tree.num_tokens for tree in trees))]
        inner = [shape_of(tree).num_inner for tree in trees if tree.num_nodes]
        if inner:
            # The predecessor comes before the nodes with children.
            models.append((self.draft, max(inner) + 1))
        weights = caches = 0
        for model, num_rows in models:
            weights += model.held_bytes
            caches += _cache_bytes(model, batch_size, num_rows, capacity, self.context)
        scratch = max(self._scratch_bytes(batch_size, tree) for tree in trees)
        return Needed(weights, caches, scratch)

    def excess(self, batch_size: int, tree: Tree) -> float:
        """Return by which share of the memory a tree is too large; 0 or less means it fits.

        Never infinite: where the memory is not known, everything fits.
        """
        if math.isinf(self.memory_bytes):
            return -1.0
        fixed, each = self._linear(tree)
        return (fixed + batch_size * each) / self.memory_bytes - 1

    def largest_batch(self, tree: Tree) -> int:
        """Return the most sequences that fit with `tree`, 0 when not even one does."""
        fixed, each = self._linear(tree)
        return max(0, int((self.memory_bytes - fixed) // each))

    def describe(self, batch_size: int, tree: Tree) -> str:
        """Return what a tree needs beside what there is."""
        needed = self.needed(batch_size, [tree]).total / 1e9
        return f"{needed:.1f} GB of the {self.memory_bytes / 1e9:.1f} GB of {self.gpu}"

    def _linear(self, tree: Tree) -> tuple[int, int]:
        """Return what a tree takes without a sequence, and more for each; kept for later calls."""
        if tree not in self.by_tree:
            fixed = self.needed(0, [tree]).total
            self.by_tree[tree] = fixed, self.needed(1, [tree]).total - fixed
        return self.by_tree[tree]

    def _scratch_bytes(self, batch_size: int, tree: Tree) -> int:
        """Return a bound of what passes and the rule hold between the caches."""
        row = batch_size * self.target.vocab_size * _LOGIT_BYTES
        verify = _COPIES[self.rule] * tree.num_tokens * row
        if not tree.num_nodes:
            return verify
        shape = shape_of(tree)
        widest = max((1, *shape.widths))
        draft = max(_COPIES[self.rule], _BRANCH_COPIES if shape.branching else 1) * widest * row
        # MSS keeps the draft's distributions until the target has chosen.
        kept = shape.num_inner * row if self.rule.sampling.rule == "mss" else 0
        return max(verify, draft) + kept


def _cache_bytes(
    model: ModelCost, num_slots: int, num_rows: int, path_capacity: int, num_positions: int
) -> int:
    """Return the bytes of a cache of stree_core.models.cache with these sizes."""
    each = model.state_bytes_per_sequence + model.kept_bytes + num_rows * model.row_bytes
    # The last step may append a whole path behind the last position that is asked for.
    each += (num_positions + path_capacity) * model.kv_bytes_per_token
    # The path, its length, the buffered rows, the committed tokens.
    return num_slots * (each + _INT_BYTES * (path_capacity + 3))
