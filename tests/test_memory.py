"""How much memory is free, and what is said when it is not enough."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stree_core import memory
from stree_core.errors import NotEnoughMemory, StreeError
from stree_core.memory import GIB, UNKNOWN_BYTES, explain_oom, free_bytes, require_memory

CPU = torch.device("cpu")
TOO_MUCH = 1 << 55


def test_the_cpu_reports_what_the_system_calls_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       64 kB\nMemFree:        8 kB\nMemAvailable:   32 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    assert free_bytes(CPU) == 32 << 10
    meminfo.write_text("MemTotal:       64 kB\n")
    assert free_bytes(CPU) == UNKNOWN_BYTES
    meminfo.unlink()
    assert free_bytes(CPU) == UNKNOWN_BYTES


def test_cuda_counts_what_the_caching_allocator_holds_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GIB, 9 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: GIB)
    assert free_bytes(torch.device("cuda", 0)) == 7 * GIB


def test_a_request_that_fits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2 * GIB)
    require_memory(2 * GIB, "the model", CPU)
    with pytest.raises(NotEnoughMemory):
        require_memory(2 * GIB + 1, "the model", CPU)


def test_the_sentence_names_both_amounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 3 * GIB // 2)
    with pytest.raises(NotEnoughMemory) as caught:
        require_memory(15 * GIB, "mamba2-2.7b", torch.device("cuda", 1))
    assert str(caught.value) == (
        "mamba2-2.7b needs 15.0 GiB on cuda:1, 1.5 GiB are free; free some, or use a smaller "
        "model, batch size or context"
    )
    assert isinstance(caught.value, StreeError)


def test_an_unknown_amount_is_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: UNKNOWN_BYTES)
    with (
        pytest.raises(NotEnoughMemory, match="an unknown amount is free"),
        explain_oom("it", GIB, CPU),
    ):
        raise torch.OutOfMemoryError


def test_failed_allocations_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: GIB)
    with (
        pytest.raises(NotEnoughMemory, match=r"the cache needs 4\.0 GiB on cpu, 1\.0 GiB are free"),
        explain_oom("the cache", 4 * GIB, CPU),
    ):
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    with (
        pytest.raises(NotEnoughMemory, match="the cache needs"),
        explain_oom("the cache", 4 * GIB, CPU),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, explain_oom("it", GIB, CPU):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, NotEnoughMemory)


@pytest.mark.gpu
def test_freed_tensors_count_as_free() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()
    before = free_bytes(device)
    held = torch.empty(GIB // 4, dtype=torch.uint8, device=device)
    assert free_bytes(device) <= before - GIB // 8
    del held
    assert free_bytes(device) >= before - GIB // 8
