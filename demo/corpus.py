"""The demo pair's training text: (prompt, completion) documents that any machine has or makes."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import site
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from word_problems import demo_prompts, word_problems

PROMPT_CHARS = (60, 900)
BODY_CHARS = (24, 900)
PROSE_CHARS = (30, 600)
MAX_FILE_BYTES = 400_000
# So many prompts of the held-out seed are kept out, should training draw one by chance.
HELD_OUT_PROMPTS = 512
NOT_PROSE = re.compile(
    r"::|>>>|https?:|[|{}<>\\]|\b(?:args|returns|params?|parameters|raises): "
    r"|copyright|licen[cs]e|warrant",
    re.IGNORECASE,
)

Pair = tuple[str, str]

ASK_FUNCTION = (
    "What does the function {name} do?", "Explain what {name} does.", "Explain {words}.",
    "Write a short description of {name}.", "Describe {words} in one or two sentences.",
    "Can you tell me what {name} is for?", "In Python, what does {name} do?",
)  # fmt: skip
ASK_CLASS = (
    "What is a {name}?", "Explain the idea of a {words}.", "Write a short description of {words}.",
    "Describe the class {name}.", "Tell me what {name} is used for.",
)  # fmt: skip
ASK_HEADING = (
    "{heading}", "Explain {heading}.", "Write a short paragraph about {heading}.",
    "What should I know about {heading}?", "Describe {heading} briefly.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """What goes into the corpus; its hash names the cache file."""

    seed: int = 0
    vocab: int = 4096
    problems: int = 300_000
    code_bytes: int = 60_000_000
    prose_bytes: int = 25_000_000
    max_files: int = 24_000
    jsonl: str = ""
    rows: tuple[int, int] = (0, 0)
    workers: int = field(default=16, compare=False)

    @property
    def key(self) -> str:
        """A short name for these settings; the number of workers does not matter."""
        parts = [self.seed, self.vocab, self.problems, self.code_bytes, self.prose_bytes]
        text = repr([*parts, self.max_files, self.jsonl, self.rows])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def spread(
    work: Callable[[Any], Any], items: Iterable[Any], workers: int, chunksize: int = 1
) -> Iterator[Any]:
    """Map in order over processes; one worker stays in this process."""
    if workers <= 1:
        yield from map(work, items)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(work, items, chunksize)


def source_files(max_files: int, seed: int) -> list[tuple[str, str]]:
    """Return (relative path, path) of installed .py, .md, .rst, .txt and METADATA files."""
    paths = sysconfig.get_paths()
    packages = {paths["purelib"], paths["platlib"], *site.getsitepackages()}
    roots = [paths["stdlib"], *sorted(packages)]
    found: dict[str, str] = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            skipped = ("__pycache__", "site-packages", "dist-packages", "node_modules", "include")
            subfolders[:] = sorted(name for name in subfolders if name not in skipped)
            for name in names:
                if name.endswith((".py", ".md", ".rst", ".txt")) or name == "METADATA":
                    path = os.path.join(folder, name)
                    found.setdefault(os.path.relpath(path, root), path)
    files = sorted(found.items())
    random.Random(seed).shuffle(files)
    return files[:max_files]


def read_pairs(file: tuple[str, str]) -> tuple[list[Pair], list[Pair]]:
    """Return one file's (function pairs, prose pairs); a file that cannot be read has none."""
    relative, path = file
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            return [], []
        text = Path(path).read_text(encoding="utf-8")
        if not relative.endswith(".py"):
            return [], document_pairs(text, random.Random(zlib.crc32(relative.encode())))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    # RecursionError and MemoryError: the parser's answers to absurdly nested sources.
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return [], []
    return python_pairs(text, tree, random.Random(zlib.crc32(relative.encode())))


def python_pairs(text: str, tree: ast.Module, rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Return (def + docstring, body) pairs and (question, summary) pairs of one module."""
    lines, code, prose = text.splitlines(), [], []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        doc = ast.get_docstring(node)
        if not doc:
            continue
        asks = ASK_CLASS if isinstance(node, ast.ClassDef) else ASK_FUNCTION
        prose += _docstring_pairs(node.name, doc, rng, asks)
        if not isinstance(node, ast.ClassDef):
            code += _function_pair(node, lines)
    return code, prose + _comment_pairs(text)


def _function_pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> list[Pair]:
    doc_end = node.body[0].end_lineno or node.lineno
    if len(node.body) < 2 or node.body[1].lineno <= doc_end:
        return []
    indent = " " * node.col_offset
    dedented = [line.removeprefix(indent) for line in lines[node.lineno - 1 : node.end_lineno]]
    cut = doc_end - node.lineno + 1
    prompt = "\n".join(dedented[:cut]) + "\n"
    body = "\n".join(line.rstrip() for line in dedented[cut:]).strip("\n") + "\n"
    fits = _within(prompt, PROMPT_CHARS) and _within(body, BODY_CHARS)
    return [(prompt, body)] if fits and not repetitive(body) else []


def _docstring_pairs(name: str, doc: str, rng: random.Random, asks: tuple[str, ...]) -> list[Pair]:
    """Ask for the summary; then let the summary ask for the paragraph after it."""
    paragraphs = [tidy(part) for part in doc.split("\n\n")[:2]]
    if name.startswith(("_", "test")) or not plain(paragraphs[0]):
        return []
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()
    pairs = [(rng.choice(asks).format(name=name, words=words), "\n" + paragraphs[0])]
    if len(paragraphs) > 1 and plain(paragraphs[1]):
        pairs.append((paragraphs[0], "\n" + paragraphs[1]))
    return pairs


def _comment_pairs(text: str) -> list[Pair]:
    """Return (first sentence, rest) of comment blocks of three lines and more."""
    pairs = []
    for block in re.findall(r"(?:^[ \t]*# .*\n){3,}", text, re.MULTILINE):
        joined = " ".join(re.sub(r"^[ \t]*# ", "", block, flags=re.MULTILINE).split())
        first, _, rest = joined.partition(". ")
        if rest and plain(first + ".") and plain(rest):
            pairs.append((first + ".", "\n" + rest))
    return pairs


def document_pairs(text: str, rng: random.Random) -> list[Pair]:
    """Return (heading or first sentence, paragraph) pairs of a plain-text document."""
    pairs, heading = [], ""
    for part in re.split(r"\n[ \t]*\n", text):
        lines = part.strip().splitlines()
        if not lines:
            continue
        title = re.fullmatch(r"#{1,5} (.{3,60})|(.{3,60})\n[=~^\-]{3,}", part.strip())
        if title:
            heading = (title[1] or title[2]).strip(" #`*")
            continue
        paragraph = tidy(part)
        if not plain(paragraph):
            continue
        first, _, rest = paragraph.partition(". ")
        if heading and plain(heading + " is explained in this paragraph."):
            pairs.append((rng.choice(ASK_HEADING).format(heading=heading), "\n" + paragraph))
        elif rest and plain(rest):
            pairs.append((first + ".", "\n" + rest))
        heading = ""
    return pairs


def tidy(text: str) -> str:
    """Join a paragraph's lines and take reST's roles and double backquotes off its words."""
    text = re.sub(r":[\w:]+:`[~.]*([^`<]*?)(?: <[^`]*)?`", r"\1", " ".join(text.split()))
    return text.replace("``", "`")


def plain(text: str) -> bool:
    """Whether a text reads as prose: a whole sentence, few symbols, no licence, no repetition."""
    if not _within(text, PROSE_CHARS) or not text[0].isupper() or text[-1] not in ".?!":
        return False
    if NOT_PROSE.search(text):
        return False
    letters = sum(char.isalpha() or char == " " for char in text)
    return text.isascii() and letters >= 0.88 * len(text) and not repetitive(text)


def repetitive(text: str) -> bool:
    """Whether a quarter of a text's four-word runs have been seen before in it."""
    words = text.split()
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(set(runs)) < 0.75 * len(runs)


def _within(text: str, limits: tuple[int, int]) -> bool:
    return limits[0] <= len(text) <= limits[1]


def _problems_of(share: tuple[int, int]) -> list[Pair]:
    seed, count = share
    return list(itertools.islice(word_problems(seed), count))


def collect(settings: CorpusSettings) -> dict[str, list[Pair]]:
    """Return each source's documents, without duplicates, in a fixed shuffled order."""
    shares = 64 if settings.problems >= 6400 else 1
    batches = [(settings.seed + i, settings.problems // shares) for i in range(shares)]
    problems = dict(itertools.chain.from_iterable(spread(_problems_of, batches, settings.workers)))
    for prompt in demo_prompts(HELD_OUT_PROMPTS):
        problems.pop(prompt, None)
    sources = {"problems": list(problems.items()), "code": [], "prose": []}
    left = {"code": settings.code_bytes, "prose": settings.prose_bytes}
    seen: set[bytes] = set()
    files = source_files(settings.max_files, settings.seed)
    for found in spread(read_pairs, files, settings.workers, chunksize=16):
        for source, pairs in zip(("code", "prose"), found, strict=True):
            for prompt, completion in pairs:
                digest = hashlib.blake2b(completion.encode(), digest_size=8).digest()
                if left[source] > 0 and digest not in seen:
                    seen.add(digest)
                    sources[source].append((prompt, completion))
                    left[source] -= len(prompt) + len(completion)
        if max(left.values()) <= 0:
            break
    if settings.jsonl:
        sources["jsonl"] = read_jsonl(Path(settings.jsonl), *settings.rows)
    for pairs in sources.values():
        random.Random(settings.seed).shuffle(pairs)
    return sources


def read_jsonl(path: Path, first: int, end: int) -> list[Pair]:
    """Return rows first..end-1 of a file with the keys prompt and answer; ValueError if short."""
    rows = path.read_text(encoding="utf-8").splitlines()[first:end]
    if len(rows) != end - first:
        raise ValueError(f"--rows must lie inside {path}, it gives {len(rows)} rows; shorten it")
    parsed = [json.loads(row) for row in rows]
    return [(row["prompt"], "\n" + row["answer"]) for row in parsed]
