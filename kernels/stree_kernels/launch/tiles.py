"""How a program of a kernel over packed prompts finds its tile.

Sequence s has the tiles from `offset // TILE + s` on; no two sequences share one, and some tiles
stay empty. See stree_kernels.launch.packing.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(offsets_ptr, num_sequences, number, TILE: tl.constexpr, BLOCK_S: tl.constexpr):
    """A tile's sequence, where that starts, the tile's first token, and where the sequence ends.

    The tile is empty where its first token is not before the end.
    """
    sequences_S = tl.arange(0, BLOCK_S)
    exists = sequences_S < num_sequences
    offsets_S = tl.load(offsets_ptr + sequences_S, mask=exists, other=0)
    begins_S = exists & (offsets_S // TILE + sequences_S <= number)
    sequence = tl.sum(begins_S.to(tl.int32), axis=0) - 1
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    first = start + (number - start // TILE - sequence) * TILE
    return sequence, start, first, end


@triton.jit
def find_token(offsets_ptr, num_sequences, token, BLOCK_S: tl.constexpr):
    """A token's sequence, where that starts, and whether it is anybody's."""
    sequences_S = tl.arange(0, BLOCK_S)
    exists = sequences_S < num_sequences
    # Of sequences that begin at one place only the last has tokens there.
    offsets_S = tl.load(offsets_ptr + sequences_S, mask=exists, other=0)
    sequence = tl.sum((exists & (offsets_S <= token)).to(tl.int32), axis=0) - 1
    start = tl.load(offsets_ptr + sequence)
    return sequence, start, token < tl.load(offsets_ptr + num_sequences)
