"""What fits: the bytes that decoding with a tree keeps on a GPU, against the memory it has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stree_autotune.runtime_table import ModelCost
from stree_core.tree import Tree

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
