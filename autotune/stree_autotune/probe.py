"""Measure the terms of a step and whole steps, for one pair on this machine's device."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stree_autotune.provenance import command_line, git_sha, utc_now, versions
from stree_autotune.runtime_table import (
    ModelCost,
    Point,
    RuntimeTable,
    Step,
    TableMeasured,
    Term,
)
from stree_autotune.stepper import Stepper, occupy
from stree_autotune.timing import (
    EFFORTS,
    Effort,
    Timing,
    Work,
    captured,
    time_interleaved,
)
from stree_core.engine import Engine, EngineConfig
from stree_core.model import Model
from stree_core.pair import Pair, device_name
from stree_core.profile import ModelRef, TreeText
from stree_core.rules import GreedyRule
from stree_core.step import Speculator, make_speculators
from stree_core.tree import DEFAULT_TREE, Tree
from stree_core.tree_plan import make_plan

BRANCH_CHILDREN = 4
"""Children per node when the cost of more than one is measured."""

_TYPICAL_DEPTH = 8
_GROUP_BYTES = 8 << 30

_VERIFY_SIZES = (
    *(2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 47, 48, 49, 56, 63, 64, 65),
    *(80, 96, 97, 112, 127, 128, 129, 160, 192, 193, 224, 256),
)
_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """What to measure: `max_nodes` bounds the trees, `context` the positions of a slot."""

    gpu: str
    context: int = 1024
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    max_nodes: int = 64
    effort: str = "quick"


def probe(
    pair: Pair,
    config: ProbeConfig,
    progress: Callable[[str], None] | None = None,
    known: RuntimeTable | None = None,
) -> Iterator[RuntimeTable]:
    """Measure batch size by batch size; yield the table of all so far after each of them.

    Batch sizes in `known`, an earlier table of the same setting, are taken over from it. `progress`
    is called with a line after every batch size.
    """
    effort = EFFORTS[config.effort]
    points = list(known.points) if known else []
    steps = list(known.steps) if known else []
    trees = step_trees(config.max_nodes)
    for batch_size in missing_batch_sizes(config, known):
        points += _terms(pair, config, batch_size, effort)
        off, *timed = time_whole_steps(
            pair.target, pair.draft, config, batch_size, (Tree.chain(0), *trees.values())
        )
        points.append(Point("one_token", batch_size, 1, off.ms, off.spread_ms))
        steps += [
            Step(batch_size, name, timing.ms, timing.spread_ms)
            for name, timing in zip(trees, timed, strict=True)
        ]
        if progress is not None:
            progress(f"batch size {batch_size}: one token {off.ms:.3f} ms")
        yield _table(pair, config, points, steps)


def missing_batch_sizes(config: ProbeConfig, known: RuntimeTable | None) -> list[int]:
    """Return the batch sizes of `config` that `known` has not measured."""
    return sorted(set(config.batch_sizes) - set(known.batch_sizes if known else ()))


def extends(known: RuntimeTable, pair: Pair, config: ProbeConfig) -> bool:
    """True when `known` has this pair, device and setting, so that rows may join it."""
    same = _table(pair, config, list(known.points), list(known.steps))
    return same.model_copy(update={"measured": known.measured}) == known


def _table(pair: Pair, config: ProbeConfig, points: list[Point], steps: list[Step]) -> RuntimeTable:
    trees = step_trees(config.max_nodes)
    return RuntimeTable(
        gpu=config.gpu,
        gpu_name=device_name(pair.device),
        target=_model_cost(pair.target, pair.target_ref),
        draft=_model_cost(pair.draft, pair.draft_ref),
        dtype=str(pair.target.dtype).removeprefix("torch."),
        backend="triton" if pair.target.backend.name == "triton" else "torch",
        context=config.context,
        weights="random" if pair.target_source.folder is None else "real",
        measured=_measured(EFFORTS[config.effort], pair.device),
        points=tuple(p._replace(ms=rounded(p.ms), spread_ms=rounded(p.spread_ms)) for p in points),
        trees={name: TreeText(paths=tree.paths) for name, tree in trees.items()},
        steps=tuple(s._replace(ms=rounded(s.ms), spread_ms=rounded(s.spread_ms)) for s in steps),
    )


def step_trees(max_nodes: int) -> dict[str, Tree]:
    """Return the trees whose whole steps are timed, from one node to `max_nodes`."""
    trees = {f"chain-{k}": Tree.chain(k) for k in (1, 2, 3, 4, 6, 8)}
    trees["default-12"] = DEFAULT_TREE
    trees |= {f"even-{n}": even_tree(n, 3) for n in (8, 16, 24, 32, 48, 64, 128, 255)}
    trees |= {f"deep-{n}": even_tree(n, 1 + n // 10) for n in (12, 24, 48)}
    return {name: tree for name, tree in trees.items() if tree.num_nodes <= max_nodes}


def even_tree(num_nodes: int, width: int) -> Tree:
    """Return a tree of chains side by side: `width` children of the root, one below each other."""
    paths = [(i % width, *[0] * (i // width)) for i in range(num_nodes)]
    return Tree.from_paths(paths)


def _terms(pair: Pair, config: ProbeConfig, batch_size: int, effort: Effort) -> list[Point]:
    """Time verify, draft passes and branching of one batch size, all in turns."""
    largest = config.max_nodes + 1
    sizes = sorted({size for size in _VERIFY_SIZES if size <= largest} | {largest})
    widest = max(1, config.max_nodes // 2)
    widths = sorted({width for width in _WIDTHS if width <= widest} | {widest})
    candidates: dict[tuple[str, int], Work] = {}
    with torch.inference_mode():
        pool = torch.cuda.graph_pool_handle() if pair.device.type == "cuda" else None
        shared = _occupied(pair, config, batch_size)
        vocab_size = pair.target.shape.vocab_size

        def add(term: str, size: int, work: Work) -> None:
            candidates[term, size] = captured(work, pair.device, pool)

        for size in sizes:
            add("verify", size, _rebound(shared, even_tree(size - 1, 2)).verify)
        root = _rebound(shared, Tree.chain(1))
        add("draft_root", 1, partial(root.draft_level, root.plan.levels[0]))
        for width in widths:
            level = _rebound(shared, even_tree(2 * width, width))
            add("draft", width, partial(level.draft_level, level.plan.levels[1]))
            logits = torch.randn(width, batch_size, vocab_size, device=pair.device)
            add("one child", width, _place_children(shared, logits, 1))
            add("children", width, _place_children(shared, logits, BRANCH_CHILDREN))
        timings = time_interleaved(candidates, pair.device, effort)
    free(pair.device)
    return _as_points(timings, batch_size)


def _as_points(timings: dict[tuple[str, int], Timing], batch_size: int) -> list[Point]:
    """Turn timings into points; branching is what several children cost more than one."""
    points: list[Point] = []
    terms: tuple[Term, ...] = ("verify", "draft_root", "draft")
    for term in terms:
        points += [
            Point(term, batch_size, size, timing.ms, timing.spread_ms)
            for (name, size), timing in timings.items()
            if name == term
        ]
    for (name, size), timing in timings.items():
        if name == "children":
            extra = max(0.0, timing.ms - timings["one child", size].ms)
            points.append(Point("branch", batch_size, size, extra, timing.spread_ms))
    return points


def _occupied(pair: Pair, config: ProbeConfig, batch_size: int) -> Speculator:
    """Return a speculator on caches with room for every tree, in the middle of their context."""
    tree = even_tree(config.max_nodes, config.max_nodes // _TYPICAL_DEPTH + 1)
    plan = make_plan(tree, pair.target.conv_widths, pair.draft.conv_widths, pair.device)
    (shared,) = make_speculators(pair.target, pair.draft, [plan], batch_size, config.context)
    occupy(shared, config.context // 2)
    return shared


def _rebound(shared: Speculator, tree: Tree) -> Speculator:
    """Return a speculator for another, smaller tree on the same caches."""
    assert shared.draft is not None
    device, backend = shared.target.device, shared.target.backend
    plan = make_plan(tree, shared.target.conv_widths, shared.draft.conv_widths, device)
    return dataclasses.replace(shared, plan=plan, rule=GreedyRule(plan, backend))


def _place_children(shared: Speculator, logits_WBV: Tensor, num_children: int) -> Work:
    """Return the work that finds so many children of every node and files them."""
    width, num_slots, _ = logits_WBV.shape
    out_RB = logits_WBV.new_empty(width * num_children, num_slots, dtype=torch.int64)
    row_WC = torch.arange(len(out_RB), device=out_RB.device).view(width, num_children)
    return partial(shared.target.backend.place_top_tokens, logits_WBV, row_WC, out_RB)


def time_whole_steps(
    target: Model, draft: Model | None, config: ProbeConfig, batch_size: int, trees: Iterable[Tree]
) -> list[Timing]:
    """Time complete steps, host included: in turns, as many engines at a time as memory allows."""
    timings: dict[int, Timing] = {}
    group: dict[int, Stepper] = {}
    effort = EFFORTS[config.effort]
    waiting = list(enumerate(trees))
    while waiting:
        index, tree = waiting.pop(0)
        group[index] = Stepper(
            Engine(target, draft, tree, EngineConfig(batch_size, config.context))
        )
        num_bytes = sum(stepper.engine.cache_bytes for stepper in group.values())
        if num_bytes > _GROUP_BYTES or not waiting:
            works: dict[int, Work] = dict(group)
            timings |= time_interleaved(works, target.device, effort, wall=True)
            works.clear()
            group.clear()
            free(target.device)
    return [timings[index] for index in sorted(timings)]


def free(device: torch.device) -> None:
    """Give back what the last measurements held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _model_cost(model: Model, ref: ModelRef) -> ModelCost:
    element = model.weights.embed_VD.element_size()
    return ModelCost(
        **ref.model_dump(),
        weight_bytes=model.shape.weight_bytes(element),
        state_bytes_per_sequence=model.shape.state_bytes(element),
        kv_bytes_per_token=model.shape.kv_bytes_per_token(element),
        vocab_size=model.shape.vocab_size,
        hidden_size=model.shape.hidden_size,
    )


def _measured(effort: Effort, device: torch.device) -> TableMeasured:
    driver = "none"
    if device.type == "cuda":
        driver = f"cuda {torch.version.cuda}"
    return TableMeasured(
        date=utc_now(),
        git_sha=git_sha(),
        versions=versions(),
        driver=driver,
        repeats=effort.min_rounds,
        command=command_line(),
    )


def rounded(ms: float) -> float:
    """Keep four digits: the others are noise, and files stay readable."""
    return float(f"{ms:.4g}")
