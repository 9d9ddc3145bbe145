"""A mixer with its weights in a checkpoint: the names that most families share, and multipliers.

Multipliers are folded into weights when they are loaded. Every function takes the width of the
rows that the part reads and the prefix of its keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from stree_core.families.model_shape import (
    AttentionShape,
    Mamba2Shape,
    MlpShape,
    MoeShape,
    Part,
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


def _runs(counts: Sequence[int], scales: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Return runs of rows and their factors, none when all factors are 1."""
    if all(scale == 1.0 for scale in scales):
        return ()
    return tuple(zip(counts, scales, strict=True))
