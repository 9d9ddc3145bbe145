"""FlashInfer's `checkpointing_ssu` as a peer: chains, replayed from a ring of 16 rows.

It is no part of this project and nothing is downloaded. A folder given to `kernels.py --flashinfer`
holds a shared library for each number of heads, groups and tokens, `h80_g1_t4.so`; where there is
none, the peer's columns stay empty. To build them, with the headers of FlashInfer's wheel:

    pip download --no-deps flashinfer-python==0.7.4 && unzip flashinfer_python*.whl -d wheel
    python benchmarks/flashinfer_peer.py wheel FOLDER --heads 80 --groups 1 --tokens 1 4 8 16

which takes nvcc 13 some 200 s of one core a library. States are fp32, rows bf16, heads 64 x 128.

A step scores a chain of T rows and has accepted as many rows of the chain before as our tree's path
has. It appends all T rows to the ring and stores the state when the kept rows and T are more than
16: at T = 4 one call of 5, at 8 of 3, at 16 every one. Which launch is fastest a search over its
own tactics finds, as its autotuner would.

Shape letters: B batch, T tokens, H heads, P head dim, N state dim, G groups.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_shapes import accepted_path
from candidates import Candidate
from layer_data import LayerInputs, relative_error
from timing import num_calls
from torch import Tensor
from torch.nn import functional

from stree_autotune.probe.timing import Effort, captured, time_interleaved

WINDOW = 16
VERSION = "0.7.4"
CONFIG = {
    "state_dtype": "float", "input_dtype": "nv_bfloat16", "dt_dtype": "nv_bfloat16",
    "weight_dtype": "float", "matrixA_dtype": "float", "stateIndex_dtype": "int32_t",
    "state_scale_type": "void", "dim": 64, "dstate": 128, "max_window": WINDOW,
    "philox_rounds": 0, "enable_pdl": "true",
}  # fmt: skip
FLAGS = (
    "-std=c++17 -use_fast_math -DFLASHINFER_ENABLE_F16 -DFLASHINFER_ENABLE_BF16 -DNDEBUG -O3"
    " -DFLASHINFER_ENABLE_FP8_E4M3 -DFLASHINFER_ENABLE_FP8_E5M2 -DFLASHINFER_ENABLE_FP8_E8M0"
    " -DFLASHINFER_ENABLE_FP4_E2M1 -gencode=arch=compute_90a,code=sm_90a"
    " --compiler-options=-fPIC --expt-relaxed-constexpr -static-global-template-stub=false"
    " -w -shared -cudart static"
)


class Tactic(NamedTuple):
    """A launch: copies under way, programs of a multiprocessor and heads of one, 0 for its own
    choice; parts of a head; and whether a kernel of its own prepares products."""

    stages: int
    programs: int
    heads: int
    parts: int
    two_kernels: bool


class Memory(NamedTuple):
    """What one call works on: a state, the ring of rows beside it, scratch, and the output."""

    state: Tensor
    x: Tensor
    b: Tensor
    dt: Tensor
    scratch: tuple[Tensor, Tensor, Tensor]
    out_BTHP: Tensor


class Cursor(NamedTuple):
    """Rows that the ring keeps, and where the first of them is."""

    kept: int
    origin: int


def cursors(tokens: int, accepted: int, count: int) -> list[Cursor]:
    """Return where the ring stands in `count` calls, the first ones of a decoder."""
    ring, found, cursor = WINDOW + tokens, [], Cursor(accepted, 0)
    for _ in range(count):
        found.append(cursor)
        kept, origin = cursor
        if stores(cursor, tokens):
            cursor = Cursor(accepted, (origin + kept) % ring)
        else:
            cursor = Cursor(kept + accepted, origin)
    return found


def stores(cursor: Cursor, tokens: int) -> bool:
    """Say whether a call stores the state."""
    return cursor.kept + tokens > WINDOW


def cycle(tokens: int, accepted: int) -> int:
    """Return the calls from one that stores the state to the next."""
    found = cursors(tokens, accepted, WINDOW + 1)
    return 1 + next(i for i, cursor in enumerate(found) if stores(cursor, tokens))


def library_path(folder: Path, heads: int, groups: int, tokens: int) -> Path:
    """Return where the library for these sizes is, if there is one."""
    return folder / f"h{heads}_g{groups}_t{tokens}.so"


class FlashInfer:
    """The launcher of one library; A, D and the bias of dt are those of a layer."""

    def __init__(self, library: Path, tokens: int, groups: int, heads: Any) -> None:
        self.tokens, self.groups, self.heads = tokens, groups, heads
        self.tactic = Tactic(0, 0, 0, 1, False)
        self._run = ctypes.CDLL(str(library)).fi_checkpointing_ssu
        self._run.restype = ctypes.c_int

    def memory(self, state_BHPN: Tensor) -> Memory:
        """Return an empty ring beside a state."""
        slots, num_heads, head_dim, state_dim = state_BHPN.shape
        ring, device = WINDOW + self.tokens, state_BHPN.device
        zeros = functools.partial(torch.zeros, device=device)
        rows = functools.partial(zeros, dtype=torch.bfloat16)
        size = (slots, self.tokens, num_heads, head_dim)
        return Memory(
            state_BHPN, rows(slots, num_heads, ring, head_dim),
            rows(slots, self.groups, ring, state_dim), zeros(slots, num_heads, ring),
            (
                rows(slots, num_heads, 32, 8), zeros(slots, num_heads, 16),
                rows(slots, num_heads, 32, 8),
            ),
            torch.full(size, torch.nan, dtype=torch.bfloat16, device=device),
        )  # fmt: skip

    @functools.cache  # noqa: B019 - lives as long as the benchmark
    def _number(self, value: int, slots: int, device: torch.device) -> Tensor:
        number = torch.full((slots,), value, dtype=torch.int32, device=device)
        # With programmatic dependent launch a kernel may read it before the one that fills it ends.
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(device)
        return number

    def step(self, memory: Memory, rows: Any, cursor: Cursor) -> Tensor:
        """Score a chain and append it; return y [B, T, H, P]."""
        state, slots = memory.state, len(memory.state)
        x, dt, b, c = rows.x_BTHP, rows.dt_BTH, rows.b_BTGN, rows.c_BTGN
        a_H, d_H, dt_bias_H = self.heads
        number = functools.partial(self._number, slots=slots, device=state.device)
        scratch = [t.data_ptr() if self.tactic.two_kernels else 0 for t in memory.scratch]
        tensors = (
            state, x, dt, a_H, b, c, memory.out_BTHP, memory.x, memory.b, memory.dt,
            number(cursor.origin), number(cursor.kept), d_H, dt_bias_H,
        )  # fmt: skip
        pointers = [t.data_ptr() for t in tensors] + [0, *scratch]
        strides = [
            state.stride(0), *(t.stride(i) for t in (x, dt, b, c, memory.out_BTHP) for i in (0, 1)),
            *(t.stride(i) for t in (memory.x, memory.b) for i in (0, 1, 2)),
            memory.dt.stride(0), memory.dt.stride(1),
        ]  # fmt: skip
        sizes = [slots, state.shape[1], self.groups, slots]
        knobs = [self.tactic.parts, self.tactic.heads, self.tactic.stages, self.tactic.programs]
        error = ctypes.create_string_buffer(512)
        stream = torch.cuda.current_stream().cuda_stream
        arrays = [
            (ctypes.c_void_p * len(pointers))(*pointers),
            *((ctypes.c_int64 * len(v))(*v) for v in (sizes, strides, knobs)),
        ]
        if self._run(*arrays, ctypes.c_void_p(stream), error, ctypes.c_int64(len(error))):
            raise RuntimeError(error.value.decode())
        return memory.out_BTHP

    def tactics(self, slots: int, num_sms: int, best: Tactic | None) -> list[Tactic]:
        """Return what a search tries: first heads of a program, then, of the best, programs."""
        num_heads = len(self.heads.a_H)
        if best is None:
            halves = [num_heads // self.groups]
            while halves[-1] > 1:
                halves.append(halves[-1] >> 1)
            alone = [Tactic(0, 0, 0, 1, False), Tactic(0, 0, 0, 2, False), Tactic(0, 0, 0, 1, True)]
            return alone + [
                Tactic(1, 16, heads, parts, True) for heads in halves for parts in (1, 2)
            ]
        grids: dict[tuple[int, int, int], Tactic] = {}
        for parts in (1, 2):
            for stages in (1, 2):
                for programs in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32):
                    grid = min(programs * num_sms, parts * slots * num_heads)
                    tactic = Tactic(stages, programs, best.heads, parts, True)
                    grids.setdefault((parts, stages, grid), tactic)
        return list(grids.values())


def chain(state: Tensor, rows: Any, heads: Any, accepted: int) -> tuple[Tensor, Tensor]:
    """Return y of a chain from `state`, and the state after its first rows, in float64."""
    a_H, d_H, dt_bias_H = (constants.double() for constants in heads)
    x, b, c = (t.double() for t in (rows.x_BTHP, rows.b_BTGN, rows.c_BTGN))
    step_BTH = functional.softplus(rows.dt_BTH.double() + dt_bias_H)
    b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (b, c))
    after, ys = state, []
    for t in range(x.shape[1]):
        decay = (step_BTH[:, t] * a_H).exp()[..., None, None]
        state = state * decay + (step_BTH[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        ys.append((state @ c[:, t, :, :, None])[..., 0] + d_H[:, None] * x[:, t])
        after = state if t + 1 == accepted else after
    return torch.stack(ys, dim=1), after


def make_candidates(inputs: LayerInputs, library: Path) -> dict[str, Candidate]:
    """Return the calls of a running decoder, with the fastest tactic, and calls that store."""
    shape, tokens = inputs.shape, inputs.tokens
    accepted, groups = len(accepted_path(tokens)), max(shape.num_b_groups, shape.num_c_groups)
    heads = inputs.heads._make(constants.contiguous() for constants in inputs.heads)  # type: ignore[var-annotated, call-arg, arg-type]
    op = FlashInfer(library, tokens, groups, heads)
    memories = [op.memory(buffer.state_BHPN) for buffer in inputs.buffers]
    length = cycle(tokens, accepted)

    def launch(call: int, found: list[Cursor]) -> None:
        which = call % len(memories)
        op.step(memories[which], inputs.repeated[which], found[call % len(found)])

    calls = num_calls(len(memories), length)
    running = functools.partial(launch, found=cursors(tokens, accepted, calls))
    op.tactic = _fastest(op, running, calls, inputs)
    errors = _check(op, inputs, accepted, length)
    storing = functools.partial(launch, found=[Cursor(WINDOW, 0)])
    return {
        "flashinfer": Candidate(running, errors, cycle=length),
        "flashinfer_storing": Candidate(storing, errors, cycle=1),
    }


def _fastest(
    op: FlashInfer, launch: Callable[[int], None], calls: int, inputs: LayerInputs
) -> Tactic:
    """Search over tactics, in two rounds, for the one that takes least."""

    def run(tactic: Tactic) -> None:
        op.tactic = tactic
        for call in range(calls):
            launch(call)

    taken: dict[Tactic, float] = {}
    num_sms = torch.cuda.get_device_properties(inputs.device).multi_processor_count
    for narrowed in (False, True):
        pairs = [tactic for tactic in taken if tactic.two_kernels]
        best = min(pairs, key=taken.__getitem__) if narrowed else None
        pool, graphs = torch.cuda.graph_pool_handle(), {}
        for tactic in op.tactics(inputs.batch, num_sms, best):
            # Some tactics do not fit some sizes, and say so.
            with contextlib.suppress(RuntimeError):
                graphs[tactic] = captured(functools.partial(run, tactic), inputs.device, pool)
        timings = time_interleaved(graphs, inputs.device, Effort(3, 3, 0.0))
        taken |= {tactic: timing.ms for tactic, timing in timings.items()}
    return min(taken, key=taken.__getitem__)


def _check(op: FlashInfer, inputs: LayerInputs, accepted: int, length: int) -> dict[str, float]:
    """Decode some steps from an empty ring; return the greatest relative errors."""
    state = inputs.buffers[0].state_BHPN.clone()
    memory, committed = op.memory(state), state.double()
    cursor, errors = Cursor(0, 0), {"y": 0.0, "state": 0.0}
    for call in range(length + 2):
        rows = inputs.repeated[call % len(inputs.repeated)]
        memory.out_BTHP.fill_(torch.nan)
        y_true, after = chain(committed, rows, inputs.heads, accepted)
        y = op.step(memory, rows, cursor)
        errors["y"] = worse(errors["y"], relative_error(y, y_true))
        if stores(cursor, inputs.tokens):
            errors["state"] = worse(errors["state"], relative_error(state, committed))
            cursor = Cursor(accepted, (cursor.origin + cursor.kept) % (WINDOW + inputs.tokens))
        else:
            cursor = Cursor(cursor.kept + accepted, cursor.origin)
        committed = after
    return errors


def worse(old: float, new: float) -> float:
    """Return the greater of two errors; NaN is the greatest."""
    return math.inf if math.isnan(new) else max(old, new)


def build(wheel: Path, folder: Path, heads: int, groups: int, tokens: int) -> None:
    """Compile the library for these sizes with the headers of FlashInfer's wheel."""
    data = wheel / "flashinfer" / "data"
    config = (data / "csrc" / "checkpointing_ssu_customize_config.jinja").read_text()
    sizes = {"npredicted": tokens, "heads_per_group": heads // groups, "num_groups": groups}
    for key, value in {**CONFIG, **sizes}.items():
        config = config.replace(f"{{{{ {key} }}}}", str(value))
    if "{{" in config:
        raise SystemExit(f"the wheel must be of {VERSION}, its template has other fields")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc must be on the path, it is not; install CUDA's compiler, version 13")
    includes = ("include", "cccl/libcudacxx/include", "cutlass/include")
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "checkpointing_ssu_config.inc").write_text(config)
        command = [nvcc, *FLAGS.split(), "-I", work]
        for include in includes:
            command += ["-I", str(data / include)]
        source = Path(__file__).with_name("flashinfer_entry.cu")
        out = library_path(folder, heads, groups, tokens)
        subprocess.run([*command, str(source), "-o", str(out)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build FlashInfer's kernel for kernels.py")
    parser.add_argument("wheel", type=Path, help="the unpacked wheel of flashinfer-python")
    parser.add_argument("folder", type=Path, help="where the libraries go")
    parser.add_argument("--heads", type=int, default=80)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for tokens in options.tokens:
        build(options.wheel, options.folder, options.heads, options.groups, tokens)


if __name__ == "__main__":
    main()
