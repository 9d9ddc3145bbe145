"""Documents as token streams: one tokenizer, prompt marks, and a cache."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus import CorpusSettings, Pair, collect, spread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EOS = "<|endoftext|>"
EOS_ID = 0
# Set on the tokens of a prompt, so that the loss can weigh them less; ids stay below it.
PROMPT_BIT = 1 << 15
# Longer than any row that training reads past a document's start.
TAIL_TOKENS = 2049
HELD_OUT_DOCUMENTS = 400
# A longer document would not end inside a row, and its end is what stops a decoder.
MAX_DOCUMENT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Stream:
    """Documents in one row of uint16 ids; `starts` points at the separator before each one."""

    tokens: np.ndarray
    starts: np.ndarray


Streams = dict[str, dict[str, Stream]]


def prepare(
    settings: CorpusSettings, work: Path, again: bool, tokenizer: str = ""
) -> tuple[str, Streams]:
    """Return tokenizer.json and each source's "train" and "held" streams, cached in `work`.

    A tokenizer that is given is taken instead of a new one.
    """
    cache = work / f"corpus-{settings.key}{'-given' if tokenizer else ''}"
    if again or not (cache / "streams.npz").exists():
        _build(settings, cache, tokenizer)
    with np.load(cache / "streams.npz") as arrays:
        streams: Streams = {}
        for name in arrays.files:
            source, split, kind = name.split(".")
            if kind == "tokens":
                stream = Stream(arrays[name], arrays[f"{source}.{split}.starts"])
                streams.setdefault(source, {})[split] = stream
    return (cache / "tokenizer.json").read_text(encoding="utf-8"), streams


def _build(settings: CorpusSettings, cache: Path, tokenizer: str) -> None:
    start = time.perf_counter()
    sources = collect(settings)
    sizes = {name: sum(len(p) + len(c) for p, c in pairs) for name, pairs in sources.items()}
    print(f"corpus: characters {sizes} after {time.perf_counter() - start:.0f} s", flush=True)
    if not tokenizer:
        # A slice of each source is enough for 4096 entries; rows of a file are few, so all count.
        slices = [p if n == "jsonl" else p[: max(2000, len(p) // 8)] for n, p in sources.items()]
        texts = ["".join(pair) for pairs in slices for pair in pairs]
        # In a child: the trainer's threads must not be alive when processes are forked later.
        (tokenizer,) = spread(train_tokenizer, [(texts, settings.vocab)], settings.workers)
    print(f"tokenizer: after {time.perf_counter() - start:.0f} s", flush=True)
    arrays: dict[str, np.ndarray] = {}
    for name, pairs in sources.items():
        jobs = [(tokenizer, pairs[i : i + 2000]) for i in range(0, len(pairs), 2000)]
        parts = itertools.chain.from_iterable(spread(encode, jobs, settings.workers))
        coded = [document for document in parts if len(document) <= MAX_DOCUMENT_TOKENS]
        held = min(HELD_OUT_DOCUMENTS, max(1, len(coded) // 20))
        for split, part in (("held", coded[:held]), ("train", coded[held:])):
            stream = stream_of(part)
            arrays[f"{name}.{split}.tokens"] = stream.tokens
            arrays[f"{name}.{split}.starts"] = stream.starts
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    with (cache / ".part.npz").open("wb") as file:
        np.savez(file, **arrays)
    (cache / ".part.npz").rename(cache / "streams.npz")
    print(f"streams: after {time.perf_counter() - start:.0f} s", flush=True)


def train_tokenizer(job: tuple[list[str], int]) -> str:
    """Return tokenizer.json: byte-level BPE, digits one by one, EOS in front of every text.

    A job is (texts, number of entries).
    """
    texts, vocab = job
    tokenizer = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, EOS_ID)]
    )
    return tokenizer.to_str()


def encode(job: tuple[str, list[Pair]]) -> list[np.ndarray]:
    """Return one uint16 array a document: prompt (with PROMPT_BIT), completion, EOS."""
    # The processes are the parallelism; threads inside each would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, pairs = Tokenizer.from_str(job[0]), job[1]
    texts = [text for pair in pairs for text in pair]
    ids = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return [
        np.array([token | PROMPT_BIT for token in prompt] + completion + [EOS_ID], dtype=np.uint16)
        for prompt, completion in zip(ids[::2], ids[1::2], strict=True)
    ]


def stream_of(documents: list[np.ndarray]) -> Stream:
    """Join documents behind one separator; the row goes on from its start past its end."""
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    tokens = np.concatenate([np.array([EOS_ID], dtype=np.uint16), *documents])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return Stream(np.resize(tokens, len(tokens) + TAIL_TOKENS), starts)
