"""Nemotron-H and Nemotron 3: every layer is one mixer: Mamba2, attention, MLP or experts."""

from __future__ import annotations

from stree_core.families.config_keys import (
    ATTENTION,
    KIND_KEYS,
    KINDS,
    MAMBA,
    attention_of,
    dt_limit,
    grouped_mamba2,
    head_dim_of,
    language_model,
    layer_kinds,
    width_of,
)
from stree_core.families.config_reader import (
    CONV_WIDTH,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    WIDTH,
    Bound,
    Keys,
    refuse_value,
)
from stree_core.families.model_shape import Block, MlpShape, ModelShape, MoeShape, Part
from stree_core.families.mtp_shape import mtp_kinds, with_mtp
from stree_core.families.weight_map import attention_part, mamba2_part, mlp_part, moe_part, vector
from stree_kernels.launch.settings import Routing

MLP, EXPERT_LAYER = "mlp", "moe"
PATTERN = "hybrid_override_pattern"
"""The older key for the layers' kinds: one letter each."""
MTP_PATTERN = "mtp_hybrid_override_pattern"
LETTERS = {"M": MAMBA, "*": ATTENTION, "-": MLP, "E": EXPERT_LAYER}
SPELLINGS = KINDS | {MLP: MLP, EXPERT_LAYER: EXPERT_LAYER}
HEAD_DIMS = ("head_dim", "attention_head_dim")


def nemotron_h(keys: Keys) -> ModelShape:
    """`NemotronHForCausalLM`; its attention has no positions.

    `time_step_limit` is the run-time limit of time steps; `time_step_min` and `time_step_max` are
    where training starts (NVIDIA's modeling_nemotron_h.py).
    """
    keys.refuse(
        mamba_hidden_act="silu", mlp_hidden_act="relu2", use_bias=False, mlp_bias=False,
        mamba_proj_bias=False, attention_bias=False, residual_in_fp32=False,
    )  # fmt: skip
    kinds = _kinds(keys)
    blocks = tuple(
        Block(
            vector(f"backbone.layers.{index}.norm.weight", width_of(keys)),
            _parts(keys, kind, f"backbone.layers.{index}.mixer."),
        )
        for index, kind in enumerate(kinds)
    )
    model = language_model(
        keys,
        blocks,
        "backbone.embeddings.weight",
        "backbone.norm_f.weight",
        norm_eps=_eps(keys),
    )
    return with_mtp(model, keys, _parts, _mtp_kinds)


def _kinds(keys: Keys) -> list[str]:
    return layer_kinds(keys, KIND_KEYS, SPELLINGS, [(PATTERN, _lettered(keys, PATTERN))])


def _mtp_kinds(keys: Keys) -> list[str]:
    return mtp_kinds(keys, SPELLINGS, (MTP_PATTERN, _lettered(keys, MTP_PATTERN)))


def _lettered(keys: Keys, name: str) -> list[str] | None:
    """Read kinds of layers from a pattern of letters, None where there is none."""
    if not keys.has(name):
        return None
    pattern = keys.text(name)
    if len(pattern) > LAYERS.most:
        raise keys.wrong(name, f"at most {LAYERS.most} letters", f"{len(pattern)} letters")
    for letter in pattern:
        if letter not in LETTERS:
            raise refuse_value(name, letter, ", ".join(map(repr, LETTERS)))
    return [LETTERS[letter] for letter in pattern]


def _eps(keys: Keys) -> float:
    return keys.positive("layer_norm_epsilon")


def _parts(keys: Keys, kind: str, prefix: str) -> tuple[Part, ...]:
    width = width_of(keys)
    if kind == MAMBA:
        mixer = grouped_mamba2(
            keys,
            num_heads=keys.count(HEADS, "mamba_num_heads"),
            head_dim=keys.count(HEAD_DIM, "mamba_head_dim"),
            num_groups=keys.count(HEADS, "n_groups", "mamba_n_groups"),
            state_dim=keys.count(HEAD_DIM, "ssm_state_size"),
            conv_width=keys.count(CONV_WIDTH, "conv_kernel", "mamba_d_conv"),
            conv_bias=keys.flag("use_conv_bias", "mamba_conv_bias", default=True),
            limit=dt_limit(keys, "time_step_limit", "mamba_dt_limit"),
            norm_eps=_eps(keys),
        )
        return (mamba2_part(mixer, width, prefix),)
    if kind == ATTENTION:
        # transformers takes 128 where there is no key, the first published code a share.
        if not keys.has(*HEAD_DIMS):
            raise keys.missing(HEAD_DIMS[0])
        attention = attention_of(keys, head_dim_of(keys), rope=None)
        return (attention_part(attention, width, prefix),)
    if kind == MLP:
        return (_mlp(keys.count(WIDTH, "intermediate_size"), width, prefix),)
    keys.refuse(n_shared_experts=1)
    shared_dim = keys.count(WIDTH, "moe_shared_expert_intermediate_size")
    return (_experts(keys, prefix), _mlp(shared_dim, width, prefix + "shared_experts."))


def _mlp(inner_dim: int, width: int, prefix: str) -> Part:
    return mlp_part(MlpShape(inner_dim, "relu2"), width, prefix, up_names=("up_proj.weight",))


def _router(keys: Keys, num_experts: int) -> Routing:
    num_groups = keys.count(EXPERTS, "n_group", default=1)
    keys.require_divides("n_group", num_groups, "n_routed_experts", num_experts)
    group_size = num_experts // num_groups
    if num_groups > 1 and group_size == 1:
        # A group ranks by the sum of its two best.
        raise keys.wrong("n_group", f"at most half of n_routed_experts ({num_experts})", num_groups)
    num_open_groups = keys.count(Bound(1, num_groups), "topk_group", default=1)
    return Routing(
        "sigmoid",
        keys.count(Bound(1, num_open_groups * group_size), "num_experts_per_tok"),
        num_groups=num_groups,
        num_open_groups=num_open_groups,
        normalised=keys.flag("norm_topk_prob", default=True),
        scale=keys.number("routed_scaling_factor", default=1.0),
    )


def _experts(keys: Keys, prefix: str) -> Part:
    num_experts = keys.count(EXPERTS, "n_routed_experts", "num_local_experts")
    latent_dim = keys.optional_count(WIDTH, "moe_latent_size")
    expert = MlpShape(keys.count(WIDTH, "moe_intermediate_size"), "relu2")
    experts = [f"{prefix}experts.{index}." for index in range(num_experts)]
    latent_keys = (prefix + "fc1_latent_proj.weight", prefix + "fc2_latent_proj.weight")
    return moe_part(
        MoeShape(num_experts, expert, _router(keys, num_experts), latent_dim),
        width_of(keys),
        router_key=prefix + "gate.weight",
        bias_key=prefix + "gate.e_score_correction_bias",
        up_keys=tuple(expert + "up_proj.weight" for expert in experts),
        down_keys=tuple(expert + "down_proj.weight" for expert in experts),
        latent_keys=latent_keys if latent_dim else None,
    )
