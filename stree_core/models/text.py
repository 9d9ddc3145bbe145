"""Text to tokens and back, plain or as a chat turn, by the files of a model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stree_core.errors import CheckpointError, ConfigError, StreeError
from stree_core.extras import install_command
from stree_core.files import read_limited, sha256_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


MAX_TOKENIZER_BYTES = 64 << 20
MAX_TOKENS = 1 << 22
# What a tokenizer without tokenizer.json is made of; the config alone is none.
VOCABULARY_FILES = ("merges.txt", "tokenizer.model", "vocab.json")
CONFIG_FILE = "tokenizer_config.json"
USE_ANOTHER = "use the tokenizer that belongs to the model"
PASS_OTHER_TEXT = f"pass other text, or {USE_ANOTHER}"


class TextCodec:
    """A folder's tokenizer; `name` is the model's and goes into errors.

    Plain text needs transformers only where there is no tokenizer.json; chats always need it.
    `num_tokens` are the rows of the model's embedding, which all ids lie below.
    """

    def __init__(
        self, folder: Path, name: str, fast: Tokenizer | None, num_tokens: int | None = None
    ) -> None:
        self._folder = folder
        self._name = name
        self._num_tokens = num_tokens
        self._fast = fast
        self._auto: Any = None
        if fast is None:
            self._load_auto()
        else:
            self._require_rows(fast)

    @property
    def sha256(self) -> str | None:
        """The hash by which tables and profiles know the tokenizer."""
        return tokenizer_sha256(self._folder)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, with the special tokens that the tokenizer adds.

        Raises ConfigError on a text that is not Unicode, CheckpointError when the tokenizer fails.
        """
        for number, text in enumerate(texts, start=1):
            require_unicode(text, f"prompt {number}")
        with _explained(f"the tokenizer of {self._name} cannot read this text", PASS_OTHER_TEXT):
            if self._fast is not None:
                return [encoding.ids for encoding in self._fast.encode_batch(texts)]
            return [list(self._auto.encode(text)) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        tokenizer = self._auto if self._fast is None else self._fast
        with _explained(f"the tokenizer of {self._name} cannot write these tokens", USE_ANOTHER):
            text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def encode_chats(self, chats: list[Chat]) -> list[list[int]]:
        """Return the token ids of each conversation, up to where the next reply begins.

        Special tokens are the template's own. Raises CheckpointError when the folder has no chat
        template or it cannot be rendered, ConfigError when it would leave a turn out.
        """
        for number, chat in enumerate(chats, start=1):
            chat.require_unicode(f"prompt {number}")
        if self._auto is None:
            self._load_auto()
        if self._auto.chat_template is None:
            raise CheckpointError(
                f"{self._name} must hold a chat template to read chats, it has none; add "
                "chat_template.jinja or pass prompts as plain text"
            )
        return [self._encode_chat(chat, number) for number, chat in enumerate(chats, start=1)]

    def _encode_chat(self, chat: Chat, number: int) -> list[int]:
        tokens = self._rendered(chat, tokenize=True)
        if len(chat.messages) > 1:
            self._require_whole(chat, number)
        return list(tokens)

    def _require_whole(self, chat: Chat, number: int) -> None:
        """Raise ConfigError when another text in a turn would be rendered alike.

        The assistant's earlier turns may be: templates drop its reasoning.
        """
        whole = self._rendered(chat, tokenize=False)
        for index, turn in enumerate(chat.messages):
            if turn["role"] == "assistant":
                continue
            changed = [*chat.messages]
            changed[index] = {**turn, "content": f"{turn['content']} #"}
            if self._rendered(Chat(tuple(changed), chat.tools), tokenize=False) == whole:
                raise ConfigError(
                    f"prompt {number} has a turn of the role {turn['role']} (turn {index + 1}), "
                    f"which the chat template of {self._name} leaves out; rename the role or pass "
                    "prompts as plain text"
                )

    def _rendered(self, chat: Chat, *, tokenize: bool) -> Any:
        # A template is a program of its own, which may fail in any way.
        with _explained(
            f"the chat template of {self._name} cannot be rendered",
            "mend it or pass prompts as plain text",
            ("rendering a chat template needs the package jinja2", install_command("hf")),
        ):
            return self._auto.apply_chat_template(
                [dict(turn) for turn in chat.messages],
                tools=[dict(tool) for tool in chat.tools] or None,
                add_generation_prompt=True,
                tokenize=tokenize,
                return_dict=False,
            )

    def _load_auto(self) -> None:
        self._auto = _auto_tokenizer(self._folder, self._name)
        self._require_rows(self._auto)

    def _require_rows(self, tokenizer: Any) -> None:
        """Raise CheckpointError unless the embedding has a row for every id of a tokenizer."""
        with _explained(f"the vocabulary of {self._name} cannot be read", USE_ANOTHER):
            ids: dict[str, int] = tokenizer.get_vocab()
        if len(ids) > MAX_TOKENS:
            raise CheckpointError(
                f"a tokenizer may have at most {MAX_TOKENS} tokens, {self._name} has {len(ids)}; "
                f"{USE_ANOTHER}"
            )
        token, last = max(ids.items(), key=lambda item: item[1], default=("", -1))
        if self._num_tokens is not None and last >= self._num_tokens:
            raise CheckpointError(
                f"{self._name}: the tokenizer gives {token[:40]!r} the id {last}, the model knows "
                f"ids up to {self._num_tokens - 1}; {USE_ANOTHER}"
            )


def load_text_codec(
    folder: Path, name: str | None = None, num_tokens: int | None = None
) -> TextCodec:
    """Read a folder's tokenizer; raise CheckpointError when it is missing, broken or too large.

    `name` is what errors call the model where the folder's own name says nothing, as in a cache;
    `num_tokens` is how many ids the model knows.
    """
    name = name or folder.name
    if (folder / "tokenizer.json").is_file():
        return TextCodec(folder, name, _fast_tokenizer(folder), num_tokens)
    if tokenizer_sha256(folder) is None:
        raise CheckpointError(f"{name} needs a tokenizer.json, it has none; add it")
    return TextCodec(folder, name, None, num_tokens)


def tokenizer_sha256(folder: Path) -> str | None:
    """Return the hash of tokenizer.json, else of the other tokenizer files, None without any."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return sha256_of(path)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return None
    total = hashlib.sha256()
    for name in sorted((*VOCABULARY_FILES, CONFIG_FILE)):
        if (folder / name).is_file():
            total.update(f"{name} {sha256_of(folder / name)}\n".encode())
    return total.hexdigest()


def _fast_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    with _explained(f"{path} is not a tokenizer", "fetch it again"):
        tokenizer = Tokenizer.from_str(read_limited(path, MAX_TOKENIZER_BYTES).decode())
        # Settings of whoever saved the file: a prompt is neither cut nor filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def _auto_tokenizer(folder: Path, name: str) -> Any:
    """Load through transformers, without code from the folder and without the network."""
    try:
        from transformers import AutoTokenizer
    except ImportError as err:
        raise CheckpointError(
            f"the tokenizer of {name} needs the package transformers for this, it is not "
            f"installed; {install_command('hf')}"
        ) from err
    for file in (*VOCABULARY_FILES, CONFIG_FILE, "tokenizer.json"):
        path = folder / file
        if path.is_file() and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{path} may have at most {MAX_TOKENIZER_BYTES} bytes, it has "
                f"{path.stat().st_size}; check it"
            )
    with _explained(
        f"the tokenizer of {name} cannot be loaded",
        "fetch it again",
        (f"the tokenizer of {name} needs a package that is not installed", "install it"),
    ):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextmanager
def _explained(what: str, remedy: str, if_missing: tuple[str, str] | None = None) -> Iterator[None]:
    """Turn whatever a tokenizer's library raises into one CheckpointError of one sentence.

    `if_missing` are rule and remedy where a package is missing.
    """
    try:
        yield
    except StreeError:
        raise
    # The Rust library raises the bare Exception, and its panics are no Exception at all.
    except BaseException as err:
        if not isinstance(err, Exception) and type(err).__name__ != "PanicException":
            raise
        if if_missing is not None and isinstance(err, ImportError):
            what, remedy = if_missing
        raise CheckpointError(f"{what} ({_line(err)}); {remedy}") from err


def _line(err: BaseException) -> str:
    """Return the first line of an error that says something."""
    line = next((line for line in str(err).splitlines() if line.strip()), type(err).__name__)
    return line[:200]


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
