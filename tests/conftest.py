"""Environment of all tests: offline, one thread, kernels interpreted where there is no GPU."""

from __future__ import annotations

import os

# Before torch starts its threads and before any library looks for a network.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if worker and "CUDA_VISIBLE_DEVICES" not in os.environ and torch.cuda.device_count() > 1:
    # Workers of xdist take turns with the GPUs.
    device = int(worker.removeprefix("gw")) % torch.cuda.device_count()
    os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before any kernel is defined: a process interprets all of its kernels or none.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
