"""Sessions on captured graphs: the demo pair on a GPU, one step ahead of the host."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import stree_profiles
import torch

from stree_core.decode import generate
from stree_core.engine import Engine, EngineConfig
from stree_core.model_source import find_source
from stree_core.pair import Pair, Runtime, load_pair
from stree_core.rules import SamplingSupport
from stree_core.sampling import SamplingParams
from stree_core.session import Request, Session
from stree_core.stop import StopRule
from stree_core.tree import DEFAULT_TREE, Tree

MODELS = Path(next(iter(stree_profiles.__path__))) / "models"
TREES = (Tree.chain(0), Tree.chain(3), DEFAULT_TREE)
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def pair() -> Pair:
    sources = (find_source(MODELS / name) for name in ("demo-target", "demo-draft"))
    return load_pair(*sources, Runtime("cuda", "float32"))


def _prompts(pair: Pair) -> list[list[int]]:
    texts = [f"Tom has {n} boxes with {n + 2} apples each. How many apples?" for n in range(2, 12)]
    return pair.encode(texts)


@pytest.mark.gpu
def test_sessions_on_graphs_emit_the_targets_own_text(pair: Pair) -> None:
    """fp32 sums are added in another order, so a text or two may differ at a near-tie."""
    prompts = _prompts(pair)
    one = Engine(pair.target, None, TREES[0], EngineConfig(1, 256))
    stop = StopRule(NUM_TOKENS)
    alone = [g.tokens for g in generate(one, prompts, stop).generations]
    engine = Engine(pair.target, pair.draft, TREES, EngineConfig(3, 256))
    rng = random.Random(0)
    for lookahead in (0, 1):
        session = Session(engine, lambda active: rng.randrange(3), lookahead=lookahead)
        for prompt in prompts:
            session.submit(Request(prompt, stop))
        ended = session.run()
        same = sum(ended[index].tokens == text for index, text in enumerate(alone))
        assert same >= len(prompts) - 2


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["naive", "mss"])
def test_seeds_reproduce_on_graphs(pair: Pair, rule: str) -> None:
    support = SamplingSupport(rule, truncates=True, penalises=True)  # type: ignore[arg-type]
    engine = Engine(pair.target, pair.draft, TREES[2], EngineConfig(4, 256, sampling=support))
    each = [SamplingParams(0.8, top_p=0.9, repetition_penalty=1.1, seed=seed) for seed in range(10)]
    texts = [
        [
            g.tokens
            for g in generate(engine, _prompts(pair), StopRule(24), sampling=each).generations
        ]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


@pytest.mark.gpu
def test_memory_does_not_grow(pair: Pair) -> None:
    engine = Engine(pair.target, pair.draft, TREES, EngineConfig(2, 256))
    prompts = _prompts(pair)
    generate(engine, prompts, StopRule(NUM_TOKENS))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        generate(engine, prompts, StopRule(NUM_TOKENS))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
