"""Conversations for a chat template, and text that a tokenizer can take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stree_core.errors import ConfigError

Message = Mapping[str, Any]
"""A turn: `role`, `content`, and what else a template reads, such as `tool_calls`."""


@dataclass(frozen=True, slots=True)
class Chat:
    """The turns of a conversation, in order, and the tools that its assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of_user(cls, text: str) -> Chat:
        """Return a conversation of one user turn."""
        return cls(({"role": "user", "content": text},))

    def require_unicode(self, where: str) -> None:
        """Raise ConfigError when any text in it is no valid Unicode."""
        content = json.dumps([self.messages, self.tools], ensure_ascii=False, default=str)
        require_unicode(content, where)


def require_unicode(text: str, where: str) -> None:
    """Raise ConfigError on a lone surrogate: half a character, which no tokenizer takes.

    JSON can spell one, and an argument of a command that is not UTF-8 becomes some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise ConfigError(
            f"{where} must be valid Unicode, it holds the lone surrogate "
            f"U+{ord(text[err.start]):04X} (half of a character, or a byte that is not UTF-8); "
            "write the text anew in UTF-8"
        ) from err
