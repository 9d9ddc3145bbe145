"""Commands side by side, one a GPU at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from queue import Queue
from typing import TypeVar

import torch

T = TypeVar("T")
Environment = Mapping[str, str]


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES names, or else all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def side_by_side(
    works: Iterable[Callable[[Environment], T]], gpus: Sequence[str]
) -> Iterator[Future[T]]:
    """Run works in order, each with the variables that give it a GPU; yield those that ended.

    Without GPUs they run one after another. One that fails keeps no other from its turn; where the
    caller ends early, those that have not begun never do.
    """
    free: Queue[str] = Queue()
    for gpu in gpus or [""]:
        free.put(gpu)

    def run(work: Callable[[Environment], T]) -> T:
        gpu = free.get()
        try:
            return work({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(free.qsize()) as pool:
        futures = [pool.submit(run, work) for work in works]
        try:
            yield from as_completed(futures)
        finally:
            for future in futures:
                future.cancel()
