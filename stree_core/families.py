"""From a Hugging Face config.json to a ModelShape: one function per model family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from stree_core.errors import CheckpointError, nearest
from stree_core.model_shape import AttentionShape, Block, Mamba2Shape, MlpShape, ModelShape

Config = dict[str, Any]


def shape_from_config(config: Config, name: str) -> ModelShape:
    """Map a parsed config.json onto a ModelShape; `name` goes into errors.

    Raises CheckpointError on an unknown family, a missing key or an unsupported setting.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise CheckpointError(
            f"{name}: model_type must be a known family, got {family!r}; "
            f"{nearest(family, FAMILIES)}"
        )
    try:
        return FAMILIES[family](config)
    except KeyError as err:
        raise CheckpointError(
            f"{name}: config.json of family {family} needs key {err.args[0]!r}; add it"
        ) from err
    except (TypeError, ValueError) as err:
        raise CheckpointError(
            f"{name}: config.json has a value of the wrong kind ({err}); mend it"
        ) from err
    except _Unsupported as err:
        raise CheckpointError(f"{name}: {err}; use a checkpoint without it") from err


class _Unsupported(Exception):
    """A setting that would change the result and is not implemented."""


def _refuse(config: Config, **expected: object) -> None:
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise _Unsupported(f"{key} = {config[key]!r} is not supported, only {value!r}")


def _dt_limit(config: Config) -> tuple[float, float]:
    low, high = config.get("time_step_limit") or (0.0, math.inf)
    return _number(low), _number(high)


def _number(value: Any) -> float:
    """Read a JSON number; transformers writes infinity as an object."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _eos_ids(config: Config) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _mamba2(config: Config) -> ModelShape:
    """`Mamba2ForCausalLM`."""
    _refuse(config, hidden_act="silu", use_bias=False, quantization_config=None)
    mixer = Mamba2Shape(
        num_heads=config["num_heads"],
        num_x_heads=config["num_heads"],
        num_b_groups=config["n_groups"],
        num_c_groups=config["n_groups"],
        num_groups=config["n_groups"],
        head_dim=config["head_dim"],
        state_dim=config["state_size"],
        conv_width=config["conv_kernel"],
        conv_bias=config["use_conv_bias"],
        dt_limit=_dt_limit(config),
    )
    layers = [f"backbone.layers.{i}." for i in range(config["num_hidden_layers"])]
    embed = "backbone.embeddings.weight"
    return ModelShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        norm_eps=config["layer_norm_epsilon"],
        residual_fp32=config.get("residual_in_fp32", True),
        eos_token_ids=_eos_ids(config),
        embed_key=embed,
        final_norm_key="backbone.norm_f.weight",
        lm_head_key=embed if config.get("tie_word_embeddings") else "lm_head.weight",
        blocks=tuple(Block(mixer, p + "norm.weight", p + "mixer.") for p in layers),
    )


def _bamba(config: Config) -> ModelShape:
    """`BambaForCausalLM`: Mamba2 or attention, then a gated MLP, in every layer."""
    _refuse(
        config, hidden_act="silu", mamba_proj_bias=False, attention_bias=False, mlp_bias=False,
        quantization_config=None,
    )  # fmt: skip
    attention_layers = set(config.get("attn_layer_indices") or ())
    blocks: list[Block] = []
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        if index in attention_layers:
            mixer_block = Block(
                _bamba_attention(config), layer + "input_layernorm.weight", layer + "self_attn."
            )
        else:
            mixer_block = Block(
                _bamba_mixer(config), layer + "input_layernorm.weight", layer + "mamba."
            )
        mlp = MlpShape(config["intermediate_size"])
        blocks += [
            mixer_block,
            Block(mlp, layer + "pre_ff_layernorm.weight", layer + "feed_forward."),
        ]
    embed = "model.embed_tokens.weight"
    return ModelShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        norm_eps=config["rms_norm_eps"],
        residual_fp32=False,
        eos_token_ids=_eos_ids(config),
        embed_key=embed,
        final_norm_key="model.final_layernorm.weight",
        lm_head_key=embed if config.get("tie_word_embeddings") else "lm_head.weight",
        blocks=tuple(blocks),
    )


def _bamba_mixer(config: Config) -> Mamba2Shape:
    num_heads = config["mamba_n_heads"]
    head_dim = config["mamba_d_head"]
    if head_dim == "auto":
        head_dim = config["mamba_expand"] * config["hidden_size"] // num_heads
    return Mamba2Shape(
        num_heads=num_heads,
        num_x_heads=num_heads,
        num_b_groups=config["mamba_n_groups"],
        num_c_groups=config["mamba_n_groups"],
        num_groups=config["mamba_n_groups"],
        head_dim=head_dim,
        state_dim=config["mamba_d_state"],
        conv_width=config["mamba_d_conv"],
        conv_bias=config["mamba_conv_bias"],
        dt_limit=_dt_limit(config),
    )


def _bamba_attention(config: Config) -> AttentionShape:
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        raise _Unsupported(f"rope_type {rope['rope_type']!r} is not supported, only 'default'")
    # transformers fixes the factor at one half for this family.
    factor = rope.get("partial_rotary_factor", 0.5)
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * factor),
        rope_theta=float(rope["rope_theta"]),
    )


FAMILIES: dict[str, Callable[[Config], ModelShape]] = {"mamba2": _mamba2, "bamba": _bamba}
