"""Record device work into a CUDA graph, memory left where it is.

torch.cuda.graph gives all spare memory back to the device before every capture, which the work
around it then has to ask for again: a quarter of the time in which an engine with 17 trees started
(docs/log.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SCARCE = 1 / 8
"""Share of a device's memory below which spare memory goes back to it before a capture."""


@contextmanager
def capture(device: torch.device, pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """Record what is launched within into the graph that this yields, with memory of `pool`.

    Kernels that have not run before are loaded meanwhile; what libraries allocate with their first
    call must be allocated by then.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    if free < _SCARCE * total:
        # A capture cannot take what the allocator has spare.
        torch.cuda.empty_cache()
    with torch.cuda.stream(_stream(device)):
        graph.capture_begin(pool=pool, capture_error_mode="relaxed")
        try:
            yield graph
        finally:
            graph.capture_end()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all captures: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)
