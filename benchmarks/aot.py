"""Compile the kernels without a GPU; fail on spills or too much shared memory.

    python benchmarks/aot.py            every configuration for every architecture (half an hour)
    python benchmarks/aot.py --quick    sizes of the shipped models on sm_90, as the tests do

Each case calls an op as a model does, on tensors in the CPU's memory; a driver without a device
compiles what the op launches. Run it in a process without TRITON_INTERPRET. The numbers come from
the compiled code (cuobjdump).
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from aot_cases import Case, all_cases, quick_cases
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from stree_kernels.launch import pdl

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""Shared memory that one block may take, by architecture (CUDA programming guide, table 30)."""

MAX_STACK_BYTES = 32
"""Stack of a thread that the assembler itself may trade for one more program."""
MAX_TRADED_BYTES = 64
"""The same in a config that caps registers for that purpose."""


class Usage(NamedTuple):
    """What a compiled kernel takes: the first two per thread, shared memory per block."""

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    capped: bool


class TargetDriver:
    """What Triton asks of a driver to compile, not to launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        """Return a number that keeps the compiled kernels of architectures apart."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_case(case: Case, arch: int) -> list[Usage]:
    """Compile all that `case` launches for sm_`arch` and read its resources from the binaries."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((run(self, *args, warmup=True, **kwargs), "maxnreg" in kwargs))

    driver.set_active(TargetDriver(arch))
    patched: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", compile_only),
        (pdl, "capability", lambda _: arch),
        # What goes to cuBLAS needs no compiler.
        (torch, "mm", lambda *_, **__: None),
    ]
    before = [getattr(owner, name) for owner, name, _ in patched]
    try:
        for owner, name, stand_in in patched:
            setattr(owner, name, stand_in)
        case()
    finally:
        for (owner, name, _), value in zip(patched, before, strict=True):
            setattr(owner, name, value)
    return [usage(kernel, capped) for kernel, capped in compiled]


def usage(kernel: Any, capped: bool) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None
    name, shared = kernel.metadata.name.strip("_"), kernel.metadata.shared
    return Usage(name, int(found[1]), int(found[2]), shared, capped)


def check(work: tuple[tuple[str, Case], int]) -> list[tuple[str, bool]]:
    """Compile one case; return a line of the table per kernel, and whether it is in the limits."""
    (name, case), arch = work
    # One intra-op thread: the processes are as many as there are cores.
    torch.set_num_threads(1)
    results = []
    for kernel, registers, stack_bytes, shared_bytes, capped in compile_case(case, arch):
        max_stack = MAX_TRADED_BYTES if capped else MAX_STACK_BYTES
        fits = stack_bytes <= max_stack and shared_bytes <= SHARED_KIB[arch] << 10
        line = (
            f"sm_{arch:<4}{name:<52}{kernel:<24}{registers:>4} registers {stack_bytes:>5} B stack"
            f"{shared_bytes / 1024:>7.1f} KiB shared{'' if fits else '  TOO MUCH'}"
        )
        results.append((line, fits))
    return results


def main() -> int:
    """Print a table of resources; return 1 when a kernel is beyond its limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the shipped models' sizes")
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, help="default: all")
    options = parser.parse_args()
    cases = list(quick_cases() if options.quick else all_cases())
    archs = options.arch or ([90] if options.quick else list(SHARED_KIB))
    count = failures = 0
    with ProcessPoolExecutor() as pool:
        for lines in pool.map(check, itertools.product(cases, archs)):
            for line, fits in lines:
                print(line, flush=True)
                count += 1
                failures += not fits
    print(f"{count} kernels, {failures} beyond the limits")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
