"""Prompts on captured graphs against the same passes without: the demo target on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import stree_profiles
import torch

from stree_core.drafting.pair import Runtime, load_single
from stree_core.drafting.prefill import Prefill
from stree_core.models.cache import Mamba2Cache
from stree_core.models.model import Model
from stree_core.models.source import find_source
from stree_kernels.testing import assert_close

MODELS = Path(next(iter(stree_profiles.__path__))) / "models"
LONGEST = 700


@pytest.fixture(scope="module")
def model() -> Model:
    return load_single(find_source(MODELS / "demo-target"), Runtime("cuda", "float32"))


@pytest.mark.gpu
@torch.inference_mode()
def test_prompts_on_graphs_are_read_as_without(model: Model) -> None:
    """Prompts of all lengths in turn, twice: nothing of the one before is left."""
    generator = torch.Generator().manual_seed(0)
    captured = Prefill(model, LONGEST, use_graph=True)
    for length in (2, 64, 1, 65, 66, 257, LONGEST, 3, 300, 1):
        prompt = torch.randint(1, 2000, (length,), generator=generator).tolist()
        plain = Prefill(model, LONGEST, use_graph=False)
        expected = plain.consume(prompt)
        hidden = captured.consume(prompt).clone()
        assert_close(f"hidden after {length}", hidden, expected, tolerance=1e-3)
        assert captured.cache.committed_B.tolist() == plain.cache.committed_B.tolist() == [length]
        for ours, truth in zip(captured.cache.layers, plain.cache.layers, strict=True):
            if isinstance(ours, Mamba2Cache) and isinstance(truth, Mamba2Cache):
                assert_close("state", ours.ssm_BHPN, truth.ssm_BHPN, tolerance=1e-3)
