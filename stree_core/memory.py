"""Memory of a device: how much is free, and one sentence when it is not enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stree_core.errors import NotEnoughMemory

GIB = 1 << 30
# Where the system does not say, every request is let through and fails by itself if it must.
UNKNOWN_BYTES = 1 << 62
MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The caching allocator gives these out again without asking the driver.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        available = None
    return UNKNOWN_BYTES if available is None else int(available[1]) << 10


def require_memory(needed_bytes: int, what: str, device: torch.device) -> None:
    """Raise NotEnoughMemory unless `needed_bytes` are free on `device`; `what` needs them."""
    if needed_bytes > free_bytes(device):
        raise NotEnoughMemory(_sentence(what, needed_bytes, device))


@contextmanager
def explain_oom(what: str, needed_bytes: int | None, device: torch.device) -> Iterator[None]:
    """Turn an allocation that fails inside the block into NotEnoughMemory.

    `needed_bytes` is None where nobody has counted them.
    """
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise NotEnoughMemory(_sentence(what, needed_bytes, device)) from err
    except RuntimeError as err:
        # The CPU allocator raises the bare class.
        if "DefaultCPUAllocator" not in str(err):
            raise
        raise NotEnoughMemory(_sentence(what, needed_bytes, device)) from err


def _sentence(what: str, needed_bytes: int | None, device: torch.device) -> str:
    free = free_bytes(device)
    known = "an unknown amount is" if free == UNKNOWN_BYTES else f"{free / GIB:.1f} GiB are"
    amount = "more memory" if needed_bytes is None else f"{needed_bytes / GIB:.1f} GiB"
    return (
        f"{what} needs {amount} on {device}, {known} free; free some, or use a smaller model, "
        "batch size or context"
    )
