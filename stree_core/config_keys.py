"""Reading a Hugging Face config.json: what several families share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stree_core.model_shape import (
    AttentionShape,
    Block,
    Llama3Scaling,
    Mamba2Shape,
    ModelShape,
    Part,
    Rope,
)
from stree_core.parts import matrix, vector

Config = dict[str, Any]


class Unsupported(Exception):
    """A setting that would change the result and is not implemented."""


def refuse(config: Config, **expected: object) -> None:
    """Raise Unsupported for the first key that is there with another value than expected."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise Unsupported(f"{key} = {config[key]!r} is not supported, only {value!r}")


def dt_limit(value: Any) -> tuple[float, float]:
    """Read the least and greatest time step; None is no limit."""
    low, high = value or (0.0, math.inf)
    return number(low), number(high)


def number(value: Any) -> float:
    """Read a JSON number; transformers writes infinity as an object."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def eos_ids(config: Config) -> tuple[int, ...]:
    """Read the end tokens: one, several or none."""
    eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def head_dim_of(config: Config) -> int:
    """Read the width of an attention head, the hidden size's share unless it is given."""
    given = config.get("head_dim") or config.get("attention_head_dim")
    return int(given or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Config, *, rotated_share: float = 1.0) -> Rope:
    """Read rotary positions from `rope_parameters`, or the older rope_theta and rope_scaling."""
    rope: Config = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    dim = int(head_dim_of(config) * float(rope.get("partial_rotary_factor", rotated_share)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(float(rope["rope_theta"]), dim)
    if kind != "llama3":
        raise Unsupported(f"rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    scaling = Llama3Scaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_positions=int(rope["original_max_position_embeddings"]),
    )
    return Rope(float(rope["rope_theta"]), dim, scaling)


def grouped_mamba2(
    *,
    num_heads: int,
    head_dim: int,
    num_groups: int,
    state_dim: int,
    conv_width: int,
    limit: tuple[float, float],
    norm_eps: float,
    conv_bias: bool = True,
    with_norm: bool = True,
) -> Mamba2Shape:
    """Return the usual mixer: every head has its x, groups of heads share B, C and the norm."""
    return Mamba2Shape(
        num_heads=num_heads,
        num_x_heads=num_heads,
        num_b_groups=num_groups,
        num_c_groups=num_groups,
        head_dim=head_dim,
        state_dim=state_dim,
        conv_width=conv_width,
        conv_bias=conv_bias,
        dt_limit=limit,
        norm_groups=num_groups if with_norm else 0,
        norm_eps=norm_eps,
    )


def mamba_keys_mixer(config: Config, *, with_norm: bool = True) -> Mamba2Shape:
    """Read the mixer of the families whose keys begin with `mamba_`: Bamba, Granite, Falcon-H1."""
    num_heads = config["mamba_n_heads"]
    inner = config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"]
    given = config.get("mamba_d_head", "auto")
    head_dim = inner // num_heads if given == "auto" else given
    if num_heads * head_dim != inner:
        raise ValueError(
            f"mamba_n_heads times mamba_d_head must be {inner}, got {num_heads} * {head_dim}"
        )
    return grouped_mamba2(
        num_heads=num_heads,
        head_dim=head_dim,
        num_groups=config["mamba_n_groups"],
        state_dim=config["mamba_d_state"],
        conv_width=config["mamba_d_conv"],
        conv_bias=config.get("mamba_conv_bias", True),
        limit=dt_limit(config.get("time_step_limit")),
        norm_eps=config["rms_norm_eps"],
        with_norm=with_norm,
    )


def attention_of(config: Config, rope: Rope | None, scale: float | None = None) -> AttentionShape:
    """Read a grouped-query attention; scores are divided by the root of the head's width."""
    head_dim = head_dim_of(config)
    return AttentionShape(
        num_heads=config["num_attention_heads"],
        num_kv_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        rope=rope,
    )


def two_blocks(
    config: Config, norm_keys: tuple[str, str], mixers: tuple[Part, ...], mlps: tuple[Part, ...]
) -> list[Block]:
    """Return the usual layer: mixers behind one norm, then MLPs behind another."""
    first, second = (vector(key, config["hidden_size"]) for key in norm_keys)
    return [Block(first, mixers), Block(second, mlps)]


def language_model(
    config: Config,
    blocks: Sequence[Block],
    embed_key: str,
    final_norm_key: str,
    *,
    norm_eps: float,
    tied_by_default: bool = False,
    residual_fp32: bool = False,
    embed_scale: float = 1.0,
    logit_scale: float = 1.0,
) -> ModelShape:
    """Return a model whose LM head is `lm_head.weight`, or the embedding where they are tied."""
    vocab_size, width = config["vocab_size"], config["hidden_size"]
    embed = matrix(embed_key, vocab_size, width)
    tied = config.get("tie_word_embeddings", tied_by_default)
    return ModelShape(
        vocab_size=vocab_size,
        hidden_size=width,
        norm_eps=norm_eps,
        residual_fp32=residual_fp32,
        eos_token_ids=eos_ids(config),
        embed=embed,
        embed_scale=embed_scale,
        blocks=tuple(blocks),
        final_norm=vector(final_norm_key, width, logit_scale),
        lm_head=embed if tied else matrix("lm_head.weight", vocab_size, width),
    )


def require_layers(kinds: list[str], known: tuple[str, ...], num_layers: int | None) -> None:
    """Raise Unsupported for an unknown kind of layer, ValueError for a wrong number of them."""
    for kind in kinds:
        if kind not in known:
            raise Unsupported(f"a layer of kind {kind!r} is not supported, only {', '.join(known)}")
    if num_layers is not None and len(kinds) != num_layers:
        raise ValueError(f"num_hidden_layers is {num_layers}, but {len(kinds)} layers are listed")
