"""Measure the passes of one model alone: what verifying a tree would cost, before any draft."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from stree_autotune.probe.plan import ProbeConfig, even_tree
from stree_autotune.probe.run import BUDGETS, rounded
from stree_autotune.probe.stepper import occupy, prompt_reader
from stree_autotune.probe.steps import StepSetting, free, time_steps
from stree_autotune.probe.timing import Work, captured, time_interleaved
from stree_autotune.store import StepRule
from stree_core.drafting import ModelRows, make_plan
from stree_core.engine import GreedyRule, make_speculators
from stree_core.models import Model
from stree_core.tree import OFF

PASS_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class PassTime(NamedTuple):
    """A pass over `num_tokens` rows of each slot: median and spread; `step_ms` with one row only.

    `step_ms` is the wall time of a whole step without speculation, host included.
    """

    batch_size: int
    num_tokens: int
    ms: float
    spread_ms: float
    step_ms: float | None


def probe_model(
    model: Model, config: ProbeConfig, progress: Callable[[str], None]
) -> Iterator[list[PassTime]]:
    """Time forward passes with LM head and argmax, batch size by batch size, and whole steps."""
    effort, settle = BUDGETS[config.effort].effort, prompt_reader(model)
    for batch_size in config.batch_sizes:
        setting = StepSetting(batch_size, config.context, effort, math.inf, settle)
        rows = _passes(model, config, setting)
        (step,) = time_steps(model, None, {OFF.kind: OFF}, StepRule.GREEDY, setting).steps
        progress(f"batch size {batch_size}: one token {step.ms:.3f} ms")
        step_ms = rounded(step.ms)
        yield [row._replace(step_ms=step_ms) if row.num_tokens == 1 else row for row in rows]


def _passes(model: Model, config: ProbeConfig, setting: StepSetting) -> list[PassTime]:
    batch_size = setting.batch_size
    largest = config.max_nodes + 1
    sizes = sorted({size for size in PASS_SIZES if size <= largest})
    device = model.device
    candidates: dict[int, Work] = {}
    with torch.inference_mode():
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        no_draft = ModelRows(frozenset())
        plans = {
            size: make_plan(even_tree(size - 1, 2), model.conv_widths, no_draft, device)
            for size in sizes
        }
        largest_plan = [plans[sizes[-1]]]
        (shared,) = make_speculators(model, None, largest_plan, batch_size, config.context)
        occupy(shared, config.context // 2)
        for size, plan in plans.items():
            bound = dataclasses.replace(shared, plan=plan, rule=GreedyRule(plan, model.backend))
            candidates[size] = captured(bound.verify, device, pool)
        setting.settle()
        timings = time_interleaved(candidates, device, setting.effort)
    free(device)
    return [
        PassTime(batch_size, size, rounded(timing.ms), rounded(timing.spread_ms), None)
        for size, timing in timings.items()
    ]
