"""What a model's passes move and hold, by its shape alone; nothing here loads torch."""

from __future__ import annotations

from stree_autotune.store import ModelCost
from stree_core.families import (
    AttentionShape,
    DeltaShape,
    GatedAttentionShape,
    Mamba2Shape,
    MlpShape,
    ModelShape,
    MoeShape,
    SharedMoeShape,
)
from stree_core.profile import ModelRef

MAX_BUFFERED = 16
"""stree_kernels.launch.rows.MAX_BUFFERED, which a test compares: that module loads torch."""

FEWEST_LAUNCHES = 4
_LAUNCHES = {
    Mamba2Shape: 4, DeltaShape: 4, AttentionShape: 4, GatedAttentionShape: 5, MlpShape: 2,
    MoeShape: 8, SharedMoeShape: 11,
}  # fmt: skip
"""Kernels of a part: a Mamba2 or delta mixer has two projections, the conv and the scan."""
WIDE_BYTES = 4
"""Least bytes of a value in what scans keep for themselves: states, and what they solve for."""
_JOIN_LAUNCHES = 3
"""Of an MTP head: the joined rows, the stream's zeros, the projection."""


def model_cost(shape: ModelShape, ref: ModelRef, element_bytes: int) -> ModelCost:
    """Return the cost of a model whose weights have `element_bytes` each."""
    kept_bytes = row_bytes = 0
    if shape.join is not None:
        # A feature of every row, and of the token before the root.
        kept_bytes = row_bytes = shape.hidden_size * element_bytes
    for part in shape.parts:
        if isinstance(part.mixer, Mamba2Shape):
            buffered = (part.mixer.conv_dim + part.mixer.num_heads) * element_bytes
        elif isinstance(part.mixer, DeltaShape):
            buffered = part.mixer.conv_dim * element_bytes
            buffered += part.mixer.solved_dim * max(WIDE_BYTES, element_bytes)
        else:
            continue
        kept_bytes += MAX_BUFFERED * buffered
        # Two sets of rows take turns.
        row_bytes += 2 * (part.mixer.proj_dim * element_bytes + buffered)
    kv_bytes = shape.kv_bytes_per_token(element_bytes)
    num_launches = FEWEST_LAUNCHES + sum(_LAUNCHES[type(part.mixer)] for part in shape.parts)
    if shape.join is not None:
        num_launches += _JOIN_LAUNCHES
    return ModelCost(
        # Time depends on the shape alone.
        **ref.model_dump(exclude={"weights_sha256"}),
        weight_bytes=shape.weight_bytes(element_bytes),
        state_bytes_per_sequence=shape.state_bytes(element_bytes),
        kv_bytes_per_token=kv_bytes,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        held_bytes=shape.held_bytes(element_bytes),
        kept_bytes=kept_bytes,
        row_bytes=row_bytes + 2 * kv_bytes,
        num_launches=num_launches,
    )
