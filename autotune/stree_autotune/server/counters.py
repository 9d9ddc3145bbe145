"""Acceptance that servers count beside a load generator: /metrics, and records of requests.

vLLM's /metrics (v1/spec_decode/metrics.py) counts since the server started, so that two scrapes are
subtracted: a file NAME-before.prom from NAME-after.prom, or a scrape alone from zero. Records of
requests are vLLM's `metrics.speculative_decoding`, AIPerf's export of it, and SGLang's `meta_info`;
each has a histogram of how many draft tokens a step kept.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stree_autotune.server.files import Document, nested
from stree_autotune.server.runs import whole_tokens
from stree_autotune.server.tables import MAX_DRAFT_TOKENS
from stree_core.errors import ConfigError, brief

VLLM_HISTOGRAM = "acceptance_histogram"
SGLANG_HISTOGRAM = "spec_correct_drafts_histogram"
BEFORE, AFTER = "-before", "-after"

_PREFIX = "vllm:spec_decode_num_"
_LINE = re.compile(r"(vllm:spec_decode_num_\w+?)(?:\{([^}]*)\})? ([^ ]+)(?: \d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Accepted:
    """Steps of one K and what they kept, as in AcceptedRun; `note` says why not to use it."""

    file: str
    draft_tokens: int
    steps: int
    by_position: tuple[int, ...]
    note: str = ""

    @property
    def accepted(self) -> int:
        """Draft tokens kept in all steps."""
        return sum(self.by_position)


def read_metrics(documents: Sequence[Document]) -> list[Accepted]:
    """Return what scrapes of /metrics counted; those without speculation count nothing.

    Raises ConfigError when a counter falls, which only a restart does.
    """
    scrapes = {document.file: _counters(document) for document in documents}
    found = []
    for name, counts in scrapes.items():
        stem, _, suffix = name.rpartition(".")
        if stem.endswith(BEFORE) and f"{stem.removesuffix(BEFORE)}{AFTER}.{suffix}" in scrapes:
            continue
        before = {}
        if stem.endswith(AFTER):
            before = scrapes.get(f"{stem.removesuffix(AFTER)}{BEFORE}.{suffix}", {})
        taken = _difference(name, before, counts)
        if taken.get("drafts"):
            found.append(_accepted(name, taken))
    return found


def _counters(document: Document) -> dict[str, float]:
    """Return drafts, draft_tokens and accepted by position, summed over engines."""
    total: dict[str, float] = defaultdict(float)
    models = set()
    for line in document.text.splitlines():
        if not line.startswith(_PREFIX):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(
                f"{document.file} is cut short or damaged at {brief(line)}; scrape it again"
            )
        labels = dict(_LABEL.findall(match[2] or ""))
        models.add(labels.get("model_name", ""))
        name = match[1].removeprefix(_PREFIX)
        if not name.endswith("_total"):
            continue
        kind = name.removesuffix("_total")
        value = _count(document.file, match[3])
        place = labels.get("position")
        total[f"position {place}" if place is not None else kind] += value
    if len(models) > 1:
        raise ConfigError(
            f"{document.file} is of one model, got {', '.join(sorted(models))[:100]}; scrape a "
            "server with one"
        )
    return dict(total)


def _count(file: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or value > 1e18:
        raise ConfigError(
            f"{file}: a counter is a finite number from 0, got {brief(text)}; scrape it again"
        )
    return value


def _difference(
    file: str, before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, float]:
    for key, value in before.items():
        if after.get(key, 0.0) < value:
            raise ConfigError(
                f"{file}: counter {key} falls from {value:g} to {after.get(key, 0.0):g}, so the "
                "server was restarted midway; run that K again"
            )
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def _accepted(file: str, counts: Mapping[str, float]) -> Accepted:
    drafts = counts["drafts"]
    tokens, note = whole_tokens(file, counts.get("draft_tokens", 0.0), drafts, None)
    places = (
        counts.get(f"position {place}", 0.0) for place in range(min(tokens, MAX_DRAFT_TOKENS))
    )
    return Accepted(file, tokens, int(drafts), tuple(int(value) for value in places), note)


def has_records(content: Mapping[str, Any]) -> bool:
    """True when an object holds a request's histogram somewhere."""
    return any(True for key in (VLLM_HISTOGRAM, SGLANG_HISTOGRAM) for _ in nested(content, key))


def read_records(documents: Iterable[Document]) -> list[Accepted]:
    """Return the sums of requests' histograms, by file and K.

    Raises ConfigError for a histogram that no chain of K can have.
    """
    kept: dict[tuple[str, int], list[int]] = {}
    for document in documents:
        for record in nested(document.content, VLLM_HISTOGRAM):
            _add(kept, document.file, _histogram(document.file, record[VLLM_HISTOGRAM]), record)
        for record in nested(document.content, SGLANG_HISTOGRAM):
            _add(kept, document.file, _histogram(document.file, record[SGLANG_HISTOGRAM]), record)
    return [
        Accepted(file, tokens, counts[0], tuple(counts[1:]))
        for (file, tokens), counts in kept.items()
    ]


def _histogram(file: str, value: Any) -> list[int]:
    """Return steps by number of kept tokens, from a list or a sparse mapping."""
    if isinstance(value, Mapping):
        places = [str(place) for place in value]
        if all(place.isdecimal() and len(place) < 4 for place in places) and places:
            value = [value.get(str(place), 0) for place in range(max(map(int, places)) + 1)]
    fits = isinstance(value, list) and 0 < len(value) <= MAX_DRAFT_TOKENS + 1
    if not fits or not all(type(count) is int and 0 <= count < 1 << 50 for count in value):
        raise ConfigError(
            f"{file}: a histogram counts steps by kept tokens, 0 to {MAX_DRAFT_TOKENS}, got "
            f"{brief(value)}; fetch it again"
        )
    return list(value)


def _add(
    kept: dict[tuple[str, int], list[int]],
    file: str,
    histogram: list[int],
    record: Mapping[str, Any],
) -> None:
    steps = sum(histogram)
    if not steps:
        return
    tokens = _record_tokens(file, histogram, record, steps)
    counts = kept.setdefault((file, tokens), [0] * (tokens + 1))
    for place in range(tokens + 1):
        counts[place] += sum(histogram[place:])


def _record_tokens(file: str, histogram: list[int], record: Mapping[str, Any], steps: int) -> int:
    """Return the K of a request: what the server states, else what it drafted per step."""
    stated = record.get("num_spec_tokens")
    drafted = record.get("num_draft_tokens", record.get("spec_num_proposed_drafts"))
    tokens = stated if type(stated) is int else len(histogram) - 1
    if type(stated) is not int and type(drafted) is int:
        tokens = round(drafted / steps)
    longest = max((place for place, count in enumerate(histogram) if count), default=0)
    if not longest <= tokens <= MAX_DRAFT_TOKENS or tokens < 1:
        raise ConfigError(
            f"{file}: a step keeps at most K tokens, K is {tokens} and one kept {longest}; the "
            "server changed its K, run it with a fixed one"
        )
    return tokens
