"""Granite 4 H (`granitemoehybrid`): Mamba2 or attention, then an MLP, with experts or without."""

from __future__ import annotations

from stree_core.config_keys import (
    Config,
    attention_of,
    language_model,
    mamba_keys_mixer,
    refuse,
    require_layers,
    rope_of,
    two_blocks,
)
from stree_core.model_shape import Block, MlpShape, ModelShape, MoeShape, Part
from stree_core.parts import attention_part, mamba2_part, mlp_part, moe_part
from stree_kernels.laws import RouterLaw

# Older files say mamba and attention.
KINDS = ("mamba", "linear_attention", "attention", "full_attention")


def granite(config: Config) -> ModelShape:
    """`GraniteMoeHybridForCausalLM`; its multipliers scale weights, scores and logits."""
    refuse(
        config, hidden_act="silu", mamba_proj_bias=False, attention_bias=False,
        normalization_function="rmsnorm",
    )  # fmt: skip
    width = config["hidden_size"]
    into_stream = float(config.get("residual_multiplier", 1.0))
    rope = rope_of(config) if config.get("position_embedding_type") == "rope" else None
    attention = attention_of(config, rope, float(config.get("attention_multiplier", 1.0)))
    mixer = mamba_keys_mixer(config)
    kinds = config.get("layer_types") or config.get("layers_block_type")
    kinds = kinds or ["mamba"] * config["num_hidden_layers"]
    require_layers(kinds, KINDS, config["num_hidden_layers"])
    blocks: list[Block] = []
    for index, kind in enumerate(kinds):
        layer = f"model.layers.{index}."
        if kind in ("attention", "full_attention"):
            part = attention_part(attention, width, layer + "self_attn.", out_scale=into_stream)
        else:
            part = mamba2_part(mixer, width, layer + "mamba.", out_scale=into_stream)
        norms = (layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight")
        blocks += two_blocks(config, norms, (part,), _feed_forward(config, layer, into_stream))
    return language_model(
        config,
        blocks,
        "model.embed_tokens.weight",
        "model.norm.weight",
        norm_eps=config["rms_norm_eps"],
        embed_scale=float(config.get("embedding_multiplier", 1.0)),
        logit_scale=1 / config.get("logits_scaling", 1.0),
    )


def _feed_forward(config: Config, layer: str, into_stream: float) -> tuple[Part, ...]:
    """Return the shared MLP and, where there are any, the routed experts beside it."""
    width = config["hidden_size"]
    shared = mlp_part(
        MlpShape(config["shared_intermediate_size"], "swiglu"),
        width,
        layer + "shared_mlp.",
        up_names=("input_linear.weight",),
        down_name="output_linear.weight",
        out_scale=into_stream,
    )
    num_experts = config.get("num_local_experts", 8)
    if not num_experts:
        return (shared,)
    moe = MoeShape(
        num_experts,
        MlpShape(config["intermediate_size"], "swiglu"),
        RouterLaw("softmax", config["num_experts_per_tok"]),
    )
    prefix = layer + "block_sparse_moe."
    experts = moe_part(
        moe,
        width,
        router_key=prefix + "router.layer.weight",
        up_keys=(prefix + "input_linear.weight",),
        down_keys=(prefix + "output_linear.weight",),
        out_scale=into_stream,
    )
    return (experts, shared)
