"""A GPU that is not there: kernels are compiled for it and never launched.

Tensors lie in the CPU's memory and say that they are on the GPU. What fills, multiplies or draws is
left out, what allocates or views is done, so code takes the same path with the same sizes, and
Triton compiles what that path launches. Numbers that come out mean nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import triton.compiler.compiler
import triton.runtime.cache
import triton.runtime.jit
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

NAME = "NVIDIA H200"
CAPABILITY, NUM_SMS, MEMORY_BYTES = (9, 0), 132, 140 << 30
SHARED_BYTES = 227 << 10
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
STEP_MS = 5.0
"""What every timing says."""
SMALL = 1_000_000
"""Values up to which tensors are zeroed and computed."""
RECIPES = "recipes"
"""Folder of Triton's cache with what the key of each kernel was made from."""

_MULTIPLIES = {
    F.linear, F.scaled_dot_product_attention, torch.mm, torch.matmul, torch.bmm, torch.addmm,
    torch.baddbmm, torch.Tensor.__matmul__, torch.Tensor.matmul, torch.Tensor.mm,
    getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None),
}  # fmt: skip
_DRAWS = {"normal_", "uniform_", "random_", "exponential_"}
_CHANGES = {"mul_", "copy_", "add_", "fill_", "zero_"}
_MAKES = {torch.randn, torch.rand, torch.empty, torch.empty_like, torch.empty_strided}


class CompilingDriver:
    """What Triton asks of a driver; what is launched goes nowhere."""

    def __init__(self) -> None:
        self.utils = self
        self._loaded = 0

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_BYTES, "multiprocessor_count": NUM_SMS, "warpSize": 32,
            "max_num_regs": 1 << 16, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
        }  # fmt: skip

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """Return a module, a function that no other kernel has, registers, spills, threads."""
        self._loaded += 1
        return self._loaded, self._loaded, 64, 0, 1024

    def unload_module(self, *_: object) -> None:
        pass

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class OnGpu(TorchFunctionMode):
    """Runs what is asked of the GPU on the CPU, without what takes long."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args = tuple(map(on_cpu, args))
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in _DRAWS or (name in _CHANGES and first is not None and first.numel() > SMALL):
            return args[0]
        if func in _MULTIPLIES:
            return product(func, args, kwargs)
        if name == "isfinite":
            return torch.ones(args[0].shape, dtype=torch.bool)
        if func in (torch.randn, torch.rand):
            kwargs.pop("generator", None)
            func = torch.empty
        made = func(*args, **kwargs)
        if func in _MAKES and (made.numel() <= SMALL or not made.is_floating_point()):
            made.zero_()
        return made


def on_cpu(value: Any) -> Any:
    """Return an argument with the CPU for the GPU."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return CPU
    return value


def product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return a tensor of the shape and type of a product that is not computed."""
    out: torch.Tensor | None = kwargs.pop("out", None)
    if out is not None:
        return out
    dtype = kwargs.pop("out_dtype", None)

    def shape_of(value: Any) -> Any:
        is_tensor = isinstance(value, torch.Tensor)
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta"
        ) if is_tensor else value  # fmt: skip

    with torch._C.DisableTorchFunction():
        found = func(*map(shape_of, args), **{key: shape_of(each) for key, each in kwargs.items()})
        return torch.empty(found.shape, dtype=dtype or found.dtype)


def recorded_key(
    source: Any, backend: Any, options: Any, environment: Any = None, **more: Any
) -> str:
    """Return the key of a kernel without Triton's own, and write down what it was made from."""
    environment = more.get("env_vars", environment) or {}
    parts = {
        "source": source.hash(),
        "backend": backend.hash(),
        "options": options.hash(),
        "environment": str(sorted(environment.items())),
    }
    key = f"dry-{'-'.join(parts.values())}"
    folder = Path(os.environ["TRITON_CACHE_DIR"]) / RECIPES
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json").write_text(json.dumps(parts))
    return key


class Event:
    """An event that has come already."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self, *_: object) -> None:
        pass

    wait = synchronize = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return STEP_MS


class Graph:
    """A graph that records nothing."""

    def capture_begin(self, **_: object) -> None:
        pass

    capture_end = reset = replay = enable_debug_mode = capture_begin

    def pool(self) -> tuple[int, int]:
        return 0, 0


class Stream:
    """The stream that everything runs on."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, *_: object) -> None:
        pass

    wait_event = wait_stream

    def record_event(self, *_: object) -> Event:
        return Event()


def properties(*_: object) -> SimpleNamespace:
    return SimpleNamespace(
        name=NAME, multi_processor_count=NUM_SMS, total_memory=MEMORY_BYTES,
        shared_memory_per_multiprocessor=228 << 10, shared_memory_per_block_optin=SHARED_BYTES,
        major=CAPABILITY[0], minor=CAPABILITY[1], L2_cache_size=50 << 20,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=1 << 16,
    )  # fmt: skip


def nothing(*_: object, **__: object) -> None:
    pass


def install() -> None:
    """Pretend from now on, in this process. TRITON_CACHE_DIR must say where kernels go."""
    driver.set_active(CompilingDriver())
    for module in (triton.runtime.cache, triton.runtime.jit, triton.compiler.compiler):
        module.get_cache_key = recorded_key
    cuda: Any = torch.cuda
    answers: dict[str, object] = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True,
        "get_device_name": NAME, "get_device_capability": CAPABILITY, "graph_pool_handle": (0, 0),
        "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES), "memory_reserved": 0, "memory_allocated": 0,
        "max_memory_allocated": 0, "max_memory_reserved": 0, "is_current_stream_capturing": False,
        "memory_stats": {}, "utilization": 0, "temperature": 0, "clock_rate": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    for name in (
        "synchronize", "empty_cache", "set_device", "init", "_lazy_init", "manual_seed",
        "manual_seed_all", "reset_peak_memory_stats",
    ):  # fmt: skip
        setattr(cuda, name, nothing)
    cuda.get_device_properties = properties
    cuda.Event, cuda.CUDAGraph, cuda.Stream = Event, Graph, Stream
    cuda.current_stream = cuda.default_stream = Stream
    cuda.stream = cuda.device = lambda *_: nullcontext()
    cuda.graph = lambda *_, **__: nullcontext()
    tensor: Any = torch.Tensor
    kind = tensor.device
    tensor.device = property(lambda self: GPU if kind.__get__(self) == CPU else kind.__get__(self))
    tensor.is_cuda = property(lambda self: True)
    tensor.pin_memory = tensor.cuda = lambda self, *_, **__: self
    tensor.record_stream = nothing
    owner: Any = torch
    owner.Generator = OnCpu
    mode: Any = OnGpu()
    mode.__enter__()


class OnCpu(torch.Generator):
    """A generator of random numbers on the CPU, whatever device is asked for."""

    def __new__(cls, *_: Any) -> OnCpu:
        return super().__new__(cls)


@contextmanager
def ours_without_gpu() -> Iterator[None]:
    """Replace what of our own code needs an answer of the GPU."""
    from stree_autotune.probe import timing
    from stree_core.engine import step_result
    from stree_kernels.launch import shared_memory

    def arrived(self: Any) -> Any:
        _, _, epochs = self._on_the_way[0]
        count = len(epochs)
        return step_result.StepResult([[7]] * count, [0] * count, [True] * count, epochs)

    patches: tuple[tuple[Any, str, Any], ...] = (
        (shared_memory, "_prefer", nothing),
        (timing, "_measure_cuda", lambda work, calls: once(work)),
        (timing, "_measure_wall", lambda work, calls: once(work)),
        (step_result.ResultQueue, "_arrived", arrived),
    )
    before = [getattr(owner, name) for owner, name, _ in patches]
    for owner, name, stand_in in patches:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(patches, before, strict=True):
            setattr(owner, name, value)


def once(work: Callable[[], object]) -> float:
    """Run a work once, whatever it takes."""
    work()
    return STEP_MS
