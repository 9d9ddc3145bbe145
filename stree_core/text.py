"""Text to tokens and back, plain or as a chat turn, by the files of a model folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stree_core.errors import CheckpointError
from stree_core.files import read_limited, sha256_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 64 << 20
# What a tokenizer without tokenizer.json is made of; the config alone is none.
VOCABULARY_FILES = ("merges.txt", "tokenizer.model", "vocab.json")
CONFIG_FILE = "tokenizer_config.json"
HINT = "pip install 'stree[hf]'"


class TextCodec:
    """A folder's tokenizer; `name` is the model's and goes into errors.

    Plain text needs transformers only where there is no tokenizer.json; chats always need it.
    """

    def __init__(self, folder: Path, name: str, fast: Tokenizer | None) -> None:
        self._folder = folder
        self._name = name
        self._fast = fast
        self._auto: Any = None if fast is not None else _auto_tokenizer(folder, name)

    @property
    def sha256(self) -> str | None:
        """The hash by which tables and profiles know the tokenizer."""
        return tokenizer_sha256(self._folder)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, with the special tokens that the tokenizer adds."""
        if self._fast is not None:
            return [encoding.ids for encoding in self._fast.encode_batch(texts)]
        return [list(self._auto.encode(text)) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        tokenizer = self._auto if self._fast is None else self._fast
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def encode_chats(self, messages: list[str]) -> list[list[int]]:
        """Return the token ids of each message as one user turn, up to where the reply begins.

        Special tokens are the template's own. Raises CheckpointError when the folder has no chat
        template or it cannot be rendered.
        """
        if self._auto is None:
            self._auto = _auto_tokenizer(self._folder, self._name)
        if self._auto.chat_template is None:
            raise CheckpointError(
                f"{self._name} must hold a chat template to read chats, it has none; add "
                "chat_template.jinja or pass prompts as plain text"
            )
        return [self._encode_chat(message) for message in messages]

    def _encode_chat(self, message: str) -> list[int]:
        turns = [{"role": "user", "content": message}]
        try:
            tokens = self._auto.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except ImportError as err:
            raise CheckpointError(
                f"rendering a chat template needs the package jinja2 ({err}); {HINT}"
            ) from err
        # A template is a program of its own, which may fail in any way.
        except Exception as err:
            raise CheckpointError(
                f"the chat template of {self._name} cannot be rendered ({_line(err)}); mend "
                "it or pass prompts as plain text"
            ) from err
        return list(tokens)


def load_text_codec(folder: Path, name: str | None = None) -> TextCodec:
    """Read a folder's tokenizer; raise CheckpointError when it is missing or broken.

    `name` is what errors call the model where the folder's own name says nothing, as in a cache.
    """
    name = name or folder.name
    if (folder / "tokenizer.json").is_file():
        return TextCodec(folder, name, _fast_tokenizer(folder))
    if tokenizer_sha256(folder) is None:
        raise CheckpointError(f"{name} needs a tokenizer.json, it has none; add it")
    return TextCodec(folder, name, None)


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
    try:
        tokenizer = Tokenizer.from_str(read_limited(path, MAX_TOKENIZER_BYTES).decode())
    # The Rust library raises the bare class on malformed content.
    except Exception as err:
        raise CheckpointError(f"{path} is not a tokenizer ({_line(err)}); fetch it again") from err
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
            f"installed; {HINT}"
        ) from err
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ImportError as err:
        raise CheckpointError(
            f"the tokenizer of {name} needs a package that is not installed "
            f"({_line(err)}); install it"
        ) from err
    # The library reads several formats, each of which fails in its own way.
    except Exception as err:
        raise CheckpointError(
            f"the tokenizer of {name} cannot be loaded ({_line(err)}); fetch it again"
        ) from err


def _line(err: Exception) -> str:
    """Return the first line of an error that says something."""
    return next((line for line in str(err).splitlines() if line.strip()), type(err).__name__)
