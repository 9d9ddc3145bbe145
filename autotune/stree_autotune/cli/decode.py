"""The verb decode: continue a prompt as a profile says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stree_autotune.store import PairRequest, chat_warning, open_profile_pair, print_json
from stree_core.drafting import (
    Pair,
    gpu_warning,
)
from stree_core.engine import (
    Engine,
    EngineConfig,
    RuleName,
    SamplingParams,
    SamplingSupport,
    StopRule,
    generate,
    needed_positions,
    stream,
)
from stree_core.profile import load_own_profile
from stree_core.tree import OFF

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What to continue and how; `mode` off never speculates."""

    profile_path: Path
    prompt: str
    chat: bool
    max_new_tokens: int
    mode: Literal["auto", "off"]
    rule: RuleName
    sampling: SamplingParams


def run_decode(models: PairRequest, request: DecodeRequest, *, as_json: bool) -> None:
    """Continue a prompt as a profile says, printing text as it comes."""
    profile = load_own_profile(request.profile_path)
    pair = open_profile_pair(models, profile)
    for warning in (gpu_warning(profile, pair.device), chat_warning(profile, chat=request.chat)):
        if warning:
            logger.warning(warning)
    tree = profile.row_for(1).tree.build() if request.mode == "auto" else OFF
    (tokens,) = pair.encode([request.prompt], chat=request.chat)
    num_positions = needed_positions(len(tokens), request.max_new_tokens, [tree])
    params = request.sampling
    support = SamplingSupport(request.rule, params.truncates, params.penalises)
    config = EngineConfig(1, num_positions, sampling=support)
    engine = Engine(pair.target, pair.draft, tree, config)
    stop = StopRule(request.max_new_tokens, pair.target.shape.eos_token_ids)
    if as_json:
        run = generate(engine, [tokens], stop, sampling=params)
        (generation,) = run.generations
        summary = {
            "text": pair.decode(generation.tokens),
            "tokens": len(generation.tokens),
            "tokens_per_step": run.tokens_per_step,
            "accept_lengths": generation.accept_lengths,
            "step_ms": run.step_ms,
        }
        print_json(summary)
        return
    _print_stream(pair, stream(engine, tokens, stop, params))


def _print_stream(pair: Pair, pieces: Iterator[list[int]]) -> None:
    """Print a continuation while it grows; a character may need several tokens to be whole."""
    kept: list[int] = []
    printed = ""
    steps = -1
    for piece in pieces:
        kept += piece
        steps += 1
        text = pair.decode(kept).rstrip("\ufffd")
        sys.stdout.write(text[len(printed) :])
        sys.stdout.flush()
        printed = text
    sys.stdout.write(pair.decode(kept)[len(printed) :] + "\n")
    logger.info("%d tokens in %d steps after the first", len(kept), steps)
