"""What `aot.py` compiles: which sizes and dtypes of the calls in `aot_calls.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import aot_fp8
from aot_calls import (
    BF16,
    FP16,
    FP32,
    attention,
    conv,
    delta,
    delta_convolution,
    delta_prompts,
    end_of_step,
    in_projection,
    mlp,
    moe,
    projections,
    prompt_attend,
    prompts,
    route,
    row_steps,
    sampled_step,
    scan,
    uniform_numbers,
)

from stree_kernels.launch.settings import Activation, Routing

Case = Callable[[], None]

LAYERS = ((64, 128), (64, 64))
"""Head dim and state dim of the shipped models: mamba2 and the demo pair."""

OTHER_LAYERS = ((16, 16), (32, 64), (128, 128), (64, 256), (128, 256))
"""The least, the largest, and what else is common."""

DELTA_LAYERS = ((128, 128), (64, 64), (64, 128), (128, 64))
"""Head dims of v and k: Qwen3-Next and Qwen3.5, and others."""


MLPS: tuple[tuple[int, int, Activation], ...] = (
    (4096, 21504, "relu2"),
    (1536, 4096, "swiglu"),
    (3072, 8192, "swiglu"),
    (4096, 14336, "swiglu"),
    (2560, 10240, "geglu"),
)
"""Hidden and inner size: Nemotron-H 8B, Granite 4 H 1B, Mamba-in-Llama 3B and 8B, Zamba2 2.7B."""

EXPERTS: tuple[tuple[int, int, int, Activation], ...] = (
    (6, 2688, 1856, "relu2"),
    (22, 1024, 2688, "relu2"),
    (6, 1536, 512, "swiglu"),
    (10, 4096, 768, "swiglu"),
    (9, 2048, 512, "swiglu"),
    (11, 2048, 512, "swiglu"),
    (4, 1040, 528, "geglu"),
)
"""Chosen experts, hidden and inner size: Nemotron 3 Nano and Super, Granite 4 H Tiny and Small,
Qwen3.5-35B-A3B and Qwen3-Next with their shared expert."""

ROUTERS: tuple[tuple[int, int, int, Routing], ...] = (
    (2048, 256, 1, Routing("softmax", 8)),
    (2688, 128, 0, Routing("sigmoid", 6, scale=2.5)),
    (2048, 512, 1, Routing("softmax", 10)),
    (4096, 512, 0, Routing("sigmoid", 22, scale=5.0)),
    (1536, 64, 0, Routing("softmax", 6)),
    (4096, 72, 0, Routing("softmax", 10)),
    (1024, 256, 0, Routing("sigmoid", 8, num_groups=8, num_open_groups=4, scale=2.5)),
    (1040, 12, 2, Routing("softmax", 4, normalised=False)),
)
"""Hidden size, routed and shared experts, and how they are chosen: Qwen3.5-35B-A3B, Nemotron 3
Nano, Qwen3-Next, Nemotron 3 Super, Granite 4 H Tiny and Small, and others."""


def quick_cases() -> Iterator[tuple[str, Case]]:
    """Yield what the shipped models run in bf16, and experts."""
    for (head_dim, state_dim), tokens in itertools.product(LAYERS, (1, 16, 32, 64, 256)):
        for many in (False, True):
            yield scan_case(tokens, head_dim, state_dim, many=many)
    for tokens, many in itertools.product((1, 8, 32, 64, 256), (False, True)):
        yield delta_case(tokens, 128, 128, many=many)
    yield "delta conv T=16 N=128 P=128", partial(delta_convolution, 16, 128, 128)
    yield "delta prompts P=128 N=128", partial(delta_prompts, 128, 128)
    for tokens in (1, 2, 4, 8, 16):
        yield f"conv T={tokens}", partial(conv, tokens)
    for tokens, batch in ((1, 1), (2, 8)):
        yield f"in-projection T={tokens} B={batch}", partial(in_projection, tokens, batch)
    for num_rows, (inner, columns) in itertools.product(
        (1, 4, 16, 64), ((2560, 10576), (768, 768))
    ):
        yield projection_case(num_rows, inner, columns)
    yield "row steps D=2560", partial(row_steps, 2560)
    for tokens in (1, 16):
        yield attention_case(tokens, 4, 128)
    for head_dim, state_dim in LAYERS:
        yield f"prompts P={head_dim} N={state_dim}", partial(prompts, head_dim, state_dim)
    yield "prompt attention D=128", partial(prompt_attend, 4, 128)
    yield attention_case(8, 6, 256, gated=True)
    yield moe_case(2, 6, 2688, 1856, "relu2")
    for num_rows in (1, 4):
        yield router_case(num_rows, *ROUTERS[0])
    yield "uniforms X=50288", partial(uniform_numbers, 50288)
    for tokens, num_children in ((1, 1), (16, 4), (256, 16)):
        yield f"end of step T={tokens} C={num_children}", partial(end_of_step, tokens, num_children)
    for sizes in ((8, 7, 1), (13, 4, 4), (64, 8, 16)):
        yield f"sampled step T, I, C = {sizes}", partial(sampled_step, *sizes)
    yield from aot_fp8.quick_cases()


def all_cases() -> Iterator[tuple[str, Case]]:
    """Yield every configuration of every kernel, at sizes that models have."""
    yield from quick_cases()
    for (head_dim, state_dim), tokens in itertools.product(OTHER_LAYERS, (1, 16, 32, 64, 256)):
        for many in (False, True):
            yield scan_case(tokens, head_dim, state_dim, many=many)
    for (head_dim, state_dim), tokens in itertools.product(LAYERS, (1, 16, 256)):
        yield scan_case(tokens, head_dim, state_dim, dtype=FP32)
    yield from delta_cases()
    for tokens in (1, 16, 64, 256):
        yield scan_case(tokens, 64, 128, state=BF16)
        yield scan_case(tokens, 64, 128, commit=False)
        yield scan_case(tokens, 64, 128, gated=False)
    for tokens, dtype, commit in itertools.product((1, 4, 16), (BF16, FP32), (True, False)):
        run = partial(conv, tokens, dtype=dtype, commit=commit)
        yield f"conv T={tokens} {dtype} commit={commit}", run
    for tokens, dtype, commit in itertools.product((1, 16), (BF16, FP16), (True, False)):
        run = partial(in_projection, tokens, 1, dtype=dtype, commit=commit)
        yield f"in-projection T={tokens} {dtype} commit={commit}", run
    yield "in-projection T=1 fp32", partial(in_projection, 1, 1, dtype=FP32)
    for num_rows, dtype in itertools.product((1, 2, 8, 16, 32, 64), (BF16, FP32)):
        for inner, columns in ((4096, 10272), (768, 3360), (5120, 2560), (1536, 768)):
            yield projection_case(num_rows, inner, columns, dtype=dtype)
        yield projection_case(num_rows, 4096, 4096, dtype=dtype, groups=32)
    for columns, dtype in itertools.product((768, 4096), (BF16, FP32)):
        yield f"row steps D={columns} {dtype}", partial(row_steps, columns, dtype=dtype)
    for tokens, group, head_dim in itertools.product((1, 16, 64), (1, 4, 16), (64, 128)):
        for dtype in (BF16, FP32):
            yield attention_case(tokens, group, head_dim, dtype=dtype)
    for tokens, group in itertools.product((1, 16, 64), (3, 5)):
        yield attention_case(tokens, group, 128)
    for tokens, group, dtype in itertools.product((1, 16, 64), (4, 6, 8), (BF16, FP16)):
        yield attention_case(tokens, group, 256, dtype=dtype, gated=True)
    for hidden, inner, activation in MLPS:
        for num_rows in (1, 2, 16, 64):
            name = f"mlp M={num_rows} {inner}x{hidden} {activation}"
            yield name, partial(mlp, num_rows, hidden, inner, activation)
    for sizes, dtype in itertools.product(EXPERTS, (BF16, FP16, FP32)):
        yield moe_case(2, *sizes, dtype=dtype)
    for router, num_rows in itertools.product(ROUTERS, (1, 2, 4)):
        yield router_case(num_rows, *router)
    for dtype in (FP16, FP32):
        yield router_case(4, *ROUTERS[0], dtype=dtype)
    yield from prompt_cases()
    yield from fp16_cases()
    yield from aot_fp8.more_cases()


def prompt_cases() -> Iterator[tuple[str, Case]]:
    """Yield the kernels that read prompts."""
    for head_dim, state_dim in (*LAYERS, *OTHER_LAYERS):
        for dtype in (BF16, FP16, FP32):
            if dtype != FP32 or state_dim <= 128:
                run = partial(prompts, head_dim, state_dim, dtype=dtype)
                yield f"prompts P={head_dim} N={state_dim} {dtype}", run
    yield "prompts P=64 N=128 state bf16", partial(prompts, 64, 128, state=BF16)
    for head_dim, dtype in itertools.product((16, 64, 128, 256), (BF16, FP16, FP32)):
        if dtype != FP32 or head_dim <= 128:
            run = partial(prompt_attend, 4, head_dim, dtype=dtype)
            yield f"prompt attention D={head_dim} {dtype}", run


def fp16_cases() -> Iterator[tuple[str, Case]]:
    """Yield every kernel in fp16, at the sizes where it takes most."""
    for (head_dim, state_dim), tokens in itertools.product(
        (*LAYERS, *OTHER_LAYERS), (1, 16, 32, 64)
    ):
        for many in (False, True):
            yield scan_case(tokens, head_dim, state_dim, dtype=FP16, many=many)
    yield scan_case(64, 64, 128, dtype=FP16, commit=False, gated=False)
    for tokens in (1, 16):
        yield f"conv T={tokens} fp16", partial(conv, tokens, dtype=FP16)
    for num_rows in (1, 8, 16, 64):
        yield projection_case(num_rows, 4096, 10272, dtype=FP16)
        yield projection_case(num_rows, 1536, 768, dtype=FP16)
        yield projection_case(num_rows, 4096, 4096, dtype=FP16, groups=32)
    yield "row steps D=4096 fp16", partial(row_steps, 4096, dtype=FP16)
    for tokens, head_dim in itertools.product((1, 16, 64), (64, 128)):
        yield attention_case(tokens, 4, head_dim, dtype=FP16)


def delta_cases() -> Iterator[tuple[str, Case]]:
    """Yield the kernels of gated delta layers."""
    for (head_dim, state_dim), tokens in itertools.product(DELTA_LAYERS, (1, 16, 32, 64, 256)):
        for many, dtype in itertools.product((False, True), (BF16, FP16)):
            yield delta_case(tokens, head_dim, state_dim, many=many, dtype=dtype)
    for tokens in (1, 16, 256):
        yield delta_case(tokens, 64, 64, dtype=FP32)
        yield delta_case(tokens, 128, 128, gated=False)
    for first, tokens in itertools.product((1, 20, 50), (8, 32)):
        yield delta_case(tokens, 128, 128, first=first)
    for (head_dim, state_dim), dtype in itertools.product(DELTA_LAYERS, (BF16, FP16, FP32)):
        for gated in (False, True):
            run = partial(delta_prompts, head_dim, state_dim, dtype=dtype, gated=gated)
            yield f"delta prompts P={head_dim} N={state_dim} {dtype} gated={gated}", run
    for tokens, dtype, commit in itertools.product((1, 16), (BF16, FP16, FP32), (True, False)):
        run = partial(delta_convolution, tokens, 128, 64, dtype=dtype, commit=commit)
        yield f"delta conv T={tokens} {dtype} commit={commit}", run


def delta_case(tokens: int, head_dim: int, state_dim: int, **options: Any) -> tuple[str, Case]:
    """Return a gated delta scan and its name."""
    words = " ".join(f"{key}={value}" for key, value in options.items())
    name = f"delta T={tokens} P={head_dim} N={state_dim} {words}".replace("torch.", "")
    return name, partial(delta, tokens, head_dim, state_dim, **options)


def scan_case(tokens: int, head_dim: int, state_dim: int, **options: Any) -> tuple[str, Case]:
    """Return a scan and its name."""
    words = " ".join(f"{key}={value}" for key, value in options.items())
    name = f"scan T={tokens} P={head_dim} N={state_dim} {words}".replace("torch.", "")
    return name, partial(scan, tokens, head_dim, state_dim, **options)


def moe_case(num_rows: int, *sizes: Any, **options: Any) -> tuple[str, Case]:
    """Return experts of one size and their name."""
    words = " ".join(map(str, [*sizes, *options.values()]))
    name = f"experts M={num_rows} {words}".replace("torch.", "")
    return name, partial(moe, num_rows, *sizes, **options)


def router_case(num_rows: int, *sizes: Any, **options: Any) -> tuple[str, Case]:
    """Return a router of one size and its name."""
    words = " ".join(map(str, [*sizes[:3], sizes[3].num_chosen, *options.values()]))
    name = f"router M={num_rows} {words}".replace("torch.", "")
    return name, partial(route, num_rows, *sizes, **options)


def projection_case(num_rows: int, inner: int, columns: int, **options: Any) -> tuple[str, Case]:
    """Return projections of one size and their name."""
    words = " ".join(f"{key}={value}" for key, value in options.items())
    name = f"projections M={num_rows} {columns}x{inner} {words}".replace("torch.", "")
    return name, partial(projections, num_rows, inner, columns, **options)


def attention_case(tokens: int, group: int, head_dim: int, **options: Any) -> tuple[str, Case]:
    """Return an attention and its name."""
    words = " ".join(f"{key}={value}" for key, value in options.items())
    name = f"attention T={tokens} group={group} D={head_dim} {words}".replace("torch.", "")
    return name, partial(attention, tokens, group, head_dim, **options)
