"""Bamba: Mamba2 or attention, then a gated MLP, in every layer."""

from __future__ import annotations

from stree_core.families.config_keys import (
    ATTENTION,
    attention_of,
    expanded_width,
    head_dim_of,
    indexed_kinds,
    language_model,
    layer_kinds,
    mamba_keys_mixer,
    rope_of,
    two_blocks,
    width_of,
)
from stree_core.families.config_reader import WIDTH, Keys
from stree_core.families.model_shape import Block, MlpShape, ModelShape, Part
from stree_core.families.mtp_shape import mtp_kinds, with_mtp
from stree_core.families.weight_map import attention_part, mamba2_part, mlp_part

# transformers rotates this share of a head, whatever the config says.
ROTATED_SHARE = 0.5
ATTENTION_LAYERS = "attn_layer_indices"
MLP = "mlp"
HEAD_KINDS = {"attention": ATTENTION, ATTENTION: ATTENTION, MLP: MLP}
"""No published Bamba has an MTP head; one that is trained for it is laid out as Nemotron's are."""


def bamba(keys: Keys) -> ModelShape:
    """`BambaForCausalLM`."""
    keys.refuse(
        hidden_act="silu", mamba_proj_bias=False, attention_bias=False, mlp_bias=False
    )  # fmt: skip
    width, head_dim = width_of(keys), head_dim_of(keys)
    attention = attention_of(keys, head_dim, rope_of(keys, head_dim, rotated_share=ROTATED_SHARE))
    mixer = mamba_keys_mixer(keys, expanded_width(keys))
    mlp = MlpShape(keys.count(WIDTH, "intermediate_size"), "swiglu")
    indexed = (ATTENTION_LAYERS, indexed_kinds(keys, ATTENTION_LAYERS))
    blocks: list[Block] = []
    for index, kind in enumerate(layer_kinds(keys, others=[indexed])):
        layer = f"model.layers.{index}."
        if kind == ATTENTION:
            part = attention_part(attention, width, layer + "self_attn.")
        else:
            part = mamba2_part(mixer, width, layer + "mamba.")
        norms = (layer + "input_layernorm.weight", layer + "pre_ff_layernorm.weight")
        feed_forward = mlp_part(mlp, width, layer + "feed_forward.")
        blocks += two_blocks(keys, norms, (part,), (feed_forward,))
    model = language_model(
        keys,
        blocks,
        "model.embed_tokens.weight",
        "model.final_layernorm.weight",
        norm_eps=keys.positive("rms_norm_eps"),
    )
    return with_mtp(model, keys, _head_parts, lambda own: mtp_kinds(own, HEAD_KINDS))


def _head_parts(keys: Keys, kind: str, prefix: str) -> tuple[Part, ...]:
    width, head_dim = width_of(keys), head_dim_of(keys)
    if kind == ATTENTION:
        rope = rope_of(keys, head_dim, rotated_share=ROTATED_SHARE)
        return (attention_part(attention_of(keys, head_dim, rope), width, prefix),)
    mlp = MlpShape(keys.count(WIDTH, "intermediate_size"), "swiglu")
    return (mlp_part(mlp, width, prefix),)
