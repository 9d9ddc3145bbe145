"""Mamba-in-Llama (arXiv:2408.15237): Llama layers, some of whose attentions became Mamba2.

A folder holds Llama's config.json and, in mamba_config.json, which layers attend and the mixers'
sizes. x and B have the heads of Llama's keys and values; neighbouring heads share them.
"""

from __future__ import annotations

from stree_core.families.config_keys import (
    attention_of,
    dt_limit,
    head_dim_of,
    language_model,
    num_layers_of,
    rope_of,
    two_blocks,
    width_of,
)
from stree_core.families.config_reader import CONV_WIDTH, HEAD_DIM, HEADS, WIDTH, Bound, Keys
from stree_core.families.model_shape import Block, Mamba2Shape, MlpShape, ModelShape
from stree_core.families.weight_map import attention_part, mamba2_part, mlp_part

MAMBA_CONFIG = "mamba_config"
MAMBA_CONFIG_FILE = "mamba_config.json"
# Fixed in the published mixer, whatever the config's norm_eps.
MIXER_EPS = 1e-5


def mamba_in_llama(keys: Keys) -> ModelShape:
    """A Llama model with `mamba_config`."""
    keys.refuse(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
    mamba = keys.section(MAMBA_CONFIG, MAMBA_CONFIG_FILE)
    width, num_layers, head_dim = width_of(keys), num_layers_of(keys), head_dim_of(keys)
    mamba.refuse(hidden_act="silu")
    _require_same_model(keys, mamba)
    attention, mixer = attention_of(keys, head_dim, rope_of(keys, head_dim)), _mixer(mamba)
    mlp = MlpShape(keys.count(WIDTH, "intermediate_size"), "swiglu")
    attention_layers = mamba.counts(Bound(0, num_layers - 1), "attn_layers", num_layers)
    if attention_layers is None:
        raise mamba.missing("attn_layers")
    blocks: list[Block] = []
    for index in range(num_layers):
        layer = f"model.layers.{index}."
        if index in attention_layers:
            part = attention_part(attention, width, layer + "self_attn.")
        else:
            part = mamba2_part(mixer, width, layer + "mamba.")
        norms = (layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight")
        blocks += two_blocks(keys, norms, (part,), (mlp_part(mlp, width, layer + "mlp."),))
    return language_model(
        keys,
        blocks,
        "model.embed_tokens.weight",
        "model.norm.weight",
        norm_eps=keys.positive("rms_norm_eps"),
    )


def _require_same_model(keys: Keys, mamba: Keys) -> None:
    """Raise Refused where the two files give one size differently."""
    for name, other in (
        ("d_model", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("intermediate_size", "intermediate_size"),
    ):
        size = mamba.optional_count(WIDTH, name)
        if size is not None and size != keys.count(WIDTH, other):
            raise mamba.wrong(name, f"{other} of {keys.file}", size)


def _mixer(mamba: Keys) -> Mamba2Shape:
    ssm = mamba.section("ssm_cfg")
    ssm.refuse(
        repeat_kv_before_conv=False, d_ssm=None, D_has_hdim=False, rmsnorm=True,
        norm_before_gate=False, bias=False,
    )  # fmt: skip
    num_heads, head_dim = ssm.count(HEADS, "ngroups"), ssm.count(HEAD_DIM, "d_state")
    inner, shared = mamba.count(WIDTH, "d_inner"), mamba.count(WIDTH, "d_xb")
    if num_heads * head_dim != inner:
        raise mamba.wrong("d_inner", f"ngroups times d_state ({num_heads * head_dim})", inner)
    mamba.require_divides("d_state", head_dim, "d_xb", shared)
    mamba.require_divides("d_xb", shared, "d_inner", inner)
    return Mamba2Shape(
        num_heads=num_heads,
        num_x_heads=shared // head_dim,
        num_b_groups=shared // head_dim,
        num_c_groups=num_heads,
        head_dim=head_dim,
        state_dim=head_dim,
        conv_width=ssm.count(CONV_WIDTH, "d_conv", default=4),
        conv_bias=ssm.flag("conv_bias", default=True),
        dt_limit=dt_limit(ssm, "dt_limit"),
        norm_groups=num_heads,
        norm_eps=MIXER_EPS,
    )
