"""Mamba2: `Mamba2ForCausalLM` of transformers, and the native `state-spaces/mamba2-*`."""

from __future__ import annotations

from stree_core.families.config_keys import (
    KIND_KEYS,
    MAMBA,
    dt_limit,
    eos_ids,
    grouped_mamba2,
    language_model,
    layer_kinds,
    num_layers_of,
    one_of,
    width_of,
)
from stree_core.families.config_reader import (
    CONV_WIDTH,
    EXPANSION,
    HEAD_DIM,
    HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Keys,
)
from stree_core.families.model_shape import Block, Mamba2Shape, ModelShape
from stree_core.families.weight_map import mamba2_part, vector

# The tokenizer of every published native checkpoint is that of GPT-NeoX: <|endoftext|>.
NATIVE_EOS = 0
NATIVE_EPS = 1e-5


def mamba2(keys: Keys) -> ModelShape:
    """`Mamba2ForCausalLM`."""
    keys.refuse(hidden_act="silu", use_bias=False, rms_norm=True)
    if keys.has(*KIND_KEYS):
        layer_kinds(keys, spellings={"mamba": MAMBA, MAMBA: MAMBA})
    norm_eps = keys.positive("layer_norm_epsilon")
    mixer = grouped_mamba2(
        keys,
        num_heads=keys.count(HEADS, "num_heads"),
        head_dim=keys.count(HEAD_DIM, "head_dim"),
        num_groups=keys.count(HEADS, "n_groups"),
        state_dim=keys.count(HEAD_DIM, "state_size"),
        conv_width=keys.count(CONV_WIDTH, "conv_kernel"),
        conv_bias=keys.flag("use_conv_bias"),
        limit=dt_limit(keys, "time_step_limit"),
        norm_eps=norm_eps,
    )
    expanded = keys.count(EXPANSION, "expand", default=2) * width_of(keys)
    if mixer.inner_dim != expanded:
        raise keys.wrong("num_heads times head_dim", f"{expanded} by expand", mixer.inner_dim)
    return language_model(
        keys,
        _blocks(mixer, width_of(keys), num_layers_of(keys)),
        "backbone.embeddings.weight",
        "backbone.norm_f.weight",
        norm_eps=norm_eps,
        residual_fp32=keys.flag("residual_in_fp32", default=True),
    )


def native_mamba2(keys: Keys) -> ModelShape:
    """The checkpoints that mamba_ssm writes: config.json with d_model, n_layer and ssm_cfg."""
    keys.refuse(d_intermediate=0, attn_layer_idx=[], rms_norm=True)
    ssm = keys.section("ssm_cfg")
    one_of(ssm, "layer", "Mamba1", {"Mamba2": MAMBA})
    ssm.refuse(
        d_ssm=None, D_has_hdim=False, rmsnorm=True, norm_before_gate=False,
        bias=False,
    )  # fmt: skip
    width = keys.count(WIDTH, "d_model")
    head_dim = ssm.count(HEAD_DIM, "headdim", default=64)
    inner = ssm.count(EXPANSION, "expand", default=2) * width
    ssm.require_divides("headdim", head_dim, "expand times d_model", inner)
    mixer = grouped_mamba2(
        ssm,
        num_heads=inner // head_dim,
        head_dim=head_dim,
        num_groups=ssm.count(HEADS, "ngroups", default=1),
        state_dim=ssm.count(HEAD_DIM, "d_state", default=128),
        conv_width=ssm.count(CONV_WIDTH, "d_conv", default=4),
        conv_bias=ssm.flag("conv_bias", default=True),
        limit=dt_limit(ssm, "dt_limit"),
        norm_eps=NATIVE_EPS,
    )
    multiple = keys.count(WIDTH, "pad_vocab_size_multiple", default=8)
    named = {
        "vocab_size": -(-keys.count(VOCABULARY, "vocab_size") // multiple) * multiple,
        "hidden_size": width,
        "tie_word_embeddings": keys.flag("tie_embeddings", default=True),
        "eos_token_id": list(eos_ids(keys)) or NATIVE_EOS,
    }
    return language_model(
        Keys(named),
        _blocks(mixer, width, keys.count(LAYERS, "n_layer")),
        "backbone.embedding.weight",
        "backbone.norm_f.weight",
        norm_eps=NATIVE_EPS,
        residual_fp32=keys.flag("residual_in_fp32", default=True),
    )


def _blocks(mixer: Mamba2Shape, width: int, num_layers: int) -> tuple[Block, ...]:
    layers = [f"backbone.layers.{index}." for index in range(num_layers)]
    return tuple(
        Block(vector(layer + "norm.weight", width), (mamba2_part(mixer, width, layer + "mixer."),))
        for layer in layers
    )
