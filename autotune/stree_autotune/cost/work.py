"""What a pass asks of a GPU: launches, bytes and operations, by a model's layout and its rows.

The rules for products are those of `stree_kernels.linear.linear` (a test compares the limits): one
row runs on CUDA cores, few rows in our kernel, more rows or larger weights in cuBLAS, which is no
part of the chain of dependent launches and has row-wise kernels around it. Those for scans are of
`stree_kernels.ssm.tree_scan`: rows of a slot fill a tile of 16, 32 or 64 whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stree_autotune.cost.layout import Layout, Layouts, Product
from stree_autotune.cost.traffic import MAX_BUFFERED
from stree_autotune.cost.tree_shape import FEWEST_ROWS
from stree_autotune.store import ModelCost, RuntimeTable, StepRule
from stree_core.models import MTP
from stree_core.tree import OFF

FEW_ROWS, MORE_ROWS, NARROW, STREAMED_ROWS = 8, 16, 2048, 64
"""pick_config of stree_kernels.linear.linear, which a test compares: that module loads torch. What
it streams is streamed on compute capability 9.0 alone; no table is of another."""
MOST_SLOTS = 64
"""The largest batch size that estimates are fitted to."""
UNGROUPED_ROWS = 32
"""Rows up to which experts are read once for every row; of more, once for all that chose them."""

SCAN_TILES = (16, 32, 64)
PRODUCT_TILE, TILE_SHARE = 128, 0.3
"""Rows of a large product's tile, and how much of its empty rows a product is charged."""

ROW_EDGES = (1, FEW_ROWS, MORE_ROWS, 32, STREAMED_ROWS, PRODUCT_TILE)
"""Rows of all slots beyond which a product runs another kernel, or the same with wider tiles. A
test derives all but the last, cuBLAS's first tile, from pick_config and the streamed kernel's plan.
"""

EDGE_COLUMNS = 300
"""A product of K columns works at K / (K + this) of its rate: what begins and ends it."""

EDGE_BYTES = 1000
"""Every launch takes as long for a row as if it wrote so many bytes more: what begins and ends it.
Chosen by hand among 0, 500, 1000, 1500 and 4000, by the errors on shapes left out of the H200's
tables: fewer err more on the 2.7b shape, more on the others."""

CODE_FACTORS = ((16, 1.45), (32, 1.58), (64, 2.12), (128, 3.87))
MORE_CODES = 6.2
"""Up to so many rows, how much longer FP8 codes take than their bytes do, since they are decoded;
and for more rows. Set by hand on the H200's table of the 8B pair in FP8, the only one."""

_LOGIT_BYTES = 4


class Work(NamedTuple):
    """What a pass asks of a GPU. Sizes are bytes; `one_row` is 1 for one row of one slot, else 0.

    Counted in launches: all of them, products in cuBLAS (`library`), products of up to 16 rows in
    our kernel (`narrow`), scans and attention over several rows (`trees`), and what wider tiles
    add to a scan (`tiles`). Experts that run in groups of rows have bytes and operations
    (`grouped`), the others bytes and how many are read, most of them again.
    """

    launches: float
    library: float
    narrow: float
    trees: float
    tiles: float
    one_row: float
    body: float
    body_flops: float
    head: float
    head_flops: float
    expert_bytes: float
    expert_reads: float
    grouped_bytes: float
    grouped_flops: float
    states: float
    scan_flops: float
    keys: float
    score_flops: float
    rows: float
    logits: float


@dataclass(frozen=True, slots=True)
class PassModel:
    """A model of a table, its layout, and the bytes of one of its values."""

    cost: ModelCost
    layout: Layout
    element_bytes: int

    @property
    def body_bytes(self) -> int:
        """Bytes of a value of all weights but the LM head's: nearly all of FP8 ones are one."""
        return self.element_bytes if self.cost.weights is None else 1

    def decoding(self, num_rows: int) -> float:
        """Return how much longer the weights of products take than their bytes do."""
        if self.cost.weights is None:
            return 1.0
        fitting = (factor for most, factor in CODE_FACTORS if num_rows <= most)
        return next(fitting, MORE_CODES)


class PassSize(NamedTuple):
    """The rows of a pass, of each of `batch_size` slots.

    `block_rows` is where the pass's rows end in the block of the step, `logit_rows` of them have
    logits, and `context` tokens are committed before them. `plain` is a step without a tree, whose
    states are stored every few steps.
    """

    batch_size: int
    num_tokens: int
    block_rows: int
    logit_rows: int
    context: float
    plain: bool = False


def pass_work(model: PassModel, size: PassSize) -> Work:
    """Return the work of a pass; weights, states and keys are read once, logits twice."""
    cost, layout = model.cost, model.layout
    rows, logits = size.batch_size * size.num_tokens, size.batch_size * size.logit_rows
    head = layout.head
    products = [(product, rows) for product in layout.products] + [(head, logits)]
    several = size.block_rows > 1
    tile = _scan_tile(size.block_rows)
    distinct = sum(e.number * e.distinct(rows) * e.values for e in layout.experts)
    chosen = sum(e.number * (e.num_chosen + e.num_shared) * rows * e.values for e in layout.experts)
    grouped = rows > UNGROUPED_ROWS
    stored = 1 / (MAX_BUFFERED + 1) if size.plain else 0
    states = size.batch_size * cost.state_bytes_per_sequence
    return Work(
        launches=cost.num_launches,
        library=sum(p.number for p, num_rows in products if in_library(p, num_rows)),
        narrow=sum(
            p.number
            for p, num_rows in products
            if FEW_ROWS < num_rows <= MORE_ROWS and p.columns < NARROW
        ),
        trees=several * (layout.num_scans + layout.num_attention),
        tiles=several * layout.num_scans * (tile / SCAN_TILES[0] - 1),
        one_row=float(rows == 1),
        body=model.body_bytes
        * model.decoding(rows)
        * sum(p.rows * p.columns * p.number for p in layout.products),
        body_flops=_charged(rows) * sum(map(_flops_of_row, layout.products)),
        head=model.element_bytes * head.rows * head.columns,
        head_flops=_charged(logits) * _flops_of_row(head),
        expert_bytes=0 if grouped else model.body_bytes * distinct,
        expert_reads=0 if grouped else model.body_bytes * chosen,
        grouped_bytes=model.body_bytes * distinct if grouped else 0,
        grouped_flops=2 * chosen if grouped else 0,
        states=states * (1 + stored),
        # two products with the state, a value of which takes four bytes
        scan_flops=several * states * tile,
        keys=size.batch_size * size.context * cost.kv_bytes_per_token,
        score_flops=rows * size.context * layout.score_flops,
        rows=rows * (cost.row_bytes + cost.num_launches * EDGE_BYTES),
        logits=logits * cost.vocab_size * 2 * _LOGIT_BYTES,
    )


def in_library(product: Product, num_rows: int) -> bool:
    """True when a product begins and ends as cuBLAS's do: from 17 rows on, streamed ones too."""
    return num_rows > MORE_ROWS


def element_bytes(dtype: str) -> int:
    """Return the bytes of one value."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def pass_models(table: RuntimeTable, layouts: Layouts) -> tuple[PassModel, PassModel]:
    """Return the target and the draft of a table."""
    width = element_bytes(table.dtype)
    target, draft = (
        PassModel(cost, layouts.at(cost, width), width) for cost in (table.target, table.draft)
    )
    return target, draft


def point_size(term: str, batch_size: int, size: int, context: float) -> PassSize:
    """Return the rows of a point of a table: verify, draft or draft_root."""
    if term == "verify":
        return PassSize(batch_size, size, size, size, context)
    if term == "draft_root":
        return PassSize(batch_size, FEWEST_ROWS, FEWEST_ROWS, 1, context)
    return PassSize(batch_size, size, FEWEST_ROWS + size, size, context)


def plain_size(batch_size: int, context: float) -> PassSize:
    """Return the rows of a step without speculation."""
    return PassSize(batch_size, 1, 1, 1, context, plain=True)


class Sample(NamedTuple):
    """A measured pass: which model, at which batch size, of which term, its work and its time."""

    model: str
    batch_size: int
    term: str
    work: Work
    ms: float


def samples_of(table: RuntimeTable, layouts: Layouts) -> list[Sample]:
    """Return the passes of a table, one token of the target (a whole step) among them."""
    target, draft = pass_models(table, layouts)
    context = table.context / 2
    # Heads of two targets have one name, and nothing else in common.
    drafted = f"{table.target.name} {MTP}" if table.draft.name == MTP else table.draft.name
    samples = []
    for point in table.points:
        if point.term not in ("verify", "draft", "draft_root"):
            continue
        model = target if point.term == "verify" else draft
        work = pass_work(model, point_size(point.term, point.batch_size, point.size, context))
        name = target.cost.name if model is target else drafted
        samples.append(Sample(name, point.batch_size, point.term, work, point.ms))
    for step in table.steps:
        if step.is_off and step.rule == StepRule.GREEDY:
            work = pass_work(target, plain_size(step.batch_size, context))
            samples.append(Sample(target.cost.name, step.batch_size, OFF.kind, work, step.ms))
    return samples


def all_samples(tables: Sequence[RuntimeTable], layouts: Layouts) -> list[Sample]:
    """Return the different passes of several tables, but for those of very many slots.

    At such batch sizes small models alone are measured, and the host's work for each slot counts.
    """
    found = dict.fromkeys(s for table in tables for s in samples_of(table, layouts))
    return [sample for sample in found if sample.batch_size <= MOST_SLOTS]


def _scan_tile(num_rows: int) -> int:
    """Return the rows that a scan computes for these."""
    fitting = next((tile for tile in SCAN_TILES if num_rows <= tile), 0)
    return fitting or -(-num_rows // SCAN_TILES[-1]) * SCAN_TILES[-1]


def _charged(num_rows: int) -> float:
    """Return the rows that a product is charged for."""
    if num_rows <= PRODUCT_TILE:
        return num_rows
    whole = -(-num_rows // PRODUCT_TILE) * PRODUCT_TILE
    return num_rows + TILE_SHARE * (whole - num_rows)


def _flops_of_row(product: Product) -> float:
    return 2 * product.number * product.rows * (product.columns + EDGE_COLUMNS)
