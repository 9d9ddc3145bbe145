"""Granite 4 H (`granitemoehybrid`): Mamba2 or attention, then an MLP, with experts or without."""

from __future__ import annotations

from stree_core.families.config_keys import (
    ATTENTION,
    attention_of,
    expanded_width,
    head_dim_of,
    language_model,
    layer_kinds,
    mamba_keys_mixer,
    one_of,
    rope_of,
    two_blocks,
    width_of,
)
from stree_core.families.config_reader import EXPERTS, WIDTH, Bound, Keys
from stree_core.families.model_shape import Block, MlpShape, ModelShape, MoeShape, Part
from stree_core.families.weight_map import attention_part, mamba2_part, mlp_part, moe_part
from stree_kernels.launch.settings import Routing

POSITIONS = {"rope": "rope", "nope": "nope"}


def granite(keys: Keys) -> ModelShape:
    """`GraniteMoeHybridForCausalLM`; its multipliers scale weights, scores and logits."""
    keys.refuse(
        hidden_act="silu", mamba_proj_bias=False, attention_bias=False,
        normalization_function="rmsnorm",
    )  # fmt: skip
    width, head_dim = width_of(keys), head_dim_of(keys)
    into_stream = keys.number("residual_multiplier", default=1.0)
    rotates = one_of(keys, "position_embedding_type", "nope", POSITIONS) == "rope"
    rope = rope_of(keys, head_dim) if rotates else None
    attention_scale = keys.number("attention_multiplier", default=1.0)
    attention = attention_of(keys, head_dim, rope, attention_scale)
    mixer = mamba_keys_mixer(keys, expanded_width(keys))
    blocks: list[Block] = []
    for index, kind in enumerate(layer_kinds(keys)):
        layer = f"model.layers.{index}."
        if kind == ATTENTION:
            part = attention_part(attention, width, layer + "self_attn.", out_scale=into_stream)
        else:
            part = mamba2_part(mixer, width, layer + "mamba.", out_scale=into_stream)
        norms = (layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight")
        blocks += two_blocks(keys, norms, (part,), _feed_forward(keys, layer, into_stream))
    return language_model(
        keys,
        blocks,
        "model.embed_tokens.weight",
        "model.norm.weight",
        norm_eps=keys.positive("rms_norm_eps"),
        embed_scale=keys.number("embedding_multiplier", default=1.0),
        logit_scale=1 / keys.positive("logits_scaling", default=1.0),
    )


def _feed_forward(keys: Keys, layer: str, into_stream: float) -> tuple[Part, ...]:
    """Return the shared MLP and, where there are any, the routed experts beside it."""
    width = width_of(keys)
    shared = mlp_part(
        MlpShape(keys.count(WIDTH, "shared_intermediate_size"), "swiglu"),
        width,
        layer + "shared_mlp.",
        up_names=("input_linear.weight",),
        down_name="output_linear.weight",
        out_scale=into_stream,
    )
    num_experts = keys.count(Bound(0, EXPERTS.most), "num_local_experts", default=8)
    if not num_experts:
        return (shared,)
    moe = MoeShape(
        num_experts,
        MlpShape(keys.count(WIDTH, "intermediate_size"), "swiglu"),
        Routing("softmax", keys.count(Bound(1, num_experts), "num_experts_per_tok")),
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
