"""Judge sampled texts by the target's own distribution, token by token.

    python benchmarks/sampled.py [--drafts mtp demo-draft] [--device cuda] [--rounds N]

The prompts of the demo set are continued at temperature 1 without end, by naive sampling and by
MSS, with a tree of unequal branches. A token's place is the probability of all likelier ones, plus
a random share of its own: over texts that follow the target's distribution, which plain one-token
passes compute anew, places are uniform. Printed are the p-value of their chi-square over 50 bins,
and by how many standard deviations the texts' log-likelihood is off its mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from report import RESULTS, Row, header, save, table
from scipy import stats
from torch import Tensor

from stree_autotune.live.validation import RAGGED
from stree_autotune.store.open_models import PairRequest, open_pair, open_prompts
from stree_core.drafting.pair import Pair, Runtime
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig, needed_positions
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.models.cache import CacheSize
from stree_core.models.model import Model
from stree_core.models.row_block import make_block
from stree_kernels.launch.rows import advance_pending

BINS = 50
SHOWN = ("draft", "rule", "tokens", "tokens_per_step", "p_value", "surplus_deviations")


def main() -> None:
    options = parse()
    head, rows = header(device=options.device), []
    for draft in options.drafts:
        pair = open_pair(PairRequest("demo-target", draft, (), Runtime(options.device, "float32")))
        prompts = pair.encode(open_prompts("demo", "", (), limit=options.prompts).texts)
        for rule in options.rules:
            rows.append({"draft": draft, "rule": rule, **judged(pair, options, rule, prompts)})
            save(options.output, head, rows)
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sampled texts against the target's distribution")
    parser.add_argument("--drafts", nargs="+", default=["mtp", "demo-draft"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rules", nargs="+", default=["naive", "mss"])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4, help="seeds of every prompt")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampled-h200.json")
    return parser.parse_args()


def judged(pair: Pair, options: argparse.Namespace, rule: str, prompts: list[list[int]]) -> Row:
    """Decode all prompts with several seeds and judge the texts."""
    positions = needed_positions(max(map(len, prompts)), options.tokens, [RAGGED])
    support = SamplingSupport(rule)  # type: ignore[arg-type]
    config = EngineConfig(len(prompts), positions, sampling=support)
    engine = Engine(pair.target, pair.draft, RAGGED, config)
    # One for all rounds: where a token is nearly certain its place is its share.
    generator = torch.Generator(pair.device).manual_seed(0)
    places, surplus, variance, num_tokens, num_steps = [], 0.0, 0.0, 0, 0
    for number in range(options.rounds):
        first = number * len(prompts)
        each = [SamplingParams(1.0, seed=first + index) for index in range(len(prompts))]
        run = generate(engine, prompts, StopRule(options.tokens), sampling=each)
        texts = [generation.tokens for generation in run.generations]
        place, more, own_variance = judge(pair.target, prompts, texts, generator)
        places.append(place)
        surplus, variance = surplus + more, variance + own_variance
        num_tokens, num_steps = num_tokens + run.num_tokens, num_steps + run.num_steps
    counts = torch.histc(torch.cat(places), bins=BINS, min=0, max=1)
    return {
        "tokens": sum(map(len, places)),
        "tokens_per_step": round(num_tokens / num_steps, 4),
        "p_value": float(stats.chisquare(counts.cpu().double().numpy()).pvalue),
        "surplus_deviations": surplus / variance**0.5,
    }


@torch.inference_mode()
def judge(
    target: Model, prompts: list[list[int]], texts: list[list[int]], generator: torch.Generator
) -> tuple[Tensor, float, float]:
    """Return the tokens' places, and how far log-likelihood is off its mean, and its variance.

    All texts run side by side, one token a pass; a slot's own prompt decides where it begins.
    """
    whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    longest = max(map(len, whole))
    padded_BT = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in whole])
    padded_BT = padded_BT.to(target.device)
    begin_B = torch.tensor([len(prompt) for prompt in prompts], device=target.device)
    end_B = torch.tensor([len(tokens) for tokens in whole], device=target.device)
    block = make_block([-1], target.conv_widths, target.device)
    cache = target.make_cache(CacheSize(len(whole), 1, 1, longest))
    places, surplus, variance = [], 0.0, 0.0
    for at in range(1, longest):
        tokens_1B = padded_BT[None, :, at - 1].contiguous()
        hidden = target.forward(tokens_1B, block, cache, first=0, commit=True)
        one_B = torch.ones_like(cache.committed_B)
        advance_pending(cache.pending, None, one_B)
        cache.committed_B.add_(one_B)
        cache.flip()
        counted_B = (begin_B <= at) & (at < end_B)
        log_BV = target.logits(hidden)[0][counted_B].double().log_softmax(-1)
        p_BV, token_B1 = log_BV.exp(), padded_BT[counted_B, at, None]
        own_B1 = p_BV.gather(-1, token_B1)
        lower_BV = torch.arange(p_BV.shape[1], device=p_BV.device) < token_B1
        likelier_BV = (p_BV > own_B1) | ((p_BV == own_B1) & lower_BV)
        share_B1 = torch.rand(own_B1.shape, generator=generator, device=p_BV.device)
        places.append(((p_BV * likelier_BV).sum(-1, keepdim=True) + share_B1 * own_B1).flatten())
        mean_B = (p_BV * log_BV).sum(-1)
        surplus += float((log_BV.gather(-1, token_B1)[:, 0] - mean_B).sum())
        variance += float(((p_BV * log_BV.square()).sum(-1) - mean_B.square()).sum())
    return torch.cat(places), surplus, variance


if __name__ == "__main__":
    main()
