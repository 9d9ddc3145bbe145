"""Open the models and prompts that a command line or a profile names."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from stree_autotune.store.library import Library, profile_model_name
from stree_autotune.store.prompts import PromptSet, load_prompts
from stree_core.drafting import (
    Pair,
    Runtime,
    load_pair,
    load_with_head,
    require_profile_fits,
)
from stree_core.errors import ConfigError
from stree_core.files import require_place
from stree_core.models import (
    MTP,
    ModelSource,
    find_source,
    folder_source,
    head_source,
    is_hub_id,
    spec_source,
)
from stree_core.profile import Profile

logger = logging.getLogger(__name__)

DEMO_DATASET = "demo"


@dataclass(frozen=True, slots=True)
class PairRequest:
    """Which models, from where, and on what to run them; empty names are a profile's.

    With `shapes` the names are those of shape specs, whose weights are drawn at random.
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
        return spec_source(*library.find_shape_and_weights(name))
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
    target = _profile_source(request, request.target, profile.target.name)
    if (request.draft or profile.draft.name) == MTP:
        pair = load_with_head(target, request.runtime)
    else:
        draft = _profile_source(request, request.draft, profile.draft.name)
        pair = load_pair(target, draft, request.runtime)
    require_profile_fits(profile, pair)
    return pair


def _profile_source(request: PairRequest, typed: str, name: str) -> ModelSource:
    """Find a model where a user says, else by a profile's name in the search path alone.

    A profile may be anybody's: only a user's own words name a folder elsewhere, or a repository to
    fetch.
    """
    if typed:
        return open_source(request, typed)
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


def require_new(path: Path, *, force: bool) -> None:
    """Raise ConfigError when a file cannot be written, or would be replaced without `force`."""
    require_place(path)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; pass --force to replace it")
