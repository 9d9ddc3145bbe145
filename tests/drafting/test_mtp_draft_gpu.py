"""The demo targets' own heads on captured graphs, against torch and the target alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import stree_profiles
import torch
from margin import logit_margin

from stree_core.drafting.pair import Pair, Runtime, load_with_head
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.session import Request, Session
from stree_core.engine.stop import StopRule
from stree_core.models.source import find_source
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.testing import assert_close

MODELS = Path(next(iter(stree_profiles.__path__))) / "models"
TARGETS = ("demo-target", "demo-gdn")
RAGGED = Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
TREES = (Tree.chain(0), Tree.chain(3), DEFAULT_TREE, RAGGED)
NEAR_TIE = 1e-3
"""Between logits: a hundred times their error in fp32."""


def opened(name: str, device: str) -> Pair:
    return load_with_head(find_source(MODELS / name), Runtime(device, "float32"))


@pytest.fixture(scope="module", params=TARGETS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return opened(request.param, "cuda")


def prompts_of(pair: Pair) -> list[list[int]]:
    texts = [f"Tom has {n} boxes with {n + 2} apples each. How many apples?" for n in range(2, 10)]
    return pair.encode([*texts, "A farmer sells eggs. " * 60])


@pytest.mark.gpu
def test_sessions_on_graphs_emit_the_targets_own_text(pair: Pair) -> None:
    """fp32 sums are added in another order, so a text may differ, but at a near-tie alone."""
    prompts, stop = prompts_of(pair), StopRule(48)
    one = Engine(pair.target, None, TREES[0], EngineConfig(1, 512))
    alone = [g.tokens for g in generate(one, prompts, stop).generations]
    engine = Engine(pair.target, pair.draft, TREES, EngineConfig(3, 512))
    rng = random.Random(0)
    session = Session(engine, lambda active: rng.randrange(len(TREES)), lookahead=1)
    for prompt in prompts:
        session.submit(Request(prompt, stop))
    ended = session.run()
    for index, text in enumerate(alone):
        own = ended[index].tokens
        assert own == text or logit_margin(pair.target, prompts[index], text, own) < NEAR_TIE


@pytest.mark.gpu
@torch.inference_mode()
def test_graphs_draft_what_torch_drafts(pair: Pair) -> None:
    """The same text step by step on both, a prompt of several chains among them."""
    plain = opened(pair.target_ref.name, "cpu")
    prompts = [prompts_of(pair)[i] for i in (0, 1, -1)]
    engines = []
    for each in (pair, plain):
        engine = Engine(each.target, each.draft, TREES, EngineConfig(3, 512))
        firsts = [engine.prefill(slot, prompt) for slot, prompt in enumerate(prompts)]
        engines.append((engine, firsts))
    assert engines[0][1] == engines[1][1]
    for which in (3, 0, 2, 1, 0, 3):
        results = [engine.step(which) for engine, _ in engines]
        assert results[0].tokens == results[1].tokens
        ours, truth = (engine._speculators[0].draft_cache for engine, _ in engines)
        assert ours is not None
        assert truth is not None
        assert ours.committed_B.tolist() == truth.committed_B.tolist()
        assert_close("state", ours.features_RBD[0].cpu(), truth.features_RBD[0], tolerance=1e-3)
        if TREES[which].num_nodes:
            inner = sum(1 for children in TREES[which].children if children)
            made, wanted = (c.features_RBD[1 : 1 + inner].cpu() for c in (ours, truth))
            assert_close("drafts", made, wanted, tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["naive", "mss"])
def test_seeds_reproduce_on_graphs(pair: Pair, rule: str) -> None:
    support = SamplingSupport(rule)  # type: ignore[arg-type]
    engine = Engine(pair.target, pair.draft, RAGGED, EngineConfig(4, 512, sampling=support))
    each = [SamplingParams(0.8, seed=seed) for seed in range(9)]
    texts = [
        [
            g.tokens
            for g in generate(engine, prompts_of(pair), StopRule(24), sampling=each).generations
        ]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
