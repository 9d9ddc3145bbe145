"""Measure the terms of a step and whole steps, for one pair on this machine's device.

A probe is a list of stages; the table of all so far is handed out after each, so that what a
stopped probe has measured is kept, and the next one goes on behind it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from stree_autotune.cost import model_cost
from stree_autotune.probe.passes import time_passes
from stree_autotune.probe.plan import (
    Attending,
    Key,
    ProbeConfig,
    ProbeStage,
    missing_stages,
    step_trees,
)
from stree_autotune.probe.prompts import time_prompts
from stree_autotune.probe.rules import time_rules
from stree_autotune.probe.stepper import prompt_reader
from stree_autotune.probe.steps import StepSetting, time_steps
from stree_autotune.probe.timing import Effort
from stree_autotune.store import (
    NoRoom,
    Point,
    PromptPoint,
    RulePoint,
    RuntimeTable,
    Step,
    StepNoRoom,
    TableMeasured,
    command_line,
    git_sha,
    time_left,
    utc_now,
    versions,
)
from stree_core.drafting import Pair, device_name
from stree_core.errors import BackendUnavailable
from stree_core.profile import TreeText
from stree_core.tree import MAX_NODES

_STATE_FIELDS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
_STATE_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds for a whole probe, compilation left out, and how often to measure at all."""

    seconds: float
    effort: Effort


BUDGETS = {
    "quick": Budget(55.0, Effort(3, 12, 0.05)),
    "full": Budget(330.0, Effort(5, 60, 0.5)),
}


@dataclass(slots=True)
class Found:
    """All that was measured so far; `trees` are those of an earlier table."""

    points: list[Point] = field(default_factory=list)
    rules: list[RulePoint] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    prompts: list[PromptPoint] = field(default_factory=list)
    no_room: list[NoRoom] = field(default_factory=list)
    steps_no_room: list[StepNoRoom] = field(default_factory=list)
    trees: dict[str, TreeText] = field(default_factory=dict)


def probe(
    pair: Pair,
    config: ProbeConfig,
    progress: Callable[[str], None] | None = None,
    known: RuntimeTable | None = None,
) -> Iterator[RuntimeTable]:
    """Measure stage by stage; yield the table of all so far after each of them.

    What `known`, an earlier table of the same setting, holds is taken over from it. `progress` is
    called with a line after every stage. Every point is measured at least a few times; the budget
    decides how often beyond that. Raises BackendUnavailable when the GPU stops answering.
    """
    budget = BUDGETS[config.effort]
    found = Found()
    if known is not None:
        found = Found(
            [*known.points],
            [*known.rules],
            [*known.steps],
            [*known.prompts],
            [*known.no_room],
            [*known.steps_no_room],
            {**known.trees},
        )
    stages = missing_stages(config, attending(pair), known)
    settle = prompt_reader(pair.target)
    # Takes its memory before anything is measured to fit.
    settle()
    start, before = time.perf_counter(), _state(pair)
    for number, stage in enumerate(stages):
        until = _until(stages[number:], start + budget.seconds)
        setting = StepSetting(stage.batch_size, config.context, budget.effort, until, settle)
        try:
            measure_stage(pair, config, stage, setting, found)
        except RuntimeError as err:
            if not _is_lost(err):
                raise
            first_line = str(err).splitlines()[0]
            raise BackendUnavailable(
                f"the GPU stopped answering while measuring {stage} ({first_line}); what was "
                "measured before is kept, run the same command again once it is back"
            ) from err
        if progress is not None:
            progress(_progress_line(stages, number, time.perf_counter() - start))
        yield make_table(pair, config, found, f"{before}; {_state(pair)}")


def attending(pair: Pair) -> Attending:
    """Return which of the two models keep keys and values."""
    return Attending(pair.target.shape.has_attention, pair.draft.shape.has_attention)


def extends(known: RuntimeTable, pair: Pair, config: ProbeConfig) -> bool:
    """True when `known` has this pair, device and setting, so that rows may join it."""
    same = make_table(pair, config, Found(), "")
    measured = {"measured", "points", "rules", "trees", "steps", "prompts"}
    measured |= {"no_room", "steps_no_room"}
    return known.model_dump(exclude=measured) == same.model_dump(exclude=measured)


def make_table(pair: Pair, config: ProbeConfig, found: Found, clocks: str) -> RuntimeTable:
    """Return the table of what was found."""
    element = pair.target.dtype.itemsize
    return RuntimeTable(
        gpu=config.gpu,
        gpu_name=device_name(pair.device),
        target=model_cost(pair.target.shape, pair.target_ref, element),
        draft=model_cost(pair.draft.shape, pair.draft_ref, element),
        dtype=str(pair.target.dtype).removeprefix("torch."),
        backend="triton" if pair.target.backend.name == "triton" else "torch",
        context=config.context,
        weights="random" if pair.target_source.folder is None else "real",
        measured=_measured(config, pair.device, clocks),
        points=tuple(p._replace(ms=rounded(p.ms), spread_ms=rounded(p.spread_ms))
                     for p in found.points),
        rules=tuple(r._replace(ms=rounded(r.ms), spread_ms=rounded(r.spread_ms))
                    for r in found.rules),
        trees=found.trees | _trees(found.steps),
        steps=tuple(
            s._replace(
                ms=rounded(s.ms),
                spread_ms=rounded(s.spread_ms),
                tokens_per_step=rounded(s.tokens_per_step),
            )
            for s in found.steps
        ),
        prompts=tuple(p._replace(ms=rounded(p.ms), spread_ms=rounded(p.spread_ms))
                      for p in found.prompts),
        no_room=tuple(found.no_room),
        steps_no_room=tuple(found.steps_no_room),
    )  # fmt: skip


def _trees(steps: Sequence[Step]) -> dict[str, TreeText]:
    """Return the trees that steps name, in order."""
    named = {step.tree for step in steps}
    return {
        name: TreeText(paths=tree.paths)
        for name, tree in step_trees(MAX_NODES).items()
        if name in named
    }


def measure_stage(
    pair: Pair, config: ProbeConfig, stage: ProbeStage, setting: StepSetting, found: Found
) -> None:
    """Run one stage and add what it finds."""
    if stage.kind == "rules":
        found.rules += time_rules(pair, stage.keys, setting)
    elif stage.kind == "passes":
        points, no_room = time_passes(pair, stage.keys, setting)
        found.points += points
        found.no_room += no_room
    elif stage.kind == "prompts":
        found.prompts += time_prompts(pair, stage.keys, setting)
    else:
        _measure_steps(pair, config, stage.keys, setting, found)


def _measure_steps(
    pair: Pair, config: ProbeConfig, keys: Sequence[Key], setting: StepSetting, found: Found
) -> None:
    trees = step_trees(config.max_nodes)
    mine = {name: trees[name] for _, name, _ in keys}
    times = time_steps(pair.target, pair.draft, mine, keys[0][2], setting)
    found.steps += times.steps
    found.steps_no_room += times.no_room
    if times.host is not None and times.host[:3] not in {p[:3] for p in found.points}:
        found.points.append(times.host)


def _until(stages: Sequence[ProbeStage], end: float) -> float:
    """Return when the first of the stages should be done for all of them to be by `end`."""
    now = time.perf_counter()
    share = stages[0].weight / sum(stage.weight for stage in stages)
    return now + max(0.0, end - now) * share


def _progress_line(stages: Sequence[ProbeStage], number: int, seconds: float) -> str:
    done = sum(stage.weight for stage in stages[: number + 1])
    left = seconds * sum(stage.weight for stage in stages[number + 1 :]) / done
    return f"{stages[number]} measured; {time_left(left)}"


def _is_lost(err: RuntimeError) -> bool:
    """True for what CUDA says when a device is gone or in a state that only a restart ends."""
    if isinstance(err, torch.OutOfMemoryError):
        return False
    return any(text in str(err) for text in ("CUDA error", "CUDA driver error", "NVML"))


def _state(pair: Pair) -> str:
    if pair.device.type != "cuda":
        return "none"
    return _gpu_state(pair.device.index or 0) or "unknown"


def _measured(config: ProbeConfig, device: torch.device, clocks: str) -> TableMeasured:
    driver = f"cuda {torch.version.cuda}" if device.type == "cuda" else "none"
    return TableMeasured(
        date=utc_now(),
        git_sha=git_sha(),
        versions=versions(),
        driver=driver,
        clocks=clocks or "none",
        repeats=BUDGETS[config.effort].effort.min_rounds,
        command=command_line(),
    )


def rounded(ms: float) -> float:
    """Keep four digits: the others are noise, and files stay readable."""
    return float(f"{ms:.4g}")


def _gpu_state(index: int) -> str | None:
    """Return clocks, temperature and power by nvidia-smi; None where it does not know."""
    query = f"--query-gpu={_STATE_FIELDS}"
    command = ["nvidia-smi", query, "--format=csv,noheader", f"--id={index}"]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_STATE_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in run.stdout.strip().split(",")]
    if len(values) != len(_STATE_FIELDS.split(",")):
        return None
    sm, memory, celsius, power = values
    return f"SM {sm}, memory {memory}, {celsius} C, {power}"[:90]
