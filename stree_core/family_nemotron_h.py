"""Nemotron-H and Nemotron 3: every layer is one mixer: Mamba2, attention, MLP or experts."""

from __future__ import annotations

from stree_core.config_keys import (
    Config,
    attention_of,
    dt_limit,
    grouped_mamba2,
    language_model,
    refuse,
    require_layers,
)
from stree_core.model_shape import Block, MlpShape, ModelShape, MoeShape, Part
from stree_core.parts import attention_part, mamba2_part, mlp_part, moe_part, vector
from stree_kernels.laws import RouterLaw

LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""Layers in `hybrid_override_pattern`, which older configs have."""
OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}


def nemotron_h(config: Config) -> ModelShape:
    """`NemotronHForCausalLM`; its attention has no positions."""
    refuse(
        config, mamba_hidden_act="silu", mlp_hidden_act="relu2", use_bias=False, mlp_bias=False,
        mamba_proj_bias=False, attention_bias=False,
    )  # fmt: skip
    width = config["hidden_size"]
    kinds = _kinds(config)
    require_layers(kinds, tuple(LETTERS.values()), config.get("num_hidden_layers"))
    blocks = tuple(
        Block(
            vector(f"backbone.layers.{index}.norm.weight", width),
            _parts(config, kind, f"backbone.layers.{index}.mixer."),
        )
        for index, kind in enumerate(kinds)
    )
    return language_model(
        config,
        blocks,
        "backbone.embeddings.weight",
        "backbone.norm_f.weight",
        norm_eps=_eps(config),
    )


def _kinds(config: Config) -> list[str]:
    listed = config.get("layers_block_type") or config.get("layer_types")
    if listed:
        return [OLD_KINDS.get(kind, kind) for kind in listed]
    return [LETTERS.get(letter, letter) for letter in config["hybrid_override_pattern"]]


def _eps(config: Config) -> float:
    return float(config["layer_norm_epsilon"])


def _parts(config: Config, kind: str, prefix: str) -> tuple[Part, ...]:
    width = config["hidden_size"]
    if kind == "linear_attention":
        mixer = grouped_mamba2(
            num_heads=config["mamba_num_heads"],
            head_dim=config["mamba_head_dim"],
            num_groups=config["n_groups"],
            state_dim=config["ssm_state_size"],
            conv_width=config["conv_kernel"],
            conv_bias=config.get("use_conv_bias", True),
            limit=dt_limit(config.get("time_step_limit")),
            norm_eps=_eps(config),
        )
        return (mamba2_part(mixer, width, prefix),)
    if kind == "full_attention":
        attention = attention_of(config, rope=None)
        return (attention_part(attention, width, prefix),)
    if kind == "mlp":
        return (_mlp(config["intermediate_size"], width, prefix),)
    shared = _mlp(config["moe_shared_expert_intermediate_size"], width, prefix + "shared_experts.")
    return (_experts(config, prefix), shared)


def _mlp(inner_dim: int, width: int, prefix: str) -> Part:
    return mlp_part(MlpShape(inner_dim, "relu2"), width, prefix, up_names=("up_proj.weight",))


def _experts(config: Config, prefix: str) -> Part:
    num_experts = config["n_routed_experts"]
    latent_dim = config.get("moe_latent_size")
    law = RouterLaw(
        "sigmoid",
        config["num_experts_per_tok"],
        num_groups=config.get("n_group", 1),
        num_open_groups=config.get("topk_group", 1),
        normalised=config.get("norm_topk_prob", True),
        scale=float(config.get("routed_scaling_factor", 1.0)),
    )
    expert = MlpShape(config["moe_intermediate_size"], "relu2")
    experts = [f"{prefix}experts.{index}." for index in range(num_experts)]
    latent_keys = (prefix + "fc1_latent_proj.weight", prefix + "fc2_latent_proj.weight")
    return moe_part(
        MoeShape(num_experts, expert, law, latent_dim),
        config["hidden_size"],
        router_key=prefix + "gate.weight",
        bias_key=prefix + "gate.e_score_correction_bias",
        up_keys=tuple(expert + "up_proj.weight" for expert in experts),
        down_keys=tuple(expert + "down_proj.weight" for expert in experts),
        latent_keys=latent_keys if latent_dim else None,
    )
