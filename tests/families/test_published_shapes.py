"""Published configs load to their makers' parameter counts, or are refused for the true reason."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest
from published_shapes import OTHER_DELTA, PUBLISHED

from stree_core.errors import CheckpointError
from stree_core.families.config_keys import UNLIMITED
from stree_core.families.model_shape import (
    AttentionShape,
    DeltaShape,
    GatedAttentionShape,
    Mamba2Shape,
    MlpShape,
    ModelShape,
    MoeShape,
    SharedMoeShape,
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
# Gated delta rule, attention, MLP and experts.
DELTA_PARTS = {
    "qwen3-next-80b-a3b": (36, 12, 0, 48),
    "qwen3.5-0.8b": (18, 6, 24, 0),
    "qwen3.5-27b": (48, 16, 64, 0),
    "qwen3.5-35b-a3b": (30, 10, 0, 40),
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
    if name in DELTA_PARTS:
        kinds = Counter(type(mixer) for mixer in mixers)
        found = [kinds[k] for k in (DeltaShape, GatedAttentionShape, MlpShape, SharedMoeShape)]
        assert tuple(found) == DELTA_PARTS[name]


def test_attention_lies_where_it_was_published() -> None:
    """Runs of Mamba2 layers between the attentions of Zamba2-7B."""
    shape = shape_from_config(PUBLISHED["zamba2-7b"].config, "zamba2-7b")
    runs = [len(list(run)) for shared, run in groupby(shape.blocks, lambda b: b.shared is not None)]
    assert runs == [6, 1, 4, 1, *[5, 1] * 11, 3]
    assert sum(runs) == 81


HEADS = {"qwen3.5-0.8b": 0.02, "qwen3.5-2b": 0.06, "qwen3.5-4b": 0.12, "qwen3.5-27b": 0.42,
         "qwen3.5-35b-a3b": 0.84}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_qwens_have_the_parameters_that_were_counted(name: str) -> None:
    """Billions, of checkpoints whose total is known with the head and without."""
    head = shape_from_config(PUBLISHED[name].config, name).mtp
    assert head is not None
    assert head.num_parameters / 1e9 == pytest.approx(HEADS[name], abs=0.006)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("kimi-linear-48b-a3b", "Kimi Delta Attention layers"), ("olmo-hybrid-7b", "another kind")],
)
def test_other_delta_rules_are_refused_by_name(name: str, kind: str) -> None:
    config = OTHER_DELTA[name]
    with pytest.raises(CheckpointError, match=f"model_type {config['model_type']} has .*{kind}; "):
        shape_from_config(config, name)
