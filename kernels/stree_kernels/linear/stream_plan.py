"""How a streamed projection is cut among programs: sizes of its ring, and who owns what.

Shape letters: M rows of the input, N rows of the weight, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE_N = 64
"""Rows of the weight that one tensor core instruction takes."""
BOX_K = 64
"""Columns of a bulk copy: 128 bytes, which its swizzle permutes."""
GROUP = 16
"""Rows of the weight that belong together where programs own whole rows."""
MAX_BOXES = 8
"""Groups of one tile: two tensor core tiles."""
ELEMENT_BYTES = 2
LEAST_STAGES = 4


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """The ring of one program: at most `ring_kib` of tiles, `splits` boxes of columns a stage."""

    ring_kib: int
    splits: int
    programs_per_sm: int = 1


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """One launch: `num_programs` with a ring of `stages`, each of `splits` boxes of columns.

    A tile is `num_boxes` boxes of `group` weight rows, twice as many if `gated`, in `halves` tensor
    core tiles. `steps` stages make a tile's K columns. With `shares` the programs cut the sequence
    of all (tile, step) evenly, else they own whole groups.
    """

    shares: bool
    gated: bool
    block_m: int
    group: int
    num_boxes: int
    halves: int
    splits: int
    stages: int
    steps: int
    num_programs: int

    @property
    def num_warps(self) -> int:
        """Return the warps of a program: more sums would not fit the registers of four."""
        return 8 if self.block_m * self.halves > 64 else 4

    @property
    def ring_bytes(self) -> int:
        """Return the shared memory of the ring; a whole tile fits behind its last box."""
        rows = _stage_rows(self.num_boxes * self.group, gated=self.gated)
        return (
            self.stages * _stage_bytes(rows, self.block_m, self.splits)
            + _spare_bytes(rows, self.halves)
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
        group, num_boxes, halves = TILE_N, 1, 1
        num_tiles = -(-num_outputs // TILE_N)
    else:
        group, num_groups = GROUP, -(-num_outputs // GROUP)
        num_programs = min(num_programs, num_groups)
        # Tiles of one program are alike, so that a ring slot is not larger than need be.
        most = -(-num_groups // num_programs)
        num_tiles = -(-most // (MAX_BOXES // 2 if gated else MAX_BOXES))
        num_boxes = -(-most // num_tiles)
        halves = 2 if gated or num_boxes * GROUP > TILE_N else 1
    rows = _stage_rows(num_boxes * group, gated=gated)
    room = (config.ring_kib << 10) - _spare_bytes(rows, halves)
    # Fewer columns a stage rather than too few stages.
    splits = min(config.splits, max(1, room // (LEAST_STAGES * _stage_bytes(rows, block_m, 1))))
    steps = -(-num_inner // (BOX_K * splits))
    stages = min(max(2, room // _stage_bytes(rows, block_m, splits)), 2 * steps)
    if shares:
        num_programs = min(num_programs, num_tiles * steps)
    return StreamPlan(
        shares, gated, block_m, group, num_boxes, halves, splits, stages, steps, num_programs
    )


def _stage_rows(tile_rows: int, *, gated: bool) -> int:
    """Return the weight rows of one stage."""
    return tile_rows * (2 if gated else 1)


def _stage_bytes(weight_rows: int, block_m: int, splits: int) -> int:
    return ELEMENT_BYTES * BOX_K * splits * (weight_rows + block_m)


def _spare_bytes(weight_rows: int, halves: int) -> int:
    return ELEMENT_BYTES * BOX_K * (halves * TILE_N - weight_rows)
