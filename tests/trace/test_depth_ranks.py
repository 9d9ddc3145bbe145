"""Ranks by depth: those of a plain head's tokens; their walk is live decoding, step for step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mtp_models import (
    HeadedModel,
    ReferenceHead,
    bamba_with_head,
    hidden_states,
    nemotron_with_head,
)
from scipy import stats
from tiny_models import VOCAB_SIZE

from stree_autotune.trace.depth_ranks import drawn_rank, seen_along
from stree_autotune.trace.file import NO_RANK, Trace
from stree_autotune.trace.record import RecordConfig, record_prompts, record_trace
from stree_autotune.trace.tree_walk import walk
from stree_core.engine.decode import Run, generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.errors import ConfigError
from stree_core.profile import Sampling
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.sampling.children_ref import choose_by_mss

RAGGED = Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 0, 0], [2, 0, 0]])
WIDE = Tree.from_paths([[i] for i in range(16)] + [[i, 0] for i in range(16)] + [[0, 0, 0]])
TREES = {
    "chain1": Tree.chain(1),
    "chain4": Tree.chain(4),
    "default": DEFAULT_TREE,
    "ragged": RAGGED,
    "wide": WIDE,
}
LIMIT = 30


@pytest.fixture(scope="module", params=[nemotron_with_head, bamba_with_head])
def headed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HeadedModel:
    return request.param(tmp_path_factory.mktemp("headed") / "model")


@pytest.fixture(scope="module")
def bamba(tmp_path_factory: pytest.TempPathFactory) -> HeadedModel:
    return bamba_with_head(tmp_path_factory.mktemp("bamba") / "model")


def prompts_of(number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 20, (number,), generator=generator).tolist()
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def trace(headed: HeadedModel) -> Trace:
    config = RecordConfig("tiny", max_new_tokens=LIMIT, num_slots=5, depths=4)
    return record_trace(headed.pair, prompts_of(5), config)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_walk_equals_live_decoding(headed: HeadedModel, trace: Trace, tree: Tree) -> None:
    engine = Engine(headed.pair.target, headed.pair.draft, tree, EngineConfig(5, 128))
    run = generate(engine, prompts_of(5), StopRule(LIMIT, headed.pair.target.shape.eos_token_ids))
    result = walk(trace, tree)
    assert result.starts_P.tolist() == [g.num_steps for g in run.generations]
    assert result.positions_P.tolist() == [len(g.tokens) - 1 for g in run.generations]


def test_the_first_level_alone_misleads(headed: HeadedModel, trace: Trace) -> None:
    """What a trace without a depth axis would say of the same draft is not what it does."""
    meta = trace.meta.model_copy(update={"schema_version": 1, "depths": 1})
    first = Trace(trace.ranks[:, 0].copy(), trace.offsets, meta)
    bush = Tree.from_paths(
        [[i] for i in range(15)] + [[i, j] for i in range(15) for j in range(15)]
    )
    assert walk(first, bush).starts.tolist() != walk(trace, bush).starts.tolist()
    assert walk(first, Tree.chain(1)).starts.tolist() == walk(trace, Tree.chain(1)).starts.tolist()


def test_ranks_are_those_of_a_plain_heads_tokens(bamba: HeadedModel) -> None:
    depths, prompt = 3, [3, 9, 4]
    config = RecordConfig("tiny", num_children=24, max_new_tokens=10, num_slots=2, depths=depths)
    trace = record_trace(bamba.pair, [prompt], config)
    engine = Engine(bamba.pair.target, None, Tree.chain(0), EngineConfig(1, 64))
    (text,) = generate(engine, [prompt], StopRule(10)).generations
    head = ReferenceHead(bamba.folder)
    for start in range(trace.num_positions):
        history = [*prompt, *text.tokens[: start + 1]]
        hidden_ND = hidden_states(bamba.theirs, history[:-1])
        tokens, ranks = history[1:], []
        for token in text.tokens[start + 1 : start + 1 + depths]:
            made_D = head(hidden_ND, tokens)
            place = head.logits(made_D).argsort(descending=True).tolist().index(token)
            ranks.append(place if place < config.num_children else NO_RANK)
            hidden_ND = torch.cat((hidden_ND, made_D[None]))
            tokens = [*tokens, token]
        ranks += [NO_RANK] * (depths - len(ranks))
        assert trace.ranks[start].tolist() == ranks


def test_fewer_depths_are_the_first_ones(bamba: HeadedModel) -> None:
    """Chunks of another length; and other prompts beside it change nothing."""
    long = RecordConfig("tiny", max_new_tokens=40, num_slots=2, depths=9)
    few = RecordConfig("tiny", max_new_tokens=40, num_slots=3, depths=3)
    whole = record_trace(bamba.pair, prompts_of(3), long)
    assert np.array_equal(whole.ranks[:, :3], record_trace(bamba.pair, prompts_of(3), few).ranks)
    (again,) = record_prompts(bamba.pair, prompts_of(3), long, {1})
    own = whole.ranks[whole.offsets[1] : whole.offsets[2]]
    assert (again[0], again[1].ranks) == (1, own.tobytes())


def test_texts_that_end_at_once_have_no_ranks(bamba: HeadedModel) -> None:
    config = RecordConfig("tiny", max_new_tokens=1, num_slots=2, depths=4)
    trace = record_trace(bamba.pair, prompts_of(3), config)
    assert trace.ranks.shape == (0, 4)


@pytest.mark.parametrize("depths", [1, 65])
def test_depths_that_cannot_be_recorded_are_refused(bamba: HeadedModel, depths: int) -> None:
    with pytest.raises(ConfigError, match=f"2 to 64 depths, got {depths}; change --depths"):
        record_trace(bamba.pair, [[1]], RecordConfig("tiny", depths=depths))


def test_ranks_given_a_token_are_distributed_as_by_the_rule() -> None:
    """Tokens of the target with ranks drawn for them, against children drawn and tried."""
    torch.manual_seed(0)
    num_draws, num_tokens, num_children = 200_000, 5, 3
    p_V, q_V = torch.tensor([0.1, 0.35, 0.05, 0.3, 0.2]), torch.tensor([0.5, 0.2, 0.15, 0.15, 0.0])
    p_MV, q_MV = p_V.expand(num_draws, -1), q_V.expand(num_draws, -1)
    children_MC = torch.multinomial(q_MV, num_children)
    tokens_M = choose_by_mss(
        p_MV[:, None], q_MV[:, None], children_MC[:, None],
        torch.rand(num_draws, 1, num_children), torch.rand(num_draws, 1),
    )[:, 0]  # fmt: skip
    is_child_MC = children_MC == tokens_M[:, None]
    live_M = torch.where(is_child_MC.any(1), is_child_MC.int().argmax(1), num_children)
    drawn_M = torch.multinomial(p_V, num_draws, replacement=True)
    rank_M = drawn_rank(p_MV, q_MV, drawn_M, torch.rand(num_draws, 2 * num_children))
    rank_M = rank_M.clamp(max=num_children)
    size = num_tokens * (num_children + 1)
    tables = [
        torch.bincount(token * (num_children + 1) + rank, minlength=size).numpy()
        for token, rank in ((tokens_M, live_M), (drawn_M, rank_M))
    ]
    seen = np.array(tables)[:, np.array(tables).sum(0) > 0]
    assert stats.chi2_contingency(seen).pvalue > 1e-3
    # without the children that were rejected before, later ranks are off
    once_M = drawn_rank(p_MV, q_MV, drawn_M, torch.rand(num_draws, 2))
    assert (once_M == 0).sum() < (rank_M < num_children).sum()


@dataclass(frozen=True)
class Mean:
    """Tokens per step over prompts, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, positions_P: np.ndarray, starts_P: np.ndarray) -> Mean:
        """Estimate a ratio of sums; prompts are independent."""
        ratio = positions_P.sum() / starts_P.sum()
        spread = positions_P - ratio * starts_P
        error = np.sqrt((spread**2).sum()) / starts_P.sum()
        return cls(float(ratio), float(error))


def live_run(headed: HeadedModel, tree: Tree, sampling: Sampling, prompts: list[list[int]]) -> Run:
    support = SamplingSupport.of(sampling)
    engine = Engine(
        headed.pair.target, headed.pair.draft, tree, EngineConfig(64, 96, sampling=support)
    )
    params = [SamplingParams.of(sampling, 10_000 + i) for i in range(len(prompts))]
    return generate(engine, prompts, StopRule(32), sampling=params)


SETTINGS = {
    "naive-t0.6": Sampling(rule="naive", temperature=0.6),
    "naive-t1": Sampling(rule="naive", temperature=1.0),
    "mss-t0.6": Sampling(rule="mss", temperature=0.6),
    "mss-t1": Sampling(rule="mss", temperature=1.0),
    "mss-t1-k20-r1.5": Sampling(rule="mss", temperature=1.0, top_k=20, repetition_penalty=1.5),
}


def test_penalised_rows_know_the_prompt_and_the_text_before_them() -> None:
    prompt_BV = torch.zeros(1, 8, dtype=torch.bool)
    prompt_BV[0, [1, 2]] = True
    roots_NB = torch.tensor([[3], [4], [3], [6]])
    rows = seen_along(prompt_BV, roots_NB, 1)
    assert [row[0].nonzero()[:, 0].tolist() for row in rows] == [
        [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 6],
    ]  # fmt: skip


@pytest.mark.parametrize("label", SETTINGS)
def test_sampled_walks_and_steps_agree(bamba: HeadedModel, label: str) -> None:
    """Other seeds on either side: three standard errors, each at most 1 % of the mean."""
    sampling = SETTINGS[label]
    assert sampling.label == label
    prompts = prompts_of(16) * 18
    config = RecordConfig(
        "tiny", sampling, max_new_tokens=32, num_slots=64, depths=4, ignore_eos=True
    )
    trace = record_trace(bamba.pair, prompts, config)
    run = live_run(bamba, DEFAULT_TREE, sampling, prompts)
    walked = walk(trace, DEFAULT_TREE)
    tokens = np.array([len(g.tokens) - 1 for g in run.generations])
    steps = np.array([g.num_steps for g in run.generations])
    live, predicted = Mean.of(tokens, steps), Mean.of(walked.positions_P, walked.starts_P)
    assert max(live.error, predicted.error) < 0.01 * live.value
    assert abs(live.value - predicted.value) < 3 * np.hypot(live.error, predicted.error)
    assert live.value > 1.03
