"""How all benchmarks time: graphs of many calls on rotating buffers, candidates in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from stree_autotune.probe.timing import Effort, captured, time_interleaved

Launch = Callable[[int], object]

EFFORT = Effort(min_rounds=9, max_rounds=25, seconds=0.15)
MIN_CALLS = 20


@dataclass(frozen=True, slots=True)
class Measured:
    """Median of the microseconds of one call, and their standard deviation over the median."""

    us: float
    spread: float


def rotation(bytes_per_call: int, device: torch.device) -> int:
    """Return how many buffers calls take turns on, so that no call finds its data in L2.

    Between two uses of a buffer at least twice the L2 cache passes through it.
    """
    l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 + math.ceil(2 * l2_bytes / bytes_per_call)


def num_calls(num_buffers: int, num_phases: int) -> int:
    """Return the calls of one graph: every phase equally often, every buffer at least once."""
    return num_phases * math.ceil(max(num_buffers, MIN_CALLS) / num_phases)


def time_calls(
    candidates: Mapping[str, Launch],
    calls: int | Mapping[str, int],
    device: torch.device,
    effort: Effort = EFFORT,
) -> dict[str, Measured]:
    """Time candidates whose `launch(i)` starts the work of call i on that call's buffers.

    On CUDA the `calls` calls of a candidate, or its own number of them, are one graph, and the
    graphs are replayed in turns. A candidate's first two runs, before the capture, compile and
    allocate.
    """
    numbers = dict.fromkeys(candidates, calls) if isinstance(calls, int) else calls
    # One pool: no graph reads what another has left.
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    graphs = {
        name: captured(partial(_run, launch, numbers[name]), device, pool)
        for name, launch in candidates.items()
    }
    timings = time_interleaved(graphs, device, effort)
    return {
        name: Measured(1e3 * timing.ms / numbers[name], timing.spread_ms / timing.ms)
        for name, timing in timings.items()
    }


def _run(launch: Launch, calls: int) -> None:
    for call in range(calls):
        launch(call)


def copy_bandwidth(device: torch.device, num_bytes: int = 1 << 30) -> float:
    """Return the bytes per second, read and written, of a large elementwise product.

    A copy by the driver reaches less of the memory's bandwidth.
    """
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    launches = {"scale": lambda _: torch.mul(source, 2.0, out=target)}
    measured = time_calls(launches, 4, device)["scale"]
    return 2 * num_bytes / (1e-6 * measured.us)
