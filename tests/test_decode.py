"""Trees decode exactly what the target decodes alone, and end where they should."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB_SIZE, ours, perturbed, tiny_bamba, tiny_mamba2

from stree_core.decode import Run, StopRule, generate, stream
from stree_core.engine import Engine, EngineConfig
from stree_core.errors import ConfigError
from stree_core.model import Model
from stree_core.tree import DEFAULT_TREE, Tree

OFF = Tree.chain(0)
RAGGED = Tree.from_paths(
    [[0], [1], [2], [3], [0, 0], [0, 1], [0, 2], [1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0, 0]]
)
TREES = {
    "chain1": Tree.chain(1),
    "chain4": Tree.chain(4),
    "star": Tree.from_paths([[i] for i in range(5)]),
    "default": DEFAULT_TREE,
    "ragged": RAGGED,
}


@pytest.fixture(scope="module")
def hybrid_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    folder = tmp_path_factory.mktemp("pair")
    target = ours(tiny_bamba(), folder / "target")
    return target, ours(perturbed(tiny_bamba(), 0.05), folder / "draft")


@pytest.fixture(scope="module")
def mamba_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    folder = tmp_path_factory.mktemp("pair")
    target = ours(tiny_mamba2(), folder / "target")
    return target, ours(perturbed(tiny_mamba2(), 0.05), folder / "draft")


def _prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 90, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def _run(pair: tuple[Model, Model], tree: Tree, stop: StopRule, slots: int = 1) -> Run:
    engine = Engine(*pair, tree, EngineConfig(num_slots=slots, num_positions=256))
    return generate(engine, _prompts(7), stop)


@pytest.mark.parametrize("pair_name", ["hybrid_pair", "mamba_pair"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("slots", [1, 3])
def test_trees_emit_the_targets_own_tokens(
    pair_name: str, tree: Tree, slots: int, request: pytest.FixtureRequest
) -> None:
    pair = request.getfixturevalue(pair_name)
    stop = StopRule(max_new_tokens=40, eos_token_ids=(0,))
    alone = _run(pair, OFF, stop)
    together = _run(pair, tree, stop, slots)
    assert [g.tokens for g in together.generations] == [g.tokens for g in alone.generations]
    assert together.num_steps < alone.num_steps, "the draft never helped: the test shows nothing"


def test_output_ends_exactly_at_the_limit(hybrid_pair: tuple[Model, Model]) -> None:
    for limit in (1, 2, 3, 5, 17):
        run = _run(hybrid_pair, DEFAULT_TREE, StopRule(limit))
        assert [len(g.tokens) for g in run.generations] == [limit] * 7


def test_output_ends_exactly_at_the_end_token(hybrid_pair: tuple[Model, Model]) -> None:
    free = _run(hybrid_pair, OFF, StopRule(40)).generations
    ends = {g.tokens[9] for g in free}
    stopped = _run(hybrid_pair, DEFAULT_TREE, StopRule(40, ends)).generations
    for generation, reference in zip(stopped, free, strict=True):
        first = next(i for i, token in enumerate(reference.tokens) if token in ends)
        assert generation.tokens == reference.tokens[: first + 1]


def test_stream_yields_what_generate_returns(hybrid_pair: tuple[Model, Model]) -> None:
    stop = StopRule(23)
    engine = Engine(*hybrid_pair, RAGGED, EngineConfig(num_positions=256))
    prompt = _prompts(1)[0]
    pieces = [token for piece in stream(engine, prompt, stop) for token in piece]
    assert pieces == generate(engine, [prompt], stop).generations[0].tokens


def test_bad_requests_end_in_one_sentence(hybrid_pair: tuple[Model, Model]) -> None:
    target, draft = hybrid_pair
    with pytest.raises(ConfigError, match="needs a draft model"):
        Engine(target, None, DEFAULT_TREE)
    engine = Engine(target, draft, DEFAULT_TREE, EngineConfig(num_positions=64))
    with pytest.raises(ConfigError, match="at least one token"):
        generate(engine, [[]], StopRule(4))
    with pytest.raises(ConfigError, match="must fit 64 positions"):
        generate(engine, [[1] * 40], StopRule(30))
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        generate(engine, [[1]], StopRule(0))
