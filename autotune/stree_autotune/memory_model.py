"""How much memory decoding takes, by shapes alone: does a tree fit, and how many sequences do.

Weights and caches are exact: they are the tensors of stree_core.cache. The rest is a bound: logits
of the largest pass and what a rule makes of them, and what CUDA, its libraries and captured graphs
take. `fits` is the one question that a search asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stree_autotune.gpu_sheet import GpuSheet
from stree_autotune.runtime_table import ModelCost, RuleKey, RuntimeTable
from stree_autotune.tree_shape import shape_of
from stree_core.tree import Tree

RESERVED_BYTES = 3 << 29
"""What a process takes on a GPU beside its tensors: context, libraries, graphs; a guess."""

CHAINS = {"cpu": 64, "cuda": 256}
"""The longest of stree_core.prefill.CHAINS, which a test compares: that module loads torch."""

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
    table: RuntimeTable, sheet: GpuSheet, batch_size: int, tree: Tree, rule: RuleKey = "greedy",
    context: int | None = None,
) -> bool:  # fmt: skip
    """True when decoding with `tree` fits into the memory of a GPU."""
    return needed_bytes(table, batch_size, [tree], rule, context).total <= _memory(sheet)


def largest_batch(
    table: RuntimeTable, sheet: GpuSheet, tree: Tree, rule: RuleKey = "greedy",
    context: int | None = None,
) -> int:  # fmt: skip
    """Return the most sequences that fit with `tree`, 0 when not even one does."""
    none = needed_bytes(table, 0, [tree], rule, context).total
    each = needed_bytes(table, 1, [tree], rule, context).total - none
    return max(0, (_memory(sheet) - none) // each)


def cache_bytes(
    model: ModelCost, num_slots: int, num_rows: int, path_capacity: int, num_positions: int
) -> int:
    """Return the bytes of a cache of stree_core.cache with these sizes."""
    each = model.state_bytes_per_sequence + model.kept_bytes + num_rows * model.row_bytes
    # The last step may append a whole path behind the last position that is asked for.
    each += (num_positions + path_capacity) * model.kv_bytes_per_token
    # The path, its length, the kept rows, the committed tokens.
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
    # MSS keeps the draft's laws until the target has chosen.
    kept = shape.num_inner * row if rule.startswith("mss") else 0
    return max(verify, draft) + kept


def _memory(sheet: GpuSheet) -> int:
    return sheet.memory_gb * 10**9
