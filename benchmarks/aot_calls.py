"""Calls of every op as a model makes them, on tensors on the CPU, for `aot_cases.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from stree_kernels.attention import (
    output_gate,
    prompt_attention,
    rope_kv_write as key_rows,
    tree_attention,
)
from stree_kernels.attention.rope_kv_write_ref import HeadNorms, KeyValues
from stree_kernels.delta import delta_chunk_scan, delta_conv, delta_scan
from stree_kernels.delta.delta_chunk_scan_ref import PackedTokens
from stree_kernels.delta.delta_conv_ref import DeltaConvOutput, DeltaProjection
from stree_kernels.delta.rows import DeltaHeads, DeltaPast, DeltaRows, DeltaTokens
from stree_kernels.launch.packing import Packing
from stree_kernels.launch.rows import (
    MASK_MULTIPLE,
    MAX_BUFFERED,
    ConvTail,
    Gate,
    Past,
    Pending,
    ScanHeads,
    ScanRows,
    gate_width,
)
from stree_kernels.launch.settings import GATED, Activation, Routing
from stree_kernels.linear import experts, linear, residual
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM, DeferredNorm, Residual
from stree_kernels.routing import router as routers
from stree_kernels.routing.router_ref import Router
from stree_kernels.sampling import children as sampling, commit_path, top_tokens, uniforms
from stree_kernels.sampling.commit_path_ref import PathMemory, TreeTables
from stree_kernels.ssm import prompt_conv, prompt_scan, tree_conv, tree_scan
from stree_kernels.ssm.prompt_scan_ref import PromptTokens

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def scan(
    tokens: int, head_dim: int, state_dim: int, *, dtype: torch.dtype = BF16,
    state: torch.dtype = FP32, many: bool = False, commit: bool = True, gated: bool = True,
) -> None:  # fmt: skip
    """Run a scan of few or many programs."""
    batch, heads, groups = (64 if many else 1), 16, 2
    sections = (heads * head_dim, groups * state_dim, groups * state_dim, heads)
    buffer = torch.empty(MAX_BUFFERED + 2 * tokens, batch, sum(sections), dtype=dtype).transpose(
        0, 1
    )
    x, b, c, dt = buffer.split(sections, dim=-1)
    all_rows = ScanRows(
        x.unflatten(-1, (heads, head_dim)), dt, b.unflatten(-1, (groups, state_dim))
    )
    rows = ScanRows(*(tensor[:, MAX_BUFFERED:] for tensor in all_rows))
    out = torch.empty(tokens, batch, heads, head_dim, dtype=dtype).transpose(0, 1)
    num_sums = heads * head_dim // gate_width(head_dim, state_dim, dtype)
    sums = torch.empty(tokens, batch, num_sums).transpose(0, 1)
    tree_scan.tree_scan(
        torch.empty(batch, heads, head_dim, state_dim, dtype=state), rows,
        c[:, MAX_BUFFERED : MAX_BUFFERED + tokens].unflatten(-1, (groups, state_dim)),
        make_mask(tokens), ScanHeads(*torch.empty(3, heads)), first=0,
        dt_limit=(0.0, 1.0), out_BTHP=out,
        gate=Gate(torch.empty_like(out), sums) if gated else None,
        past=Past(all_rows, MAX_BUFFERED, pending(batch), commit),
    )  # fmt: skip


def delta(
    tokens: int, head_dim: int, state_dim: int, *, dtype: torch.dtype = BF16, many: bool = False,
    first: int = 0, gated: bool = True,
) -> None:  # fmt: skip
    """Run a gated delta scan of few or many programs, of a whole block or of its last rows."""
    batch, heads, key_heads = (64 if many else 1), 16, 8
    num_rows = MAX_BUFFERED + 2 * (first + tokens)

    def rows(count: int, *size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(count, batch, *size, dtype=dtype).transpose(0, 1)

    all_rows = DeltaRows(
        rows(num_rows, heads, head_dim, dtype=FP32), rows(num_rows, key_heads, state_dim),
        rows(num_rows, heads, dtype=FP32),
    )  # fmt: skip
    out = rows(tokens, heads, head_dim)
    num_sums = heads * head_dim // gate_width(head_dim, state_dim, dtype)
    delta_scan.delta_scan(
        torch.empty(batch, heads, head_dim, state_dim),
        DeltaRows(*(tensor[:, MAX_BUFFERED:] for tensor in all_rows)),
        DeltaTokens(
            rows(tokens, key_heads, state_dim), torch.empty_like(out),
            rows(tokens, heads, dtype=FP32),
        ),
        make_mask(first + tokens), first=first, out_BTHP=out,
        gate=Gate(torch.empty_like(out), rows(tokens, num_sums, dtype=FP32)) if gated else None,
        past=DeltaPast(all_rows, MAX_BUFFERED, pending(batch), first == 0),
    )  # fmt: skip


def delta_convolution(
    tokens: int, key_dim: int, head_dim: int, *, dtype: torch.dtype = BF16, commit: bool = True
) -> None:
    """Run the conv of a gated delta layer, of width 4."""
    key_heads, heads = 2, 4
    channels = 2 * key_heads * key_dim + heads * head_dim
    rows = torch.empty(tokens, 1, channels + 2 * heads, dtype=dtype).transpose(0, 1)
    qkv, a, b = rows.split((channels, heads, heads), dim=-1)
    gates = torch.empty(2, 1, tokens, heads)
    delta_conv.delta_conv(
        torch.empty(1, channels, 3, dtype=dtype), DeltaProjection(qkv, a, b),
        torch.empty(channels, 4, dtype=dtype), DeltaHeads(*torch.empty(2, heads)),
        torch.zeros(tokens, 3, dtype=torch.int32), num_key_heads=key_heads, key_head_dim=key_dim,
        first=0, num_tokens=tokens, out=DeltaConvOutput(torch.empty_like(qkv), *gates),
        previous_BRC=qkv if commit else None, pending=pending(1) if commit else None,
    )  # fmt: skip


def delta_prompts(
    head_dim: int, state_dim: int, *, dtype: torch.dtype = BF16, gated: bool = True
) -> None:
    """Read two prompts of a gated delta layer."""
    tokens, heads, key_heads = 100, 4, 2
    q, k = torch.empty(2, tokens, key_heads, state_dim, dtype=dtype)
    v = torch.empty(tokens, heads, head_dim, dtype=dtype)
    sums = torch.empty(tokens, heads * head_dim // gate_width(head_dim, state_dim, dtype))
    delta_chunk_scan.delta_chunk_scan(
        torch.empty(2, heads, head_dim, state_dim),
        PackedTokens(q, k, v, *torch.empty(2, tokens, heads)),
        make_packing(), out_MHP=torch.empty_like(v),
        gate=Gate(torch.empty_like(v), sums) if gated else None,
    )  # fmt: skip


def conv(tokens: int, *, dtype: torch.dtype = BF16, commit: bool = True) -> None:
    """Run a conv of width 4."""
    channels, columns = 256, 272
    rows = torch.empty(tokens, 1, columns, dtype=dtype).transpose(0, 1)
    tree_conv.tree_conv(
        torch.empty(1, channels, 3, dtype=dtype), rows, torch.empty(channels, 4, dtype=dtype),
        torch.empty(channels, dtype=dtype), torch.zeros(tokens, 3, dtype=torch.int32), first=0,
        num_tokens=tokens, out_BRE=torch.empty_like(rows), previous_BRE=rows if commit else None,
        pending=pending(1) if commit else None,
    )  # fmt: skip


def in_projection(
    tokens: int, batch: int, *, dtype: torch.dtype = BF16, commit: bool = True
) -> None:
    """Run a short in-projection with a conv of width 4 behind some of its columns."""
    hidden, inner, channels, columns = 768, 256, 128, 400
    values = torch.empty(tokens * batch, hidden, dtype=dtype)
    rows = DeferredNorm(values, torch.empty(tokens * batch, hidden // COLUMNS_PER_SUM), 1, 1e-5)
    product = torch.empty(tokens, batch, columns, dtype=dtype)
    inputs = product[..., inner:].transpose(0, 1)
    tail = ConvTail(
        torch.empty(batch, channels, 3, dtype=dtype), inputs,
        torch.empty(channels, 4, dtype=dtype), torch.empty(channels, dtype=dtype),
        torch.zeros(tokens, 3, dtype=torch.int32), 0, torch.empty_like(inputs),
        inputs if commit else None, pending(batch) if commit else None, inner,
    )  # fmt: skip
    weight = torch.empty(columns, hidden, dtype=dtype)
    assert linear.takes_conv(len(values), weight, one_token=tokens == 1)
    linear.linear_conv(rows, weight, product.flatten(0, 1), tail, one_token=tokens == 1)


def projections(
    num_rows: int, num_inner: int, num_columns: int, *, dtype: torch.dtype = BF16, groups: int = 1
) -> None:
    """Run what a model runs of projections: plain with a norm, gated MLP, fp32 logits, added."""
    # The scan sums 64 columns at a time, two runs for each of 32 groups of 128.
    num_sums = num_inner // COLUMNS_PER_SUM if groups == 1 else 2 * groups
    sums = torch.empty(num_rows, num_sums)
    rows = DeferredNorm(torch.empty(num_rows, num_inner, dtype=dtype), sums, groups, 1e-5)
    weight = torch.empty(num_columns, num_inner, dtype=dtype)
    out = torch.empty(num_rows, num_columns, dtype=dtype)
    linear.linear(rows, weight, out)
    linear.linear_activated(rows, weight, out[:, : num_columns // 2].contiguous(), "swiglu")
    linear.linear(rows._replace(square_sums_MQ=None), weight, out.float())
    sums_out = torch.empty(num_rows, num_columns // COLUMNS_PER_SUM)
    linear.linear_add(rows, weight, Residual(out, out, sums_out), eps=1e-5)
    if dtype != FP32:
        linear.linear_add(rows, weight, Residual(out.float(), out, sums_out), eps=1e-5)


def mlp(num_rows: int, hidden: int, inner: int, activation: Activation) -> None:
    """Run both projections of a dense MLP in bf16, with a stream in fp32."""
    values = torch.empty(num_rows, hidden, dtype=BF16)
    sums = torch.empty(num_rows, hidden // COLUMNS_PER_SUM)
    stream = Residual(values.float(), values, sums)
    num_products = 2 * inner if activation in GATED else inner
    out = torch.empty(num_rows, inner, dtype=BF16)
    linear.linear_activated(
        stream.rows(1e-5), torch.empty(num_products, hidden, dtype=BF16), out, activation
    )
    down = torch.empty(hidden, inner, dtype=BF16)
    linear.linear_add(DeferredNorm(out, None, 1, 0.0), down, stream, eps=1e-5)


def moe(
    num_rows: int, num_chosen: int, hidden: int, inner: int, activation: Activation, *,
    dtype: torch.dtype = BF16,
) -> None:  # fmt: skip
    """Run the experts of some rows, with an output in fp32."""
    num_products = 2 * inner if activation in GATED else inner
    choice = torch.zeros(num_rows, num_chosen, dtype=torch.int64)
    experts.expert_mlps(
        torch.empty(num_rows, hidden, dtype=dtype), choice, torch.empty(num_rows, num_chosen),
        torch.empty(2, num_products, hidden, dtype=dtype),
        torch.empty(2, hidden, inner, dtype=dtype), torch.empty(num_rows, hidden),
        activation=activation,
    )  # fmt: skip


def route(
    num_rows: int, hidden: int, num_experts: int, num_shared: int, routing: Routing, *,
    dtype: torch.dtype = BF16,
) -> None:  # fmt: skip
    """Choose the experts of some rows; sigmoid routing has a bias."""
    values = torch.empty(num_rows, hidden, dtype=dtype)
    rows = DeferredNorm(values, torch.empty(num_rows, hidden // COLUMNS_PER_SUM), 1, 1e-5)
    bias = torch.empty(num_experts) if routing.kind == "sigmoid" else None
    weight = torch.empty(num_experts + (num_shared > 0), hidden)
    router = Router(torch.empty(hidden), weight, bias, routing, num_shared)
    routers.route(rows, router, torch.empty_like(values))


def row_steps(num_columns: int, *, dtype: torch.dtype = BF16) -> None:
    """Run the row-wise steps between projections."""
    values = torch.empty(2, num_columns, dtype=dtype)
    stream = Residual(
        values if dtype == FP32 else values.float(), values,
        torch.empty(2, num_columns // COLUMNS_PER_SUM),
    )  # fmt: skip
    residual.start_residual(values, torch.zeros(2, dtype=torch.int64), stream)
    tokens, joined = torch.zeros(2, 1, dtype=torch.int64), values.new_empty(2, 2 * num_columns)
    residual.join_rows(values, tokens, values[:, None], tokens, joined, eps=1e-5)
    residual.add_residual(values.float(), stream)
    residual.scale_rows(stream.rows(1e-5), values[0].contiguous(), torch.empty_like(values))
    residual.activate(
        values, torch.empty_like(values[:, : num_columns // 2].contiguous()), "swiglu"
    )


def attention(
    tokens: int, group: int, head_dim: int, *, dtype: torch.dtype = BF16, gated: bool = False
) -> None:
    """Store keys and attend, `group` query heads for each of two kv heads.

    `gated`: with norms of heads, a quarter of each rotated, and a gate behind.
    """
    kv_heads, positions = 2, 256
    heads = group * kv_heads
    rows = KeyValues(*torch.empty(2, tokens, 1, kv_heads, head_dim, dtype=dtype))
    cache = KeyValues(*torch.empty(2, 1, positions, kv_heads, head_dim, dtype=dtype))
    q = torch.empty(tokens, 1, heads, head_dim, dtype=dtype)
    counts = torch.zeros(1, dtype=torch.int32)
    key_rows.rope_kv_write(
        torch.empty(tokens, 1, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
        torch.zeros(tokens, dtype=torch.int32), counts,
        torch.empty(head_dim // (8 if gated else 2)), first=0,
        q_TBHD=q, rows=rows, cache=cache, previous=rows, pending=pending(1),
        norms=HeadNorms(torch.empty(head_dim), torch.empty(head_dim), 1e-6) if gated else None,
    )  # fmt: skip
    if gated:
        columns = torch.empty(tokens, 2 * heads * head_dim, dtype=dtype)
        output_gate.gate_output(columns[:, heads * head_dim :], q.view(tokens, -1))
    num_values = tree_attention.workspace_size(tokens, 1, heads, kv_heads, head_dim, dtype)
    tree_attention.tree_attention(
        q, cache, rows, make_mask(tokens), counts, first=0, scale=0.1,
        out_TBHD=torch.empty_like(q), workspace=torch.empty(num_values),
    )  # fmt: skip


def prompts(
    head_dim: int, state_dim: int, *, dtype: torch.dtype = BF16, state: torch.dtype = FP32
) -> None:
    """Read two prompts of a Mamba2 layer, with a conv of width 4; then with none of them long."""
    tokens, heads, groups = 1500, 16, 2
    sections = (heads * head_dim, groups * state_dim, groups * state_dim)
    inner, channels = sections[0], sum(sections)
    rows = torch.empty(tokens, inner + channels + heads, dtype=dtype)
    z, inputs, dt = rows.split((inner, channels, heads), dim=-1)
    packing = make_packing()
    outputs = torch.empty(tokens, channels, dtype=dtype)
    prompt_conv.prompt_conv(
        torch.empty(2, channels, 3, dtype=dtype), inputs, torch.empty(channels, 4, dtype=dtype),
        torch.empty(channels, dtype=dtype), packing, out_MC=outputs,
    )  # fmt: skip
    x, b, c = outputs.split(sections, dim=-1)
    sums = torch.empty(tokens, inner // gate_width(head_dim, state_dim, dtype))
    for longest in (prompt_scan.SEGMENT + 1, prompt_scan.SEGMENT):
        prompt_scan.prompt_scan(
            torch.empty(2, heads, head_dim, state_dim, dtype=state),
            PromptTokens(
                x.unflatten(-1, (heads, head_dim)), dt, b.unflatten(-1, (groups, state_dim)),
                c.unflatten(-1, (groups, state_dim)),
            ),
            ScanHeads(*torch.empty(3, heads)), packing, longest=longest, dt_limit=(0.0, 1.0),
            out_MHP=torch.empty(tokens, heads, head_dim, dtype=dtype),
            gate=Gate(z.unflatten(-1, (heads, head_dim)), sums),
        )  # fmt: skip


def prompt_attend(group: int, head_dim: int, *, dtype: torch.dtype = BF16) -> None:
    """Store the keys of two prompts and attend, `group` query heads for each of two kv heads."""
    tokens, kv_heads = 300, 2
    cache = KeyValues(*torch.empty(2, 2, 400, kv_heads, head_dim, dtype=dtype))
    q = torch.empty(tokens, group * kv_heads, head_dim, dtype=dtype)
    qkv = torch.empty(tokens, (group + 2) * kv_heads * head_dim, dtype=dtype)
    prompt_attention.prompt_kv_write(
        qkv, make_packing(), torch.empty(head_dim // 2), q_MHD=q, cache=cache
    )
    prompt_attention.prompt_attention(
        q, cache, make_packing(), scale=0.1, out_MHD=torch.empty_like(q)
    )


def make_packing() -> Packing:
    """Return the tables of two prompts."""
    return Packing(*(torch.zeros(count, dtype=torch.int32) for count in (3, 2, 2)))


def uniform_numbers(num_columns: int) -> None:
    """Fill two rows of numbers of each of three sequences."""
    seeds, steps = torch.zeros(2, 3, dtype=torch.int64)
    uniforms.fill_uniforms(seeds, steps, torch.empty(2, 3, num_columns), stream=0)


def end_of_step(tokens: int, num_children: int) -> None:
    """Find the likeliest tokens of every node, then commit a path of three slots."""
    rows = torch.zeros(tokens, num_children, dtype=torch.int64)
    chosen, logits = torch.zeros(tokens, 3, dtype=torch.int64), torch.empty(tokens, 3, 50288)
    top_tokens.place_top_tokens(logits, rows, chosen)
    tables = TreeTables(*torch.zeros(2, tokens, dtype=torch.int64))
    memory = PathMemory(
        torch.zeros(tokens, 4, dtype=torch.int64), pending(3), torch.zeros(3, dtype=torch.int32)
    )
    commit_path.commit_path(
        torch.zeros(tokens + 1, 3, dtype=torch.int64), chosen, logits, tables,
        torch.ones(3, dtype=torch.int32), torch.zeros(7, 3, dtype=torch.int64), [memory, memory],
    )  # fmt: skip


def sampled_step(tokens: int, num_inner: int, num_children: int) -> None:
    """Draw children, sample after every node and try the children, for three slots."""

    def scores(num_rows: int) -> Tensor:
        return torch.empty(num_rows, 3, 50288)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(*sizes, dtype=torch.int64)

    heat, chosen, uniforms = torch.ones(3), zeros(tokens, 3), torch.empty(tokens, 3)
    table = zeros(num_inner, num_children)
    sampling.place_drawn_tokens(
        scores(num_inner), heat, zeros(3), zeros(3), table, chosen, stream=3
    )
    sampling.sample_tokens(scores(tokens), heat, uniforms, chosen)
    sampling.try_children(
        scores(tokens), scores(num_inner), heat, zeros(num_inner), table, zeros(tokens, 3),
        torch.empty(num_inner, 3, num_children), uniforms, chosen,
    )  # fmt: skip


def make_mask(tokens: int) -> Tensor:
    return torch.ones(tokens, -(-tokens // MASK_MULTIPLE) * MASK_MULTIPLE, dtype=torch.bool)


def pending(batch: int) -> Pending:
    counts = torch.zeros(2, batch, dtype=torch.int32)
    return Pending(torch.zeros(batch, 4, dtype=torch.int32), *counts)
