"""Bring a cache's states up to its committed tokens, so that a prompt pass may go on from them.

Buffered rows and the pending path stand beside the states otherwise. A draft needs it once, after
steps that left it behind, so plain torch is fast enough on a GPU, too.

Shape letters: B slots, L accepted rows of a slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from stree_core.families import Mamba2Shape
from stree_core.models.cache import AttentionCache, Cache, DeltaCache, Mamba2Cache
from stree_core.models.model import Model
from stree_core.models.weights import Mamba2Weights, PartWeights
from stree_kernels.attention.rope_kv_write_ref import append_path
from stree_kernels.delta import delta_scan_ref
from stree_kernels.delta.rows import DeltaRows
from stree_kernels.launch.rows import ScanRows
from stree_kernels.ssm.tree_conv_ref import advance_window
from stree_kernels.ssm.tree_scan_ref import accepted_sources, advanced, widen


def flush_states(model: Model, cache: Cache, path_set: int) -> None:
    """Commit all that is pending or buffered, in every slot; the path's rows lie in `path_set`."""
    pending = cache.pending
    total_B = pending.num_buffered_B + pending.length_B
    slot_B1 = torch.arange(len(total_B), device=total_B.device)[:, None]
    for layer, part, weights in zip(cache.layers, model.shape.parts, _weights(model), strict=True):
        if isinstance(layer, AttentionCache):
            append_path(layer.committed, layer.rows[path_set], cache.committed_B, pending)
        elif isinstance(layer, Mamba2Cache):
            assert isinstance(part.mixer, Mamba2Shape)
            assert isinstance(weights, Mamba2Weights)
            rows = layer.sets[path_set]
            advance_window(layer.conv_BCK, rows.conv_inputs_BRE, pending)
            source_BL = accepted_sources(rows.start, pending)
            accepted = ScanRows(*(tensor[slot_B1, source_BL] for tensor in layer.all_rows))
            state = widen(layer.ssm_BHPN)
            state = advanced(state, accepted, total_B, weights.heads, part.mixer.dt_limit)
            layer.ssm_BHPN.copy_(state)
        elif isinstance(layer, DeltaCache):
            past = layer.sets[path_set]
            advance_window(layer.conv_BCK, past.inputs.qkv_BRC, pending)
            source_BL = accepted_sources(past.start, pending)
            replayed = DeltaRows(*(tensor[slot_B1, source_BL] for tensor in layer.all_rows))
            moved = delta_scan_ref.advanced(widen(layer.state_BHPN), replayed, total_B)
            layer.state_BHPN.copy_(moved)
    for table in pending:
        table.zero_()


def _weights(model: Model) -> Iterator[PartWeights]:
    """Return the weights of every part, in the order of a cache's layers."""
    for block in model.weights.blocks:
        if block.shared is not None:
            yield from (block.shared.attention, block.shared.mlp)
        yield from block.parts
