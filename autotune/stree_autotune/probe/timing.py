"""The one way to time device work: captured, interleaved, median and spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from stree_core.models import capture

Work = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

WALL_MS, FEWEST_WALL_CALLS = 15.0, 2
"""How long, and of how many calls, a measurement by wall time is at least on a GPU."""

WALL_CYCLE, LONGEST_CYCLE_MS = 17, 100.0
"""A slot that emits one token a step stores its state every 17 steps: steps are timed for whole
cycles, so that their mean is what is timed, unless a cycle takes too long."""

_DEVICE_MS, _MOST_DEVICE_CALLS = 2.0, 20
_SETTLED_MS, _SLOW_CALL_MS, _SETTLING_CALLS = 1.0, 3.0, 4

_HEAVIER, _RECOVERY_MS = 2.0, 100.0
"""A step that follows one so many times as long runs by itself for so long first: the first tree
behind the largest came out 4 % slow (8B shape, 32 slots, H200), as if the clock had to recover."""

_SLOW, _NOISY = 1.03, 0.02


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: rounds per candidate, and seconds that one candidate may take."""

    min_rounds: int
    max_rounds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and standard deviation of repeated calls, in ms."""

    ms: float
    spread_ms: float


def captured(work: Work, device: torch.device, pool: Any = None) -> Work:
    """Return `work` as one CUDA graph replay; on the CPU return it as it is.

    `work` runs once first, so that compilation and allocation stay out of the graph.
    """
    if device.type != "cuda":
        return work
    work()
    with capture(device, pool) as graph:
        work()

    def replay(_keep_alive: Work = work) -> None:
        # The graph reads the tensors that `work` holds, so they must live as long as it does.
        graph.replay()

    return replay


def time_interleaved(
    candidates: Mapping[Key, Work],
    device: torch.device,
    effort: Effort,
    *,
    wall: bool = False,
    until: float = math.inf,
) -> dict[Key, Timing]:
    """Time candidates in turns, so that a drift of the machine touches all of them alike.

    On CUDA one measurement is several calls back to back between two events, which hides the
    launch of a graph behind the one before, as in a running decoder; caches stay as such a decoder
    leaves them: weights beyond L2 pass through it anyway. On the CPU, or with `wall` for calls that
    bring a result to the host, it is the wall time per call. Rounds in which everything was slow
    (a GPU that throttles) do not count and are run again; candidates that stay noisy get further
    rounds. The shortest comes first in a round. After `until` (time.perf_counter) nothing goes
    beyond the fewest rounds.
    """
    return _Rounds(candidates, device, effort, wall=wall).run(until)


class _Rounds(Generic[Key]):
    """Rounds over candidates, and what they took."""

    def __init__(
        self, candidates: Mapping[Key, Work], device: torch.device, effort: Effort, *, wall: bool
    ) -> None:
        on_gpu = device.type == "cuda"
        self._candidates = candidates
        self._effort = effort
        self._measure = _measure_cuda if on_gpu and not wall else _measure_wall
        self._in_a_row = on_gpu and wall
        self._expected_ms: dict[Key, float] = {}
        self._calls = {name: self._num_calls(name, work) for name, work in candidates.items()}
        self._last: Key | None = None
        self._rounds: list[dict[Key, float]] = []
        self._spent = dict.fromkeys(candidates, 0.0)

    def run(self, until: float) -> dict[Key, Timing]:
        """Measure until it is enough, and return what each candidate takes."""
        effort = self._effort
        for number in range(effort.max_rounds):
            waiting = self._waiting(number)
            late = number >= effort.min_rounds and time.perf_counter() > until
            if late or not waiting:
                break
            waiting.sort(key=lambda name: self._expected_ms[name])
            self._rounds.append({name: self._time(name) for name in waiting})
        rounds = self._counted()
        values = {name: [r[name] for r in rounds if name in r] for name in self._candidates}
        return {
            name: Timing(statistics.median(ms), statistics.stdev(ms) if len(ms) > 1 else 0.0)
            for name, ms in values.items()
        }

    def _num_calls(self, name: Key, work: Work) -> int:
        """Return how many calls make one measurement long against what disturbs it."""
        for _ in range(2 if self._in_a_row else 1):
            work()
        ms = max(1e-3, self._measure(work, 2 if self._in_a_row else 1))
        self._expected_ms[name] = ms
        if not self._in_a_row:
            return max(1, min(_MOST_DEVICE_CALLS, round(_DEVICE_MS / ms)))
        if ms * WALL_CYCLE > LONGEST_CYCLE_MS:
            return max(FEWEST_WALL_CALLS, round(2 * WALL_MS / ms))
        return WALL_CYCLE * max(1, round(WALL_MS / (ms * WALL_CYCLE)))

    def _time(self, name: Key) -> float:
        work, calls = self._candidates[name], self._calls[name]
        for _ in range(self._unmeasured(name)):
            work()
        ms = self._measure(work, calls)
        self._spent[name] += ms * calls / 1e3
        self._last = name
        return ms

    def _unmeasured(self, name: Key) -> int:
        """Return the calls before a measurement: those after another candidate's are slower."""
        ms = self._expected_ms[name]
        if not self._in_a_row:
            return int(ms < _SETTLED_MS)
        before_ms = ms if self._last is None else self._expected_ms[self._last]
        if before_ms > _HEAVIER * ms:
            return max(_SETTLING_CALLS, round(_RECOVERY_MS / ms))
        # A call brings the result of the one before, which is another candidate's at first.
        return 2 if ms > _SLOW_CALL_MS else _SETTLING_CALLS

    def _waiting(self, number: int) -> list[Key]:
        """Return whom to measure next: all at first, then who had little time or is noisy."""
        if number < self._effort.min_rounds or len(self._counted()) < self._effort.min_rounds:
            return list(self._candidates)
        return [
            name
            for name in self._candidates
            if self._spent[name] < self._effort.seconds or self._noisy(name)
        ]

    def _noisy(self, name: Key) -> bool:
        values = [r[name] for r in self._rounds if name in r]
        return statistics.stdev(values) > _NOISY * statistics.median(values)

    def _counted(self) -> list[dict[Key, float]]:
        """Return the rounds but for those in which all was slow, at most half of the whole ones."""
        whole = [r for r in self._rounds if len(r) == len(self._candidates)]
        if len(whole) < 2:
            return self._rounds
        typical = {name: statistics.median(r[name] for r in whole) for name in self._candidates}
        pace = [statistics.median(r[name] / typical[name] for name in r) for r in whole]
        limit = max(_SLOW * min(pace), statistics.median(pace))
        counted = [r for r, factor in zip(whole, pace, strict=True) if factor <= limit]
        return counted + self._rounds[len(whole) :]


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
