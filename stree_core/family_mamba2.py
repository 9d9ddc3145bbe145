"""Mamba2: `Mamba2ForCausalLM` of transformers, and the native `state-spaces/mamba2-*`."""

from __future__ import annotations

from stree_core.config_keys import (
    Config,
    dt_limit,
    grouped_mamba2,
    language_model,
    refuse,
)
from stree_core.model_shape import Block, Mamba2Shape, ModelShape
from stree_core.parts import mamba2_part, vector

# The tokenizer of every published native checkpoint is that of GPT-NeoX: <|endoftext|>.
NATIVE_EOS = 0
NATIVE_EPS = 1e-5


def mamba2(config: Config) -> ModelShape:
    """`Mamba2ForCausalLM`."""
    refuse(config, hidden_act="silu", use_bias=False, rms_norm=True)
    mixer = grouped_mamba2(
        num_heads=config["num_heads"],
        head_dim=config["head_dim"],
        num_groups=config["n_groups"],
        state_dim=config["state_size"],
        conv_width=config["conv_kernel"],
        conv_bias=config["use_conv_bias"],
        limit=dt_limit(config.get("time_step_limit")),
        norm_eps=config["layer_norm_epsilon"],
    )
    return language_model(
        config,
        _blocks(mixer, config["hidden_size"], config["num_hidden_layers"]),
        "backbone.embeddings.weight",
        "backbone.norm_f.weight",
        norm_eps=config["layer_norm_epsilon"],
        residual_fp32=config.get("residual_in_fp32", True),
    )


def native_mamba2(config: Config) -> ModelShape:
    """The checkpoints that mamba_ssm writes: config.json with d_model, n_layer and ssm_cfg."""
    refuse(config, d_intermediate=0, attn_layer_idx=[], rms_norm=True)
    ssm = {"layer": "Mamba1"} | config["ssm_cfg"]
    refuse(
        ssm, layer="Mamba2", d_ssm=None, D_has_hdim=False, rmsnorm=True, norm_before_gate=False,
        bias=False,
    )  # fmt: skip
    width = config["d_model"]
    head_dim = ssm.get("headdim", 64)
    mixer = grouped_mamba2(
        num_heads=ssm.get("expand", 2) * width // head_dim,
        head_dim=head_dim,
        num_groups=ssm.get("ngroups", 1),
        state_dim=ssm.get("d_state", 128),
        conv_width=ssm.get("d_conv", 4),
        conv_bias=ssm.get("conv_bias", True),
        limit=dt_limit(ssm.get("dt_limit")),
        norm_eps=NATIVE_EPS,
    )
    multiple = config.get("pad_vocab_size_multiple", 8)
    named = {
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "hidden_size": width,
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "eos_token_id": config.get("eos_token_id", NATIVE_EOS),
    }
    return language_model(
        named,
        _blocks(mixer, width, config["n_layer"]),
        "backbone.embedding.weight",
        "backbone.norm_f.weight",
        norm_eps=NATIVE_EPS,
        residual_fp32=config.get("residual_in_fp32", True),
    )


def _blocks(mixer: Mamba2Shape, width: int, num_layers: int) -> tuple[Block, ...]:
    layers = [f"backbone.layers.{index}." for index in range(num_layers)]
    return tuple(
        Block(vector(layer + "norm.weight", width), (mamba2_part(mixer, width, layer + "mixer."),))
        for layer in layers
    )
