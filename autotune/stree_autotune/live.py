"""Open what the command line names, and the verb decode."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stree_autotune.library import Library
from stree_autotune.profile_sources import profile_model_name
from stree_autotune.prompts import PromptSet, load_prompts
from stree_core.decode import generate, stream
from stree_core.engine import Engine, EngineConfig, needed_positions
from stree_core.errors import ConfigError
from stree_core.files import require_place
from stree_core.hub import is_hub_id
from stree_core.model_source import (
    MTP,
    ModelSource,
    find_source,
    folder_source,
    head_source,
    sheet_source,
)
from stree_core.pair import (
    Pair,
    Runtime,
    gpu_warning,
    load_pair,
    load_with_head,
    require_profile_fits,
)
from stree_core.profile import Profile, load_profile
from stree_core.rules import RuleName, SamplingSupport
from stree_core.sampling import SamplingParams
from stree_core.stop import StopRule
from stree_core.tree import Tree

logger = logging.getLogger(__name__)

DEMO_DATASET = "demo"


@dataclass(frozen=True, slots=True)
class PairRequest:
    """Which models, from where, and on what to run them; empty names are a profile's.

    With `shapes` the names are those of shape sheets, whose weights are drawn at random.
    """

    target: str
    draft: str
    data: tuple[Path, ...]
    runtime: Runtime
    shapes: bool = False


def open_source(request: PairRequest, name: str) -> ModelSource:
    """Find a model by its folder, its Hugging Face id, its shipped name or its shape's name."""
    library = Library.open(request.data, missing_ok=True)
    if request.shapes:
        return sheet_source(library.find_shape(name))
    if is_hub_id(name) and not Path(name).exists():
        return find_source(name)
    return folder_source(library.find_model(name))


def open_sources(request: PairRequest) -> tuple[ModelSource, ModelSource]:
    """Find the target and the draft of a request; `mtp` is the target's own head."""
    target = open_source(request, request.target)
    if request.draft == MTP:
        return target, head_source(target)
    return target, open_source(request, request.draft)


def open_pair(request: PairRequest) -> Pair:
    """Find and load the pair of a request."""
    target, draft = open_sources(request)
    if request.draft == MTP:
        return load_with_head(target, request.runtime)
    return load_pair(target, draft, request.runtime)


def open_profile_pair(request: PairRequest, profile: Profile) -> Pair:
    """Load the pair of a profile, found by its names or where the request says.

    Raises ConfigError when it is not the pair that the profile was made for.
    """
    names = ((request.target, profile.target.name), (request.draft, profile.draft.name))
    target, draft = (
        open_source(request, typed) if typed else _named_source(request, name)
        for typed, name in names
    )
    pair = load_pair(target, draft, request.runtime)
    require_profile_fits(profile, pair)
    return pair


def _named_source(request: PairRequest, name: str) -> ModelSource:
    """Find a model that a profile names: in the search path alone, for a profile may be anybody's.

    Only a user's own words name a folder elsewhere, or a repository to fetch.
    """
    library = Library.open(request.data, missing_ok=True)
    return folder_source(library.find_model(profile_model_name(name)))


def open_prompts(
    dataset: str,
    source: str = "",
    data: tuple[Path, ...] = (),
    *,
    rows: slice = slice(None),
    limit: int | None = None,
) -> PromptSet:
    """Return prompts of a file, of a hub dataset or by name; the demo set ships with its target."""
    if not source and dataset == DEMO_DATASET:
        model = Library.open(data, missing_ok=True).find_model("demo-target")
        source = str(model / "prompts.jsonl")
    return load_prompts(dataset, source, rows=rows, limit=limit)


def encode_prompts(pair: Pair, prompts: PromptSet, *, chat: bool) -> list[list[int]]:
    """Return the token ids of prompts: whole conversations with `chat`, else last user turns."""
    return pair.encode_chats(prompts.chats) if chat else pair.encode(prompts.texts)


def chat_warning(profile: Profile, *, chat: bool) -> str | None:
    """Return one line when a profile's acceptance was recorded on prompts of the other form."""
    if profile.chat == chat:
        return None
    forms = ("plain prompts", "prompts in the chat template")
    return (
        f"the profile was tuned on {forms[profile.chat]}, these are {forms[chat]}: its tokens are "
        "right, its speed is not promised"
    )


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
    profile = load_profile(request.profile_path)
    pair = open_profile_pair(models, profile)
    for warning in (gpu_warning(profile, pair.device), chat_warning(profile, chat=request.chat)):
        if warning:
            logger.warning(warning)
    tree = profile.row_for(1).tree.build() if request.mode == "auto" else Tree.chain(0)
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


def print_json(content: object) -> None:
    """Print one JSON document as one line."""
    sys.stdout.write(json.dumps(content) + "\n")


def report(text: str, summary: dict[str, object], as_json: bool) -> None:
    """Print lines for a reader, then, when asked, one line of JSON."""
    sys.stdout.write(text + "\n")
    if as_json:
        print_json(summary)


def require_new(path: Path, *, force: bool) -> None:
    """Raise ConfigError when a file cannot be written, or would be replaced without `force`."""
    require_place(path)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; pass --force to replace it")
