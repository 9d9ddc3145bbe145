"""How a streamed projection is cut among programs: sizes of its ring, and who owns what.

Shape letters: M rows of the input, N rows of the weight, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE_N = 64
"""Rows of the weight that one tensor core instruction takes."""
BOX_K = 64
"""Columns of a bulk copy: 128 bytes, which its swizzle permutes."""
GROUPS = (16, 8)
"""Rows of the weight that belong together where programs own whole rows: fewer are cut evener."""
UNEVEN = 1.02
"""The largest part of the wider groups over that of the others from which on those are taken."""
ELEMENT_BYTES = 2
LEAST_STAGES = 4
SUMS_OF_FOUR_WARPS = 4096
"""Sums that the registers of four warps hold: 32 a thread."""


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """The ring of one program: at most `ring_kib` of tiles, `splits` boxes of columns a stage.

    A tile of whole rows is of up to `max_rows` weight rows: 64, 128 or 256.
    """

    ring_kib: int
    splits: int
    programs_per_sm: int = 1
    max_rows: int = 128


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """One launch: `num_programs` with a ring of `stages`, each of `splits` boxes of columns.

    A tile is `num_boxes` boxes of `group` weight rows, of gate and of up if `gated`; the tensor
    cores read `mma_rows` rows of it. `steps` stages make a tile's K columns. With `shares` the
    programs cut the sequence of all (tile, step) evenly, else they own whole groups, in `tiles`.
    """

    shares: bool
    gated: bool
    block_m: int
    group: int
    num_boxes: int
    mma_rows: int
    splits: int
    stages: int
    steps: int
    tiles: int
    num_programs: int

    @property
    def num_warps(self) -> int:
        """Return the warps of a program: more sums would not fit the registers of four."""
        return 8 if self.block_m * self.mma_rows > SUMS_OF_FOUR_WARPS else 4

    @property
    def box_rows(self) -> int:
        """Return the weight rows of a box."""
        return self.group * (2 if self.gated else 1)

    @property
    def ring_bytes(self) -> int:
        """Return the shared memory of the ring; a whole tile fits behind its last box."""
        rows = self.num_boxes * self.box_rows
        return (
            self.stages * _stage_bytes(rows, self.block_m, self.splits)
            + _row_bytes(self.mma_rows - rows)
        )  # fmt: skip

    def num_ranks(self, num_outputs: int) -> int:
        """Return the most programs that share one tile."""
        num_tiles = -(-num_outputs // (self.group * self.num_boxes))
        total = num_tiles * self.steps
        parts = self.num_programs

        def part_of(place: int) -> int:
            return ((place + 1) * parts - 1) // total

        firsts = range(0, total, self.steps)
        return max(part_of(first + self.steps - 1) - part_of(first) + 1 for first in firsts)


def make_plan(
    config: StreamConfig, num_rows: int, num_outputs: int, num_inner: int, num_sms: int,
    *, gated: bool, shares: bool,
) -> StreamPlan:  # fmt: skip
    """Return the plan for `num_rows` times a weight of `num_outputs` rows (of gate, if gated)."""
    block_m = max(8, 1 << (num_rows - 1).bit_length())
    num_programs = config.programs_per_sm * num_sms
    if shares:
        group, tiles, num_boxes = TILE_N, 1, 1
    else:
        group = _pick_group(num_outputs, num_programs, gated=gated)
        num_groups = -(-num_outputs // group)
        num_programs = min(num_programs, num_groups)
        most = -(-num_groups // num_programs)
        # Tiles are alike within a group, so that no copy of a step is much smaller than another.
        max_boxes = config.max_rows // (group * (2 if gated else 1))
        tiles = -(-most // max_boxes)
        num_boxes = -(-most // tiles)
    rows = num_boxes * group * (2 if gated else 1)
    mma_rows = max(TILE_N, 1 << (rows - 1).bit_length())
    room = (config.ring_kib << 10) - _row_bytes(mma_rows - rows)
    # Fewer columns a stage rather than too few stages.
    splits = min(config.splits, max(1, room // (LEAST_STAGES * _stage_bytes(rows, block_m, 1))))
    steps = -(-num_inner // (BOX_K * splits))
    stages = min(max(2, room // _stage_bytes(rows, block_m, splits)), 2 * steps)
    if shares:
        num_programs = min(num_programs, -(-num_outputs // TILE_N) * steps)
    return StreamPlan(
        shares, gated, block_m, group, num_boxes, mma_rows, splits, stages, steps, tiles,
        num_programs,
    )  # fmt: skip


def _pick_group(num_outputs: int, num_programs: int, *, gated: bool) -> int:
    """Return the rows that belong together: as many, unless programs with the most have too many.

    A thread holds the sums of rows that are 8 apart, so gate and up are by turns of 8.
    """

    def most_rows(group: int) -> int:
        num_groups = -(-num_outputs // group)
        return group * -(-num_groups // min(num_programs, num_groups))

    wide, narrow = GROUPS
    uneven = most_rows(wide) > UNEVEN * most_rows(narrow)
    return narrow if gated or uneven else wide


def _stage_bytes(weight_rows: int, block_m: int, splits: int) -> int:
    return splits * _row_bytes(weight_rows + block_m)


def _row_bytes(rows: int) -> int:
    """Return the bytes of rows of one box of columns."""
    return ELEMENT_BYTES * BOX_K * rows
