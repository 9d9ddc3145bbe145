"""Packed prompts on a GPU: captured and launched passes against chains, the demo pair's texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import stree_profiles
import torch
from chain_prefill import ChainPrefill, settled
from margin import logit_margin

from stree_core.drafting.pair import Pair, Runtime, load_pair, load_single
from stree_core.drafting.prefill import Prefill, PromptPart
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.stop import StopRule
from stree_core.models.cache import CacheSize
from stree_core.models.source import find_source
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.testing import assert_close

MODELS = Path(next(iter(stree_profiles.__path__))) / "models"
LENGTHS = (2, 64, 1, 65, 1000, 257, 1500, 3, 300, 63)
NEAR_TIE = 1e-3
"""Between logits: a hundred times their error in fp32."""


def prompts_of(lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(1, 2000, (length,), generator=generator).tolist()) for length in lengths
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("use_graph", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_prompts_are_read_as_chains(dtype: str, use_graph: bool) -> None:
    """One after another in the same slot, in pieces of lengths that are captured and that are not.

    Between them another prompt fills the buffers of the captured passes.
    """
    model = load_single(find_source(MODELS / "demo-target"), Runtime("cuda", dtype))
    tolerance = 1e-3 if dtype == "float32" else 3e-2
    cache = model.make_cache(CacheSize(3, 1, 1, 1600))
    prefill = Prefill(model, cache, use_graph=use_graph)
    other = PromptPart(2, prompts_of((1100,))[0], 0, 1100)
    for prompt in prompts_of(LENGTHS):
        chain = ChainPrefill(model, len(prompt))
        expected = chain.consume(prompt)[-1]
        for begin in range(0, len(prompt), 700):
            part = PromptPart(1, prompt, begin, min(begin + 700, len(prompt)))
            hidden = prefill.read([part, other])[0]
            hidden = hidden.clone()
            prefill.read([other])
        assert_close(f"hidden after {len(prompt)}", hidden, expected, tolerance=tolerance)
        one = model.make_cache(CacheSize(1, 1, 1, 1600))
        for mine, theirs in zip(one._tensors(), cache._tensors(), strict=True):
            if mine.shape[1:] == theirs.shape[1:] and len(theirs) == 3:
                mine[0] = theirs[1]
        one.hold(0, len(prompt))
        for ours, truth in zip(settled(model, one), chain.states(), strict=True):
            for actual, wanted in zip(ours, truth, strict=True):
                assert_close("state", actual, wanted, tolerance=tolerance)


@pytest.fixture(scope="module")
def pair() -> Pair:
    sources = (find_source(MODELS / name) for name in ("demo-target", "demo-draft"))
    return load_pair(*sources, Runtime("cuda", "float32"))


@pytest.mark.gpu
def test_texts_do_not_depend_on_pieces(pair: Pair) -> None:
    """Up to near-ties: sums in fp32 are added in another order."""
    prompts, stop = [list(prompt) for prompt in prompts_of((5, 300, 1, 900, 64))], StopRule(64)
    trees = (Tree.chain(0), DEFAULT_TREE)
    for tree in trees:
        texts = []
        for piece, use_graph in ((4096, True), (100, True), (777, False)):
            config = EngineConfig(2, 1024, piece_tokens=piece, use_graph=use_graph)
            engine = Engine(pair.target, pair.draft, tree, config)
            texts.append([g.tokens for g in generate(engine, prompts, stop).generations])
        for other in texts[1:]:
            for prompt, first, second in zip(prompts, texts[0], other, strict=True):
                if first != second:
                    assert logit_margin(pair.target, prompt, first, second) < NEAR_TIE
