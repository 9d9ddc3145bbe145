"""Compile every kernel configuration without a GPU; fail on spills or too much shared memory.

    python benchmarks/aot.py            every configuration for every architecture (minutes)
    python benchmarks/aot.py --quick    one model's shapes on sm_90, as the tests do

Run it in a process without TRITON_INTERPRET. The numbers come from the compiled code (cuobjdump).
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stree_kernels import tree_conv, tree_scan

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""Shared memory that one block may take, by architecture (CUDA programming guide, table 30)."""

# By name, which goes to another process; a kernel does not.
KERNELS: dict[str, Any] = {
    "tree_scan": tree_scan._tree_scan_kernel,
    "token_scan": tree_scan._token_scan_kernel,
    "tree_conv": tree_conv._tree_conv_kernel,
}
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SCAN_PREVIOUS = ("prev_x_ptr", "prev_dt_ptr", "prev_b_ptr", "path_ptr", "length_ptr")
CONV_PREVIOUS = ("prev_ptr", "path_ptr", "length_ptr")


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel to compile: element types of its pointers (default `dtype`), its constants.

    Without a path to replay a kernel is one straight block, in which the assembler may trade a few
    registers for earlier loads; a tile that does not fit takes over 500 bytes of stack.
    """

    name: str
    kernel: str
    dtype: torch.dtype
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    pending: bool

    @property
    def max_stack_bytes(self) -> int:
        """Bytes per thread that may be spilled."""
        return 0 if self.pending else 256

    def source(self) -> ASTSource:
        """Return what Triton compiles, specialised as for a model's aligned buffers."""
        signature, constants, attributes = {}, {}, {}
        kernel = KERNELS[self.kernel]
        for index, name in enumerate(kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
                constants[index,] = self.constants[name]
                continue
            if name.endswith("_ptr"):
                signature[name] = "*" + self.pointers.get(name, TRITON_TYPES[self.dtype])
            else:
                signature[name] = "fp32" if name in ("dt_min", "dt_max") else "i32"
            if name not in kernel.do_not_specialize and signature[name] != "fp32":
                attributes[index,] = [["tt.divisibility", 16]]
        return ASTSource(kernel, signature, constants, attributes)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes: the first two per thread, shared memory per block."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def compile_for(build: Build, arch: int) -> Usage:
    """Compile `build` for sm_`arch` and read its resources from the binary."""
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": build.num_warps, "num_stages": 1}
    compiled = triton.compile(build.source(), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None
    return Usage(int(found[1]), int(found[2]), compiled.metadata.shared)


def scan_build(
    config: tree_scan.ScanConfig, head_dim: int, state_dim: int, *, dtype: torch.dtype,
    state: torch.dtype, pending: bool, one_tile: bool,
) -> Build:  # fmt: skip
    """Return the build of one scan: the one-token kernel where the config holds one row."""
    block_p = config.block_head_dim(head_dim, state_dim)
    constants: dict[str, Any] = {
        "HEADS_PER_GROUP": 8, "HEAD_DIM": head_dim, "STATE_DIM": state_dim, "BLOCK_P": block_p,
        "BLOCK_T": config.block_rows, "BLOCK_L": tree_scan.BLOCK_PATH, "ONE_TILE": one_tile,
    }  # fmt: skip
    constants |= {} if pending else dict.fromkeys(SCAN_PREVIOUS)
    names = dict.fromkeys(("a_ptr", "skip_ptr", "dt_bias_ptr"), "fp32")
    names |= {"state_ptr": TRITON_TYPES[state], "mask_ptr": "i1"}
    names |= {"path_ptr": "i32", "length_ptr": "i32"}
    one_token = config is tree_scan.TOKEN_CONFIG
    kernel = "token_scan" if one_token else "tree_scan"
    name = (
        f"{kernel} rows={config.block_rows}{'' if one_tile else '+'} P={head_dim} N={state_dim} "
        f"{TRITON_TYPES[dtype]} state={TRITON_TYPES[state]} replay={'yes' if pending else 'no'}"
    )
    return Build(name, kernel, dtype, names, constants, config.num_warps, pending)


def conv_build(config: tree_conv.ConvConfig, *, dtype: torch.dtype, pending: bool) -> Build:
    """Return the build of one conv of width 4."""
    constants: dict[str, Any] = {
        "NUM_COLUMNS": 3, "BLOCK_C": config.block_channels, "BLOCK_T": config.block_rows,
    }  # fmt: skip
    constants |= {} if pending else dict.fromkeys(CONV_PREVIOUS)
    names = dict.fromkeys(("ancestors_ptr", "path_ptr", "length_ptr"), "i32")
    replay = "yes" if pending else "no"
    name = f"tree_conv rows={config.block_rows} {TRITON_TYPES[dtype]} replay={replay}"
    return Build(name, "tree_conv", dtype, names, constants, config.num_warps, pending)


def quick_builds() -> Iterator[Build]:
    """Yield what a bf16 model of head dim 64 and state dim 128 runs, and the largest state."""
    yield from scan_builds(torch.bfloat16, 64, 128, torch.float32, pending=True)
    *_, last = scan_builds(torch.bfloat16, 128, 256, torch.float32, pending=True)
    yield last
    for config in tree_conv.CONFIGS:
        yield conv_build(config, dtype=torch.bfloat16, pending=True)


def all_builds() -> Iterator[Build]:
    """Yield every configuration with every size it is made for."""
    for dtype, pending in itertools.product(TRITON_TYPES, (True, False)):
        for config in tree_conv.CONFIGS:
            yield conv_build(config, dtype=dtype, pending=pending)
        # Head dims above 64 are cut to it; a state in bf16 takes less.
        for head_dim, state_dim in itertools.product((16, 32, 64), tree_scan.STATE_DIMS):
            yield from scan_builds(dtype, head_dim, state_dim, torch.float32, pending=pending)
    yield from scan_builds(torch.bfloat16, 64, 128, torch.bfloat16, pending=True)


def scan_builds(
    dtype: torch.dtype, head_dim: int, state_dim: int, state: torch.dtype, *, pending: bool
) -> Iterator[Build]:
    """Yield what the launcher picks for one token, for every tile size and for several tiles."""
    cuts = {tree_scan.TOKEN_CONFIG: {True}}
    if dtype == torch.bfloat16 or state_dim <= tree_scan.FP32_CONFIG.max_state_dim:
        for num_rows in (16, 32, 64, tree_scan.MAX_ROWS):
            config = tree_scan.pick_config(num_rows, state_dim, dtype)
            cuts.setdefault(config, set()).add(num_rows <= config.block_rows)
    for config, one_tile in ((config, tile) for config, tiles in cuts.items() for tile in tiles):
        yield scan_build(
            config, head_dim, state_dim, dtype=dtype, state=state, pending=pending,
            one_tile=one_tile,
        )  # fmt: skip


def check(work: tuple[Build, int]) -> tuple[str, bool]:
    """Compile one build; return its line of the table and whether it is within the limits."""
    build, arch = work
    usage = compile_for(build, arch)
    fits = (
        usage.stack_bytes <= build.max_stack_bytes and usage.shared_bytes <= SHARED_KIB[arch] << 10
    )
    line = (
        f"sm_{arch:<4}{build.name:<62}{usage.registers:>4} registers {usage.stack_bytes:>5} B stack"
        f"{usage.shared_bytes / 1024:>7.1f} KiB shared{'' if fits else '  TOO MUCH'}"
    )
    return line, fits


def main() -> int:
    """Print a table of resources; return 1 when a build is beyond its limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model's shapes")
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, help="default: all")
    options = parser.parse_args()
    builds = list(quick_builds() if options.quick else all_builds())
    archs = options.arch or ([90] if options.quick else list(SHARED_KIB))
    failures = 0
    with ProcessPoolExecutor() as pool:
        for line, fits in pool.map(check, itertools.product(builds, archs)):
            print(line, flush=True)
            failures += not fits
    print(f"{len(builds) * len(archs)} builds, {failures} beyond the limits")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
