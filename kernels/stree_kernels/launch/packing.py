"""Tokens of many prompts side by side: whose they are, and how kernels find their own.

A kernel cuts every sequence into tiles of its own size. How many tiles there can be at most follows
from the number of tokens and sequences alone, so a launch needs no table from the host.

Shape letters: M packed tokens, S sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stree_kernels.launch.rows import require_dtypes, require_packed

MAX_SEQUENCES = 4096


class Packing(NamedTuple):
    """Which tokens go on with which slot; all int32.

    Sequence s is tokens `offsets_S1[s]` to `offsets_S1[s + 1] - 1`, possibly none; behind the last
    may be tokens of nobody. It goes on with slot `slots_S[s]`, where `starts_S[s]` tokens are; at
    the start of a prompt, with none, the slot's states count as zero. Slots differ.
    """

    offsets_S1: Tensor
    slots_S: Tensor
    starts_S: Tensor


def num_tiles(num_tokens: int, num_sequences: int, tile: int) -> int:
    """Return the most tiles of `tile` tokens that the sequences can have."""
    return num_tokens // tile + num_sequences


def check_packing(packing: Packing) -> None:
    """Raise ValueError unless the tables are what a kernel relies on."""
    require_dtypes("offsets, slots and starts of prompts", packing, (torch.int32,))
    require_packed("offsets, slots or starts of prompts", packing, 1)
    num_sequences = len(packing.slots_S)
    sizes = (len(packing.offsets_S1), len(packing.starts_S))
    if sizes != (num_sequences + 1, num_sequences) or num_sequences > MAX_SEQUENCES:
        raise ValueError(
            f"up to {MAX_SEQUENCES} prompts have a slot and a start each, and one offset more than "
            f"there are, got {num_sequences} slots, {sizes[1]} starts, {sizes[0]} offsets; pass "
            "fewer prompts at a time"
        )
