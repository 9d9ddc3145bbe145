"""What kernels prefer of a multiprocessor's memory, told to a driver that takes notes."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from stree_kernels.launch import shared_memory
from stree_kernels.launch.shared_memory import (
    is_streamed,
    match_neighbours,
    prefer_cache,
    prefer_shared,
)

DEVICE = torch.device("cuda", 0)
H200_SHARED_BYTES, H200_MULTIPROCESSORS = 233472, 132
H200 = SimpleNamespace(
    shared_memory_per_multiprocessor=H200_SHARED_BYTES, multi_processor_count=H200_MULTIPROCESSORS
)


class Driver:
    """Notes which share of shared memory a function was given."""

    def __init__(self, code: int = 0) -> None:
        self.told: list[tuple[int | None, int]] = []
        self._code = code

    def cuFuncSetAttribute(self, function: ctypes.c_void_p, attribute: int, value: int) -> int:
        assert attribute == 9, "CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT"
        self.told.append((function.value, value))
        return self._code


def kernel(shared: int, registers: int = 128, function: int = 1) -> SimpleNamespace:
    """What a launch of four warps returns."""
    metadata = SimpleNamespace(num_warps=4, shared=shared)
    return SimpleNamespace(function=function, n_regs=registers, metadata=metadata)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return installed(Driver(), monkeypatch, capability=90)


def installed(driver: Driver, monkeypatch: pytest.MonkeyPatch, capability: int) -> Driver:
    monkeypatch.setattr(shared_memory, "capability", lambda device: capability)
    monkeypatch.setattr(shared_memory, "_driver", lambda: driver)
    monkeypatch.setattr(shared_memory, "_properties", lambda device: H200)
    monkeypatch.setattr(shared_memory, "_preferred", {})
    return driver


def test_a_streaming_kernel_leaves_all_to_the_cache(driver: Driver) -> None:
    prefer_cache(kernel(4096), DEVICE)
    assert driver.told == [(1, 0)]


@pytest.mark.parametrize(
    ("registers", "programs", "at_once"),
    [(128, 1, 1), (128, 132, 1), (128, 133, 2), (128, 9999, 4), (255, 264, 2), (255, 265, 2)],
)
def test_a_kernel_of_tiles_gets_room_for_its_programs(
    driver: Driver, registers: int, programs: int, at_once: int
) -> None:
    prefer_shared(kernel(32768, registers), DEVICE, programs)
    ((_, percent),) = driver.told
    needed = at_once * (32768 + 1024)
    assert (percent - 1) * H200_SHARED_BYTES < 100 * needed <= percent * H200_SHARED_BYTES


def test_more_than_all_is_all(driver: Driver) -> None:
    prefer_shared(kernel(100_000, 64), DEVICE, 9999)
    assert driver.told == [(1, 100)]


def test_what_lies_between_takes_the_split_of_its_neighbours(driver: Driver) -> None:
    # Four programs of the scan, 32 KiB each, fill a multiprocessor.
    prefer_shared(kernel(32768), DEVICE, 9999)
    match_neighbours(kernel(0, function=2), DEVICE, num_rows=8, num_columns=768)
    match_neighbours(kernel(0, function=2), DEVICE, num_rows=1)
    match_neighbours(kernel(0, function=2), DEVICE, num_rows=128)
    assert driver.told == [(1, 58), (2, 58), (2, 0), (2, 58)]


def test_a_pass_whose_weights_are_streamed_takes_the_largest_carveout(driver: Driver) -> None:
    assert is_streamed(2, 2560)
    assert is_streamed(9, 2560, one_token=True)
    assert not is_streamed(8, 2560, one_token=True)
    assert is_streamed(17, 768)
    assert not any(is_streamed(*sizes) for sizes in ((1, 2560), (16, 768), (65, 2560)))
    prefer_shared(kernel(32768), DEVICE, 1, streamed=True)
    match_neighbours(kernel(0, function=2), DEVICE, 9, 2560)
    assert driver.told == [(1, 100), (2, 100)]


def test_the_driver_is_told_what_is_new(driver: Driver) -> None:
    for programs in (300, 300, 500, 300):
        prefer_shared(kernel(16384), DEVICE, programs)
    prefer_cache(kernel(0, function=2), DEVICE)
    functions = [function for function, _ in driver.told]
    assert functions == [1, 1, 1, 2]


@pytest.mark.parametrize("capability", [0, 80, 100])
def test_elsewhere_the_driver_decides(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    driver = installed(Driver(), monkeypatch, capability)
    # Where kernels are interpreted a launch returns nothing.
    prefer_cache(None, DEVICE)
    prefer_shared(None, DEVICE, 1)
    match_neighbours(None, DEVICE, 1)
    assert not driver.told


def test_a_driver_that_refuses_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(Driver(code=400), monkeypatch, capability=90)
    with pytest.raises(RuntimeError, match=r"driver error 400 .* 0 % shared memory"):
        prefer_cache(kernel(0), DEVICE)
