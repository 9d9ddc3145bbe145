"""How long a context may be before a model was not trained for it."""

from __future__ import annotations

import logging
from functools import lru_cache

from stree_core.model_shape import ModelShape

logger = logging.getLogger(__name__)


def warn_of_long_context(shape: ModelShape, num_positions: int) -> None:
    """Say once when slots hold more positions than the model's `max_position_embeddings`."""
    if shape.max_positions is not None and num_positions > shape.max_positions:
        _warn(num_positions, shape.max_positions)


@lru_cache
def _warn(num_positions: int, longest: int) -> None:
    logger.warning(
        "slots of %d positions exceed max_position_embeddings = %d: later text may degrade",
        num_positions,
        longest,
    )
