"""Prompts by dataset name, from a file or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from stree_autotune.prompt_files import Records, read_rows
from stree_autotune.prompt_rows import Prompt, prompt_of
from stree_core.chat import Chat
from stree_core.errors import ConfigError, nearest
from stree_core.extras import install_command
from stree_core.hub import is_hub_id

HUB_PREFIX = "hub:"

HUB = {
    "gsm8k": "hub:openai/gsm8k:main:test",
    "human_eval": "hub:openai/openai_humaneval:test",
    "mt_bench": "hub:HuggingFaceH4/mt_bench_prompts:train",
}
"""Where the datasets known by name lie on the hub."""

SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a dataset, by index their texts; those of all rows stand under one field."""

    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> str:
        return self.prompts[index].text

    @property
    def texts(self) -> list[str]:
        """The last user turn of every prompt."""
        return [prompt.text for prompt in self.prompts]

    @property
    def chats(self) -> list[Chat]:
        """Every conversation up to its last user turn, system prompt included."""
        return [prompt.chat for prompt in self.prompts]

    def describe(self, *, chat: bool) -> str:
        """Return one line: how many prompts from which field, and how the first begins."""
        fields = dict.fromkeys(field for prompt in self.prompts for field in prompt.fields)
        turns = self.prompts[0].chat.messages
        shown, form = self.prompts[0].text, "the last user turn"
        if chat:
            shown = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            form = _count(len(turns), "turn")
        several = chat or len(turns) > 1
        return (
            f"{_count(len(self), 'prompt')} from field {' + '.join(fields)}; the first"
            f"{f' ({form})' if several else ''} begins: {escaped(shown[:SHOWN_CHARACTERS])}"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def escaped(text: str) -> str:
    """Return a text in one line without control characters, which a terminal would obey."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def load_prompts(
    dataset: str, source: str, *, rows: slice = slice(None), limit: int | None = None
) -> PromptSet:
    """Return the prompts of a source, or, when it is empty, of a dataset known by name.

    A source is a file (prompt_files.py) or a dataset of the Hugging Face hub, written
    hub:OWNER/NAME[:CONFIG]:SPLIT. `rows`, counted from 0, are selected before `limit` cuts. Raises
    ConfigError on a missing source, a row whose prompt cannot be taken whole, or no rows.
    """
    source = source or _known_source(dataset)
    is_hub = source.startswith(HUB_PREFIX)
    records = _read_hub(source, rows) if is_hub else read_rows(Path(source), rows)
    prompts = tuple(_of_one_field(islice(records, limit)))
    if not prompts:
        raise ConfigError(
            f"{source} must hold at least one prompt in the rows asked for, it has none; check them"
        )
    return PromptSet(prompts)


def _of_one_field(records: Records) -> Iterator[Prompt]:
    first = ""
    for where, record in records:
        prompt = prompt_of(record, where)
        first = first or prompt.fields[0]
        if prompt.fields[0] != first:
            raise ConfigError(
                f"{where} must have its prompt under {first} as the rows before, it is under "
                f"{prompt.fields[0]}; rename the field or choose rows with --rows"
            )
        yield prompt


def parse_rows(text: str) -> slice:
    """Parse "A:B" into a slice of rows; raise ConfigError on anything else."""
    start, colon, stop = text.partition(":")
    if colon and all(part == "" or part.isdecimal() for part in (start, stop)):
        return slice(int(start) if start else None, int(stop) if stop else None)
    raise ConfigError(f"--rows must be START:STOP with whole numbers, got {text!r}; e.g. 0:100")


def _known_source(dataset: str) -> str:
    if dataset not in HUB:
        raise ConfigError(
            f"dataset {dataset!r} is not known on the hub; pass its rows with --prompts FILE "
            f"({nearest(dataset, HUB)})"
        )
    return HUB[dataset]


def _read_hub(source: str, rows: slice) -> Records:
    repository, *parts = source.removeprefix(HUB_PREFIX).split(":")
    if not is_hub_id(repository) or not 1 <= len(parts) <= 2 or not all(parts):
        raise ConfigError(
            f"a hub dataset is written hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT, got "
            f"{source}; for example {HUB['gsm8k']}"
        )
    try:
        import datasets
    except ImportError as err:
        raise ConfigError(
            f"reading {source} needs the package datasets, it is not installed; "
            f"{install_command('data')} or pass --prompts FILE"
        ) from err
    configuration = parts[0] if len(parts) == 2 else None
    try:
        content = datasets.load_dataset(repository, configuration, split=parts[-1])
    # The library reads many formats over the network, and fails in as many ways.
    except Exception as err:
        line = next(iter(str(err).splitlines()), type(err).__name__)
        raise ConfigError(
            f"{source} cannot be read from the hub ({line}); check the name or pass --prompts FILE"
        ) from err
    records = ((f"{source} row {number}", row) for number, row in enumerate(content))
    return islice(records, rows.start, rows.stop)
