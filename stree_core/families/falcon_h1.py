"""Falcon-H1: attention and Mamba2 side by side in every layer, then a gated MLP."""

from __future__ import annotations

from stree_core.families.config_keys import (
    KIND_KEYS,
    attention_of,
    expanded_width,
    head_dim_of,
    language_model,
    layer_kinds,
    mamba_keys_mixer,
    num_layers_of,
    rope_of,
    two_blocks,
    width_of,
)
from stree_core.families.config_reader import WIDTH, Keys, refuse_value
from stree_core.families.model_shape import (
    AttentionShape,
    Block,
    Mamba2Shape,
    MlpShape,
    ModelShape,
    Part,
)
from stree_core.families.weight_map import attention_part, mamba2_part, mlp_part


def falcon_h1(keys: Keys) -> ModelShape:
    """`FalconH1ForCausalLM`; all its multipliers are folded into weights."""
    keys.refuse(
        hidden_act="silu", attention_bias=False, mlp_bias=False, projectors_bias=False,
        mamba_proj_bias=False, mamba_use_mlp=True, attn_layer_indices=None,
    )  # fmt: skip
    if keys.has(*KIND_KEYS):
        layer_kinds(keys, spellings={"hybrid": "hybrid"})
    width, head_dim = width_of(keys), head_dim_of(keys)
    attention, mixer = attention_of(keys, head_dim, rope_of(keys, head_dim)), _mixer(keys)
    gate_scale, down_scale = keys.numbers("mlp_multipliers", 2) or (1.0, 1.0)
    mlp = MlpShape(keys.count(WIDTH, "intermediate_size"), "swiglu")
    blocks: list[Block] = []
    for index in range(num_layers_of(keys)):
        layer = f"model.layers.{index}."
        feed_forward = mlp_part(
            mlp, width, layer + "feed_forward.", gate_scale=gate_scale, out_scale=down_scale
        )
        norms = (layer + "input_layernorm.weight", layer + "pre_ff_layernorm.weight")
        mixers = _side_by_side(keys, attention, mixer, layer)
        blocks += two_blocks(keys, norms, mixers, (feed_forward,))
    return language_model(
        keys,
        blocks,
        "model.embed_tokens.weight",
        "model.final_layernorm.weight",
        norm_eps=keys.positive("rms_norm_eps"),
        embed_scale=keys.number("embedding_multiplier", default=1.0),
        logit_scale=keys.number("lm_head_multiplier", default=1.0),
    )


def _mixer(keys: Keys) -> Mamba2Shape:
    """Read the mixer; its width is a key of its own, or a multiple of the hidden size when null.

    Without the key transformers takes 1024, which no published model has.
    """
    inner = keys.optional_count(WIDTH, "mamba_d_ssm")
    if "mamba_d_ssm" not in keys.values:
        raise keys.missing("mamba_d_ssm")
    with_norm = keys.flag("mamba_rms_norm", default=False)
    if keys.flag("mamba_norm_before_gate", default=True) and with_norm:
        raise refuse_value("mamba_norm_before_gate", True, "False beside mamba_rms_norm")
    return mamba_keys_mixer(keys, inner or expanded_width(keys), with_norm=with_norm)


def _side_by_side(
    keys: Keys, attention: AttentionShape, mixer: Mamba2Shape, layer: str
) -> tuple[Part, ...]:
    """Return the attention and the Mamba2 mixer that read the same rows."""
    width = width_of(keys)
    into_mamba = keys.number("ssm_in_multiplier", default=1.0)
    sections = keys.numbers("ssm_multipliers", 5) or [1.0] * 5
    return (
        attention_part(
            attention,
            width,
            layer + "self_attn.",
            in_scale=keys.number("attention_in_multiplier", default=1.0),
            key_scale=keys.number("key_multiplier", default=1.0),
            out_scale=keys.number("attention_out_multiplier", default=1.0),
        ),
        mamba2_part(
            mixer,
            width,
            layer + "mamba.",
            in_scales=[into_mamba * section for section in sections],
            out_scale=keys.number("ssm_out_multiplier", default=1.0),
        ),
    )
