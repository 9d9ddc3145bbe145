"""Mamba-in-Llama (arXiv:2408.15237): Llama layers, some of whose attentions became Mamba2.

A folder holds Llama's config.json and, in mamba_config.json, which layers attend and the mixers'
sizes. x and B have the heads of Llama's keys and values; neighbouring heads share them.
"""

from __future__ import annotations

from stree_core.config_keys import (
    Config,
    attention_of,
    dt_limit,
    language_model,
    refuse,
    rope_of,
    two_blocks,
)
from stree_core.model_shape import Block, Mamba2Shape, MlpShape, ModelShape
from stree_core.parts import attention_part, mamba2_part, mlp_part

# Fixed in the published mixer, whatever the config's norm_eps.
MIXER_EPS = 1e-5


def mamba_in_llama(config: Config) -> ModelShape:
    """A Llama model with `mamba_config`."""
    refuse(config, model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
    mamba = config["mamba_config"]
    width = config["hidden_size"]
    attention, mixer = attention_of(config, rope_of(config)), _mixer(mamba)
    mlp = MlpShape(config["intermediate_size"], "swiglu")
    attention_layers = set(mamba["attn_layers"])
    blocks: list[Block] = []
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        if index in attention_layers:
            part = attention_part(attention, width, layer + "self_attn.")
        else:
            part = mamba2_part(mixer, width, layer + "mamba.")
        norms = (layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight")
        blocks += two_blocks(config, norms, (part,), (mlp_part(mlp, width, layer + "mlp."),))
    return language_model(
        config,
        blocks,
        "model.embed_tokens.weight",
        "model.norm.weight",
        norm_eps=config["rms_norm_eps"],
    )


def _mixer(mamba: Config) -> Mamba2Shape:
    ssm = mamba["ssm_cfg"]
    refuse(
        ssm, repeat_kv_before_conv=False, d_ssm=None, D_has_hdim=False, rmsnorm=True,
        norm_before_gate=False, bias=False,
    )  # fmt: skip
    num_heads, head_dim = ssm["ngroups"], ssm["d_state"]
    if num_heads * head_dim != mamba["d_inner"] or mamba["d_xb"] % head_dim:
        raise ValueError(
            f"ngroups times d_state must be d_inner and divide d_xb, got {num_heads} * {head_dim}, "
            f"{mamba['d_inner']} and {mamba['d_xb']}"
        )
    return Mamba2Shape(
        num_heads=num_heads,
        num_x_heads=mamba["d_xb"] // head_dim,
        num_b_groups=mamba["d_xb"] // head_dim,
        num_c_groups=num_heads,
        head_dim=head_dim,
        state_dim=head_dim,
        conv_width=ssm.get("d_conv", 4),
        conv_bias=ssm.get("conv_bias", True),
        dt_limit=dt_limit(ssm.get("dt_limit")),
        norm_groups=num_heads,
        norm_eps=MIXER_EPS,
    )
