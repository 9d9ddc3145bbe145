"""Text in, text out: a profile and its two models, loaded by one call."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stree_core.drafting import (
    Pair,
    Runtime,
    gpu_warning,
    load_pair,
    load_with_head,
    require_profile_fits,
)
from stree_core.engine.decode import Run, generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.errors import ConfigError, brief
from stree_core.given import whole_number
from stree_core.models import MTP, ModelSource, find_source
from stree_core.profile import Profile, load_own_profile, policy_of
from stree_core.shipped import shipped_path

logger = logging.getLogger(__name__)

NUM_SLOTS = 8


@dataclass(frozen=True, slots=True)
class TextRun:
    """The texts of one call, in the order of its prompts, and the run that made them."""

    texts: tuple[str, ...]
    run: Run

    def __str__(self) -> str:
        run = self.run
        return (
            f"{run.num_tokens} tokens in {run.step_seconds:.2f} s of steps: "
            f"{run.tokens_per_s:.0f} tokens/s, {run.tokens_per_step:.2f} tokens per step"
        )


class TextDecoder:
    """Decodes prompts as a profile says: its trees, by the number of sequences that run.

    `pair` and `engine` are what a session of one's own takes.
    """

    def __init__(self, profile: Profile, pair: Pair, engine: Engine) -> None:
        self.profile = profile
        self.pair = pair
        self.engine = engine

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        sampling: SamplingParams | None = None,
        chat: bool | None = None,
    ) -> TextRun:
        """Continue prompts until an end token, a stop string or so many new tokens.

        `sampling` and `chat` (the tokenizer's chat template) are the profile's by default. Raises
        ConfigError for a prompt that cannot be served, or sampling that the profile has not.
        """
        given = [prompts] if isinstance(prompts, str) else prompts
        texts = list(given) if isinstance(given, Iterable) else []
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise ConfigError(f"prompts are one or more texts, got {brief(prompts)}; pass texts")
        if chat is not None and not isinstance(chat, bool):
            raise ConfigError(f"chat is True, False or None, got {brief(chat)}; pass one of them")
        as_chat = self.profile.chat if chat is None else chat
        rule = StopRule(max_new_tokens, self.pair.target.shape.eos_token_ids, stop)
        run = generate(
            self.engine,
            self.pair.encode(texts, chat=as_chat),
            rule,
            sampling=SamplingParams.of(self.profile.sampling) if sampling is None else sampling,
            decode=self.pair.decode,
        )
        return TextRun(tuple(self.pair.decode(each.tokens) for each in run.generations), run)


def load(
    profile: str | Path | Profile,
    *,
    target: str | Path = "",
    draft: str | Path = "",
    device: str = "auto",
    num_slots: int = NUM_SLOTS,
) -> TextDecoder:
    """Load a profile with its two models and return what decodes text with them.

    `profile` is a file, a shipped profile's name or a Profile. `target` and `draft` are model
    folders or Hugging Face ids; without them the models are those that ship by the profile's names.
    A draft `mtp` is the target's own head. At most `num_slots` sequences run at a time, each of up
    to the profile's context. Raises ConfigError when the models are not those of the profile.
    """
    if not isinstance(profile, str | Path | Profile) or not str(profile):
        raise ConfigError(
            f"a profile is a file, a name or a Profile, got {brief(profile)}; pass one"
        )
    if whole_number("num_slots", num_slots) < 1:
        raise ConfigError(f"num_slots must be at least 1, got {num_slots}; pass more")
    known = profile if isinstance(profile, Profile) else load_own_profile(_profile_path(profile))
    source = _source(target, known.target.name)
    runtime = Runtime(device)
    if str(draft or known.draft.name) == MTP:
        pair = load_with_head(source, runtime)
    else:
        pair = load_pair(source, _source(draft, known.draft.name), runtime)
    require_profile_fits(known, pair)
    warning = gpu_warning(known, pair.device)
    if warning:
        logger.warning(warning)
    sampling = SamplingSupport.of(known.sampling)
    config = EngineConfig(num_slots, known.context, sampling=sampling)
    engine = Engine(pair.target, pair.draft, policy_of(known), config)
    return TextDecoder(known, pair, engine)


def _profile_path(name: str | Path) -> Path:
    """Return a profile's file; a bare name is that of a shipped one where no file has it."""
    path = Path(name)
    shipped = shipped_path("tuned", f"{name}.yaml")
    return shipped if shipped is not None and not path.exists() else path


def _source(given: str | Path, name: str) -> ModelSource:
    """Find a model where the caller says, else among those that ship: names fetch nothing."""
    if given:
        return find_source(given)
    folder = shipped_path("models", name)
    if folder is None:
        raise ConfigError(
            f"the profile's model {name} does not ship with stree; pass its folder or hub id as "
            "target or draft"
        )
    return find_source(folder)
