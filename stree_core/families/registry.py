"""From a parsed config to a ModelShape: which family a model is of, and what none supports."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from stree_core.errors import CheckpointError, brief
from stree_core.families.bamba import bamba
from stree_core.families.config_reader import Config, Keys, Refused
from stree_core.families.falcon_h1 import falcon_h1
from stree_core.families.granite import granite
from stree_core.families.mamba2 import mamba2, native_mamba2
from stree_core.families.mamba_in_llama import MAMBA_CONFIG, MAMBA_CONFIG_FILE, mamba_in_llama
from stree_core.families.model_shape import ModelShape
from stree_core.families.nemotron_h import nemotron_h
from stree_core.families.qwen import qwen3_5, qwen3_5_moe, qwen3_next
from stree_core.families.zamba2 import zamba2
from stree_core.fp8 import Fp8Scheme, Fp8Weights, Unsupported, find_scheme

logger = logging.getLogger(__name__)

FAMILIES: dict[str, Callable[[Keys], ModelShape]] = {
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "granitemoehybrid": granite,
    "mamba2": mamba2,
    "mamba2 (native)": native_mamba2,
    "mamba-in-llama": mamba_in_llama,
    "nemotron_h": nemotron_h,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_next": qwen3_next,
    "zamba2": zamba2,
}
"""By model_type; the two formats without one of their own are known by other keys."""

_TEXT_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
"""The model_type of a language model that is saved without its vision part."""

QUANTISATION = ("quantization_config", "compression_config", "hf_quant_config")
HF_QUANT_CONFIG = "hf_quant_config"
HF_QUANT_CONFIG_FILE = "hf_quant_config.json"

_MAMBA_1 = "Mamba-1 layers"
_DELTA_ATTENTION = "Kimi Delta Attention layers"
_OTHER_DELTA_RULE = "gated delta rule layers of another kind"
_CONVOLUTIONS = "short convolution layers"
_OTHER_RECURRENCES = {
    "falcon_mamba": _MAMBA_1,
    "jamba": _MAMBA_1,
    "kimi_linear": _DELTA_ATTENTION,
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "mamba": _MAMBA_1,
    "mamba3": "Mamba-3 layers",
    "olmo_hybrid": _OTHER_DELTA_RULE,
    "recurrent_gemma": "RG-LRU layers",
    "zamba": _MAMBA_1,
}
_TEXT_MODELS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which configs of vision and omni models hold their language model's."""
_MOST_NAMED = 40
WIDTH_MULTIPLE = 8
"""COLUMNS_PER_SUM of stree_kernels.linear.deferred_norm; a test compares, for it loads torch."""


def shape_from_config(config: Config, name: str) -> ModelShape:
    """Map a parsed config onto a ModelShape; `name` goes into errors.

    Raises CheckpointError on an unknown family, a missing key or an unsupported setting.
    """
    keys = Keys(config)
    try:
        family = _family_of(keys)
        scheme = find_scheme(config)
        keys.skip(*QUANTISATION)
        keys.refuse(sliding_window=None)
        shape = FAMILIES[family](keys)
        if shape.hidden_size % WIDTH_MULTIPLE:
            raise Refused(
                f"the hidden size must be a multiple of {WIDTH_MULTIPLE}, as the kernels sum "
                f"columns, got {shape.hidden_size}; use another checkpoint"
            )
    except (Refused, Unsupported) as err:
        raise CheckpointError(f"{name}: {err}") from err
    unread = list(keys.unread())
    if unread:
        more = f" and {len(unread) - _MOST_NAMED} more" if len(unread) > _MOST_NAMED else ""
        logger.info("%s: config keys not used: %s%s", name, ", ".join(unread[:_MOST_NAMED]), more)
    return shape if scheme is None else in_fp8(shape, scheme)


# By the checkpoints that are published: rows of single heads, and how an MTP head begins.
_NEVER_IN_FP8 = ("in_proj_a", "in_proj_b", "in_proj_ba", "fc", "eh_proj")


def in_fp8(shape: ModelShape, scheme: Fp8Scheme) -> ModelShape:
    """Return a shape with the projections in FP8 that a scheme does not exclude.

    It is what a config says; the files of a checkpoint may say otherwise.
    """
    ending = "_scale_inv" if scheme.kind == "fp8-block" else "_scale"
    scales = {
        key: key + ending
        for weight in shape.projections
        for key in weight.keys
        if not scheme.skips(key)
        and key.removesuffix(".weight").rpartition(".")[2] not in _NEVER_IN_FP8
    }
    head = None if shape.mtp is None else in_fp8(shape.mtp, scheme)
    fp8 = Fp8Weights(scheme.kind, scales, scheme.block) if scales else None
    return dataclasses.replace(shape, fp8=fp8, mtp=head)


def _family_of(keys: Keys) -> str:
    config = keys.values
    if MAMBA_CONFIG in config:
        return "mamba-in-llama"
    if "ssm_cfg" in config and "model_type" not in config:
        return "mamba2 (native)"
    family = keys.text("model_type", "")
    family = _TEXT_TYPES.get(family, family)
    if family in FAMILIES:
        return family
    raise Refused(_why_not(family, config))


def _why_not(family: str, config: dict[str, Any]) -> str:
    """Return why a model of no known family cannot be run."""
    inner = next((key for key in _TEXT_MODELS if isinstance(config.get(key), dict)), None)
    inner_type = str(config[inner].get("model_type")) if inner else ""
    text_model = f", its language model's config is {inner}" if inner else ""
    for model_type in (family, inner_type):
        if model_type in _OTHER_RECURRENCES:
            return (
                f"model_type {model_type} has {_OTHER_RECURRENCES[model_type]}{text_model}; only "
                "Mamba-2 layers and Qwen's gated delta rule layers are supported, so choose a "
                f"model of {_known()}"
            )
    if inner:
        kind = f" of model_type {inner_type}" if inner_type in FAMILIES else ""
        return (
            f"model_type {brief(family)} is a model of several modalities{text_model}{kind}; "
            "use a checkpoint of the language model alone"
        )
    if family == "llama":
        return f"model_type llama needs {MAMBA_CONFIG_FILE} (Mamba-in-Llama), it has none; add it"
    if not family:
        made_for = config.get("architectures")
        hint = f", the nearest it has is architectures {brief(made_for)}" if made_for else ""
        return f"config.json needs key 'model_type'{hint}; add it, one of {_known()}"
    # Names that are merely alike (mamba3, jamba) belong to other recurrences.
    same = [name for name in FAMILIES if _letters(name) == _letters(family)]
    hint = f"did you mean {same[0]}?" if same else f"known: {_known()}"
    return f"model_type must be a known family, got {brief(family)}; {hint}"


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _known() -> str:
    return ", ".join(sorted(FAMILIES))
