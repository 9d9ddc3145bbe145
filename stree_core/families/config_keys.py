"""What several families' configs have in common: attention, mixers, layer lists, the frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from stree_core.errors import brief
from stree_core.families.config_reader import (
    CONV_WIDTH,
    EXPANSION,
    HEAD_DIM,
    HEADS,
    LAYERS,
    POSITIONS,
    TOKEN_ID,
    VOCABULARY,
    WIDTH,
    Keys,
    Refused,
    refuse_value,
)
from stree_core.families.model_shape import (
    AttentionShape,
    Block,
    Llama3Scaling,
    Mamba2Shape,
    ModelShape,
    Part,
    Rope,
)
from stree_core.families.weight_map import matrix, vector

MAMBA, ATTENTION = "linear_attention", "full_attention"
KINDS = {"mamba": MAMBA, MAMBA: MAMBA, "attention": ATTENTION, ATTENTION: ATTENTION}
"""Kinds of layers by their spellings in published configs."""
KIND_KEYS = ("layers_block_type", "layer_types")
UNLIMITED = (0.0, math.inf)
_MAX_END_TOKENS = 64


def width_of(keys: Keys) -> int:
    """Read the width of the residual stream."""
    return keys.count(WIDTH, "hidden_size")


def num_layers_of(keys: Keys) -> int:
    """Read how many layers there are."""
    return keys.count(LAYERS, "num_hidden_layers")


def dt_limit(keys: Keys, *names: str) -> tuple[float, float]:
    """Read the run-time limit of time steps; none where it is missing or null."""
    there = [limit for name in names if (limit := keys.numbers(name, 2, infinite=True)) is not None]
    if not there:
        return UNLIMITED
    low, high = there[0]
    if any(limit != there[0] for limit in there):
        raise Refused(f"{' and '.join(names)} are one setting; remove the wrong one")
    if not 0 <= low <= high or high == 0 or low == math.inf:
        raise keys.wrong(names[0], "a least and a greatest time step", there[0])
    return low, high


def layer_kinds(
    keys: Keys,
    names: tuple[str, ...] = KIND_KEYS,
    spellings: Mapping[str, str] = KINDS,
    others: Sequence[tuple[str, list[str] | None]] = (),
) -> list[str]:
    """Return the kind of each layer; all keys that say it must agree, and one must.

    `others` are lists that a family derives from further keys, with those keys' names.
    """
    listed = [(name, spelled_kinds(keys, name, spellings)) for name in names]
    found = [(name, kinds) for name, kinds in [*listed, *others] if kinds is not None]
    if not found:
        known = " or ".join(repr(name) for name, _ in [*listed, *others])
        raise Refused(f"{keys.file} needs key {known} to say what each layer is; add it")
    first, kinds = found[0]
    num_layers = keys.optional_count(LAYERS, "num_hidden_layers")
    if num_layers is not None and len(kinds) != num_layers:
        raise Refused(
            f"num_hidden_layers is {num_layers}, but {first} lists {len(kinds)} layers; "
            f"correct {keys.file}"
        )
    for name, other in found[1:]:
        if other != kinds:
            where = next(
                (i for i, (a, b) in enumerate(zip(kinds, other, strict=False)) if a != b), 0
            )
            raise Refused(
                f"{first} ({len(kinds)} layers) and {name} ({len(other)} layers) disagree, first "
                f"at layer {where}; keep the one of the published config"
            )
    return kinds


def spelled_kinds(keys: Keys, name: str, spellings: Mapping[str, str]) -> list[str] | None:
    """Read a list of kinds of layers by a family's spellings, None where there is none."""
    listed = keys.texts(name, LAYERS.most)
    for index, kind in enumerate(listed or ()):
        if kind not in spellings:
            raise refuse_value(f"{name}[{index}]", kind, ", ".join(sorted(spellings)))
    return None if listed is None else [spellings[kind] for kind in listed]


def indexed_kinds(keys: Keys, name: str) -> list[str] | None:
    """Return the kinds of layers where a list holds the indices of those that attend."""
    num_layers = num_layers_of(keys)
    indices = keys.counts(TOKEN_ID, name, num_layers)
    if indices is None:
        return None
    if len(set(indices)) < len(indices) or max(indices, default=0) >= num_layers:
        raise keys.wrong(name, f"different layers below {num_layers}", indices)
    return [ATTENTION if index in indices else MAMBA for index in range(num_layers)]


def head_dim_of(keys: Keys) -> int:
    """Read the width of an attention head, the hidden size's share unless it is given."""
    given = keys.optional_count(HEAD_DIM, "head_dim", "attention_head_dim")
    heads = keys.count(HEADS, "num_attention_heads")
    share = width_of(keys) // heads
    if given is None and not share:
        raise keys.wrong("num_attention_heads", "at most hidden_size", heads)
    return given or share


def rope_of(keys: Keys, head_dim: int, *, rotated_share: float = 1.0) -> Rope:
    """Read rotary positions from `rope_parameters`, or the older rope_theta and rope_scaling."""
    theta = keys.positive("rope_theta", default=10000.0)
    name = next((name for name in ("rope_parameters", "rope_scaling") if keys.has(name)), None)
    rope = keys.section(name) if name else Keys({})
    for where in (keys, rope):
        where.refuse(partial_rotary_factor=rotated_share)
    theta = rope.positive("rope_theta", default=theta)
    dim = int(head_dim * rotated_share)
    kind = rope.text("rope_type" if rope.has("rope_type") else "type", "default")
    if kind == "default":
        return Rope(theta, dim)
    if kind != "llama3":
        raise refuse_value("rope_type", kind, "'default' and 'llama3'")
    scaling = Llama3Scaling(
        factor=rope.positive("factor"),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_positions=rope.count(POSITIONS, "original_max_position_embeddings"),
    )
    return Rope(theta, dim, scaling)


def grouped_mamba2(
    keys: Keys,
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
    keys.require_divides("the number of groups", num_groups, "the Mamba2 heads", num_heads)
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


def mamba_keys_mixer(keys: Keys, inner: int, *, with_norm: bool = True) -> Mamba2Shape:
    """Read the mixer of the families whose keys begin with `mamba_`: Bamba, Granite, Falcon-H1."""
    num_heads = keys.count(HEADS, "mamba_n_heads")
    if keys.values.get("mamba_d_head", "auto") == "auto":
        keys.require_divides("mamba_n_heads", num_heads, "the Mamba2 width", inner)
        head_dim = inner // num_heads
    else:
        head_dim = keys.count(HEAD_DIM, "mamba_d_head")
    if num_heads * head_dim != inner:
        raise keys.wrong("mamba_n_heads times mamba_d_head", str(inner), num_heads * head_dim)
    return grouped_mamba2(
        keys,
        num_heads=num_heads,
        head_dim=head_dim,
        num_groups=keys.count(HEADS, "mamba_n_groups"),
        state_dim=keys.count(HEAD_DIM, "mamba_d_state"),
        conv_width=keys.count(CONV_WIDTH, "mamba_d_conv"),
        conv_bias=keys.flag("mamba_conv_bias", default=True),
        limit=dt_limit(keys, "time_step_limit"),
        norm_eps=keys.positive("rms_norm_eps"),
        with_norm=with_norm,
    )


def expanded_width(keys: Keys) -> int:
    """Read the width of a mixer that is a multiple of the hidden size."""
    return keys.count(EXPANSION, "mamba_expand") * width_of(keys)


def attention_of(
    keys: Keys, head_dim: int, rope: Rope | None, scale: float | None = None
) -> AttentionShape:
    """Read a grouped-query attention; scores are divided by the root of the head's width.

    As many heads of keys and values as of queries where the config says null.
    """
    num_heads = keys.count(HEADS, "num_attention_heads")
    num_kv_heads = num_heads
    if keys.values.get("num_key_value_heads", 0) is not None:
        num_kv_heads = keys.count(HEADS, "num_key_value_heads")
    keys.require_divides("num_key_value_heads", num_kv_heads, "num_attention_heads", num_heads)
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        rope=rope,
    )


def two_blocks(
    keys: Keys, norm_keys: tuple[str, str], mixers: tuple[Part, ...], mlps: tuple[Part, ...]
) -> list[Block]:
    """Return the usual layer: mixers behind one norm, then MLPs behind another."""
    first, second = (vector(key, width_of(keys)) for key in norm_keys)
    return [Block(first, mixers), Block(second, mlps)]


def eos_ids(keys: Keys) -> tuple[int, ...]:
    """Read the end tokens: one, several or none."""
    if isinstance(keys.values.get("eos_token_id"), list):
        return tuple(keys.counts(TOKEN_ID, "eos_token_id", _MAX_END_TOKENS) or ())
    one = keys.optional_count(TOKEN_ID, "eos_token_id")
    return () if one is None else (one,)


def language_model(
    keys: Keys,
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
    vocab_size, width = keys.count(VOCABULARY, "vocab_size"), width_of(keys)
    embed = matrix(embed_key, vocab_size, width)
    tied = keys.flag("tie_word_embeddings", default=tied_by_default)
    return ModelShape(
        vocab_size=vocab_size,
        hidden_size=width,
        norm_eps=norm_eps,
        residual_fp32=residual_fp32,
        eos_token_ids=eos_ids(keys),
        embed=embed,
        embed_scale=embed_scale,
        blocks=tuple(blocks),
        final_norm=vector(final_norm_key, width, logit_scale),
        lm_head=embed if tied else matrix("lm_head.weight", vocab_size, width),
        max_positions=keys.optional_count(POSITIONS, "max_position_embeddings"),
    )


def one_of(keys: Keys, name: str, default: str, known: Mapping[str, str]) -> str:
    """Read a text that must be a key of `known`, and return what that maps to."""
    value = keys.text(name, default)
    if value not in known:
        raise refuse_value(name, value, " and ".join(brief(text) for text in known))
    return known[value]
