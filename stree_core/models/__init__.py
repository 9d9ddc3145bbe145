"""Models: weights, caches and one forward pass over a block of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_core.models.backend import (
        Backend as Backend,
        load_backend as load_backend,
        resolve_backend as resolve_backend,
        resolve_device as resolve_device,
        resolve_dtype as resolve_dtype,
    )
    from stree_core.models.cache import (
        AttentionCache as AttentionCache,
        Cache as Cache,
        CacheSize as CacheSize,
    )
    from stree_core.models.cuda_graph import capture as capture
    from stree_core.models.hub import is_hub_id as is_hub_id
    from stree_core.models.model import Model as Model, Pass as Pass
    from stree_core.models.prompt_pass import PromptPass as PromptPass
    from stree_core.models.row_block import (
        RowBlock as RowBlock,
        like as like,
        make_block as make_block,
    )
    from stree_core.models.scaled_files import ScaledFiles as ScaledFiles
    from stree_core.models.source import (
        MTP as MTP,
        ModelSource as ModelSource,
        config_source as config_source,
        find_source as find_source,
        folder_source as folder_source,
        head_source as head_source,
        hub_config_source as hub_config_source,
        spec_source as spec_source,
    )
    from stree_core.models.state_flush import flush_states as flush_states
    from stree_core.models.text import (
        Chat as Chat,
        Message as Message,
        TextCodec as TextCodec,
        load_text_codec as load_text_codec,
    )
    from stree_core.models.weight_files import WeightFiles as WeightFiles
    from stree_core.models.weight_index import (
        require_present as require_present,
        shape_keys as shape_keys,
        skipped_copies as skipped_copies,
    )
    from stree_core.models.weights import (
        AttentionWeights as AttentionWeights,
        ModelWeights as ModelWeights,
        Read as Read,
        ReadParts as ReadParts,
        ReadProjection as ReadProjection,
        assemble as assemble,
        assemble_head as assemble_head,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "backend": [
            "Backend",
            "load_backend",
            "resolve_backend",
            "resolve_device",
            "resolve_dtype",
        ],
        "cache": ["AttentionCache", "Cache", "CacheSize"],
        "cuda_graph": ["capture"],
        "hub": ["is_hub_id"],
        "model": ["Model", "Pass"],
        "prompt_pass": ["PromptPass"],
        "row_block": ["RowBlock", "like", "make_block"],
        "scaled_files": ["ScaledFiles"],
        "source": [
            "MTP",
            "ModelSource",
            "config_source",
            "find_source",
            "folder_source",
            "head_source",
            "hub_config_source",
            "spec_source",
        ],
        "state_flush": ["flush_states"],
        "text": ["Chat", "Message", "TextCodec", "load_text_codec"],
        "weight_files": ["WeightFiles"],
        "weight_index": ["require_present", "shape_keys", "skipped_copies"],
        "weights": [
            "AttentionWeights",
            "ModelWeights",
            "Read",
            "ReadParts",
            "ReadProjection",
            "assemble",
            "assemble_head",
        ],
    },
)
