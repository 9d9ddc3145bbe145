"""Texts decoded at temperatures above 0, and how well they follow the target's distributions."""

from __future__ import annotations

import dataclasses

import torch
from chain_prefill import advance
from scipy import stats
from torch import Tensor

from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.rules import RuleName, SamplingSupport
from stree_core.engine.sampling import SamplingParams, make_settings, processed
from stree_core.engine.stop import StopRule
from stree_core.models.cache import CacheSize
from stree_core.models.model import Model
from stree_core.models.row_block import make_block
from stree_core.tree import Tree
from stree_kernels.sampling.children_ref import softmax_distribution

NUM_TOKENS = 6
PROMPT = [1, 2]
NUM_SLOTS = 256
LENGTH = 401
TREES = {
    "off": Tree.chain(0),
    "chain": Tree.chain(3),
    "ragged": Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]),
    # More children than tokens: a distribution can have fewer than it is asked for.
    "star": Tree.from_paths([[0], [1], [2], [3], [4]]),
}
PARAMS = {
    "plain": SamplingParams(temperature=1.0),
    "cut": SamplingParams(0.7, top_k=4, top_p=0.9, min_p=0.03, repetition_penalty=1.2),
}
Pair = tuple[Model, Model]


def decode(
    pair: Pair, tree: Tree, rule: RuleName, params: SamplingParams, length: int, seed: int = 0
) -> tuple[list[list[int]], float]:
    """Return texts of `length` tokens with seeds of their own, and tokens per step."""
    support = SamplingSupport(rule, truncates=params.truncates, penalises=params.penalises)
    engine = Engine(*pair, tree, EngineConfig(NUM_SLOTS, length + 8, sampling=support))
    each = [dataclasses.replace(params, seed=seed + slot) for slot in range(NUM_SLOTS)]
    run = generate(engine, [PROMPT] * NUM_SLOTS, StopRule(length), sampling=each)
    return [generation.tokens for generation in run.generations], run.tokens_per_step


@torch.inference_mode()
def distributions_of(target: Model, texts: list[list[int]], params: SamplingParams) -> Tensor:
    """Return the distribution [T, B, V] of every token of the texts, one token after another."""
    tokens_TB = torch.tensor([PROMPT + text for text in texts]).t()
    block = make_block([-1], target.conv_widths, target.device)
    cache = target.make_cache(CacheSize(len(texts), 1, 1, len(tokens_TB)))
    settings = make_settings(len(texts), target.device)
    for slot in range(len(texts)):
        settings.set(slot, params)
    seen_BV = torch.zeros(len(texts), NUM_TOKENS, dtype=torch.bool)
    distributions = []
    for tokens_B in tokens_TB[:-1]:
        hidden = target.forward(tokens_B[None], block, cache, first=0, commit=True)
        advance(cache, 1)
        seen_BV.scatter_(1, tokens_B[:, None], value=True)
        scores_1BV = processed(target.logits(hidden), settings, seen_BV[None], truncates=True)
        distributions.append(softmax_distribution(scores_1BV, settings.temperature_B))
    return torch.cat(distributions[len(PROMPT) - 1 :]).double()


def judge(target: Model, texts: list[list[int]], params: SamplingParams) -> tuple[float, float]:
    """Return how uniform the tokens' places in their distributions are, and how surprising they
    are.

    The first is the p-value of a chi-square over places, likeliest tokens first; the second the sum
    of log p(token) beyond its mean, in standard deviations.
    """
    p_TBV = distributions_of(target, texts, params)
    token_TB1 = torch.tensor(texts).t()[..., None]
    own_TB1 = p_TBV.gather(-1, token_TB1)
    assert own_TB1.min() > 0, "a token that the distribution excludes"
    generator = torch.Generator().manual_seed(0)
    share_TB1 = torch.rand(own_TB1.shape, generator=generator, dtype=torch.float64)
    lower_TBV = torch.arange(NUM_TOKENS) < token_TB1
    likelier_TBV = (p_TBV > own_TB1) | ((p_TBV == own_TB1) & lower_TBV)
    place = ((p_TBV * likelier_TBV).sum(-1, keepdim=True) + share_TB1 * own_TB1).flatten()
    counts = torch.histc(place, bins=50, min=0, max=1)
    log_TBV = p_TBV.clamp(min=1e-300).log()
    mean_TB = (p_TBV * log_TBV).sum(-1)
    variance = ((p_TBV * log_TBV.square()).sum(-1) - mean_TB.square()).sum()
    surplus = (own_TB1[..., 0].log() - mean_TB).sum() / variance.sqrt()
    return float(stats.chisquare(counts.numpy()).pvalue), surplus.item()
