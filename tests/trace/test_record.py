"""A trace walked over a tree equals live decoding with that tree, step for step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, ours, perturbed, tiny_bamba

from stree_autotune.trace.file import NO_RANK, Trace
from stree_autotune.trace.record import RecordConfig, record_trace, repeated_positions
from stree_autotune.trace.tree_walk import walk
from stree_core.drafting.draft import ModelDraft
from stree_core.drafting.pair import Pair
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.stop import StopRule
from stree_core.models.source import ModelSource
from stree_core.profile import ModelRef
from stree_core.tree import DEFAULT_TREE, Tree

REF = ModelRef(name="tiny", config_sha256="0" * 64, tokenizer_sha256="0" * 64)
LIMIT = 60
RAGGED = Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]])
WIDE = Tree.from_paths(
    [[i] for i in range(6)] + [[0, i] for i in range(4)] + [[1, 0], [0, 0, 0], [0, 1, 0]]
)
TREES = {
    "chain1": Tree.chain(1),
    "chain5": Tree.chain(5),
    "default": DEFAULT_TREE,
    "ragged": RAGGED,
    "wide": WIDE,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    target = ours(tiny_bamba(), folder / "target")
    draft = ours(perturbed(tiny_bamba(), 0.07), folder / "draft")
    source = ModelSource(REF, target.shape, None)
    return Pair(target, ModelDraft(draft), source, source, None)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(2, 30, (9,), generator=generator).tolist()
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def trace(pair: Pair, prompts: list[list[int]]) -> Trace:
    config = RecordConfig("tiny", num_children=8, max_new_tokens=LIMIT, num_slots=4)
    return record_trace(pair, prompts, config)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_walk_equals_live_decoding(
    tree: Tree, pair: Pair, prompts: list[list[int]], trace: Trace
) -> None:
    engine = Engine(pair.target, pair.draft, tree, EngineConfig(num_positions=256))
    run = generate(engine, prompts, StopRule(LIMIT, pair.target.shape.eos_token_ids))
    result = walk(trace, tree)
    assert result.starts_P.tolist() == [g.num_steps for g in run.generations]
    assert result.positions_P.tolist() == [len(g.tokens) - 1 for g in run.generations]
    assert result.tokens_per_step == run.tokens_per_step


def test_trace_does_not_depend_on_how_many_prompts_run_together(
    pair: Pair, prompts: list[list[int]], trace: Trace
) -> None:
    config = RecordConfig("tiny", num_children=8, max_new_tokens=LIMIT, num_slots=1)
    alone = record_trace(pair, prompts, config)
    assert np.array_equal(alone.ranks, trace.ranks)
    assert np.array_equal(alone.offsets, trace.offsets)


def test_fewer_children_give_the_same_ranks_cut_off(
    pair: Pair, prompts: list[list[int]], trace: Trace
) -> None:
    config = RecordConfig("tiny", num_children=3, max_new_tokens=LIMIT, num_slots=4)
    narrow = record_trace(pair, prompts, config)
    assert np.array_equal(narrow.ranks, np.where(trace.ranks < 3, trace.ranks, NO_RANK))
    assert (narrow.ranks < 3).any()


def test_repeated_positions_counts_positions_inside_repeats() -> None:
    assert repeated_positions(list(range(30))) == 0
    assert repeated_positions([*range(8), *range(8)]) == 8
    assert repeated_positions([5] * 20) == 19


def test_statistics_describe_the_ranks(trace: Trace) -> None:
    share = float(np.mean(trace.ranks == 0))
    assert trace.meta.statistics["rank0_share"] == pytest.approx(share, abs=1e-6)
    assert 0.2 < share < 1, "the draft should sometimes agree, or the walks above show nothing"


def test_traces_are_written_and_read_back(trace: Trace, tmp_path: Path) -> None:
    from stree_autotune.trace.file import load_trace, save_trace

    save_trace(trace, tmp_path / "t.safetensors")
    back = load_trace(tmp_path / "t.safetensors")
    assert np.array_equal(back.ranks, trace.ranks)
    assert back.meta == trace.meta
