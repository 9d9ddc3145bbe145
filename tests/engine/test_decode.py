"""Trees decode exactly what the target decodes alone, and end where they should."""

from __future__ import annotations

import pytest
import torch
from synthetic_data import make_profile, policy_row
from tiny_models import VOCAB_SIZE, ours, perturbed, save_pair, tiny_bamba, tiny_mamba2

from stree_core.drafting.pair import Pair, Runtime, load_pair
from stree_core.engine.decode import Run, StopRule, generate, profile_engine, stream
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.errors import ConfigError
from stree_core.models.model import Model
from stree_core.models.source import find_source
from stree_core.profile import Profile
from stree_core.tree import DEFAULT_TREE, OFF, Tree

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


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("whole")
    save_pair(folder)
    models = folder / "models"
    sources = (find_source(models / name) for name in ("tiny-target", "tiny-draft"))
    return load_pair(*sources, Runtime("cpu"))


def profile_of(pair: Pair, rows: dict[int, Tree]) -> Profile:
    profile = make_profile(*(policy_row(size, tree) for size, tree in rows.items()))
    refs = {"target": pair.target_ref, "draft": pair.draft_ref}
    return profile.model_copy(update=refs)


class Watched(Engine):
    """Notes what runs with which tree."""

    def launch(self, which: int = 0) -> None:
        active = int(self.speculator.buffers.active_B.sum())
        taken.append((active, self.trees[which]))
        super().launch(which)


taken: list[tuple[int, Tree]] = []


@pytest.mark.parametrize(
    "rows",
    [{1: OFF, 2: Tree.chain(3), 4: RAGGED}, {1: Tree.chain(3), 2: RAGGED, 4: OFF}],
    ids=["off first", "off last"],
)
def test_generate_and_stream_follow_a_profile(
    rows: dict[int, Tree], whole_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stree_core.engine.decode.Engine", Watched)
    profile = profile_of(whole_pair, rows)
    config = EngineConfig(num_slots=4, num_positions=256)
    engine = profile_engine(profile, whole_pair, config)
    prompts = _prompts(4)
    stops = [StopRule(count) for count in (4, 12, 30, 40)]
    taken.clear()
    run = generate(engine, prompts, stops)
    assert {active for active, _ in taken} == {1, 2, 3, 4}
    for active, tree in taken:
        assert tree == profile.row_for(active).tree.build()
    taken.clear()
    pieces = [token for piece in stream(engine, prompts[3], stops[3]) for token in piece]
    assert {tree for _, tree in taken} == {rows[1]}
    alone = Engine(whole_pair.target, None, OFF, config)
    expected = generate(alone, prompts, stops)
    assert [g.tokens for g in run.generations] == [g.tokens for g in expected.generations]
    assert pieces == expected.generations[3].tokens
    assert run.num_steps < expected.num_steps, "nothing was speculated: the test shows nothing"


def test_trees_without_a_policy_take_the_first(whole_pair: Pair) -> None:
    engine = Engine(whole_pair.target, whole_pair.draft, [OFF, RAGGED], EngineConfig(2, 256))
    assert [engine.policy.choose(active) for active in (1, 2, 9)] == [0, 0, 0]
    other = profile_of(whole_pair, {1: OFF})
    other = other.model_copy(update={"target": whole_pair.draft_ref})
    with pytest.raises(ConfigError, match="the profile is for target tiny-draft"):
        profile_engine(other, whole_pair, EngineConfig())


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
