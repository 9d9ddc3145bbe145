"""Live decoding at temperatures above 0 against the target's own distribution, computed by itself.

A tiny target over a handful of tokens: long texts are judged position by position, short ones as a
whole, against distributions from plain forward passes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sampled_case import (
    LENGTH,
    NUM_SLOTS,
    NUM_TOKENS,
    PARAMS,
    PROMPT,
    TREES,
    Pair,
    decode,
    distributions_of,
    judge,
)
from scipy import stats
from tiny_models import ours, perturbed
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

from stree_autotune.trace.record import RecordConfig, record_trace
from stree_autotune.trace.tree_walk import walk
from stree_core.drafting.draft import ModelDraft
from stree_core.drafting.pair import Pair as LoadedPair
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.rules import RuleName, SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.errors import ConfigError
from stree_core.models.source import ModelSource
from stree_core.profile import ModelRef, Sampling
from stree_kernels.sampling import children_ref as sampling_ref


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(3)
    config = Mamba2Config(
        num_heads=2, head_dim=16, hidden_size=16, state_size=16, num_hidden_layers=1, n_groups=1,
        vocab_size=NUM_TOKENS, tie_word_embeddings=False, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, initializer_range=0.7,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("models")
    target = ours(model, folder / "target", torch.float32)
    return target, ours(perturbed(model, 0.5), folder / "draft", torch.float32)


@pytest.mark.parametrize("setting", PARAMS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rule", ["naive", "mss"])
def test_every_token_follows_the_targets_law(
    pair: Pair, rule: RuleName, tree: str, setting: str
) -> None:
    """10^5 tokens for the tree of all kinds of nodes, a quarter for the others."""
    is_long = (tree, setting) == ("ragged", "plain")
    params, length = PARAMS[setting], LENGTH if is_long else LENGTH // 4
    texts, tokens_per_step = decode(pair, TREES[tree], rule, params, length)
    assert sum(map(len, texts)) > (100_000 if is_long else 25_000)
    assert (tokens_per_step > 1.1) == (tree != "off")
    uniform, surplus = judge(pair[0], texts, params)
    assert uniform > 1e-4
    assert abs(surplus) < 4, "texts are more or less likely than the distribution's own"


def test_children_tried_out_of_order_would_be_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published sampler tries children sorted by the draft's distribution, which is not
    lossless."""
    choose = sampling_ref.choose_by_mss

    def choose_sorted(p: Tensor, q_NBV: Tensor, children_NBC: Tensor, *numbers: Tensor) -> Tensor:
        order_NBC = q_NBV.gather(-1, children_NBC).argsort(-1, descending=True)
        return choose(p, q_NBV, children_NBC.gather(-1, order_NBC), *numbers)

    monkeypatch.setattr(sampling_ref, "choose_by_mss", choose_sorted)
    texts, _ = decode(pair, TREES["ragged"], "mss", PARAMS["plain"], LENGTH // 4)
    uniform, surplus = judge(pair[0], texts, PARAMS["plain"])
    assert uniform < 1e-9
    assert surplus > 10


@pytest.mark.parametrize("rule", ["naive", "mss"])
def test_short_texts_follow_the_joint_law(pair: Pair, rule: RuleName) -> None:
    params, length = PARAMS["plain"], 3
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(8):
        texts, _ = decode(pair, TREES["ragged"], rule, params, length, seed * NUM_SLOTS)
        for text in texts:
            counts[tuple(text)] = counts.get(tuple(text), 0) + 1
    every = list(itertools.product(range(NUM_TOKENS), repeat=length))
    p_TBV = distributions_of(pair[0], [list(text) for text in every], params)
    token_TB1 = torch.tensor(every).t()[..., None]
    exact = p_TBV.gather(-1, token_TB1)[..., 0].prod(0)
    assert math.isclose(exact.sum().item(), 1, rel_tol=1e-4)
    total = sum(counts.values())
    large = exact * total >= 5
    observed = torch.tensor([counts.get(text, 0) for text in every])
    cells = torch.cat((observed[large], observed[~large].sum()[None])).double()
    expected = torch.cat((exact[large], exact[~large].sum()[None])) * total
    expected *= cells.sum() / expected.sum()
    assert stats.chisquare(cells.numpy(), expected.numpy()).pvalue > 1e-4


def _ratio(tokens: Sequence[int], steps: Sequence[int]) -> tuple[float, float]:
    """Return tokens per step over sequences, and its standard error (of a ratio of means)."""
    tokens_P, steps_P = np.array(tokens, float), np.array(steps, float)
    ratio = tokens_P.sum() / steps_P.sum()
    residual_P = tokens_P - ratio * steps_P
    error = np.sqrt(residual_P.var(ddof=1) / len(tokens)) / steps_P.mean()
    return float(ratio), float(error)


@pytest.mark.parametrize(("rule", "temperature"), [("naive", 0.6), ("mss", 1.0)])
def test_a_sampled_trace_predicts_live_tokens_per_step(
    pair: Pair, rule: RuleName, temperature: float
) -> None:
    """Other random numbers, so equal within the error of both."""
    ref = ModelRef(name="tiny", config_sha256="0" * 64)
    source = ModelSource(ref, pair[0].shape, None)
    config = RecordConfig(
        "toys",
        Sampling(rule=rule, temperature=temperature),
        num_children=NUM_TOKENS - 1,
        max_new_tokens=LENGTH,
        num_slots=NUM_SLOTS,
        seed=10**6,
        ignore_eos=True,
    )
    loaded = LoadedPair(pair[0], ModelDraft(pair[1]), source, source, None)
    trace = record_trace(loaded, [PROMPT] * NUM_SLOTS, config)
    result = walk(trace, TREES["ragged"])
    predicted = _ratio(result.positions_P.tolist(), result.starts_P.tolist())
    support = SamplingSupport(rule)
    engine = Engine(*pair, TREES["ragged"], EngineConfig(NUM_SLOTS, 450, sampling=support))
    each = [SamplingParams(temperature, seed=slot) for slot in range(NUM_SLOTS)]
    run = generate(engine, [PROMPT] * NUM_SLOTS, StopRule(LENGTH), sampling=each)
    live = _ratio(
        [len(g.tokens) - 1 for g in run.generations], [g.num_steps for g in run.generations]
    )
    for ratio, error in (predicted, live):
        assert error < 0.005 * ratio, error / ratio
    assert abs(predicted[0] - live[0]) < 3 * math.hypot(predicted[1], live[1])


@pytest.mark.parametrize("rule", ["naive", "mss"])
def test_seeds_reproduce_whatever_else_runs(pair: Pair, rule: RuleName) -> None:
    params = SamplingParams(temperature=1.0, seed=11)
    support = SamplingSupport(rule)

    def text(num_slots: int, others: int) -> list[int]:
        engine = Engine(*pair, TREES["ragged"], EngineConfig(num_slots, 64, sampling=support))
        each = [params, *(SamplingParams(temperature=2.0, seed=n) for n in range(others))]
        run = generate(engine, [PROMPT] * len(each), StopRule(40), sampling=each)
        return run.generations[0].tokens

    assert text(1, 0) == text(4, 3) == text(2, 3)
    params = dataclasses.replace(params, seed=12)
    assert text(1, 0) != text(1, 0)[::-1]


def test_greedy_requests_among_sampled_ones_get_greedy_text(pair: Pair) -> None:
    greedy = generate(
        Engine(*pair, TREES["chain"], EngineConfig(1, 64)), [PROMPT], StopRule(30)
    ).generations[0]
    for rule in ("naive", "mss"):
        support = SamplingSupport(rule)
        engine = Engine(*pair, TREES["ragged"], EngineConfig(2, 64, sampling=support))
        each = [SamplingParams(temperature=1.0), SamplingParams()]
        run = generate(engine, [PROMPT] * 2, StopRule(30), sampling=each)
        assert run.generations[1].tokens == greedy.tokens


def test_a_penalty_alone_is_greedy_with_other_scores(pair: Pair) -> None:
    params = SamplingParams(repetition_penalty=3.0)
    texts = []
    for tree in (TREES["off"], TREES["ragged"]):
        support = SamplingSupport(penalises=True)
        engine = Engine(*pair, tree, EngineConfig(1, 64, sampling=support))
        run = generate(engine, [PROMPT], StopRule(30), sampling=params)
        texts.append(run.generations[0].tokens)
    assert texts[0] == texts[1]
    choices = distributions_of(pair[0], texts[:1], params)[:, 0].argmax(-1)
    assert texts[0] == choices.tolist()


@pytest.mark.parametrize(
    ("support", "params", "message"),
    [
        (SamplingSupport(), SamplingParams(temperature=0.5), "a temperature above 0"),
        (SamplingSupport("mss"), SamplingParams(temperature=0.5, top_p=0.9), "top-p"),
        (SamplingSupport("mss"), SamplingParams(repetition_penalty=1.1), "a repetition penalty"),
    ],
)
def test_an_engine_refuses_what_it_was_not_made_for(
    pair: Pair, support: SamplingSupport, params: SamplingParams, message: str
) -> None:
    engine = Engine(*pair, TREES["chain"], EngineConfig(1, 64, sampling=support))
    with pytest.raises(ConfigError, match=message):
        engine.prefill(0, PROMPT, params)
