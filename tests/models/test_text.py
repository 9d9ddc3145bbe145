"""Text to tokens and back: the ids that transformers gives, plain and as a chat."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stree_core.errors import CheckpointError, ConfigError
from stree_core.extras import install_command
from stree_core.files import sha256_of
from stree_core.models.text import Chat, load_text_codec, tokenizer_sha256

TEXTS = ["a tree of tokens", "tokens of a tree, a tree!", "<user> is special", ""]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<reply>{% endif %}"
)
HELLO = Chat.of_user("hello")
SPECIAL = ["<bos>", "<end>", "<user>", "<reply>"]


def bpe() -> Tokenizer:
    """Return a byte-level BPE that has seen a sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, template: str | None = TEMPLATE) -> Path:
    """Save a tokenizer as transformers does."""
    wrap: Any = PreTrainedTokenizerFast
    wrapped = wrap(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>")
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer that begins every sequence with <bos>, and a chat template that does too."""
    tokenizer = bpe()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return save(tmp_path / "model", tokenizer)


def bos(folder: Path) -> int:
    identifier = AutoTokenizer.from_pretrained(folder).bos_token_id
    assert isinstance(identifier, int)
    return identifier


def test_plain_text_is_encoded_as_by_transformers(folder: Path) -> None:
    codec = load_text_codec(folder)
    ids = codec.encode(TEXTS)
    assert ids == [AutoTokenizer.from_pretrained(folder).encode(text) for text in TEXTS]
    assert all(row[0] == bos(folder) for row in ids)
    assert codec.encode([]) == []


def test_decoding_leaves_special_tokens_out(folder: Path) -> None:
    codec = load_text_codec(folder)
    (ids,) = codec.encode(TEXTS[:1])
    assert codec.decode(ids) == TEXTS[0]


def test_tokenizer_json_alone_decides_on_the_ends(folder: Path) -> None:
    edit_config(folder, add_bos_token=False, add_eos_token=True)
    (ids,) = load_text_codec(folder).encode(TEXTS[:1])
    assert ids == AutoTokenizer.from_pretrained(folder).encode(TEXTS[0])
    assert ids[0] == bos(folder)


def test_prompts_are_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    tokenizer = bpe()
    expected = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_text_codec(tmp_path).encode(TEXTS) == expected


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_is_rendered_once_begun(folder: Path, place: str) -> None:
    if place == "tokenizer_config.json":
        (folder / "chat_template.jinja").unlink()
        edit_config(folder, chat_template=TEMPLATE)
    chats = load_text_codec(folder).encode_chats(
        [Chat.of_user("a tree of tokens "), Chat.of_user("a tree!")]
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    plain = theirs.encode("<bos><user>a tree of tokens<end><reply>", add_special_tokens=False)
    assert chats[0] == plain
    assert [row.count(theirs.bos_token_id) for row in chats] == [1, 1]
    assert chats[1] == theirs.apply_chat_template(
        [{"role": "user", "content": "a tree!"}],
        add_generation_prompt=True, tokenize=True, return_dict=False,
    )  # fmt: skip


def test_a_conversation_goes_through_the_template_whole(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
        "{% for m in messages if m.role != 'developer' %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    turns = [("system", "a tree"), ("user", "of"), ("assistant", "tokens"), ("user", "a")]
    chat = Chat(tuple({"role": r, "content": c} for r, c in turns), ({"name": "tree"},))
    (ids,) = load_text_codec(folder).encode_chats([chat])
    text = "[tree]system:a tree;user:of;assistant:tokens;user:a;"
    assert ids == AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    silent = Chat(({"role": "developer", "content": "a tree"}, *chat.messages))
    with pytest.raises(ConfigError, match=r"prompt 2 has a turn of the role developer \(turn 1\)"):
        load_text_codec(folder).encode_chats([chat, silent])


def test_half_a_character_is_refused(folder: Path) -> None:
    codec = load_text_codec(folder)
    for text in ("a \ud83d tree", "a \udcff tree"):
        with pytest.raises(ConfigError, match="prompt 2 must be valid Unicode, it holds the lone"):
            codec.encode(["a", text])
        with pytest.raises(ConfigError, match="prompt 1 must be valid Unicode"):
            codec.encode_chats([Chat.of_user(text)])


def test_a_folder_without_template_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path / "plain", bpe(), template=None)
    with pytest.raises(CheckpointError, match=r"^plain must hold a chat template.*jinja"):
        load_text_codec(folder).encode_chats([HELLO])
    with pytest.raises(CheckpointError, match=r"^known must hold a chat template"):
        load_text_codec(folder, "known").encode_chats([HELLO])


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no users here') }}"])
def test_a_broken_template_is_named(tmp_path: Path, template: str) -> None:
    codec = load_text_codec(save(tmp_path / "model", bpe(), template))
    with pytest.raises(CheckpointError, match="chat template of model cannot be rendered"):
        codec.encode_chats([HELLO])


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """The same tokenizer as vocab.json and merges.txt."""
    bpe().model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<bos>", "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_vocabulary_and_merges_are_read_through_transformers(split: Path) -> None:
    codec = load_text_codec(split)
    assert codec.encode(TEXTS[:2]) == [encoding.ids for encoding in bpe().encode_batch(TEXTS[:2])]
    assert codec.decode([*codec.encode(TEXTS[:1])[0], 1]) == TEXTS[0]


def test_transformers_may_be_missing(
    folder: Path, split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    missing = f"package transformers .*{re.escape(install_command('hf'))}"
    codec = load_text_codec(folder)
    assert codec.encode(TEXTS[:1])
    with pytest.raises(CheckpointError, match=missing):
        codec.encode_chats([HELLO])
    with pytest.raises(CheckpointError, match=missing):
        load_text_codec(split)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_sha256(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"needs a tokenizer\.json, it has none"):
        load_text_codec(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE"}}', "[" * 10_000])
def test_malformed_tokenizers(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer \(.+\)") as err:
        load_text_codec(tmp_path)
    assert "\n" not in str(err.value)


def test_malformed_configs_are_said_where_they_matter(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    codec = load_text_codec(folder)
    assert codec.encode(TEXTS[:1])
    with pytest.raises(CheckpointError, match="the tokenizer of model cannot be loaded"):
        codec.encode_chats([HELLO])


def test_malformed_vocabulary(split: Path) -> None:
    (split / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_text_codec(split)


def test_the_hash_is_of_the_file_or_of_the_parts(folder: Path, split: Path) -> None:
    assert tokenizer_sha256(folder) == sha256_of(folder / "tokenizer.json")
    assert load_text_codec(folder).sha256 == tokenizer_sha256(folder)
    first = tokenizer_sha256(split)
    assert first is not None
    assert len(first) == 64
    assert load_text_codec(split).sha256 == first
    (split / "notes.txt").write_text("no part of it")
    assert tokenizer_sha256(split) == first
    edit_config(split, add_bos_token=True)
    assert tokenizer_sha256(split) != first
