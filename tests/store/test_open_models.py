"""Shapes whose weights are drawn in FP8: their names, and what tells them from others."""

from __future__ import annotations

import pytest
import torch

from stree_autotune.cost.traffic import model_cost
from stree_autotune.store.library import require_same_shape
from stree_autotune.store.open_models import PairRequest, open_source
from stree_core.drafting.checkpoint import random_model
from stree_core.drafting.pair import Runtime
from stree_core.errors import ConfigError
from stree_core.models.backend import load_backend
from stree_core.models.source import ModelSource
from stree_kernels.fp8.scaled_weight import ScaledWeight

SHAPE = "mamba2-130m"


def shape_source(name: str) -> ModelSource:
    return open_source(PairRequest("", "", (), Runtime("cpu"), shapes=True), name)


def test_a_shape_in_fp8_has_a_name_and_a_hash_of_its_own() -> None:
    plain, stored = shape_source(SHAPE), shape_source(f"{SHAPE}-fp8-block")
    assert stored.name == f"{SHAPE}-fp8-block"
    assert (plain.ref.weights, stored.ref.weights) == (None, "fp8-block")
    assert plain.ref.shape_sha256 != stored.ref.shape_sha256
    assert "weights" not in plain.ref.model_dump()
    assert stored.ref.model_dump()["weights"] == "fp8-block"
    with pytest.raises(ConfigError, match="no known shape; did you mean"):
        shape_source("mamba2-131m-fp8-block")


def test_files_in_fp8_and_not_are_never_of_one_model() -> None:
    plain, stored = shape_source(SHAPE).ref, shape_source(f"{SHAPE}-fp8-block").ref
    renamed = stored.model_copy(update={"name": plain.name})
    message = r"got weights in no FP8 and fp8-block; tune again"
    with pytest.raises(ConfigError, match=message):
        require_same_shape(plain, renamed, "a", "b", "tune again")


def test_costs_count_bytes_as_they_are_stored() -> None:
    plain, stored = (
        model_cost(source.shape, source.ref, 2)
        for source in (shape_source(SHAPE), shape_source(f"{SHAPE}-fp8-tensor"))
    )
    assert stored.weights == "fp8-tensor"
    assert stored.ref.weights == "fp8-tensor"
    projections = 24 * (3352 * 768 + 768 * 1536)
    saved = plain.weight_bytes - stored.weight_bytes
    # A byte a value less, but for a scale of each 128 rows.
    assert 0.999 * projections < saved < projections
    assert stored.state_bytes_per_sequence == plain.state_bytes_per_sequence


def test_random_weights_in_fp8_are_drawn_where_the_shape_says() -> None:
    source = shape_source(f"{SHAPE}-fp8-block")
    cpu = torch.device("cpu")
    model = random_model(source.shape, load_backend("torch", cpu), torch.bfloat16, cpu)
    (part,) = model.weights.blocks[0].parts
    in_proj = getattr(part, "in_proj")  # noqa: B009 - a part of several kinds
    assert isinstance(in_proj, ScaledWeight)
    assert (in_proj.row_group, in_proj.column_block) == (128, 128)
    assert in_proj.column_factor_K is not None
    assert isinstance(model.weights.lm_head_VD, torch.Tensor)
