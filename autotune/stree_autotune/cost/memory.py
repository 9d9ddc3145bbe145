"""How much memory decoding takes, by shapes alone, and which trees fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stree_autotune.cost.tree_shape import shape_of
from stree_autotune.store import GpuSpec, ModelCost, RuleKey, RuntimeTable
from stree_core.tree import Tree

RESERVED_BYTES = 3 << 29
"""What a process takes on a GPU beside its tensors: context, libraries, graphs; a guess."""

CHAINS = {"cpu": 64, "cuda": 256}
"""The longest of stree_core.drafting.prefill.CHAINS, by a test: that module loads torch."""

_INT_BYTES = 4
_LOGIT_BYTES = 4
_COPIES = {"greedy": 1, "naive": 5, "naive_truncated": 10, "mss": 6, "mss_truncated": 10}
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


def needed_bytes(
    table: RuntimeTable, batch_size: int, trees: Sequence[Tree], rule: RuleKey = "greedy",
    context: int | None = None,
) -> Needed:  # fmt: skip
    """Return what an engine with these trees takes for slots of `context` positions each.

    Without a tree that has nodes there is no draft.
    """
    positions = context or table.context
    capacity = max(tree.depth for tree in trees) + 1
    rows = max(tree.num_tokens for tree in trees)
    models = [(table.target, rows)]
    inner = [shape_of(tree).num_inner for tree in trees if tree.num_nodes]
    if inner:
        # The predecessor comes before the nodes with children.
        models.append((table.draft, max(inner) + 1))
    chain = CHAINS["cpu" if table.gpu == "cpu" else "cuda"]
    weights = caches = 0
    for model, num_rows in models:
        weights += model.held_bytes
        caches += cache_bytes(model, batch_size, num_rows, capacity, positions)
        caches += cache_bytes(model, 1, chain, chain, positions)
    scratch = max(_scratch_bytes(table, batch_size, tree, rule) for tree in trees)
    return Needed(weights, caches, scratch)


def fits(
    table: RuntimeTable, spec: GpuSpec, batch_size: int, tree: Tree, rule: RuleKey = "greedy",
    context: int | None = None,
) -> bool:  # fmt: skip
    """True when decoding with `tree` fits into the memory of a GPU."""
    return needed_bytes(table, batch_size, [tree], rule, context).total <= _memory(spec)


def largest_batch(
    table: RuntimeTable, spec: GpuSpec, tree: Tree, rule: RuleKey = "greedy",
    context: int | None = None,
) -> int:  # fmt: skip
    """Return the most sequences that fit with `tree`, 0 when not even one does."""
    none = needed_bytes(table, 0, [tree], rule, context).total
    each = needed_bytes(table, 1, [tree], rule, context).total - none
    return max(0, (_memory(spec) - none) // each)


def cache_bytes(
    model: ModelCost, num_slots: int, num_rows: int, path_capacity: int, num_positions: int
) -> int:
    """Return the bytes of a cache of stree_core.models.cache with these sizes."""
    each = model.state_bytes_per_sequence + model.kept_bytes + num_rows * model.row_bytes
    # The last step may append a whole path behind the last position that is asked for.
    each += (num_positions + path_capacity) * model.kv_bytes_per_token
    # The path, its length, the buffered rows, the committed tokens.
    return num_slots * (each + _INT_BYTES * (path_capacity + 3))


def _scratch_bytes(table: RuntimeTable, batch_size: int, tree: Tree, rule: RuleKey) -> int:
    """Return a bound of what passes and the rule hold between the caches."""
    row = batch_size * table.target.vocab_size * _LOGIT_BYTES
    verify = _COPIES[rule] * tree.num_tokens * row
    if not tree.num_nodes:
        return verify
    shape = shape_of(tree)
    widest = max((1, *shape.widths))
    draft = max(_COPIES[rule], _BRANCH_COPIES if shape.branching else 1) * widest * row
    # MSS keeps the draft's distributions until the target has chosen.
    kept = shape.num_inner * row if rule.startswith("mss") else 0
    return max(verify, draft) + kept


def _memory(spec: GpuSpec) -> int:
    return spec.memory_gb * 10**9


USABLE_SHARE = 0.9
"""Of a GPU's memory; the rest is the driver's, the kernels' and what allocation wastes."""

LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The memory of a GPU, and what one pair at one context needs of it.

    An estimate from published sizes: weights, states, keys and values of both models, and the fp32
    logits of every token that is verified. It grows with a tree's tokens alone.
    """

    target: ModelCost
    draft: ModelCost
    context: int
    gpu: str = ""
    memory_bytes: float = math.inf

    def needed_bytes(self, batch_size: int, tree: Tree) -> int:
        """Return the bytes of decoding with a tree; the empty tree needs no draft."""
        models = (self.target, self.draft) if tree.num_nodes else (self.target,)
        total = 0
        for model in models:
            per_sequence = model.state_bytes_per_sequence + self.context * model.kv_bytes_per_token
            total += model.weight_bytes + batch_size * per_sequence
        return total + batch_size * tree.num_tokens * self.target.vocab_size * LOGIT_BYTES

    def excess(self, batch_size: int, tree: Tree) -> float:
        """Return by which share of the usable memory a tree is too large; 0 or less means it fits.

        Never infinite: where the memory is not known, everything fits.
        """
        if math.isinf(self.memory_bytes):
            return -1.0
        return self.needed_bytes(batch_size, tree) / (USABLE_SHARE * self.memory_bytes) - 1

    def describe(self, batch_size: int, tree: Tree) -> str:
        """Return what a tree needs beside what there is."""
        needed = self.needed_bytes(batch_size, tree) / 1e9
        return (
            f"{needed:.1f} GB of {USABLE_SHARE * self.memory_bytes / 1e9:.1f} GB that {self.gpu} "
            "leaves usable"
        )
