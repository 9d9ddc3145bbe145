"""Forward passes against transformers' own models, and trees against separate sequences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, ours, tiny_bamba, tiny_mamba2
from transformers import PreTrainedModel

from stree_core.cache import CacheSize
from stree_core.engine import Engine, EngineConfig
from stree_core.model import Model
from stree_core.prefill import PREFILL_CHUNK
from stree_core.row_block import make_block
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.testing import assert_close

# transformers computes the scan in fp32 whatever the model's dtype.
TOLERANCE = 1e-5

FAMILIES = {
    "mamba2": tiny_mamba2,
    "mamba2-grouped": lambda: tiny_mamba2(num_groups=2),
    "bamba": tiny_bamba,
}


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Model]:
    theirs = FAMILIES[request.param]()
    return theirs, ours(theirs, tmp_path / "model")


def _logits(model: Model, tokens: torch.Tensor, parents: list[int]) -> torch.Tensor:
    """Return logits [T, V] of one block of rows from an empty cache."""
    block = make_block(parents, model.conv_widths, model.device)
    cache = model.make_cache(CacheSize(1, len(parents), 1, 8))
    with torch.inference_mode():
        hidden = model.forward(tokens[:, None], block, cache, first=0, commit=True)
        return model.logits(hidden)[:, 0]


def test_chain_logits_equal_transformers(pair: tuple[PreTrainedModel, Model]) -> None:
    theirs, model = pair
    tokens = torch.randint(VOCAB_SIZE, (21,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = theirs(tokens[None]).logits[0]
    actual = _logits(model, tokens, list(range(-1, 20)))
    assert_close("logits", actual, expected, tolerance=TOLERANCE)


def test_tree_logits_equal_every_path_on_its_own(pair: tuple[PreTrainedModel, Model]) -> None:
    _, model = pair
    tree = DEFAULT_TREE
    tokens = torch.randint(VOCAB_SIZE, (13,), generator=torch.Generator().manual_seed(4))
    together = _logits(model, tokens, list(tree.parents))
    for path in tree.node_paths:
        alone = _logits(model, tokens[list(path)], list(range(-1, len(path) - 1)))
        assert_close(f"path {path}", together[path[-1]], alone[-1], tolerance=1e-6)


@pytest.mark.parametrize("length", [1, 2, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 7])
def test_prefill_and_steps_equal_transformers_greedy_text(
    pair: tuple[PreTrainedModel, Model], length: int
) -> None:
    theirs, model = pair
    prompt = torch.randint(1, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(5))
    engine = Engine(model, None, Tree.chain(0), EngineConfig(num_positions=192))
    tokens = [*prompt.tolist(), engine.prefill(0, prompt.tolist())]
    for _ in range(12):
        tokens += engine.step()[0]
    with torch.inference_mode():
        logits = theirs(torch.tensor(tokens)[None]).logits[0, length - 1 : -1]
    chosen = torch.tensor(tokens[length:])
    margin = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
    assert margin.max() < 1e-4, f"our token is not theirs: margins {margin.tolist()}"
