"""Model families: from a config.json to a typed description of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_core.families.model_shape import (
        AttentionShape as AttentionShape,
        Block as Block,
        DeltaShape as DeltaShape,
        GatedAttentionShape as GatedAttentionShape,
        Llama3Scaling as Llama3Scaling,
        Mamba2Shape as Mamba2Shape,
        Mixer as Mixer,
        MlpShape as MlpShape,
        ModelShape as ModelShape,
        MoeShape as MoeShape,
        Part as Part,
        SharedBlock as SharedBlock,
        SharedMoeShape as SharedMoeShape,
        Weight as Weight,
        warn_of_long_context as warn_of_long_context,
    )
    from stree_core.families.mtp_shape import (
        MTP_CONFIG as MTP_CONFIG,
        MTP_FILE as MTP_FILE,
        PREFIX as PREFIX,
    )
    from stree_core.families.registry import (
        HF_QUANT_CONFIG as HF_QUANT_CONFIG,
        HF_QUANT_CONFIG_FILE as HF_QUANT_CONFIG_FILE,
        in_fp8 as in_fp8,
        shape_from_config as shape_from_config,
    )
    from stree_core.families.shape_spec import (
        find_shape_spec as find_shape_spec,
        load_shape_spec as load_shape_spec,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "model_shape": [
            "AttentionShape",
            "Block",
            "DeltaShape",
            "GatedAttentionShape",
            "Llama3Scaling",
            "Mamba2Shape",
            "Mixer",
            "MlpShape",
            "ModelShape",
            "MoeShape",
            "Part",
            "SharedBlock",
            "SharedMoeShape",
            "Weight",
            "warn_of_long_context",
        ],
        "mtp_shape": ["MTP_CONFIG", "MTP_FILE", "PREFIX"],
        "registry": ["HF_QUANT_CONFIG", "HF_QUANT_CONFIG_FILE", "in_fp8", "shape_from_config"],
        "shape_spec": ["find_shape_spec", "load_shape_spec"],
    },
)
