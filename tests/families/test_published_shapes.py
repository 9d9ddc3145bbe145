"""Published configs load to their makers' parameter counts, or are refused for the true reason."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest
from published_shapes import GATED_DELTA, PUBLISHED

from stree_core.errors import CheckpointError
from stree_core.families.config_keys import UNLIMITED
from stree_core.families.model_shape import (
    AttentionShape,
    Mamba2Shape,
    MlpShape,
    ModelShape,
    MoeShape,
)
from stree_core.families.registry import shape_from_config

# Mamba2, attention, MLP and experts, in the makers' words.
PARTS = {
    "nemotron-3-nano-30b-a3b": (23, 6, 23, 23),
    "nemotron-3.5-lightning-30b-a3b": (23, 6, 23, 23),
    "nemotron-3-super-120b-a12b": (40, 8, 40, 40),
    "nemotron-nano-9b-v2": (27, 4, 25, 0),
    "nemotron-nano-12b-v2": (28, 6, 28, 0),
    "nemotron-h-4b": (24, 4, 24, 0),
    "nemotron-h-8b": (24, 4, 24, 0),
    "nemotron-h-56b": (54, 10, 54, 0),
    "granite-4.0-h-small": (36, 4, 40, 40),
    "bamba-9b-v1": (29, 3, 32, 0),
    "zamba2-2.7b": (54, 9, 9, 0),
    "zamba2-7b": (81, 13, 13, 0),
    "codestral-mamba-7b": (64, 0, 0, 0),
}


def stored_parameters(shape: ModelShape, adapter_rank: int) -> int:
    """Count what a checkpoint stores: shared layers once, and their adapters beside them."""
    stored = {weight.keys: weight.num_values for weight in shape.weights}
    for weight in shape.weights:
        rows, columns = weight.shape[0], weight.shape[-1]
        for pair in weight.adapters:
            stored[pair] = adapter_rank * (rows + columns)
    return sum(stored.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_load_to_the_parameters_of_their_name(name: str) -> None:
    published = PUBLISHED[name]
    shape = shape_from_config(published.config, name)
    count = stored_parameters(shape, published.adapter_rank)
    assert count / 1e9 == pytest.approx(published.billions, abs=0.006)
    mixers = [part.mixer for part in shape.parts]
    assert all(m.dt_limit == UNLIMITED for m in mixers if isinstance(m, Mamba2Shape))
    if name in PARTS:
        kinds = Counter(type(mixer) for mixer in mixers)
        found = [kinds[kind] for kind in (Mamba2Shape, AttentionShape, MlpShape, MoeShape)]
        assert tuple(found) == PARTS[name]


def test_attention_lies_where_it_was_published() -> None:
    """Runs of Mamba2 layers between the attentions of Zamba2-7B."""
    shape = shape_from_config(PUBLISHED["zamba2-7b"].config, "zamba2-7b")
    runs = [len(list(run)) for shared, run in groupby(shape.blocks, lambda b: b.shared is not None)]
    assert runs == [6, 1, 4, 1, *[5, 1] * 11, 3]
    assert sum(runs) == 81


@pytest.mark.parametrize("name", GATED_DELTA)
def test_gated_delta_rule_models_are_refused_by_name(name: str) -> None:
    config = GATED_DELTA[name]
    with pytest.raises(CheckpointError) as caught:
        shape_from_config(config, name)
    message = str(caught.value)
    assert f"model_type {config['model_type']} has gated delta rule layers" in message
    assert ("config is text_config" in message) == ("text_config" in config)
    assert "did you mean" not in message
