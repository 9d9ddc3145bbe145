"""Which weights of a folder are read: none is missing, and none that would count is left over."""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from stree_core.errors import CheckpointError
from stree_core.model_shape import ModelShape

logger = logging.getLogger(__name__)

# Buffers that are computed from the config, and heads that draft for the model.
KNOWN_EXTRAS = ("*.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached", "mtp.*")
MAX_COMPARED = 2000


def shape_keys(shape: ModelShape) -> list[str]:
    """Return the name of every tensor that a model of this shape reads, each once."""
    keys: dict[str, None] = {}
    for weight in shape.weights:
        keys |= dict.fromkeys((*weight.keys, *(key for pair in weight.adapters for key in pair)))
    return list(keys)


def require_present(shape: ModelShape, stored: Collection[str], name: str) -> None:
    """Raise CheckpointError for the first weight of the shape that no file has."""
    for key in shape_keys(shape):
        if key not in stored:
            raise CheckpointError(
                f"{name} needs weight {key}, no file has one of that name; "
                f"{nearest_key(key, stored)}"
            )


def skipped_copies(shape: ModelShape, stored: Collection[str], name: str) -> dict[str, str]:
    """Return the tensors that must be copies of others, by name; say what else is skipped.

    Raises CheckpointError for a tensor that is neither read, nor a copy, nor a known extra.
    """
    read = set(shape_keys(shape))
    copies: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    unknown = []
    for key in sorted(set(stored) - read):
        original = _original(shape, key)
        extra = next((p for p in (*KNOWN_EXTRAS, *shape.extras) if fnmatchcase(key, p)), None)
        if original in read:
            copies[key] = original
            skipped[f"copies of {_without_numbers(original)}"] += 1
        elif extra is not None:
            skipped[extra] += 1
        else:
            unknown.append(key)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{name} holds weight {unknown[0]}{more} that decoding would ignore, so it would be "
            "another model; use the config and the checkpoint that belong together"
        )
    if skipped:
        what = ", ".join(f"{group} ({count})" for group, count in sorted(skipped.items()))
        logger.info("%s: weights that decoding does not need: %s", name, what)
    return copies


def nearest_key(key: str, stored: Iterable[str]) -> str:
    """Return the half sentence that names the nearest weight which is there."""
    there = list(stored)
    numbers = re.findall(r"\d+", key)
    # Of a large model only the same layer is compared: this is quadratic in a name's length.
    same_layer = [other for other in there if re.findall(r"\d+", other) == numbers]
    close = difflib.get_close_matches(key, (same_layer or there)[:MAX_COMPARED], n=1, cutoff=0.0)
    if not close:
        return "the files hold no weights at all: check the folder"
    return f"the nearest is {close[0]}: use the config that belongs to the weights"


def _original(shape: ModelShape, key: str) -> str | None:
    """Return the tensor that `key` repeats by the config, None when it repeats none."""
    copies = shape.copies
    if shape.lm_head == shape.embed:
        copies = (*copies, ("lm_head.weight", shape.embed.keys[0]))
    for copy, original in copies:
        if key.startswith(copy):
            return original + key.removeprefix(copy)
    return None


def _without_numbers(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)
