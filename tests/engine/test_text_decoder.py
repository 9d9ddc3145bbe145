"""Text in, text out, by one call: what ships, a pair of one's own, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import stree_core
from stree_core.engine import SamplingParams, TextDecoder
from stree_core.errors import ConfigError, StreeError
from stree_core.models import find_source
from stree_core.shipped import shipped_path, shipped_root
from stree_core.tree import OFF

PROFILE = "h200--demo-target--mtp--demo"
PROMPTS = ("def add(a, b):", "What is a tree?", "Count to")


@pytest.fixture(scope="module")
def decoder() -> TextDecoder:
    return stree_core.load(PROFILE, device="cpu", num_slots=2)


def test_texts_are_those_without_speculation(decoder: TextDecoder) -> None:
    found = decoder.generate(PROMPTS, max_new_tokens=12)
    pair = decoder.pair
    config = stree_core.EngineConfig(1, num_positions=128)
    off = stree_core.Engine(pair.target, None, OFF, config)
    stop = stree_core.StopRule(12, pair.target.shape.eos_token_ids)
    run = stree_core.generate(off, pair.encode(list(PROMPTS)), stop)
    assert found.texts == tuple(pair.decode(each.tokens) for each in run.generations)
    assert found.run.tokens_per_step > 1.5, "the head drafts"
    assert str(found).startswith(f"{found.run.num_tokens} tokens in ")
    assert decoder.generate(PROMPTS[0], max_new_tokens=12).texts == found.texts[:1]


def test_a_stop_string_ends_a_text(decoder: TextDecoder) -> None:
    (whole,) = decoder.generate(PROMPTS[0], max_new_tokens=16).texts
    stop = whole[len(whole) // 2 :][:2]
    (text,) = decoder.generate(PROMPTS[0], max_new_tokens=16, stop=(stop,)).texts
    assert len(text) < len(whole)
    assert stop in text


def test_a_pair_of_ones_own_is_named(tmp_path: Path) -> None:
    profile = stree_core.load_profile(shipped_root() / "tuned" / f"{PROFILE}.yaml")
    unknown = profile.target.model_copy(update={"name": "mine"})
    mine = profile.model_copy(update={"target": unknown})
    with pytest.raises(ConfigError, match="model mine does not ship with stree; pass its folder"):
        stree_core.load(mine)
    other = shipped_root() / "models" / "demo-draft"
    with pytest.raises(StreeError):
        stree_core.load(profile, target=other, device="cpu")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stop": "Question:"}, "got one text, 'Question:'; put it into a list"),
        ({"stop": [""]}, "a stop string holds some text"),
        ({"stop": None}, "strings are a list of texts, got None"),
        ({"chat": "no"}, "chat is True, False or None, got 'no'"),
    ],
)
def test_what_has_another_meaning_is_refused(
    decoder: TextDecoder, given: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        decoder.generate("Count to", max_new_tokens=4, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_slots", [0, -1, "8", 1.5, True])
def test_slots_are_one_or_more(num_slots: object) -> None:
    with pytest.raises(ConfigError, match="num_slots must be"):
        stree_core.load(PROFILE, num_slots=num_slots)  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", [5, None, b"x", ""])
def test_a_profile_is_named(profile: object) -> None:
    with pytest.raises(ConfigError, match="a profile is a file, a name or a Profile"):
        stree_core.load(profile)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [[], "", [b"text"], [1], 5, None])
def test_prompts_are_texts(decoder: TextDecoder, prompts: object) -> None:
    with pytest.raises(ConfigError):
        decoder.generate(prompts)  # type: ignore[arg-type]


def test_sampling_that_the_profile_has_not_is_refused(decoder: TextDecoder) -> None:
    with pytest.raises(ConfigError, match="a temperature above 0"):
        decoder.generate("a", sampling=SamplingParams(temperature=0.7))


def test_bare_names_alone_are_looked_up() -> None:
    assert find_source("demo-target").name == "demo-target"
    assert shipped_path("models", "demo-target") is not None
    for name in ("", ".", "..", "../models/demo-target", "/etc", "no-such-model"):
        assert shipped_path("models", name) is None
