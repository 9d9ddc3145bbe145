"""The commands that messages propose: they run as printed, in the words their user chose."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from stree_core.profile import Sampling

KNOWN_DATASETS = ("demo", "gsm8k", "human_eval", "mt_bench")
"""Datasets whose rows `stree-tune trace` finds by name; others are in a file of the user's."""


class PairWords(NamedTuple):
    """What a user typed for the pair, hub ids and folders whole, and the data folders."""

    target: str
    draft: str
    data: tuple[Path, ...] = ()


def command(*words: str | Path | int) -> str:
    """Return a call of stree-tune, quoted for a shell."""
    return shlex.join(["stree-tune", *map(str, words)])


def probe_command(gpu: str, words: PairWords, *more: str | Path | int, shapes: bool = False) -> str:
    """Return the command that records the runtime table of a pair on a GPU."""
    pair = ["--target", words.target, "--draft", words.draft]
    if shapes:
        pair = ["--shapes", f"{words.target},{words.draft}"]
    device = ["--device", "cpu"] if gpu == "cpu" else []
    return command("probe", "--gpu", gpu, *pair, *device, *more, *_data_flags(words.data))


def trace_command(
    words: PairWords, dataset: str, sampling: Sampling | None = None, *more: str | Path | int
) -> str:
    """Return the command that records a trace, greedy unless another setting is given.

    FILE holds the rows of a dataset of the user's.
    """
    rows = [] if dataset in KNOWN_DATASETS else ["--prompts", "FILE"]
    setting: list[str] = []
    if sampling is not None:
        setting = _sampling_flags(sampling)
    pair = ["--target", words.target, "--draft", words.draft]
    data = _data_flags(words.data)
    return command("trace", "--dataset", dataset, *rows, *pair, *setting, *more, *data)


def _sampling_flags(sampling: Sampling) -> list[str]:
    flags = {
        "--temperature": sampling.temperature or None,
        "--top-k": sampling.top_k,
        "--top-p": sampling.top_p if sampling.top_p != 1 else None,
        "--min-p": sampling.min_p,
        "--repetition-penalty": sampling.repetition_penalty,
    }
    rule = [] if sampling.rule == "greedy" else ["--rule", sampling.rule]
    given = [(flag, f"{value:g}") for flag, value in flags.items() if value is not None]
    return [*rule, *(word for pair in given for word in pair)]


def repeated(flag: str, values: Sequence[int]) -> list[str]:
    """Return a flag once for every value."""
    return [word for value in values for word in (flag, str(value))]


def _data_flags(folders: Sequence[Path]) -> list[str]:
    return [word for folder in folders for word in ("--data", str(folder))]
