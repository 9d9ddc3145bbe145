"""Time the passes of one batch size: verify, draft, what flushing states and context add."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from stree_autotune.cost import FEWEST_ROWS, PER_TOKENS
from stree_autotune.probe.plan import Key, even_tree
from stree_autotune.probe.stepper import occupy
from stree_autotune.probe.steps import StepSetting, free
from stree_autotune.probe.timing import Timing, Work, captured, time_interleaved
from stree_autotune.store import STORES, TIMED_PATH, NoRoom, Point
from stree_core.drafting import Pair, make_plan
from stree_core.engine import GreedyRule, Speculator, make_speculators
from stree_core.errors import NotEnoughMemory
from stree_core.tree import Tree
from stree_kernels.launch.rows import MAX_BUFFERED

_FEW_BUFFERED = 5
_TYPICAL_DEPTH = 8
_FEW_TOKENS = 16
_LONG_PATH, _PATH_ROWS = 8, 4
_SHORT_CONTEXT = 32

_Name = tuple[str, int]
"""A term and a size, or what such a term is compared with."""


def time_passes(
    pair: Pair, keys: Sequence[Key], setting: StepSetting
) -> tuple[list[Point], list[NoRoom]]:
    """Time what `keys` (term, batch size, size) name, all in turns; and say what did not fit."""
    passes = _Passes(pair, setting)
    with torch.inference_mode():
        try:
            passes.prepare(keys)
            setting.settle()
            timings = time_interleaved(
                passes.works, pair.device, setting.effort, until=setting.until
            )
        finally:
            missing, differences = passes.missing, passes.differences
            passes.close()
            free(pair.device)
    measured = [key for key in keys if (key[0], key[2]) not in missing]
    points = [_point(key, timings, differences) for key in measured]
    no_room = [
        NoRoom(term, batch_size, size)
        for term, batch_size, size in sorted(keys)
        if (term, size) in missing
    ]
    return points, no_room


def _point(
    key: Key, timings: Mapping[_Name, Timing], differences: Mapping[_Name, tuple[_Name, float]]
) -> Point:
    """Turn a timing into a point, or what it is more than another's, which is at least 0."""
    term, batch_size, size = key
    found = timings[term, size]
    ms = found.ms
    if (term, size) in differences:
        less, scale = differences[term, size]
        ms = max(0.0, ms - timings[less].ms) * scale
    return Point(term, batch_size, size, ms, found.spread_ms)


class _State(NamedTuple):
    """What a pass finds: committed tokens and tokens accepted last of every slot.

    `flushing` slots, spread evenly, have so many buffered rows that they store their states.
    """

    committed: int
    accepted: int = TIMED_PATH
    flushing: int = 0


class _Passes:
    """Captured passes on one set of caches.

    `differences` are terms that are what their pass takes longer than another, times a number.
    """

    def __init__(self, pair: Pair, setting: StepSetting) -> None:
        self.works: dict[_Name, Work] = {}
        self.missing: set[_Name] = set()
        self.differences: dict[_Name, tuple[_Name, float]] = {}
        self._pair = pair
        self._setting = setting
        on_gpu = pair.device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if on_gpu else None
        self._shared: Speculator | None = None

    def close(self) -> None:
        """Let go of graphs and caches."""
        self.works.clear()
        self._shared = None

    def prepare(self, keys: Sequence[Key]) -> None:
        """Capture all passes, smallest first; what does not fit is noted in `missing`."""
        passes = sorted(((term, size) for term, _, size in keys), key=_rows_needed)
        while passes and self._shared is None:
            try:
                self._shared = self._speculator([_covering(passes), *_chains(passes)])
            except (NotEnoughMemory, torch.OutOfMemoryError):
                self.missing.add(passes.pop())
                free(self._pair.device)
        for term, size in passes:
            try:
                self._prepare(term, size)
            except torch.OutOfMemoryError:
                self.missing.add((term, size))
                for name in (term, f"{term} without"):
                    self.works.pop((name, size), None)
                free(self._pair.device)

    def _prepare(self, term: str, size: int) -> None:
        name, usual = (term, size), _State(self._setting.context // 2)
        if term == "verify":
            self._add(name, self._rebound(_verified(size)).verify, usual)
        elif term == "draft_root":
            self._add(name, self._root(), usual)
        elif term == "draft":
            level = self._rebound(even_tree(2 * size, size))
            self._add(name, partial(level.draft_level, level.plan.levels[1]), usual)
        elif term == "draft_rows":
            fewest = term, FEWEST_ROWS + 1
            for each in (fewest, name):
                if each not in self.works:
                    self._add(each, self._last_level(each[1]), usual)
            self.differences[name] = fewest, 1.0
        elif term in ("context", "draft_context"):
            few = _short_context(self._setting.context)
            verified = term == "context"
            work = self._rebound(_verified(size)).verify if verified else self._root()
            scale = PER_TOKENS / max(1, usual.committed - few)
            self._add_difference(name, work, usual, usual._replace(committed=few), scale)
        elif term in ("target_path", "draft_path"):
            work = self._few_verified() if term == "target_path" else self._last_level(_PATH_ROWS)
            more = usual._replace(accepted=_LONG_PATH)
            self._add_difference(name, work, more, usual, 1 / (_LONG_PATH - TIMED_PATH))
        else:
            work = self._few_verified() if term == "target_store" else self._root()
            self._add_difference(name, work, usual._replace(flushing=size), usual, 1.0)

    def _add_difference(
        self, name: _Name, work: Callable[[], object], state: _State, less: _State, scale: float
    ) -> None:
        """Capture a pass in two states, for what it takes longer in the first."""
        without = f"{name[0]} without", name[1]
        self._add(name, work, state)
        self._add(without, work, less)
        self.differences[name] = without, scale

    def _add(self, name: _Name, work: Callable[[], object], state: _State) -> None:
        """Capture a pass that finds every slot in this state.

        Setting it is part of the graph: it takes as long in every pass, next to nothing.
        """
        assert self._shared is not None
        cache = [self._shared.target_cache, self._shared.draft_cache]
        buffered_B = _buffered_rows(self._setting.batch_size, state.flushing).to(self._pair.device)

        def run() -> None:
            for each in cache:
                assert each is not None
                each.pending.num_buffered_B.copy_(buffered_B)
                each.pending.length_B.fill_(state.accepted)
                each.committed_B.fill_(state.committed)
            work()

        self.works[name] = captured(run, self._pair.device, self._pool)

    def _few_verified(self) -> Callable[[], object]:
        """Return a verify pass of a few tokens."""
        assert self._shared is not None
        tokens = min(_FEW_TOKENS, self._shared.plan.tree.num_tokens)
        return self._rebound(_verified(tokens)).verify

    def _root(self) -> Callable[[], object]:
        root = self._rebound(Tree.chain(1))
        return partial(root.draft_level, root.plan.levels[0])

    def _last_level(self, num_rows: int) -> Callable[[], object]:
        """Return a draft pass of one node that is the last of `num_rows` rows."""
        chain = self._rebound(Tree.chain(num_rows - 1))
        return partial(chain.draft_level, chain.plan.levels[-1])

    def _speculator(self, trees: Sequence[Tree]) -> Speculator:
        """Return a speculator for the first tree, whose caches serve all of them."""
        pair, setting = self._pair, self._setting
        order = (pair.target.conv_widths, pair.draft.layout)
        plans = [make_plan(tree, *order, pair.device) for tree in trees]
        shared, *_ = make_speculators(
            pair.target, pair.draft, plans, setting.batch_size, setting.context
        )
        occupy(shared, setting.context // 2, _FEW_BUFFERED)
        return shared

    def _rebound(self, tree: Tree) -> Speculator:
        """Return a speculator for another, smaller tree on the same caches."""
        assert self._shared is not None
        target, draft = self._pair.target, self._pair.draft
        plan = make_plan(tree, target.conv_widths, draft.layout, target.device)
        rule = GreedyRule(plan, target.backend)
        return dataclasses.replace(self._shared, plan=plan, rule=rule)


def _buffered_rows(num_slots: int, num_flushing: int) -> torch.Tensor:
    """Return the buffered rows [B] (int32) of slots of which some, spread evenly, store."""
    buffered_B = torch.full((num_slots,), _FEW_BUFFERED, dtype=torch.int32)
    for number in range(num_flushing):
        buffered_B[number * num_slots // num_flushing] = MAX_BUFFERED
    return buffered_B


def _short_context(context: int) -> int:
    """Return the few committed tokens from which, up to half of `context`, its cost is measured.

    A table answers for contexts up to its own, whose slots are half full on average: more than
    half is never asked for, and from few to half the cost rises faster than beyond.
    """
    return min(_SHORT_CONTEXT, context // 4)


def _rows_needed(each: tuple[str, int]) -> int:
    """Return the nodes of a tree whose buffers hold a pass."""
    term, size = each
    if term in STORES:
        return 2
    return 2 * size if term == "draft" else max(size, 2)


def _covering(passes: Sequence[tuple[str, int]]) -> Tree:
    """Return a tree whose buffers hold every pass but those that `_chains` are for."""
    num_nodes = max(map(_rows_needed, passes))
    widest = max((size for term, size in passes if term == "draft"), default=1)
    return even_tree(num_nodes, max(2, widest, num_nodes // _TYPICAL_DEPTH))


def _chains(passes: Sequence[tuple[str, int]]) -> list[Tree]:
    """Return a chain with the most rows of a draft's block, and of a path, that a pass has."""
    most = max((size for term, size in passes if term == "draft_rows"), default=0)
    if any(term in ("target_path", "draft_path") for term, _ in passes):
        most = max(most, _LONG_PATH)
    return [Tree.chain(most - 1)] if most else []


def _verified(size: int) -> Tree:
    return even_tree(size - 1, 2)
