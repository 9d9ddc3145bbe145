"""Zamba2 (arXiv:2411.15242): Mamba2 layers, some behind a transformer layer with shared weights.

Each use of the shared layer has low-rank adapters of its own, which are merged when it is loaded:
its weights are then kept once per use.
"""

from __future__ import annotations

from dataclasses import replace

from stree_core.families.config_keys import (
    MAMBA,
    attention_of,
    dt_limit,
    expanded_width,
    grouped_mamba2,
    language_model,
    layer_kinds,
    one_of,
    rope_of,
    width_of,
)
from stree_core.families.config_reader import CONV_WIDTH, HEAD_DIM, HEADS, WIDTH, Keys, Refused
from stree_core.families.model_shape import Block, Mamba2Shape, MlpShape, ModelShape, SharedBlock
from stree_core.families.weight_map import attention_part, mamba2_part, matrix, mlp_part, vector
from stree_kernels.launch.settings import Activation

HYBRID = "hybrid"
KINDS = {"mamba": MAMBA, MAMBA: MAMBA, HYBRID: HYBRID}
ACTIVATIONS: dict[str, Activation] = {"gelu": "geglu", "silu": "swiglu"}
FIRST_KEYS = ("state_size", "conv_dimension", "expansion_factor", "ffn_hidden_size", "lora_rank")
"""Of Zyphra's first format, which names weights otherwise too (`in_proj.0`, `linear_fc1`)."""
# Fixed in the published mixer, whatever the config's norm_eps.
MIXER_EPS = 1e-5


def zamba2(keys: Keys) -> ModelShape:
    """`Zamba2ForCausalLM`.

    `time_step_limit` is the run-time limit of time steps where a config has it; the authors' code
    has none otherwise, and `time_step_min` is where training starts.
    """
    for name in FIRST_KEYS:
        if keys.has(name):
            raise Refused(
                f"{keys.file} has {name}, which is of Zyphra's first Zamba2 format, whose weights "
                "have other names; use the model in transformers' format, with mamba_d_state"
            )
    keys.refuse(
        add_bias_linear=False, use_long_context=False, use_conv_bias=True,
        use_shared_mlp_adapter=True,
    )  # fmt: skip
    width, mixer, kinds = width_of(keys), _mixer(keys), layer_kinds(keys, spellings=KINDS)
    num_shared = keys.count(HEADS, "num_mem_blocks")
    hybrids = [index for index, kind in enumerate(kinds) if kind == HYBRID]
    blocks = []
    for index, kind in enumerate(kinds):
        layer = f"model.layers.{index}."
        inner = layer + "mamba_decoder." if kind == HYBRID else layer
        shared = None
        if kind == HYBRID:
            use = hybrids.index(index)
            owner = hybrids[use % num_shared]
            shared = _shared(keys, layer, f"model.layers.{owner}.shared_transformer.", use)
        part = mamba2_part(mixer, width, inner + "mamba.")
        blocks.append(Block(vector(inner + "input_layernorm.weight", width), (part,), shared))
    model = language_model(
        keys,
        blocks,
        "model.embed_tokens.weight",
        "model.final_layernorm.weight",
        norm_eps=keys.positive("rms_norm_eps"),
        tied_by_default=True,
    )
    return replace(model, copies=_copies(hybrids, num_shared))


def _copies(hybrids: list[int], num_owners: int) -> tuple[tuple[str, str], ...]:
    """Return where a file may repeat the weights of the shared layers: at each further use."""
    prefixes = [f"model.layers.{index}.shared_transformer." for index in hybrids]
    return tuple(
        (prefix, prefixes[use % num_owners])
        for use, prefix in enumerate(prefixes)
        if use >= num_owners
    )


def _mixer(keys: Keys) -> Mamba2Shape:
    num_heads, inner = keys.count(HEADS, "n_mamba_heads"), expanded_width(keys)
    keys.require_divides("n_mamba_heads", num_heads, "mamba_expand times hidden_size", inner)
    keys.refuse(mamba_headdim=inner // num_heads)
    return grouped_mamba2(
        keys,
        num_heads=num_heads,
        head_dim=inner // num_heads,
        num_groups=keys.count(HEADS, "mamba_ngroups"),
        state_dim=keys.count(HEAD_DIM, "mamba_d_state"),
        conv_width=keys.count(CONV_WIDTH, "mamba_d_conv"),
        limit=dt_limit(keys, "time_step_limit"),
        norm_eps=MIXER_EPS,
    )


def _shared(keys: Keys, layer: str, owner: str, use: int) -> SharedBlock:
    """Return the `use`-th use of a shared layer, whose weights lie under `owner`."""
    width, num_heads = width_of(keys), keys.count(HEADS, "num_attention_heads")
    keys.require_divides("num_attention_heads", num_heads, "twice hidden_size", 2 * width)
    head_dim = 2 * width // num_heads
    keys.refuse(attention_head_dim=head_dim)
    rope = rope_of(keys, head_dim) if keys.flag("use_mem_rope", default=False) else None
    attention = attention_of(keys, head_dim, rope, scale=(head_dim / 2) ** -0.5)
    adapters: tuple[tuple[str, str], ...] = ()
    if keys.flag("use_shared_attention_adapter", default=False):
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
            _mlp(keys),
            width,
            owner + "feed_forward.",
            up_names=("gate_up_proj.weight",),
            adapters=(_adapter(f"{owner}feed_forward.gate_up_proj_adapter_list.{use}."),),
        ),
        linear=matrix(layer + "linear.weight", width, width),
    )


def _mlp(keys: Keys) -> MlpShape:
    inner_dim = keys.optional_count(WIDTH, "intermediate_size") or 4 * width_of(keys)
    known = {name: name for name in ACTIVATIONS}
    return MlpShape(inner_dim, ACTIVATIONS[one_of(keys, "hidden_act", "gelu", known)])


def _adapter(prefix: str) -> tuple[str, str]:
    """Return the keys of a low-rank pair."""
    return prefix + "0.weight", prefix + "1.weight"
