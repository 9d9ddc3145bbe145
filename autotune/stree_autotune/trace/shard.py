"""Which part of the work is this process's, when several run the same command side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stree_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """Process `rank` of `count`, number `local_rank` on its own machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def owns(self, batch: int) -> bool:
        """Return whether this process does batch number `batch`: they are dealt out in turns."""
        return batch % self.count == self.rank


def current_shard(environment: Mapping[str, str] = os.environ) -> Shard:
    """Return what torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; all the work without them.

    Raises ConfigError when they are not numbers that fit each other.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Shard()
    words = [environment.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    numbers = [int(word) if word.isdecimal() else -1 for word in words]
    rank, count, local_rank = numbers
    if not 0 <= rank < count or local_rank < 0:
        raise ConfigError(
            "RANK counts from 0 up to before WORLD_SIZE and LOCAL_RANK from 0, got "
            f"{', '.join(words)}; start the processes with torchrun or unset the variables"
        )
    return Shard(rank, count, local_rank)


def take_own_gpu(shard: Shard) -> None:
    """Make a process of several work on the GPU of its local rank, where there is any.

    Raises ConfigError when the machine has fewer GPUs than processes.
    """
    if shard.count == 1 or not torch.cuda.is_available():
        return
    num_gpus = torch.cuda.device_count()
    if shard.local_rank >= num_gpus:
        raise ConfigError(
            f"every process takes a GPU of its own, this machine has {num_gpus} and process "
            f"{shard.local_rank} (from 0) has none; lower --nproc-per-node"
        )
    torch.cuda.set_device(shard.local_rank)
