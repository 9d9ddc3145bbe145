"""What a model's passes move and hold, by its shape alone; nothing here loads torch."""

from __future__ import annotations

from stree_autotune.store import ModelCost
from stree_core.families import AttentionShape, Mamba2Shape, MlpShape, ModelShape, MoeShape
from stree_core.profile import ModelRef

MAX_BUFFERED = 16
"""stree_kernels.launch.rows.MAX_BUFFERED, which a test compares: that module loads torch."""

FEWEST_LAUNCHES = 4
_LAUNCHES = {Mamba2Shape: 4, AttentionShape: 4, MlpShape: 2, MoeShape: 8}
"""Kernels of a part: a Mamba2 mixer has two projections, the conv and the scan."""
_JOIN_LAUNCHES = 3
"""Of an MTP head: the joined rows, the stream's zeros, the projection."""


def model_cost(shape: ModelShape, ref: ModelRef, element_bytes: int) -> ModelCost:
    """Return the cost of a model whose weights have `element_bytes` each."""
    kept_values = row_values = 0
    if shape.join is not None:
        # A feature of every row, and of the token before the root.
        kept_values = row_values = shape.hidden_size
    for part in shape.parts:
        if isinstance(part.mixer, Mamba2Shape):
            columns = part.mixer.conv_dim + part.mixer.num_heads
            kept_values += MAX_BUFFERED * columns
            # Two sets of rows take turns.
            row_values += 2 * (part.mixer.proj_dim + columns)
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
        held_bytes=shape.num_parameters * element_bytes,
        kept_bytes=kept_values * element_bytes,
        row_bytes=row_values * element_bytes + 2 * kv_bytes,
        num_launches=num_launches,
    )
