"""MTP heads: what they draft against a head in plain torch, whatever steps did before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from mtp_models import (
    FAULTS,
    QWEN_FAULTS,
    HeadedModel,
    bamba_with_head,
    hidden_states,
    nemotron_with_head,
    qwen_with_head,
    reference_head,
)
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE
from torch import Tensor

from stree_autotune.trace.file import NO_RANK
from stree_autotune.trace.record import RecordConfig, record_trace
from stree_core.drafting.pair import Runtime, load_with_head
from stree_core.drafting.tree_plan import TreePlan
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig, MakeRules
from stree_core.engine.rules import GreedyRule, Rule
from stree_core.engine.session import Request, Session
from stree_core.engine.step import Speculator
from stree_core.engine.stop import StopRule
from stree_core.errors import CheckpointError
from stree_core.models.backend import Backend
from stree_core.models.source import folder_source
from stree_core.tree import DEFAULT_TREE, OFF, Tree

RAGGED = Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 0, 0], [2, 0, 0]])
LARGE = Tree.from_paths(
    [[i] for i in range(6)]
    + [[i, j] for i in range(4) for j in range(3)]
    + [[0, i, j] for i in range(3) for j in range(3)]
    + [[1, 0, 0], [2, 0, 0], [3, 0, 0]]
    + [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    + [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]]
)
CHAIN = Tree.chain(4)
PROMPTS = ([7], [3, 9, 4, 11, 2], [5, 6])
# transformers computes norms, gates and scans in fp32, whatever the weights are; a head that reads
# our own float64 hidden states is within 1e-13 of the plain one.
TOLERANCE = 1e-4

MAKERS: dict[str, Callable[[Path], HeadedModel]] = {
    "nemotron": nemotron_with_head,
    "nemotron-latent": lambda folder: nemotron_with_head(folder, latent=16),
    "bamba": bamba_with_head,
    "qwen3.5": qwen_with_head,
    "qwen3-next": lambda folder: qwen_with_head(folder, next_generation=True, packed=True),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def headed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HeadedModel:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def bamba(tmp_path_factory: pytest.TempPathFactory) -> HeadedModel:
    return bamba_with_head(tmp_path_factory.mktemp("bamba") / "model")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeadedModel, Engine]:
    """A Qwen3-Next, and an engine of it after two steps."""
    headed = qwen_with_head(tmp_path_factory.mktemp("qwen") / "model", next_generation=True)
    engine = started(headed, (RAGGED,))
    for _ in range(2):
        engine.step()
    return headed, engine


class Forced(GreedyRule):
    """Accepts the path to a node that is drawn anew for every slot and step, the root's among them.

    What it emits is no text of the target's, but the target's states and the head's rows are as
    true of it as of any.
    """

    def __init__(self, plan: TreePlan, backend: Backend, rng: random.Random) -> None:
        super().__init__(plan, backend)
        self._tree = plan.tree
        self._rng = rng

    def choose(self, logits_TBV: Tensor, tokens_TB: Tensor) -> Tensor:
        chosen_TB = super().choose(logits_TBV, tokens_TB)
        for slot in range(tokens_TB.shape[1]):
            end = self._rng.choice([0, self._tree.num_tokens - 1, self._rng.randrange(99)])
            path = self._tree.node_paths[end % self._tree.num_tokens]
            for parent, child in pairwise(path):
                chosen_TB[parent, slot] = tokens_TB[child, slot]
        return chosen_TB


def forced(seed: int = 0) -> MakeRules:
    def rules(plans: Sequence[TreePlan], backend: Backend) -> list[Rule]:
        rng = random.Random(seed)
        return [Forced(plan, backend, rng) for plan in plans]

    return rules


def expected_features(
    headed: HeadedModel, tree: Tree, history: Sequence[int], node_tokens: Sequence[int],
    fault: str = "", shift: int = 0,
) -> Tensor:  # fmt: skip
    """Return what a plain head makes [I, D] of every node with children, run without a cache."""
    head = reference_head(headed.folder, fault, shift)
    normed = fault != "hidden state before the final norm"
    true_ND = hidden_states(headed.theirs, history[:-1], normed=normed)
    made: dict[int, Tensor] = {}
    for node in range(tree.num_tokens):
        if not tree.children[node]:
            continue
        path = tree.node_paths[node]
        given = [made[parent] for parent in path[:-1]]
        if fault == "no final norm between depths":
            given = [head.unnormed(y) for y in given]
        hidden_ND = torch.cat((true_ND, *(y[None] for y in given)))
        tokens = [*history[1:], *(node_tokens[n] for n in path[1:])]
        made[node] = head(hidden_ND, tokens)
    return torch.stack(list(made.values()))


@torch.inference_mode()
def proposed(engine: Engine, which: int) -> Tensor:
    """Draft with one of an engine's trees; return its tokens [T, B]. Drafting twice is harmless."""
    speculator = engine._speculators[which]
    speculator.propose()
    return speculator.tokens_TB.clone()


def difference(
    headed: HeadedModel, engine: Engine, which: int, fault: str = "", shift: int = 0
) -> float:
    """Return by how much what an engine drafts of any slot is off, 1 where tokens are others."""
    tree = engine.trees[which]
    tokens_TB = proposed(engine, which)
    features_RBD = engine._speculators[which].draft_cache.features_RBD
    inner = [node for node in range(tree.num_tokens) if tree.children[node]]
    head, worst = reference_head(headed.folder), 0.0
    for slot, history in enumerate(engine._history):
        tokens = tokens_TB[:, slot].tolist()
        wanted_ID = expected_features(headed, tree, history, tokens, fault, shift)
        ours_ID = features_RBD[1 : 1 + len(inner), slot]
        worst = max(worst, float((ours_ID - wanted_ID).norm() / wanted_ID.norm()))
        for node, wanted_D in zip(inner, wanted_ID, strict=True):
            best = head.logits(wanted_D).topk(len(tree.children[node])).indices.tolist()
            if [tokens[child] for child in tree.children[node]] != best:
                return 1.0
    return worst


def started(headed: HeadedModel, trees: Sequence[Tree], seed: int = 0) -> Engine:
    config = EngineConfig(len(PROMPTS), 256)
    engine = Engine(headed.pair.target, headed.pair.draft, trees, config, rules=forced(seed))
    for slot, prompt in enumerate(PROMPTS):
        engine.prefill(slot, prompt)
    return engine


def test_every_node_is_drafted_as_by_a_plain_head(headed: HeadedModel) -> None:
    """Also after steps that accepted none, some, all and other branches, and after none at all."""
    trees = (RAGGED, OFF, CHAIN, DEFAULT_TREE)
    engine = started(headed, trees)
    rng = random.Random(1)
    lengths = set()
    for number in range(10):
        which = number % 4 if number < 4 else rng.randrange(len(trees))
        if trees[which].num_nodes:
            assert difference(headed, engine, which) < TOLERANCE
        lengths |= {len(tokens) for tokens in engine.step(which).tokens}
    assert {1, 2, 4, 5} <= lengths


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(bamba: HeadedModel, fault: str) -> None:
    engine = started(bamba, (RAGGED,))
    for _ in range(2):
        engine.step()
    assert difference(bamba, engine, 0) < TOLERANCE
    assert difference(bamba, engine, 0, fault) > 1e-3


@pytest.mark.parametrize("fault", ["", *QWEN_FAULTS])
def test_a_fault_is_seen_in_a_head_of_qwens(qwen: tuple[HeadedModel, Engine], fault: str) -> None:
    off = difference(*qwen, 0, fault)
    assert (off > 1e-3) if fault else (off < TOLERANCE)


def test_positions_count_from_the_row_before(bamba: HeadedModel) -> None:
    """All of them may be shifted; one alone may not."""
    engine = started(bamba, (CHAIN,))
    engine.step()
    assert difference(bamba, engine, 0, shift=1) > 1e-3
    assert difference(bamba, engine, 0, shift=0) < TOLERANCE


def test_rows_of_an_accepted_path_are_made_true(
    headed: HeadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rows that were drafted left as they are, later drafts are off."""
    engine = started(headed, (CHAIN,))
    monkeypatch.setattr(type(headed.pair.draft), "file", lambda *_: None)
    worst = 0.0
    for _ in range(4):
        engine.step()
        worst = max(worst, difference(headed, engine, 0))
    assert worst > 1e-4


def test_siblings_do_not_see_each_other(bamba: HeadedModel) -> None:
    """What a head makes of a node is the same whatever stands beside it."""
    engine = started(bamba, (RAGGED, Tree.from_paths([[0], [0, 0], [0, 0, 0]])))
    speculators = engine._speculators
    proposed(engine, 0)
    wide = speculators[0].draft_cache.features_RBD[1:].clone()
    proposed(engine, 1)
    alone = speculators[1].draft_cache.features_RBD[1:].clone()
    # Rows of nodes [] and [0] come first in both; [0, 0] is the third in one, the fourth in one.
    assert torch.allclose(wide[:2], alone[:2], atol=1e-12)
    assert torch.allclose(wide[3], alone[2], atol=1e-12)


@pytest.mark.parametrize("piece", [1, 3, 64])
def test_a_prompt_is_read_in_pieces_as_whole(bamba: HeadedModel, piece: int) -> None:
    """A piece's last row needs the first token of the next."""
    generator = torch.Generator().manual_seed(0)
    config = EngineConfig(3, 256, piece_tokens=piece)
    engine = Engine(bamba.pair.target, bamba.pair.draft, (RAGGED,), config)
    for slot, length in enumerate((1, 2, 70)):
        prompt = torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist()
        engine.prefill(slot, prompt)
    assert difference(bamba, engine, 0) < TOLERANCE


def test_a_recording_step_commits_the_root_alone(bamba: HeadedModel) -> None:
    star = Tree.from_paths([[0], [1], [2], [3]])
    config = EngineConfig(len(PROMPTS), 64)
    engine = Engine(
        bamba.pair.target, bamba.pair.draft, star, config, rules=forced(3), step=Speculator.record
    )
    for slot, prompt in enumerate(PROMPTS):
        engine.prefill(slot, prompt)
    for _ in range(4):
        assert difference(bamba, engine, 0) < TOLERANCE
        assert {len(tokens) for tokens in engine.step().tokens} == {1}


def test_greedy_text_is_the_targets_own(headed: HeadedModel) -> None:
    """Requests join and leave; a tree of 40 nodes and depth 6 among the trees."""
    assert (LARGE.num_nodes, LARGE.depth) == (40, 6)
    rng = random.Random(2)
    prompts = [[rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 9))] for _ in range(7)]
    stops = [StopRule(rng.randint(3, 40)) for _ in prompts]
    target, draft = headed.pair.target, headed.pair.draft
    alone = generate(Engine(target, None, OFF, EngineConfig(1, 128)), prompts, stops)
    engine = Engine(target, draft, (RAGGED, OFF, LARGE, CHAIN), EngineConfig(3, 128))
    session = Session(engine, lambda active: rng.randrange(4), lookahead=1)
    ids = [session.submit(Request(p, s)) for p, s in zip(prompts, stops, strict=True)]
    ended = session.run()
    assert [ended[i].tokens for i in ids] == [g.tokens for g in alone.generations]


def test_a_trace_of_a_head_is_of_its_children(bamba: HeadedModel) -> None:
    """Recording knows the draft's interface alone; ranks are those of a plain head's tokens."""
    config = RecordConfig("toys", num_children=VOCAB_SIZE // 2, max_new_tokens=12, num_slots=2)
    trace = record_trace(bamba.pair, [[7], [3, 9, 4]], config)
    assert trace.meta.draft == bamba.pair.draft_ref
    engine = Engine(bamba.pair.target, None, OFF, EngineConfig(1, 64))
    head = reference_head(bamba.folder)
    for number, prompt in enumerate(([7], [3, 9, 4])):
        (text,) = generate(engine, [prompt], StopRule(12)).generations
        history, ranks = [*prompt, text.tokens[0]], []
        for token in text.tokens[1:]:
            logits = head.logits(head(hidden_states(bamba.theirs, history[:-1]), history[1:]))
            place = logits.argsort(descending=True).tolist().index(token)
            ranks.append(place if place < config.num_children else NO_RANK)
            history.append(token)
        own = trace.ranks[trace.offsets[number] : trace.offsets[number + 1]]
        assert own[:, 0].tolist() == ranks


def test_an_engine_says_what_a_head_needs(headed: HeadedModel) -> None:
    trees = (RAGGED, CHAIN, OFF)
    engine = Engine(headed.pair.target, headed.pair.draft, trees, EngineConfig(2, 64))
    assert engine.needed_bytes() == engine.cache_bytes


def test_the_head_has_a_name_and_a_shape_of_its_own(headed: HeadedModel) -> None:
    head, target = headed.pair.draft_ref, headed.pair.target_ref
    assert head.name == "mtp"
    assert head.tokenizer_sha256 == target.tokenizer_sha256
    assert head.shape_sha256 != target.shape_sha256
    stored = {key for key in load_file(headed.folder / "model.safetensors") if "mtp." in key}
    keys = {key for weight in headed.pair.draft.shape.weights for key in weight.keys_in(stored)}
    assert stored == {key for key in keys if "mtp." in key}


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def load(folder: Path) -> None:
    load_with_head(folder_source(folder), Runtime("cpu"))


def test_a_config_that_names_a_head_without_weights_is_refused(tmp_path: Path) -> None:
    nemotron_with_head(tmp_path)
    change_weights(tmp_path, lambda w: {k: t for k, t in w.items() if not k.startswith("mtp.")})
    with pytest.raises(CheckpointError, match=r"hold no weight under mtp\."):
        load(tmp_path)


def test_a_head_has_all_its_weights_and_no_other(tmp_path: Path) -> None:
    nemotron_with_head(tmp_path)
    norm = "mtp.layers.0.hnorm.weight"
    change_weights(tmp_path, lambda w: w | {"mtp.layers.2.norm.weight": w[norm].clone()})
    with pytest.raises(CheckpointError, match=r"also hold 1 weights such as mtp\.layers\.2"):
        load(tmp_path)
    change_weights(tmp_path, lambda w: {k: t for k, t in w.items() if "mtp.layers.2" not in k})
    load(tmp_path)
    change_weights(tmp_path, lambda w: {k: t for k, t in w.items() if k != norm})
    with pytest.raises(CheckpointError, match=rf"lack 1 weights such as {norm}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_nextn_predict_layers": 0}, "names none"),
        ({"num_nextn_predict_layers": 2}, "only 1"),
        ({"mtp_hybrid_override_pattern": "E*"}, "begins with its one attention layer"),
        ({"mtp_hybrid_override_pattern": "*X"}, "'X' is not supported"),
    ],
)
def test_other_heads_are_refused(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    nemotron_with_head(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_head_changes_nothing_that_is_known_of_its_model(tmp_path: Path) -> None:
    """Files that were recorded before a head was trained stay about this model."""
    headed = bamba_with_head(tmp_path)
    (tmp_path / "mtp_config.json").unlink()
    assert folder_source(tmp_path).ref == headed.pair.target_ref
