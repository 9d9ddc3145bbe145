"""What a probe measures: sizes, trees and rules, and what of it a table lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from stree_autotune.cost import PRODUCT_TILE, ROW_EDGES
from stree_autotune.store import STORES, Reader, RuntimeTable, StepRule, Work
from stree_core.tree import DEFAULT_TREE, MAX_NODES, OFF, Tree

_VERIFY_SIZES = (
    *(2, 3, 4, 5, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65),
    *(80, 96, 97, 112, 127, 128, 129, 160, 192, 193, 224, 240, 256),
)
"""Both sides of every size at which a slot's tiles are filled up, and some in between."""

_CLOSEST = 4
"""Tokens between sizes that are timed because all slots' rows fill a matrix product's tiles."""

_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_DRAFT_ROWS = (3, 8, 16, 17, 32, 33, 64, 65, 96, 128, 129, 192, 193, 256)
_CONTEXT_SIZES = (1, 2, 5, 9, 17, 33, 65, 129, 256)
_SLOTS_PER_FLUSH = 8
"""With two accepted tokens about one slot in so many stores its state in a step."""

_EVEN = (
    *((7, 4), (8, 3), (15, 4), (16, 4), (24, 3), (31, 8), (32, 8), (48, 6), (63, 16), (64, 16)),
    *((128, 16), (255, 32)),
)
"""Nodes and width of even trees. With the root they are on both sides of the edges in rows at every
batch size that is a power of two."""

_COMBS = ((5, 3), (8, 2), (8, 7))
_FEW = {
    OFF.kind, "chain-1", "chain-2", "chain-4", "chain-8", "even-8x3", "even-32x8", "even-64x16",
    "even-128x16", "even-255x32", "comb-5x3",
}  # fmt: skip
"""Trees that a few whole steps are of."""

_PROMPT_TOKENS, _MOST_PROMPT_ROWS = (64, 256, 1000, 4000), 8192
"""Lengths of prompts, a little less than a piece and than four; tokens side by side at most."""

_MOST_RULE_ROWS = 4096
_TRIES_AT_MOST = 1024

SAMPLED = (StepRule.NAIVE, StepRule.MSS, StepRule.MSS_TRUNCATED)
"""Rules whose whole steps are timed; a truncated distribution costs naive what it costs MSS."""
_FEW_SAMPLED = (StepRule.MSS, StepRule.MSS_TRUNCATED)
"""Those that draw in every draft pass. What a draw takes between two passes is more than what it
takes by itself, so even a few whole steps hold some of them."""

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """What to measure: `max_nodes` bounds the trees, `context` the positions of a slot.

    Without `sampled` greedy decoding alone is measured. With `few_steps` whole steps are those of
    half of the trees, and of two sampling rules.
    """

    gpu: str
    context: int = 1024
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    max_nodes: int = 64
    effort: str = "quick"
    sampled: bool = True
    few_steps: bool = False


class Attending(NamedTuple):
    """Which models of a pair keep keys and values, so that their passes depend on the context."""

    target: bool
    draft: bool


class ProbeStage(NamedTuple):
    """A part of a probe that is written down as a whole: which keys of which kind, at one size.

    Keys are what makes a point of a table unique; `batch_size` is 0 for rules, which know none.
    """

    kind: Literal["passes", "steps", "rules", "prompts"]
    batch_size: int
    keys: tuple[Key, ...]

    @property
    def weight(self) -> float:
        """About how long it takes beside the others: host time, and device time by batch size."""
        steps = 0.5 if len(self.keys) > 1 else 0.1
        each = {"passes": 1.0, "steps": steps, "rules": 1.0, "prompts": 0.3}[self.kind]
        return each * (1 + self.batch_size / 12)

    def __str__(self) -> str:
        if self.kind == "rules":
            return "rules"
        if self.kind == "prompts":
            return f"prompts at batch size {self.batch_size}"
        what = "passes" if self.kind == "passes" else f"whole {self.keys[0][2]} steps"
        return f"{what} at batch size {self.batch_size}"


def missing_stages(
    config: ProbeConfig, attending: Attending, known: RuntimeTable | None
) -> list[ProbeStage]:
    """Return what a probe with this setting has to measure beyond `known`, in order."""
    done = measured_keys(known) if known else set()
    stages = []
    for stage in _stages(config, attending):
        keys = tuple(key for key in stage.keys if (stage.kind, *key) not in done)
        if keys:
            stages.append(stage._replace(keys=keys))
    return stages


def measured_keys(table: RuntimeTable) -> set[Key]:
    """Return the kind and key of all that a table holds, what did not fit included."""
    keys: set[Key] = {("passes", *point[:3]) for point in table.points}
    keys |= {("rules", *point[:2]) for point in table.rules}
    keys |= {("steps", step.batch_size, step.tree, step.rule) for step in table.steps}
    keys |= {("passes", *row) for row in table.no_room}
    keys |= {("steps", *row) for row in table.steps_no_room}
    keys |= {("prompts", *prompt[:3]) for prompt in table.prompts}
    return keys


def step_trees(max_nodes: int) -> dict[str, Tree]:
    """Return the trees whose whole steps are timed: off, and from one node to `max_nodes`."""
    trees: dict[str, Tree] = {OFF.kind: OFF}
    trees |= {f"chain-{k}": Tree.chain(k) for k in (1, 2, 3, 4, 6, 8)}
    trees["default-12"] = DEFAULT_TREE
    trees |= {f"even-{n}x{width}": even_tree(n, width) for n, width in _EVEN}
    trees |= {f"comb-{depth}x{width}": comb_tree(depth, width) for depth, width in _COMBS}
    return {name: tree for name, tree in trees.items() if tree.num_nodes <= max_nodes}


def even_tree(num_nodes: int, width: int) -> Tree:
    """Return a tree of chains side by side: `width` children of the root, one below each other."""
    paths = [(i % width, *[0] * (i // width)) for i in range(num_nodes)]
    return Tree.from_paths(paths)


def comb_tree(depth: int, width: int) -> Tree:
    """Return a chain of first choices with `width` - 1 siblings of every node."""
    return Tree.from_paths([(*[0] * level, i) for level in range(depth) for i in range(width)])


def sampled_trees(max_nodes: int, *, few: bool = False) -> list[str]:
    """Return the names of the trees whose whole steps are timed with sampling as well.

    A few tell apart what rules add to a step, to a level and to siblings.
    """
    names = [OFF.kind, "chain-1", "chain-4", "even-7x4", *([] if few else ["default-12"])]
    return [name for name in names if name in step_trees(max_nodes)]


def _stages(config: ProbeConfig, attending: Attending) -> Iterator[ProbeStage]:
    """Yield every stage of a probe, small batch sizes first; rules serve all of them.

    Prompts, and off at the batch sizes in between, come last: a table is of use without them.
    """
    sizes = sorted(set(config.batch_sizes))
    yield ProbeStage("rules", 0, tuple(_rule_keys(config)))
    for batch_size in sizes:
        passes = _pass_keys(config, batch_size, attending)
        yield ProbeStage("passes", batch_size, tuple(passes))
        few = config.few_steps
        trees = [name for name in step_trees(config.max_nodes) if not few or name in _FEW]
        yield ProbeStage(
            "steps", batch_size, tuple((batch_size, name, StepRule.GREEDY) for name in trees)
        )
        names = sampled_trees(config.max_nodes, few=few)
        for rule in (_FEW_SAMPLED if few else SAMPLED) if config.sampled else ():
            yield ProbeStage("steps", batch_size, tuple((batch_size, name, rule) for name in names))
    for batch_size in sizes:
        if keys := tuple(_prompt_keys(config, batch_size)):
            yield ProbeStage("prompts", batch_size, keys)
    for batch_size in off_sizes(sizes):
        yield ProbeStage("steps", batch_size, ((batch_size, OFF.kind, StepRule.GREEDY),))


def _pass_keys(config: ProbeConfig, batch_size: int, attending: Attending) -> Iterator[Key]:
    largest = config.max_nodes + 1
    sizes = {*_VERIFY_SIZES, *_product_edges(batch_size)}
    for size in sorted({size for size in sizes if size <= largest} | {largest}):
        yield "verify", batch_size, size
    widest = max(1, config.max_nodes // 2)
    for width in sorted({width for width in _WIDTHS if width <= widest} | {widest}):
        yield "draft", batch_size, width
    if config.max_nodes > 1:
        for rows in sorted({rows for rows in _DRAFT_ROWS if rows <= largest} | {largest}):
            yield "draft_rows", batch_size, rows
    for term in ("draft_root", "target_path", "draft_path"):
        yield term, batch_size, 1
    for term in STORES:
        for flushing in sorted({1, max(1, batch_size // _SLOTS_PER_FLUSH), batch_size}):
            yield term, batch_size, flushing
    if attending.target:
        for size in sorted({s for s in _CONTEXT_SIZES if s <= largest} | {largest}):
            yield "context", batch_size, size
    if attending.draft:
        yield "draft_context", batch_size, 1


def _prompt_keys(config: ProbeConfig, batch_size: int) -> Iterator[Key]:
    for reader in get_args(Reader):
        for length in _PROMPT_TOKENS:
            # One position is left for the first token.
            if length < config.context and batch_size * length <= _MOST_PROMPT_ROWS:
                yield reader, batch_size, length


def _product_edges(batch_size: int) -> Iterator[int]:
    """Yield both sides of sizes at which products of all slots' rows change their kernel or tiles.

    From PRODUCT_TILE slots on every size fills whole tiles.
    """
    for edge in ROW_EDGES:
        yield from (size for size in (edge // batch_size, edge // batch_size + 1) if size > 1)
    if batch_size >= PRODUCT_TILE:
        return
    period = max(_CLOSEST, PRODUCT_TILE // batch_size)
    for full in range(period, MAX_NODES + 1, period):
        yield from (full, full + 1)


def off_sizes(batch_sizes: Sequence[int]) -> list[int]:
    """Return further batch sizes at which off is timed: both sides of every edge between the asked.

    A step of off has a row a slot, so that its kernels change with the batch size alone.
    """
    first, last = min(batch_sizes), max(batch_sizes)
    sides = {side for edge in ROW_EDGES for side in (edge, edge + 1)}
    return sorted(size for size in sides - {*batch_sizes} if first < size < last)


def _rule_keys(config: ProbeConfig) -> Iterator[Key]:
    """Yield every work at powers of two of rows, up to what the largest step of the probe has."""
    most = max(config.batch_sizes) * (config.max_nodes + 1)
    works: tuple[Work, ...] = get_args(Work) if config.sampled else ("branch",)
    for work in works:
        limit = _TRIES_AT_MOST if work in ("try", "tries", "branch") else _MOST_RULE_ROWS
        # Behind one row come 2, 8, 32, ...: between them times rise evenly.
        rows = 1
        while rows < 2 * most and rows <= limit:
            yield work, rows
            rows *= 4 if rows > 1 else 2
