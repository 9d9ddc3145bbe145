"""The one way to time device work: captured, interleaved, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

FEWEST_WALL_CALLS = 4
Work = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: rounds per candidate, and seconds that one candidate may take."""

    min_rounds: int
    max_rounds: int
    seconds: float


EFFORTS = {"quick": Effort(5, 30, 0.1), "full": Effort(9, 100, 0.5)}


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and standard deviation of repeated calls, in ms."""

    ms: float
    spread_ms: float


def captured(work: Work, device: torch.device, pool: Any = None) -> Work:
    """Return `work` as one CUDA graph replay; on the CPU return it as it is.

    `work` runs twice first, so that compilation and allocation stay out of the graph.
    """
    if device.type != "cuda":
        return work
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()

    def replay(_keep_alive: Work = work) -> None:
        # The graph reads the tensors that `work` holds, so they must live as long as it does.
        graph.replay()

    return replay


def time_interleaved(
    candidates: dict[Key, Work], device: torch.device, effort: Effort, *, wall: bool = False
) -> dict[Key, Timing]:
    """Time candidates in turns, so that a drift of the machine touches all of them alike.

    On CUDA one measurement is several calls back to back between two events, which hides the
    launch of a graph behind the one before, as in a running decoder; caches stay as such a decoder
    leaves them. On the CPU, or with `wall` for calls that bring a result to the host, it is the
    wall time per call.
    """
    on_gpu = device.type == "cuda"
    measure = _measure_cuda if on_gpu and not wall else _measure_wall
    # A call on a GPU brings the result of the one before: a few in a row are needed to be steady.
    fewest = FEWEST_WALL_CALLS if on_gpu and wall else 1
    calls = {
        name: _calls_per_measurement(work, measure, fewest) for name, work in candidates.items()
    }
    times: dict[Key, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    for round_number in range(effort.max_rounds):
        for name, work in candidates.items():
            if round_number >= effort.min_rounds and spent[name] > effort.seconds:
                continue
            # Unmeasured at first: the call after another candidate's is a tenth slower.
            for _ in range(fewest):
                work()
            ms = measure(work, calls[name])
            times[name].append(ms)
            spent[name] += ms * calls[name] / 1e3
    return {
        name: Timing(statistics.median(values), statistics.stdev(values))
        for name, values in times.items()
    }


def _calls_per_measurement(work: Work, measure: Callable[[Work, int], float], fewest: int) -> int:
    """Return how many calls make one measurement long against the clock's resolution."""
    work()
    ms = measure(work, fewest)
    return max(fewest, min(20, round(2.0 / max(ms, 1e-3))))


def _measure_cuda(work: Work, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def _measure_wall(work: Work, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return 1e3 * (time.perf_counter() - start) / calls
