"""Falcon-H1: attention and Mamba2 side by side in every layer, then a gated MLP."""

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
from stree_core.model_shape import Block, MlpShape, ModelShape, Part
from stree_core.parts import attention_part, mamba2_part, mlp_part


def falcon_h1(config: Config) -> ModelShape:
    """`FalconH1ForCausalLM`; all its multipliers are folded into weights."""
    refuse(
        config, hidden_act="silu", attention_bias=False, mlp_bias=False, projectors_bias=False,
        mamba_proj_bias=False,
    )  # fmt: skip
    if config.get("mamba_rms_norm", False):
        refuse({"mamba_norm_before_gate": True} | config, mamba_norm_before_gate=False)
    width = config["hidden_size"]
    gate_scale, down_scale = config.get("mlp_multipliers") or (1.0, 1.0)
    mlp = MlpShape(config["intermediate_size"], "swiglu")
    blocks: list[Block] = []
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        feed_forward = mlp_part(
            mlp, width, layer + "feed_forward.", gate_scale=gate_scale, out_scale=down_scale
        )
        norms = (layer + "input_layernorm.weight", layer + "pre_ff_layernorm.weight")
        blocks += two_blocks(config, norms, _mixers(config, layer), (feed_forward,))
    return language_model(
        config,
        blocks,
        "model.embed_tokens.weight",
        "model.final_layernorm.weight",
        norm_eps=config["rms_norm_eps"],
        embed_scale=_factor(config, "embedding_multiplier"),
        logit_scale=_factor(config, "lm_head_multiplier"),
    )


def _mixers(config: Config, layer: str) -> tuple[Part, ...]:
    """Return the attention and the Mamba2 mixer that read the same rows."""
    width = config["hidden_size"]
    into_mamba = _factor(config, "ssm_in_multiplier")
    sections = config.get("ssm_multipliers") or [1.0] * 5
    return (
        attention_part(
            attention_of(config, rope_of(config)),
            width,
            layer + "self_attn.",
            in_scale=_factor(config, "attention_in_multiplier"),
            key_scale=_factor(config, "key_multiplier"),
            out_scale=_factor(config, "attention_out_multiplier"),
        ),
        mamba2_part(
            mamba_keys_mixer(config, with_norm=config.get("mamba_rms_norm", False)),
            width,
            layer + "mamba.",
            in_scales=[into_mamba * section for section in sections],
            out_scale=_factor(config, "ssm_out_multiplier"),
        ),
    )


def _factor(config: Config, key: str) -> float:
    return float(config.get(key, 1.0))
