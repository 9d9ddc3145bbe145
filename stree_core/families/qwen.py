"""Qwen3-Next and Qwen3.5: gated delta rule or gated attention, then an MLP or experts.

Norms are zero-centred but for the one inside a delta layer. Sources: transformers' Qwen3Next,
Qwen3_5 and Qwen3_5Moe; for the MTP head Megatron-Bridge's qwen3_next_bridge.py and vLLM's
qwen3_next_mtp.py.
"""

from __future__ import annotations

import dataclasses
import logging

from stree_core.families.config_keys import (
    ATTENTION,
    MAMBA,
    attention_of,
    head_dim_of,
    language_model,
    layer_kinds,
    num_layers_of,
    rope_of,
    width_of,
)
from stree_core.families.config_reader import (
    CONV_WIDTH,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    TOKEN_ID,
    WIDTH,
    Bound,
    Keys,
    Refused,
    refuse_value,
)
from stree_core.families.model_shape import (
    LEAST_ROW_DIM,
    Block,
    DeltaShape,
    GatedAttentionShape,
    Join,
    MlpShape,
    ModelShape,
    Part,
    SharedMoeShape,
)
from stree_core.families.mtp_shape import MTP_CONFIG, MTP_FILE, PREFIX
from stree_core.families.weight_map import (
    centred,
    delta_part,
    gated_attention_part,
    matrix,
    mlp_part,
    shared_moe_part,
)
from stree_kernels.launch.settings import Routing

logger = logging.getLogger(__name__)

TEXT_CONFIG = "text_config"
MODEL = "model."
RENAMES = (("model.language_model.", MODEL),)
"""How checkpoints with a vision part name the language model's weights."""
VISION = ("model.visual.*",)
TIED = "tie_word_embeddings"
MTP_COUNT = "mtp_num_hidden_layers"
INTERVAL = "full_attention_interval"
ROTATED_SHARE = "partial_rotary_factor"
ROPE_SECTIONS = ("rope_parameters", "rope_scaling")
# Of heads that are rotated, where no config says otherwise.
DEFAULT_SHARE = 0.25
# What both servers take where Qwen3-Next's config, which has no key for it, says nothing.
QWEN3_NEXT_HEADS = 1


def qwen3_next(keys: Keys) -> ModelShape:
    """`Qwen3NextForCausalLM`: the projections of a delta layer lie together by key head."""
    keys.refuse(decoder_sparse_step=1, use_sliding_window=False)
    model = _model(keys, with_experts=True, by_key_head=True)
    return _with_mtp(model, keys, with_experts=True, default=QWEN3_NEXT_HEADS)


def qwen3_5(keys: Keys) -> ModelShape:
    """`Qwen3_5ForCausalLM`, or the language model of `Qwen3_5ForConditionalGeneration`."""
    return _qwen3_5(keys, with_experts=False)


def qwen3_5_moe(keys: Keys) -> ModelShape:
    """`Qwen3_5MoeForCausalLM`, or the language model inside a vision model."""
    return _qwen3_5(keys, with_experts=True)


def _qwen3_5(keys: Keys, *, with_experts: bool) -> ModelShape:
    if keys.has(TEXT_CONFIG):
        logger.info("%s describes a vision model: its %s is run", keys.file, TEXT_CONFIG)
        keys = _text_keys(keys)
    keys.refuse(attn_output_gate=True, mtp_use_dedicated_embeddings=False, sliding_window=None)
    model = _model(keys, with_experts=with_experts, by_key_head=False)
    model = dataclasses.replace(model, extras=VISION, renames=RENAMES)
    return _with_mtp(model, keys, with_experts=with_experts, default=0)


def _text_keys(keys: Keys) -> Keys:
    """Return the keys of the language model, with what stands outside and is about it."""
    tied = [part.values.get(TIED) for part in (keys, keys.section(TEXT_CONFIG)) if part.has(TIED)]
    if any(tied) and not all(tied):
        raise Refused(
            f"{TIED} differs inside {TEXT_CONFIG} and outside; keep the one of the published config"
        )
    # End tokens outside may be those of generation_config.json, which knows all.
    return keys.inside(TEXT_CONFIG, ("eos_token_id", TIED, MTP_CONFIG))


def _model(keys: Keys, *, with_experts: bool, by_key_head: bool) -> ModelShape:
    keys.refuse(hidden_act="silu", attention_bias=False)
    if without_experts := keys.counts(TOKEN_ID, "mlp_only_layers", LAYERS.most):
        raise refuse_value("mlp_only_layers", without_experts, "[]")
    width, attention, delta = width_of(keys), _attention(keys), _delta(keys)
    blocks: list[Block] = []
    for index, kind in enumerate(layer_kinds(keys, others=[(INTERVAL, _interval_kinds(keys))])):
        layer = f"{MODEL}layers.{index}."
        if kind == ATTENTION:
            part = gated_attention_part(attention, width, layer + "self_attn.")
        else:
            part = delta_part(delta, width, layer + "linear_attn.", by_key_head=by_key_head)
        blocks += _layer(keys, layer, part, with_experts=with_experts)
    model = language_model(
        keys, blocks, MODEL + "embed_tokens.weight", MODEL + "norm.weight",
        norm_eps=keys.positive("rms_norm_eps"),
    )  # fmt: skip
    return dataclasses.replace(model, final_norm=centred(MODEL + "norm.weight", width))


def _layer(keys: Keys, layer: str, mixer: Part, *, with_experts: bool) -> list[Block]:
    """Return the blocks of a layer: a mixer behind one norm, then what feeds forward."""
    width = width_of(keys)
    feed_forward = _experts(keys, layer) if with_experts else _mlp(keys, layer)
    return [
        Block(centred(layer + "input_layernorm.weight", width), (mixer,)),
        Block(centred(layer + "post_attention_layernorm.weight", width), (feed_forward,)),
    ]


def _interval_kinds(keys: Keys) -> list[str] | None:
    """Return the layers' kinds where every so many-th one attends, None where no key says so."""
    interval = keys.optional_count(LAYERS, INTERVAL)
    if interval is None:
        return None
    return [ATTENTION if n % interval == 0 else MAMBA for n in range(1, 1 + num_layers_of(keys))]


def _attention(keys: Keys) -> GatedAttentionShape:
    head_dim = head_dim_of(keys)
    if head_dim < LEAST_ROW_DIM or head_dim & (head_dim - 1):
        raise refuse_value("head_dim", head_dim, f"powers of two from {LEAST_ROW_DIM} on")
    plain = attention_of(keys, head_dim, rope_of(keys, head_dim, rotated_share=_share(keys)))
    return GatedAttentionShape(
        plain.num_heads, plain.num_kv_heads, head_dim, plain.scale, plain.rope,
        norm_eps=keys.positive("rms_norm_eps"),
    )  # fmt: skip


def _share(keys: Keys) -> float:
    """Read which share of a head is rotated: a key of its own, or one of the rotation's."""
    places = [keys, *(keys.section(name) for name in ROPE_SECTIONS if keys.has(name))]
    share = next(
        (place.positive(ROTATED_SHARE) for place in places if place.has(ROTATED_SHARE)),
        DEFAULT_SHARE,
    )
    if share > 1:
        raise keys.wrong(ROTATED_SHARE, "at most 1", share)
    return share


def _delta(keys: Keys) -> DeltaShape:
    num_key_heads = keys.count(HEADS, "linear_num_key_heads")
    num_value_heads = keys.count(HEADS, "linear_num_value_heads")
    keys.require_divides(
        "linear_num_key_heads", num_key_heads, "linear_num_value_heads", num_value_heads
    )
    return DeltaShape(
        num_key_heads,
        num_value_heads,
        keys.count(HEAD_DIM, "linear_key_head_dim"),
        keys.count(HEAD_DIM, "linear_value_head_dim"),
        keys.count(CONV_WIDTH, "linear_conv_kernel_dim"),
        keys.positive("rms_norm_eps"),
    )


def _mlp(keys: Keys, layer: str) -> Part:
    mixer = MlpShape(keys.count(WIDTH, "intermediate_size"), "swiglu")
    return mlp_part(mixer, width_of(keys), layer + "mlp.")


def _experts(keys: Keys, layer: str) -> Part:
    num_experts = keys.count(EXPERTS, "num_experts")
    inner_dim = keys.count(WIDTH, "moe_intermediate_size")
    shared_dim = keys.count(WIDTH, "shared_expert_intermediate_size")
    if shared_dim % inner_dim:
        raise keys.wrong(
            "shared_expert_intermediate_size", f"a multiple of {inner_dim}", shared_dim
        )
    router = Routing(
        "softmax",
        keys.count(Bound(1, num_experts), "num_experts_per_tok"),
        normalised=keys.flag("norm_topk_prob", default=True),
    )
    mixer = SharedMoeShape(
        num_experts, MlpShape(inner_dim, "swiglu"), router, num_shared=shared_dim // inner_dim
    )
    return shared_moe_part(mixer, width_of(keys), layer + "mlp.")


def _with_mtp(model: ModelShape, keys: Keys, *, with_experts: bool, default: int) -> ModelShape:
    """Return the model with its MTP head: one layer with attention, run anew for every depth."""
    if keys.has(MTP_CONFIG):
        keys = keys.overlaid(MTP_CONFIG, MTP_FILE)
    count = keys.count(Bound(0, LAYERS.most), MTP_COUNT, default=default)
    if not count:
        return model
    if count != 1:
        raise Refused(
            f"{MTP_COUNT} = {count} is not supported, only 1, which is run for every depth; use a "
            "checkpoint whose head has one layer"
        )
    width, layer = model.hidden_size, PREFIX + "layers.0."
    attention = gated_attention_part(_attention(keys), width, layer + "self_attn.")
    join = Join(
        centred(PREFIX + "pre_fc_norm_embedding.weight", width),
        centred(PREFIX + "pre_fc_norm_hidden.weight", width),
        matrix(PREFIX + "fc.weight", width, 2 * width),
    )
    head = dataclasses.replace(
        model,
        blocks=tuple(_layer(keys, layer, attention, with_experts=with_experts)),
        final_norm=centred(PREFIX + "norm.weight", width),
        join=join,
    )
    return dataclasses.replace(model, mtp=head)
