"""Bamba: Mamba2 or attention, then a gated MLP, in every layer."""

from __future__ import annotations

from stree_core.config_keys import (
    Config,
    eos_ids,
    head_and_embedding,
    head_dim_of,
    kv_heads_of,
    mamba_keys_mixer,
    refuse,
    rope_of,
)
from stree_core.model_shape import AttentionShape, Block, MlpShape, ModelShape
from stree_core.parts import attention_part, mamba2_part, mlp_part, vector

# transformers rotates this share of a head when the config is silent.
ROTATED_SHARE = 0.5


def bamba(config: Config) -> ModelShape:
    """`BambaForCausalLM`."""
    refuse(config, hidden_act="silu", mamba_proj_bias=False, attention_bias=False, mlp_bias=False)
    width, head_dim = config["hidden_size"], head_dim_of(config)
    attention = AttentionShape(
        num_heads=config["num_attention_heads"],
        num_kv_heads=kv_heads_of(config),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope_of(config, head_dim, ROTATED_SHARE),
    )
    mixer, mlp = mamba_keys_mixer(config), MlpShape(config["intermediate_size"], "swiglu")
    attention_layers = set(config.get("attn_layer_indices") or ())
    blocks: list[Block] = []
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        if index in attention_layers:
            part = attention_part(attention, width, layer + "self_attn.")
        else:
            part = mamba2_part(mixer, width, layer + "mamba.")
        blocks += [
            Block(vector(layer + "input_layernorm.weight", width), (part,)),
            Block(
                vector(layer + "pre_ff_layernorm.weight", width),
                (mlp_part(mlp, width, layer + "feed_forward."),),
            ),
        ]
    embed, lm_head = head_and_embedding(config, "model.embed_tokens.weight", tied_by_default=False)
    return ModelShape(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        norm_eps=config["rms_norm_eps"],
        residual_fp32=False,
        eos_token_ids=eos_ids(config),
        embed=embed,
        embed_scale=1.0,
        blocks=tuple(blocks),
        final_norm=vector("model.final_layernorm.weight", width),
        lm_head=lm_head,
    )
