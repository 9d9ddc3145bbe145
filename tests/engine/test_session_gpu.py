"""Sessions on captured graphs: the demo pair on a GPU, one step ahead of the host."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import stree_profiles
import torch
from margin import logit_margin
from torch import Tensor

from stree_core.drafting.pair import Pair, Runtime, load_pair
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.request import Request
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.session import Session
from stree_core.engine.stop import StopRule
from stree_core.errors import NotEnoughMemory
from stree_core.models.model import Model
from stree_core.models.source import find_source
from stree_core.tree import DEFAULT_TREE, Tree

MODELS = Path(next(iter(stree_profiles.__path__))) / "models"
TREES = (Tree.chain(0), Tree.chain(3), DEFAULT_TREE)
NUM_TOKENS = 48
NEAR_TIE = 1e-3
"""Between logits: a hundred times their error in fp32."""


@pytest.fixture(scope="module")
def pair() -> Pair:
    sources = (find_source(MODELS / name) for name in ("demo-target", "demo-draft"))
    return load_pair(*sources, Runtime("cuda", "float32"))


def _prompts(pair: Pair) -> list[list[int]]:
    texts = [f"Tom has {n} boxes with {n + 2} apples each. How many apples?" for n in range(2, 12)]
    return pair.encode(texts)


@pytest.mark.gpu
def test_sessions_on_graphs_emit_the_targets_own_text(pair: Pair) -> None:
    """fp32 sums are added in another order, so a text may differ, but at a near-tie alone."""
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
        for index, text in enumerate(alone):
            own = ended[index].tokens
            assert own == text or logit_margin(pair.target, prompts[index], text, own) < NEAR_TIE


@pytest.mark.gpu
def test_interrupts_and_cut_steps_on_graphs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder's interrupts lose nothing with a step under way; graphs serve on after a cut."""
    prompts = _prompts(pair)
    stop = StopRule(NUM_TOKENS, strings=("never",))
    engine = Engine(pair.target, pair.draft, TREES[1], EngineConfig(3, 256))
    expected = [g.tokens for g in generate(engine, prompts, stop, decode=pair.decode).generations]
    rng = random.Random(0)

    def decode(tokens: list[int]) -> str:
        if rng.random() < 0.05:
            raise KeyboardInterrupt
        return pair.decode(tokens)

    session = Session(engine, decode=decode)
    for prompt in prompts:
        session.submit(Request(prompt, stop))
    ended, num_raised = {}, 0
    while session.busy:
        try:
            ended |= session.run()
        except KeyboardInterrupt:
            num_raised += 1
    assert num_raised > 10
    assert [ended[index].tokens for index in range(len(prompts))] == expected

    def cut(self: Engine) -> None:
        self._caches()[0].flip()
        raise KeyboardInterrupt

    session = Session(engine, decode=pair.decode)
    for prompt in prompts:
        session.submit(Request(prompt, stop))
    session.step()
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_flip", cut)
        with pytest.raises(KeyboardInterrupt):
            session.step()
    ended = session.run()
    assert [ended[index].finish for index in range(3)] == ["error"] * 3
    assert [ended[index].tokens for index in range(3, len(prompts))] == expected[3:]


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
    before, num_steps = torch.cuda.memory_allocated(), 0
    while num_steps < 10_000:
        session = Session(engine, lambda active: active % len(TREES))
        for prompt in prompts:
            session.submit(Request(prompt, StopRule(NUM_TOKENS)))
        session.run()
        num_steps += session.num_steps
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
def test_an_engine_that_does_not_fit_leaves_the_others_unharmed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, stop = _prompts(pair), StopRule(NUM_TOKENS)
    engine = Engine(pair.target, pair.draft, TREES, EngineConfig(3, 256))
    expected = [g.tokens for g in generate(engine, prompts, stop).generations]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    session = Session(engine, lambda active: 2)
    for prompt in prompts:
        session.submit(Request(prompt, stop))
    for _ in range(5):
        session.step()

    def fail(self: Model, hidden_TBD: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(self, hidden_TBD)

    logits = Model.logits
    with monkeypatch.context() as patch:
        patch.setattr(Model, "logits", fail)
        with pytest.raises(
            NotEnoughMemory, match=r"^remembering 3 sequences of 256 positions need"
        ):
            Engine(pair.target, pair.draft, TREES, EngineConfig(3, 256))
    ended = session.run()
    again = Engine(pair.target, pair.draft, TREES, EngineConfig(3, 256))
    assert [g.tokens for g in generate(again, prompts, stop).generations] == expected
    assert all(len(generation.tokens) == NUM_TOKENS for generation in ended.values())
    del again
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
