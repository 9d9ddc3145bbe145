"""When an output ends, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stree_core.errors import ConfigError

Finish = Literal["eos", "length", "string", "cancelled", "error"]
"""Why an output ended: an end token, its limit, a stop string, the caller, a fault."""

_CONTEXT_TOKENS = 8
"""Tokens that are decoded before those that could hold a stop string: some share a character."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a sequence ends: at an end token, which is kept, after `max_new_tokens`, or with text.

    The token that completes one of `strings` is the last one kept. Raises ConfigError when
    `max_new_tokens` is below 1 or a string is empty.
    """

    max_new_tokens: int
    eos_token_ids: Collection[int] = ()
    strings: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens must be at least 1, got {self.max_new_tokens}; raise it"
            )
        if not all(self.strings):
            raise ConfigError("a stop string holds some text, got an empty one; leave it out")

    def cut(
        self,
        tokens: Sequence[int],
        before: Sequence[int],
        decode: Callable[[list[int]], str] | None = None,
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

    def _completes(self, tokens: list[int], decode: Callable[[list[int]], str]) -> bool:
        """Return whether the last token completes a stop string; a character has up to 4 bytes."""
        window = 4 * max(map(len, self.strings)) + _CONTEXT_TOKENS
        text = decode(tokens[-window:])
        return any(string in text for string in self.strings)


@dataclass(slots=True)
class Generation:
    """One request's output.

    `tokens` holds the first token, which prefill emits, and all kept ones; `accept_lengths` the
    accepted draft tokens of every step, the last step's as far as they were kept. `error` says what
    went wrong where `finish` is "error".
    """

    tokens: list[int] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: str | None = None

    @property
    def num_steps(self) -> int:
        """Decoding steps, prefill not counted."""
        return len(self.accept_lengths)
