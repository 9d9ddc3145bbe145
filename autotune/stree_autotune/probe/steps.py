"""Time whole steps as sessions run them: all trees of a rule on one engine, in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from stree_autotune.probe.stepper import SteadyEngine, Stepper
from stree_autotune.probe.timing import Effort, Timing, Work, time_interleaved
from stree_autotune.store import Point, Step, StepNoRoom, StepRule
from stree_core.drafting import Draft
from stree_core.engine import EngineConfig, SamplingParams, SamplingSupport
from stree_core.errors import NotEnoughMemory
from stree_core.models import Model
from stree_core.tree import Tree


class StepTimes(NamedTuple):
    """What was measured of whole steps, and what did not fit; `host` is None without a GPU."""

    steps: list[Step]
    no_room: list[StepNoRoom]
    host: Point | None


@dataclass(frozen=True, slots=True)
class StepSetting:
    """Slots, positions of each, how long to measure, and what runs right before it."""

    batch_size: int
    context: int
    effort: Effort
    until: float
    settle: Callable[[], None]


def time_steps(
    target: Model, draft: Draft | None, trees: Mapping[str, Tree], rule: StepRule,
    setting: StepSetting,
) -> StepTimes:  # fmt: skip
    """Time complete steps with each tree, host included.

    Trees with nodes share one engine, as they do in a session that changes between them; off has
    one without a draft. Trees that do not fit beside the others are left out, largest first.
    """
    off = {name: tree for name, tree in trees.items() if not tree.num_nodes}
    speculating = {name: tree for name, tree in trees.items() if tree.num_nodes}
    steps: list[Step] = []
    no_room: list[StepNoRoom] = []
    host: Point | None = None
    for group in (off, speculating):
        while group:
            try:
                rows, worked = _time_group(target, draft, group, rule, setting)
            except NotEnoughMemory:
                largest = max(group, key=lambda name: group[name].num_tokens)
                del group[largest]
                no_room.append(StepNoRoom(setting.batch_size, largest, rule))
                continue
            finally:
                free(target.device)
            steps += rows
            if worked is not None and rule == StepRule.GREEDY:
                host = Point("host", setting.batch_size, 1, worked.ms, worked.spread_ms)
            break
    return StepTimes(steps, no_room, host)


def _time_group(
    target: Model, draft: Draft | None, trees: Mapping[str, Tree], rule: StepRule,
    setting: StepSetting,
) -> tuple[list[Step], Timing | None]:  # fmt: skip
    """Return the steps of one engine, and what the host works for one."""
    params, support = SamplingParams.of(rule.sampling), SamplingSupport.of(rule.sampling)
    config = EngineConfig(setting.batch_size, setting.context, sampling=support)
    stepper = Stepper(SteadyEngine(target, draft, list(trees.values()), config), params)
    works: dict[str, Work] = {
        tree: partial(stepper.step, which) for which, tree in enumerate(trees)
    }
    setting.settle()
    timings = time_interleaved(works, target.device, setting.effort, wall=True, until=setting.until)
    host = stepper.host_timing() if target.device.type == "cuda" else None
    rows = [
        Step(
            setting.batch_size, tree, timings[tree].ms, timings[tree].spread_ms,
            stepper.engine.tokens_per_step(which), rule,
        )
        for which, tree in enumerate(trees)
    ]  # fmt: skip
    return rows, host


def free(device: torch.device) -> None:
    """Give back what the last measurements held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
