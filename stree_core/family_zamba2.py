"""Zamba2 (arXiv:2411.15242): Mamba2 layers, some behind a transformer layer with shared weights.

Each use of the shared layer has low-rank adapters of its own, which are merged when it is loaded:
its weights are then kept once per use.
"""

from __future__ import annotations

from stree_core.config_keys import (
    Config,
    Unsupported,
    attention_of,
    dt_limit,
    grouped_mamba2,
    language_model,
    refuse,
    require_layers,
    rope_of,
)
from stree_core.model_shape import Block, Mamba2Shape, MlpShape, ModelShape, SharedBlock
from stree_core.parts import attention_part, mamba2_part, matrix, mlp_part, vector

KINDS = ("mamba", "linear_attention", "hybrid")
# Fixed in the published mixer, whatever the config's norm_eps.
MIXER_EPS = 1e-5


def zamba2(config: Config) -> ModelShape:
    """`Zamba2ForCausalLM`."""
    refuse(config, add_bias_linear=False, use_long_context=False)
    width, mixer = config["hidden_size"], _mixer(config)
    kinds = config["layers_block_type"]
    require_layers(kinds, KINDS, config["num_hidden_layers"])
    hybrids = [index for index, kind in enumerate(kinds) if kind == "hybrid"]
    blocks = []
    for index, kind in enumerate(kinds):
        layer = f"model.layers.{index}."
        inner = layer + "mamba_decoder." if kind == "hybrid" else layer
        shared = None
        if kind == "hybrid":
            use = hybrids.index(index)
            owner = hybrids[use % config["num_mem_blocks"]]
            shared = _shared(config, layer, f"model.layers.{owner}.shared_transformer.", use)
        part = mamba2_part(mixer, width, inner + "mamba.")
        blocks.append(Block(vector(inner + "input_layernorm.weight", width), (part,), shared))
    return language_model(
        config,
        blocks,
        "model.embed_tokens.weight",
        "model.final_layernorm.weight",
        norm_eps=config["rms_norm_eps"],
        tied_by_default=True,
    )


def _mixer(config: Config) -> Mamba2Shape:
    num_heads = config["n_mamba_heads"]
    return grouped_mamba2(
        num_heads=num_heads,
        head_dim=config["mamba_expand"] * config["hidden_size"] // num_heads,
        num_groups=config["mamba_ngroups"],
        state_dim=config["mamba_d_state"],
        conv_width=config["mamba_d_conv"],
        limit=dt_limit(config.get("time_step_limit")),
        norm_eps=MIXER_EPS,
    )


def _shared(config: Config, layer: str, owner: str, use: int) -> SharedBlock:
    """Return the `use`-th use of a shared layer, whose weights lie under `owner`."""
    width = config["hidden_size"]
    head_dim = 2 * width // config["num_attention_heads"]
    heads = config | {"head_dim": head_dim}
    rope = rope_of(heads) if config.get("use_mem_rope", False) else None
    attention = attention_of(heads, rope, scale=(head_dim / 2) ** -0.5)
    adapters: tuple[tuple[str, str], ...] = ()
    if config.get("use_shared_attention_adapter", False):
        adapters = tuple(
            _adapter(f"{owner}self_attn.linear_{name}_adapter_list.{use}.") for name in "qkv"
        )
    return SharedBlock(
        attention_norm=vector(owner + "input_layernorm.weight", 2 * width),
        attention=attention_part(
            attention, 2 * width, owner + "self_attn.", out_width=width, adapters=adapters
        ),
        mlp_norm=vector(owner + "pre_ff_layernorm.weight", width),
        mlp=mlp_part(
            _mlp(config),
            width,
            owner + "feed_forward.",
            up_names=("gate_up_proj.weight",),
            adapters=(_adapter(f"{owner}feed_forward.gate_up_proj_adapter_list.{use}."),),
        ),
        linear=matrix(layer + "linear.weight", width, width),
    )


def _mlp(config: Config) -> MlpShape:
    name = config.get("hidden_act", "gelu")
    inner_dim = config.get("intermediate_size") or 4 * config["hidden_size"]
    if name == "gelu":
        return MlpShape(inner_dim, "geglu")
    if name == "silu":
        return MlpShape(inner_dim, "swiglu")
    raise Unsupported(f"hidden_act = {name!r} is not supported, only 'gelu' and 'silu'")


def _adapter(prefix: str) -> tuple[str, str]:
    """Return the keys of a low-rank pair."""
    return prefix + "0.weight", prefix + "1.weight"
