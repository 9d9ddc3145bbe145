"""A tokenizer that fails, text that is none and ids that the model lacks: one sentence each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import VOCAB_SIZE, save_pair, word_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from stree_core.drafting.pair import Runtime, load_pair
from stree_core.errors import CheckpointError, ConfigError, StreeError
from stree_core.models import text
from stree_core.models.source import find_source
from stree_core.models.text import Chat, load_text_codec

LONE = ["w1 \ud83d w2", "\udcff", "w1\udfff"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    return folder / "models"


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def backtracking() -> Tokenizer:
    """Return a tokenizer whose pattern gives up on a long run of one letter, in a panic."""
    tokenizer = word_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(z+z+)+y| "), "removed")
    return tokenizer


def test_a_panic_is_one_sentence_and_harms_no_later_text(tmp_path: Path) -> None:
    codec = load_text_codec(save(tmp_path / "panics", backtracking()))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"of panics cannot read this text \(.*retry"):
            codec.encode(["w1 w2", "z" * 60])
        assert codec.encode(["w1 w2"]) == [[1, 2]]


def test_a_panic_while_loading_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """What the Rust library's panics are called; no class of that name can be imported."""

    def panic(content: str) -> None:
        raise PanicException("called unwrap\non nothing")

    folder = save(tmp_path / "model", word_tokenizer())
    monkeypatch.setattr(text, "read_limited", lambda path, limit: panic(""))
    with pytest.raises(CheckpointError, match=r"is not a tokenizer \(called unwrap\); fetch"):
        load_text_codec(folder)
    for interruption in (KeyboardInterrupt, SystemExit):

        def interrupt(path: Path, limit: int, error: type = interruption) -> bytes:
            raise error

        monkeypatch.setattr(text, "read_limited", interrupt)
        with pytest.raises(interruption):
            load_text_codec(folder)


def test_an_unknown_token_without_a_stand_in_is_one_sentence(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], None, False))
    codec = load_text_codec(save(tmp_path / "narrow", tokenizer))
    assert codec.encode(["ab"]) == [[0, 1]]
    with pytest.raises(CheckpointError, match=r"of narrow cannot read this text \(.*unk"):
        codec.encode(["ab", "c"])


@pytest.mark.parametrize("broken", LONE, ids=ascii)
def test_half_a_character_is_named_with_its_prompt(tmp_path: Path, broken: str) -> None:
    codec = load_text_codec(save(tmp_path / "model", word_tokenizer()))
    half = next(c for c in broken if "\ud800" <= c <= "\udfff")
    message = rf"must be valid Unicode, it holds the lone surrogate U\+{ord(half):04X}"
    with pytest.raises(ConfigError, match=f"prompt 2 {message}") as err:
        codec.encode(["w1", broken])
    str(err.value).encode()
    with pytest.raises(ConfigError, match=f"prompt 1 {message}"):
        codec.encode_chats([Chat.of_user(broken)])


@pytest.mark.parametrize("tokens", [[-1], [1 << 40], [1, -5]])
def test_ids_that_are_none_are_one_sentence(tmp_path: Path, tokens: list[int]) -> None:
    codec = load_text_codec(save(tmp_path / "model", word_tokenizer()))
    with pytest.raises(CheckpointError, match="of model cannot write these tokens"):
        codec.decode(tokens)


def with_added_token() -> Tokenizer:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<user>", special=True)])
    return tokenizer


def test_a_pair_whose_tokenizer_has_more_ids_than_the_embedding_is_refused(
    root: Path, tmp_path: Path
) -> None:
    folders = [Path(shutil.copytree(root / n, tmp_path / n)) for n in ("tiny-target", "tiny-draft")]
    for folder in folders:
        save(folder, with_added_token())
    message = f"tiny-target: the tokenizer gives '<user>' the id {VOCAB_SIZE}, .* up to 95; use"
    with pytest.raises(CheckpointError, match=message):
        load_pair(*(find_source(folder) for folder in folders), Runtime("cpu"))
    load_pair(*(find_source(root / folder.name) for folder in folders), Runtime("cpu"))


def test_the_tokenizer_of_transformers_is_checked_too(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", word_tokenizer())
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}",
        "added_tokens_decoder": {"4000": {"content": "<user>", "special": True}},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    codec = load_text_codec(folder, num_tokens=VOCAB_SIZE)
    with pytest.raises(CheckpointError, match=r"the tokenizer gives '<user>' the id \d+, "):
        codec.encode_chats([Chat.of_user("w1")])


def test_vocabularies_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", word_tokenizer())
    monkeypatch.setattr(text, "MAX_TOKENS", 50)
    with pytest.raises(CheckpointError, match="at most 50 tokens, model has 96; use"):
        load_text_codec(folder)
    monkeypatch.setattr(text, "MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(StreeError, match="at most 100 bytes"):
        load_text_codec(folder)
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(CheckpointError, match=r"vocab\.json may have at most 100 bytes"):
        load_text_codec(folder)
