"""When an output ends, and what is kept of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stree_core.errors import ConfigError, brief
from stree_core.given import LIMIT, token_ids, whole_number

Decode = Callable[[list[int]], str]
"""Turns token ids into text."""

Finish = Literal["eos", "length", "string", "cancelled", "error"]
"""Why an output ended: an end token, its limit, a stop string, the caller, a fault."""

_CONTEXT_TOKENS = 8
"""Tokens that are decoded before those that could hold a stop string: some share a character."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a sequence ends: at an end token, which is kept, after `max_new_tokens`, or with text.

    The token that completes one of `strings` is the last one kept. Integers may be numpy's or
    torch's. Raises ConfigError on all that has another meaning: one token id or one string in
    place of several, no text, a limit below 1.
    """

    max_new_tokens: int
    eos_token_ids: Collection[int] = ()
    strings: Collection[str] = ()

    def __post_init__(self) -> None:
        limit = whole_number("max_new_tokens", self.max_new_tokens)
        if not 1 <= limit < LIMIT:
            raise ConfigError(
                f"max_new_tokens must be at least 1 and below 2^63, got {brief(limit)}; change it"
            )
        object.__setattr__(self, "max_new_tokens", limit)
        object.__setattr__(self, "eos_token_ids", _end_tokens(self.eos_token_ids))
        object.__setattr__(self, "strings", _strings(self.strings))

    def cut(
        self,
        tokens: Sequence[int],
        before: Sequence[int],
        decode: Decode | None = None,
    ) -> tuple[list[int], Finish | None]:
        """Return the tokens to keep after those `before`, and why that ends it, if it does."""
        kept = list(tokens[: self.max_new_tokens - len(before)])
        decode = decode if self.strings else None
        if self.eos_token_ids or decode is not None:
            for count, token in enumerate(kept, 1):
                if token in self.eos_token_ids:
                    return kept[:count], "eos"
                if decode is not None and self._completes([*before, *kept[:count]], decode):
                    return kept[:count], "string"
        return kept, "length" if len(before) + len(kept) >= self.max_new_tokens else None

    def _completes(self, tokens: list[int], decode: Decode) -> bool:
        """Return whether the last token completes a stop string; a character has up to 4 bytes."""
        window = 4 * max(map(len, self.strings)) + _CONTEXT_TOKENS
        text = decode(tokens[-window:])
        return any(string in text for string in self.strings)


def careful(decode: Decode) -> Decode:
    """Return a decoder that raises ConfigError, whatever is wrong with `decode`; not interrupts."""

    def checked(tokens: list[int]) -> str:
        try:
            text = decode(tokens)
        # It is the caller's code, and what it raises is about the tokens that it was given.
        except Exception as err:
            reason = " ".join(traceback.format_exception_only(err)[-1].split())
            raise ConfigError(f"a decoder must not fail, it raised {reason}; mend it") from err
        if not isinstance(text, str):
            raise ConfigError(f"a decoder must return text, got {brief(text)}; return a str")
        return text

    return checked


def _end_tokens(given: object) -> tuple[int, ...]:
    if isinstance(given, int):
        raise ConfigError(
            f"eos_token_ids must be a list of token ids, got {brief(given)}; pass ({brief(given)},)"
        )
    tokens = token_ids("eos_token_ids", given)
    if tokens and min(tokens) < 0:
        raise ConfigError(
            f"eos_token_ids must be 0 or more, got {brief(min(tokens))}; leave out what never comes"
        )
    return tokens


def _strings(given: object) -> tuple[str, ...]:
    if isinstance(given, str):
        raise ConfigError(
            f"strings are a list of texts, got one text, {brief(given)}; put it into a list"
        )
    if not isinstance(given, Collection):
        raise ConfigError(f"strings are a list of texts, got {brief(given)}; pass a list")
    for string in given:
        if not isinstance(string, str):
            raise ConfigError(f"a stop string must be text, got {brief(string)}; pass a str")
        if not string:
            raise ConfigError("a stop string holds some text, got an empty one; leave it out")
    return tuple(given)


@dataclass(slots=True)
class Generation:
    """One request's output.

    `tokens` holds the first token, which prefill emits, and all buffered ones; `accept_lengths` the
    accepted draft tokens of every step, the last step's as far as they were kept. `error` says what
    went wrong where `finish` is "error".

    `first_token_seconds` is the time from the request's submission to its first token, waiting for
    a slot included; `prefill_seconds` what the pieces took in which its prompt was read.
    """

    tokens: list[int] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: str | None = None
    prompt_tokens: int = 0
    first_token_seconds: float | None = field(default=None, compare=False)
    prefill_seconds: float = field(default=0.0, compare=False)

    @property
    def num_steps(self) -> int:
        """Decoding steps, prefill not counted."""
        return len(self.accept_lengths)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of the prompt per second in which it was read, beside others or not."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0
