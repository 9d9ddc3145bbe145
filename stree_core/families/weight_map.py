"""A mixer with its weights in a checkpoint: the names that most families share, and multipliers.

Multipliers are folded into weights when they are loaded. Every function takes the width of the
rows that the part reads and the prefix of its keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from stree_core.families.model_shape import (
    AttentionShape,
    DeltaShape,
    GatedAttentionShape,
    Mamba2Shape,
    MlpShape,
    MoeShape,
    Part,
    SharedMoeShape,
    Weight,
)


def vector(key: str, size: int, scale: float = 1.0) -> Weight:
    """Return a weight of one dimension."""
    return Weight((key,), (size,), _runs([size], [scale]))


def matrix(key: str, rows: int, columns: int, scale: float = 1.0) -> Weight:
    """Return a weight of two dimensions."""
    return Weight((key,), (rows, columns), _runs([rows], [scale]))


def mamba2_part(
    mixer: Mamba2Shape,
    width: int,
    prefix: str,
    *,
    in_scales: Sequence[float] = (1.0,) * 5,
    out_scale: float = 1.0,
) -> Part:
    """Return a Mamba2 part; `in_scales` multiply gate, x, B, C and dt."""
    in_runs = _runs(mixer.proj_sections, in_scales)
    weights = {
        "in_proj": Weight((prefix + "in_proj.weight",), (mixer.proj_dim, width), in_runs),
        "conv": matrix(prefix + "conv1d.weight", mixer.conv_dim, mixer.conv_width),
        "dt_bias": vector(prefix + "dt_bias", mixer.num_heads),
        "a_log": vector(prefix + "A_log", mixer.num_heads),
        "skip": vector(prefix + "D", mixer.num_heads),
        "out_proj": matrix(prefix + "out_proj.weight", width, mixer.inner_dim, out_scale),
    }
    if mixer.conv_bias:
        weights["conv_bias"] = vector(prefix + "conv1d.bias", mixer.conv_dim)
    if mixer.norm_groups:
        weights["norm"] = vector(prefix + "norm.weight", mixer.inner_dim)
    return Part(mixer, weights)


def centred(key: str, size: int) -> Weight:
    """Return the weight of a zero-centred norm: what is stored is added to 1."""
    return Weight((key,), (size,), offset=1.0)


def delta_part(mixer: DeltaShape, width: int, prefix: str, *, by_key_head: bool) -> Part:
    """Return a gated delta rule part.

    With `by_key_head` two projections hold, for one key head after another, its q, k, v and z, and
    its beta and decay; otherwise four hold the heads of all.
    """
    names = ("qkvz", "ba") if by_key_head else ("z", "qkv", "a", "b")
    order = _by_key_head(mixer) if by_key_head else ()
    keys = tuple(f"{prefix}in_proj_{name}.weight" for name in names)
    heads, wide = mixer.num_value_heads, mixer.inner_dim + mixer.conv_dim
    rows = (wide, 2 * heads) if by_key_head else (mixer.inner_dim, mixer.conv_dim, heads, heads)
    in_proj = Weight(keys, (mixer.proj_dim, width), row_order=order, part_rows=rows)
    weights = {
        "in_proj": in_proj,
        "conv": matrix(prefix + "conv1d.weight", mixer.conv_dim, mixer.conv_width),
        "dt_bias": vector(prefix + "dt_bias", mixer.num_value_heads),
        "a_log": vector(prefix + "A_log", mixer.num_value_heads),
        "norm": vector(prefix + "norm.weight", mixer.value_head_dim),
        "out_proj": matrix(prefix + "out_proj.weight", width, mixer.inner_dim),
    }
    return Part(mixer, weights)


def _by_key_head(mixer: DeltaShape) -> tuple[tuple[int, int], ...]:
    """Return the rows of gate, q, k, v, decay and beta where each key head has its own together."""
    values = mixer.inner_dim // mixer.num_key_heads
    heads = mixer.num_value_heads // mixer.num_key_heads
    q, k, v, z = _strided(mixer.num_key_heads, (*[mixer.key_head_dim] * 2, values, values))
    behind = mixer.inner_dim + mixer.conv_dim
    b, a = _strided(mixer.num_key_heads, (heads, heads), behind)
    return (*z, *q, *k, *v, *a, *b)


def _strided(count: int, sizes: Sequence[int], first: int = 0) -> list[tuple[tuple[int, int], ...]]:
    """Return for each section of `count` like groups of rows its runs (first row, rows)."""
    starts = [first + sum(sizes[:place]) for place in range(len(sizes))]
    return [
        tuple((start + group * sum(sizes), size) for group in range(count))
        for start, size in zip(starts, sizes, strict=True)
    ]


def gated_attention_part(mixer: GatedAttentionShape, width: int, prefix: str) -> Part:
    """Return an attention part whose query projection holds, for each head, queries and a gate."""
    queries, keys = (n * mixer.head_dim for n in (mixer.num_heads, mixer.num_kv_heads))
    q, gate = _strided(mixer.num_heads, (mixer.head_dim, mixer.head_dim))
    qkv_proj = Weight(
        tuple(f"{prefix}{name}_proj.weight" for name in "qkv"),
        (2 * queries + 2 * keys, width),
        row_order=(*q, (2 * queries, 2 * keys), *gate),
    )
    weights = {
        "qkv_proj": qkv_proj,
        "q_norm": centred(prefix + "q_norm.weight", mixer.head_dim),
        "k_norm": centred(prefix + "k_norm.weight", mixer.head_dim),
        "o_proj": matrix(prefix + "o_proj.weight", width, queries),
    }
    return Part(mixer, weights)


def attention_part(
    mixer: AttentionShape,
    width: int,
    prefix: str,
    *,
    out_width: int | None = None,
    in_scale: float = 1.0,
    key_scale: float = 1.0,
    out_scale: float = 1.0,
    adapters: tuple[tuple[str, str], ...] = (),
) -> Part:
    """Return an attention part; `key_scale` multiplies keys besides `in_scale`."""
    queries, keys = (n * mixer.head_dim for n in (mixer.num_heads, mixer.num_kv_heads))
    qkv_proj = Weight(
        tuple(f"{prefix}{name}_proj.weight" for name in "qkv"),
        (queries + 2 * keys, width),
        _runs((queries, keys, keys), (in_scale, in_scale * key_scale, in_scale)),
        adapters,
    )
    o_proj = matrix(prefix + "o_proj.weight", out_width or width, queries, out_scale)
    return Part(mixer, {"qkv_proj": qkv_proj, "o_proj": o_proj})


def mlp_part(
    mixer: MlpShape,
    width: int,
    prefix: str,
    *,
    up_names: tuple[str, ...] = ("gate_proj.weight", "up_proj.weight"),
    down_name: str = "down_proj.weight",
    gate_scale: float = 1.0,
    out_scale: float = 1.0,
    adapters: tuple[tuple[str, str], ...] = (),
) -> Part:
    """Return an MLP part; `up_names` are stacked to gate and up, or to up alone."""
    up_proj = Weight(
        tuple(prefix + name for name in up_names),
        (mixer.up_dim, width),
        _runs((mixer.inner_dim, mixer.up_dim - mixer.inner_dim), (gate_scale, 1.0)),
        adapters,
    )
    down_proj = matrix(prefix + down_name, width, mixer.inner_dim, out_scale)
    return Part(mixer, {"up_proj": up_proj, "down_proj": down_proj})


def moe_part(
    mixer: MoeShape,
    width: int,
    *,
    router_key: str,
    up_keys: tuple[str, ...],
    down_keys: tuple[str, ...],
    bias_key: str | None = None,
    latent_keys: tuple[str, str] | None = None,
    out_scale: float = 1.0,
) -> Part:
    """Return an experts part; the keys of stacks are one for all experts or one for each."""
    expert, num_experts = mixer.expert, mixer.num_experts
    inner = mixer.latent_dim or width
    stack_scale = 1.0 if mixer.latent_dim else out_scale
    weights = {
        "router": matrix(router_key, num_experts, width),
        "up_proj": Weight(up_keys, (num_experts, expert.up_dim, inner)),
        "down_proj": Weight(
            down_keys,
            (num_experts, inner, expert.inner_dim),
            _runs([num_experts], [stack_scale]),
        ),
    }
    if bias_key is not None:
        weights["bias"] = vector(bias_key, num_experts)
    if latent_keys is not None:
        weights["latent_in"] = matrix(latent_keys[0], inner, width)
        weights["latent_out"] = matrix(latent_keys[1], width, inner, out_scale)
    return Part(mixer, weights)


def shared_moe_part(mixer: SharedMoeShape, width: int, prefix: str) -> Part:
    """Return experts beside a shared one; the routed ones are stored packed, or one by one."""
    expert, num_experts = mixer.expert, mixer.num_experts
    experts = [f"{prefix}experts.{index}." for index in range(num_experts)]
    shared = prefix + "shared_expert."
    inner_dim = mixer.num_shared * expert.inner_dim
    weights = {
        "router": matrix(prefix + "gate.weight", num_experts, width),
        "shared_gate": matrix(prefix + "shared_expert_gate.weight", 1, width),
        "up_proj": Weight(
            tuple(f"{e}{name}_proj.weight" for e in experts for name in ("gate", "up")),
            (num_experts, expert.up_dim, width),
            other_keys=((prefix + "experts.gate_up_proj",),),
        ),
        "down_proj": Weight(
            tuple(e + "down_proj.weight" for e in experts),
            (num_experts, width, expert.inner_dim),
            other_keys=((prefix + "experts.down_proj",),),
        ),
        "shared_up": Weight(
            tuple(f"{shared}{name}_proj.weight" for name in ("gate", "up")), (2 * inner_dim, width)
        ),
        "shared_down": matrix(shared + "down_proj.weight", width, inner_dim),
    }
    return Part(mixer, weights)


def _runs(counts: Sequence[int], scales: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Return runs of rows and their factors, none when all factors are 1."""
    if all(scale == 1.0 for scale in scales):
        return ()
    return tuple(zip(counts, scales, strict=True))
