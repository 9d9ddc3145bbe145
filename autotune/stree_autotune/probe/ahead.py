"""Compile a probe's kernels in several processes before it measures, into Triton's disk cache.

Kernels depend on the sizes of a model, not on its weights nor on how often a block repeats: every
process runs stages of the probe on the pair cut down to one block of each kind, weights random.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import stree_core
import stree_kernels
from stree_autotune.probe.plan import ProbeConfig, ProbeStage, missing_stages
from stree_autotune.probe.run import Found, attending, measure_stage
from stree_autotune.probe.stepper import prompt_reader
from stree_autotune.probe.steps import StepSetting, free
from stree_autotune.probe.timing import Effort
from stree_autotune.store import RuntimeTable
from stree_core.drafting import Pair, Runtime, load_pair, load_with_head
from stree_core.families import Block, ModelShape, Part, Weight
from stree_core.memory import GIB, free_bytes
from stree_core.models import ModelSource

_LEAST = Effort(1, 1, 0.0)
_FEWEST_SIZES = 2
"""With the passes of fewer batch sizes to compile there is little to do side by side."""

_EXTRA_BYTES = 4 * GIB
"""What a process takes beside its weights: CUDA's context, logits and caches."""

_LOWEST_PRIORITY = 19


@dataclass(frozen=True, slots=True)
class Job:
    """What one process compiles: stages of a probe of a pair that is cut down."""

    target: ModelSource
    draft: ModelSource
    runtime: Runtime
    config: ProbeConfig
    stages: tuple[ProbeStage, ...]


class _Outcome(NamedTuple):
    """The stages that a process compiled, and why it did no more; empty when it did all."""

    stages: list[ProbeStage]
    failure: str


def compile_ahead(
    pair: Pair, config: ProbeConfig, known: RuntimeTable | None, progress: Callable[[str], None]
) -> None:
    """Compile what a probe beyond `known` needs in processes side by side, where that pays.

    Stages that an earlier call compiled are marked in Triton's cache, and left out. Whatever fails
    is said in a line: the probe compiles what is missing as it measures.
    """
    if pair.device.type != "cuda" or pair.target.backend.name != "triton":
        return
    job, stages = cut_down(pair, config), missing_stages(config, attending(pair), known)
    marks = _marks(job, stages, _code_digest(pair.device))
    new = [stage for stage in stages if not marks[stage].exists()]
    num_sizes = sum(stage.kind == "passes" for stage in new)
    free(pair.device)
    most = _most_processes(job, pair.device)
    if num_sizes < _FEWEST_SIZES or most < 2:
        return
    jobs = [replace(job, stages=share) for share in shares(new, most)]
    progress(f"compiling kernels for {num_sizes} batch sizes, {len(jobs)} processes")
    with ThreadPoolExecutor(len(jobs)) as threads:
        outcomes = list(threads.map(_run, jobs))
    _mark(marks[stage] for outcome in outcomes for stage in outcome.stages)
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    if failures:
        progress(
            f"{len(failures)} of {len(jobs)} processes compiled in part ({failures[0]}); the probe "
            "compiles the rest"
        )


def cut_down(pair: Pair, config: ProbeConfig) -> Job:
    """Return a job without stages: of a pair's sizes, with random weights."""
    target, draft = (
        replace(source, shape=one_of_each(source.shape), folder=None)
        for source in (pair.target_source, pair.draft_source)
    )
    dtype = str(pair.target.dtype).removeprefix("torch.")
    runtime = Runtime(pair.device.type, dtype, pair.target.backend.name)
    return Job(target, draft, runtime, config, ())


def one_of_each(shape: ModelShape) -> ModelShape:
    """Return a shape with the first block of each kind, in order; so its MTP head."""
    kinds: dict[object, Block] = {}
    for block in shape.blocks:
        kinds.setdefault(_kind(block, shape), block)
    mtp = None if shape.mtp is None else one_of_each(shape.mtp)
    return replace(shape, blocks=tuple(kinds.values()), mtp=mtp)


def _kind(block: Block, shape: ModelShape) -> object:
    """Return what a block's kernels depend on: mixers, sizes, and which weights are in FP8."""

    def stored(weight: Weight) -> object:
        if shape.fp8 is None or weight.adapters:
            return weight.shape
        pieces = weight.split(shape.fp8.scales) or (weight,)
        return tuple((piece.shape, shape.fp8.holds(piece.keys)) for piece in pieces)

    def of(part: Part) -> object:
        return part.mixer, tuple((name, stored(weight)) for name, weight in part.weights.items())

    shared = block.shared
    beside = shared and (of(shared.attention), of(shared.mlp), stored(shared.linear))
    return tuple(map(of, block.parts)), beside


def shares(stages: Sequence[ProbeStage], most: int) -> list[tuple[ProbeStage, ...]]:
    """Return the stages of at most so many processes, about as many points each.

    Those of one batch size stay together, in order: steps run the kernels of their passes.
    """
    groups: dict[int, list[ProbeStage]] = {}
    for stage in stages:
        groups.setdefault(stage.batch_size, []).append(stage)
    found: list[list[ProbeStage]] = [[] for _ in range(min(most, len(groups)))]
    for group in sorted(groups.values(), key=_num_points, reverse=True):
        min(found, key=_num_points).extend(group)
    return [tuple(share) for share in found]


def _num_points(stages: Sequence[ProbeStage]) -> int:
    return sum(len(stage.keys) for stage in stages)


def _most_processes(job: Job, device: torch.device) -> int:
    """Return for how many processes there are processors, one left over, and memory."""
    element = getattr(torch, job.runtime.dtype).itemsize
    weights = sum(source.shape.held_bytes(element) for source in (job.target, job.draft))
    by_memory = free_bytes(device) // (weights + _EXTRA_BYTES)
    return min(len(os.sched_getaffinity(0)) - 1, by_memory)


def _run(job: Job) -> _Outcome:
    """Run one process to its end."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(_work, job).result()
    except (BrokenProcessPool, OSError) as err:
        return _Outcome([], str(err))


def _work(job: Job) -> _Outcome:
    """Compile a job in a process of its own."""
    os.nice(_LOWEST_PRIORITY)
    torch.set_num_threads(1)
    done: list[ProbeStage] = []
    try:
        for number in compiled(job):
            done.append(job.stages[number])
    # Whatever fails here, the probe meets again and says.
    except Exception as err:
        return _Outcome(done, str(err) or type(err).__name__)
    return _Outcome(done, "")


def compiled(job: Job) -> Iterable[int]:
    """Run each stage of a job with the least effort; yield its number behind it."""
    if job.draft.shape.join is None:
        pair = load_pair(job.target, job.draft, job.runtime)
    else:
        pair = load_with_head(job.target, job.runtime)
    for number, stage in enumerate(job.stages):
        # In the probe every stage follows a prompt; one process compiles its kernels.
        settle = prompt_reader(pair.target) if stage.kind == "rules" else _nothing
        settle()
        setting = StepSetting(stage.batch_size, job.config.context, _LEAST, 0.0, _nothing)
        measure_stage(pair, job.config, stage, setting, Found())
        yield number


def _nothing() -> None:
    pass


def _marks(job: Job, stages: Iterable[ProbeStage], code: str) -> dict[ProbeStage, Path]:
    """Return the files that say that a stage's kernels are in Triton's cache: they go with it."""
    from triton import knobs

    folder = Path(knobs.cache.dir) / "stree-compiled"
    digests = [source.shape.digest for source in (job.target, job.draft)]
    setting = (*digests, job.runtime, job.config.context, code)
    return {
        stage: folder / hashlib.sha256(repr((*setting, *stage)).encode()).hexdigest()
        for stage in stages
    }


def _mark(marks: Iterable[Path]) -> None:
    for mark in marks:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _code_digest(device: torch.device) -> str:
    """Return a hash of what compiled kernels depend on beside sizes: code, Triton, GPU."""
    import triton

    found = hashlib.sha256()
    gpu = torch.cuda.get_device_capability(device)
    found.update(repr((triton.__version__, torch.__version__, gpu)).encode())
    for package in (stree_core, stree_kernels):
        (folder,) = package.__path__
        for file in sorted(Path(folder).rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()
