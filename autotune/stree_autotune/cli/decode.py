"""The verb decode: continue a prompt as a profile says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stree_autotune.store import (
    PairRequest,
    Working,
    chat_warning,
    digits,
    open_profile_pair,
    print_json,
)
from stree_core.drafting import (
    Pair,
    gpu_warning,
)
from stree_core.engine import (
    Engine,
    EngineConfig,
    Generation,
    Request,
    RuleName,
    SamplingParams,
    SamplingSupport,
    Session,
    StopRule,
    Update,
    generate,
    needed_positions,
    steps_of,
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
    with Working("loading the models"):
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
    with Working("preparing the models' graphs"):
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
            "prompt_tokens": generation.prompt_tokens,
            "first_token_ms": run.first_token_ms,
            "prefill_tokens_per_s": run.prefill_tokens_per_s,
        }
        print_json(summary)
        return
    with Session(engine) as session:
        session.submit(Request(tokens, stop, params))
        _print_stream(pair, steps_of(session))


def _print_stream(pair: Pair, steps: Iterator[list[Update]]) -> None:
    """Print a continuation while it grows; a character may need several tokens to be whole."""
    kept: list[int] = []
    printed = ""
    generation = Generation()
    for update in (update for updates in steps for update in updates):
        kept += update.tokens
        generation = update.generation or generation
        text = pair.decode(kept).rstrip("\ufffd")
        sys.stdout.write(text[len(printed) :])
        sys.stdout.flush()
        printed = text
    sys.stdout.write(pair.decode(kept)[len(printed) :] + "\n")
    logger.info(
        "%d tokens in %d steps after the first, which took %s ms; %d prompt tokens at %s per s",
        len(kept),
        generation.num_steps,
        digits(1e3 * (generation.first_token_seconds or 0.0)),
        generation.prompt_tokens,
        digits(generation.prefill_tokens_per_s),
    )
