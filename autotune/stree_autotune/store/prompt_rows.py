"""A row of a dataset and the prompt in it: which field holds it, and what of it is taken.

Whatever cannot be taken whole is refused: a row with an image, or with choices beside its question,
is no prompt of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stree_core.errors import ConfigError
from stree_core.models import Chat, Message

MAX_PROMPT_CHARACTERS = 4 << 20
MAX_TURNS = 10_000

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "observation": "tool", "function": "function",
}  # fmt: skip
"""What messages and ShareGPT's `from` call a turn's speaker, and how chat templates do."""

TEXT_PARTS = ("text", "input_text", "output_text")
SYSTEM_FIELDS = ("system", "system_prompt")
CONTEXT_FIELDS = ("input", "context")
MEDIA_FIELDS = ("image", "images", "audio", "audios", "video", "videos")
BESIDE_FIELDS = (*MEDIA_FIELDS, "choices", "options", "passage", "history")
"""What would be lost if the text of a question alone were taken."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to its last user turn, and the fields of the row that it was read from."""

    fields: tuple[str, ...]
    chat: Chat

    @property
    def text(self) -> str:
        """The last user turn, which is what a model without chat template is given."""
        return str(self.chat.messages[-1]["content"])


def prompt_of(row: Any, where: str) -> Prompt:
    """Return the prompt of a row; raise ConfigError, naming `where`, when it has none or is cut."""
    if isinstance(row, dict):
        for field, read in FIELDS.items():
            value = _value(row, field)
            if value is not None:
                prompt = read(row, value, field, f"{where}, field {field},")
                _require_bounded(prompt, where)
                prompt.chat.require_unicode(where)
                return prompt
    *names, last = FIELDS
    raise ConfigError(
        f"{where} must have a prompt under {', '.join(names)} or {last}, it has none; add one or "
        "leave the row out with --rows"
    )


def _value(row: Mapping[str, Any], field: str) -> Any:
    """Return what stands under a dotted name, None when it is not there or empty."""
    value: Any = row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    is_blank = isinstance(value, str) and not value.strip()
    return None if is_blank or value in ([], {}) else value


def _of_messages(row: Mapping[str, Any], value: Any, field: str, where: str) -> Prompt:
    """Read turns with role and content, or from and value, up to the last one of a user."""
    _refuse_fields(row, MEDIA_FIELDS, where)
    if not isinstance(value, list) or len(value) > MAX_TURNS:
        raise ConfigError(
            f"{where} must be a list of at most {MAX_TURNS} turns, got {_short(value)}; mend it"
        )
    roles = [_role(turn, f"{where} turn {number},") for number, turn in enumerate(value, start=1)]
    if "user" not in roles:
        raise ConfigError(f"{where} must have a turn of a user, it has none; leave the row out")
    num_taken = len(roles) - roles[::-1].index("user")
    system = _system(row, roles, where)
    turns = [
        _turn(value[index], roles[index], f"{where} turn {index + 1},")
        for index in range(num_taken)
    ]
    tools = _value(row, "body.tools" if field.startswith("body.") else "tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{where} stands beside tools, which must be a list of objects; mend it")
    return Prompt((field,), Chat((*system, *turns), tuple(tools)))


def _role(turn: Any, where: str) -> str:
    """Return a turn's role as chat templates call it."""
    if not isinstance(turn, dict):
        raise ConfigError(f"{where} must be an object with role and content; mend it")
    given = turn.get("role", turn.get("from"))
    if not isinstance(given, str) or given not in ROLES:
        raise ConfigError(
            f"{where} must be of a known role ({', '.join(ROLES)}), got {_short(given)}; "
            "rename it or leave the row out"
        )
    return ROLES[given]


def _turn(turn: Mapping[str, Any], role: str, where: str) -> Message:
    content = turn.get("content", turn.get("value"))
    rest = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value")}
    if content is None and role == "assistant" and turn.get("tool_calls"):
        return {"role": role, "content": None, **rest}
    # a tool may answer nothing, and so may an assistant
    may_be_empty = role in ("assistant", "tool", "function")
    return {"role": role, "content": _content(content, where, may_be_empty), **rest}


def _content(value: Any, where: str, may_be_empty: bool = False) -> str:
    """Return a turn's text: a string, or parts of text joined by line breaks."""
    if isinstance(value, list):
        parts = enumerate(value, start=1)
        value = "\n".join(_part(part, f"{where} part {number}") for number, part in parts)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise ConfigError(f"{where} must have text, got {_short(value)}; add it or leave it out")
    return value


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise ConfigError(
            f"{where} must be text, got {_short(kind or part)}, which these models do not read; "
            "leave the row out with --rows"
        )
    return str(part["text"])


def _of_text(row: Mapping[str, Any], value: Any, field: str, where: str) -> Prompt:
    """Read one text, or the turns of a conversation that stands under the name of a text."""
    if isinstance(value, list) and isinstance(value[0], dict):
        return _of_messages(row, value, field, where)
    if isinstance(value, list):
        # questions without their replies: a later one needs the reply to the first
        value, field = value[0], f"{field}[0]"
    _refuse_fields(row, MEDIA_FIELDS, where)
    return Prompt((field,), Chat((*_system(row, [], where), _user(value, where))))


def _of_question(row: Mapping[str, Any], value: Any, field: str, where: str) -> Prompt:
    """Read a question with what it is about: alpaca's `input`, dolly's `context`."""
    _refuse_fields(row, BESIDE_FIELDS, where)
    about = [name for name in CONTEXT_FIELDS if _value(row, name) is not None]
    texts = [value, *(row[name] for name in about)]
    joined = "\n\n".join(str(_user(text, where)["content"]) for text in texts)
    return Prompt((field, *about), Chat((*_system(row, [], where), _user(joined, where))))


def _user(text: Any, where: str) -> Message:
    if not isinstance(text, str):
        raise ConfigError(f"{where} must have text, got {_short(text)}; add it or leave it out")
    return {"role": "user", "content": _content(text, where)}


def _system(row: Mapping[str, Any], roles: Sequence[str], where: str) -> list[Message]:
    """Return the system turn of a row that keeps it in a field of its own."""
    given = [name for name in SYSTEM_FIELDS if _value(row, name) is not None]
    if not given:
        return []
    if "system" in roles or len(given) > 1:
        raise ConfigError(f"{where} has more than one system turn ({given[0]}); keep one of them")
    return [{"role": "system", "content": _content(row[given[0]], f"{where} beside it {given[0]}")}]


def _refuse_fields(row: Mapping[str, Any], fields: Iterable[str], where: str) -> None:
    for name in fields:
        if _value(row, name) is not None:
            raise ConfigError(
                f"{where} stands beside the field {name}, which would be left out; write all of it "
                "into prompt, or leave the row out with --rows"
            )


def _require_bounded(prompt: Prompt, where: str) -> None:
    size = sum(len(str(turn["content"])) for turn in prompt.chat.messages)
    if size > MAX_PROMPT_CHARACTERS:
        raise ConfigError(
            f"{where} may have a prompt of at most {MAX_PROMPT_CHARACTERS} characters, it has "
            f"{size}; leave the row out with --rows"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


_Read = Callable[[Mapping[str, Any], Any, str, str], Prompt]

FIELDS: dict[str, _Read] = {
    "messages": _of_messages,
    "body.messages": _of_messages,
    "conversations": _of_messages,
    "prompt": _of_text,
    "question": _of_question,
    "instruction": _of_question,
    "problem": _of_question,
    "turns": _of_text,
    "body.prompt": _of_text,
    "text": _of_text,
}
"""Where a row may keep its prompt; of several fields the first that is filled counts."""
