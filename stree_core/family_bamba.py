"""Bamba: Mamba2 or attention, then a gated MLP, in every layer."""

from __future__ import annotations

from stree_core.config_keys import (
    Config,
    attention_of,
    language_model,
    mamba_keys_mixer,
    refuse,
    rope_of,
    two_blocks,
)
from stree_core.model_shape import Block, MlpShape, ModelShape
from stree_core.parts import attention_part, mamba2_part, mlp_part

# transformers rotates this share of a head when the config is silent.
ROTATED_SHARE = 0.5


def bamba(config: Config) -> ModelShape:
    """`BambaForCausalLM`."""
    refuse(config, hidden_act="silu", mamba_proj_bias=False, attention_bias=False, mlp_bias=False)
    width = config["hidden_size"]
    attention = attention_of(config, rope_of(config, rotated_share=ROTATED_SHARE))
    mixer, mlp = mamba_keys_mixer(config), MlpShape(config["intermediate_size"], "swiglu")
    attention_layers = set(config.get("attn_layer_indices") or ())
    blocks: list[Block] = []
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        if index in attention_layers:
            part = attention_part(attention, width, layer + "self_attn.")
        else:
            part = mamba2_part(mixer, width, layer + "mamba.")
        norms = (layer + "input_layernorm.weight", layer + "pre_ff_layernorm.weight")
        feed_forward = mlp_part(mlp, width, layer + "feed_forward.")
        blocks += two_blocks(config, norms, (part,), (feed_forward,))
    return language_model(
        config,
        blocks,
        "model.embed_tokens.weight",
        "model.final_layernorm.weight",
        norm_eps=config["rms_norm_eps"],
    )
