"""How a streamed projection by a weight in FP8 is cut among programs.

As `linear.stream_plan` cuts one in 16 bits, but programs may own full tiles of the tensor cores:
codes of an empty part of a tile are converted in vain.
"""

from __future__ import annotations

from dataclasses import dataclass

from stree_kernels.linear.stream_plan import ELEMENT_BYTES, TILE_N, StreamPlan

CODE_BOX_K = 128
"""Columns of a bulk copy of codes: 128 bytes; of the rows that is two copies."""
GROUP = 16
"""Rows of the weight that belong together where programs own whole rows."""
MAX_TILE_ROWS = 128
"""Rows of one tile, of gate and of up: two tensor core tiles."""
FEW_ROWS = 32
"""Rows of the input up to which shares are of one tensor core tile: more are read less often."""


@dataclass(frozen=True, slots=True)
class CodeConfig:
    """The ring of one program: at most `ring_kib` of tiles.

    With `full_tiles` programs that own whole rows own those of a tensor core tile, if these suit.
    """

    ring_kib: int
    programs_per_sm: int = 1
    full_tiles: bool = False

    def fills(self, num_outputs: int, num_sms: int) -> bool:
        """Say whether full tiles suit: one a multiprocessor at least, and all run at once."""
        num_tiles = -(-num_outputs // TILE_N)
        return self.full_tiles and num_sms <= num_tiles <= self.programs_per_sm * num_sms


def make_plan(
    config: CodeConfig, num_rows: int, num_outputs: int, num_inner: int, num_sms: int,
    *, gated: bool, shares: bool,
) -> StreamPlan:  # fmt: skip
    """Return the plan for `num_rows` times a weight of `num_outputs` rows (of gate, if gated).

    All tiles of a program but its last are of `num_boxes` boxes, twice as many if gated: those of
    up are a tensor core tile of their own.
    """
    block_m = max(8, 1 << (num_rows - 1).bit_length())
    num_programs = config.programs_per_sm * num_sms
    steps = -(-num_inner // CODE_BOX_K)
    if shares:
        num_boxes = 1 if num_rows <= FEW_ROWS else 2
        group, tiles, mma_rows = TILE_N, 1, num_boxes * TILE_N
        num_programs = min(num_programs, -(-num_outputs // mma_rows) * steps)
    else:
        group, num_groups = GROUP, -(-num_outputs // GROUP)
        num_programs = min(num_programs, num_groups)
        if config.fills(num_outputs, num_sms):
            num_programs = -(-num_outputs // TILE_N)
        # Tiles of one program are alike, so that a ring slot is not larger than need be.
        most = -(-num_groups // num_programs)
        tiles = -(-most * GROUP * (2 if gated else 1) // MAX_TILE_ROWS)
        num_boxes = -(-most // tiles)
        mma_rows = 2 * TILE_N if gated or num_boxes * GROUP > TILE_N else TILE_N
    weight_rows = num_boxes * group * (2 if gated else 1)
    stage_bytes = CODE_BOX_K * (weight_rows + ELEMENT_BYTES * block_m)
    room = (config.ring_kib << 10) - CODE_BOX_K * (mma_rows - weight_rows)
    stages = min(max(2, room // stage_bytes), 2 * steps)
    return StreamPlan(
        shares, gated, block_m, group, num_boxes, mma_rows, 1, stages, steps, tiles, num_programs
    )
