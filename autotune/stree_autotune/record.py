"""Record an acceptance trace: depth-1 speculation with K children at every position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stree_autotune.provenance import provenance
from stree_autotune.trace_file import MAX_CHILDREN, NO_RANK, Trace, TraceMeta
from stree_core.engine import Engine, EngineConfig, needed_positions
from stree_core.errors import ConfigError
from stree_core.pair import Pair
from stree_core.profile import Sampling
from stree_core.rules import SamplingSupport
from stree_core.sampling import SamplingParams
from stree_core.stop import StopRule
from stree_core.tree import Tree

GREEDY_SAMPLING = Sampling()
_GRAM = 8


@dataclass(frozen=True, slots=True)
class RecordConfig:
    """What to record; `num_slots` prompts run together; `chat` says how they were encoded.

    Prompt number i samples with the seed `seed + i`, whatever runs beside it.
    """

    dataset: str
    sampling: Sampling = GREEDY_SAMPLING
    num_children: int = 16
    max_new_tokens: int = 256
    num_slots: int = 16
    seed: int = 0
    ignore_eos: bool = False
    chat: bool = False


@dataclass(frozen=True, slots=True)
class Recording:
    """One prompt's kept tokens, and the rank of every token but the first."""

    tokens: list[int]
    ranks: list[int]


def record_trace(
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    config: RecordConfig,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Decode `prompts` and return their trace.

    Every step drafts K children of the root, verifies them with the decoder's own accept code and
    notes the accepted child, but emits only the target's next token, so that every position is
    seen. Whether child i is accepted does not depend on how many there are, whatever the rule.
    `progress` is called with the number of finished prompts.
    """
    if not 1 <= config.num_children <= MAX_CHILDREN:
        raise ConfigError(
            f"a trace records 1 to {MAX_CHILDREN} children, got {config.num_children}; "
            "change --num-children"
        )
    star = Tree.from_paths([[rank] for rank in range(config.num_children)])
    num_positions = needed_positions(max(map(len, prompts)), config.max_new_tokens, [star])
    support = SamplingSupport(config.sampling.rule, truncates=config.sampling.top_p < 1)
    engine_config = EngineConfig(config.num_slots, num_positions, record=True, sampling=support)
    engine = Engine(pair.target, pair.draft, star, engine_config)
    eos = () if config.ignore_eos else pair.target.shape.eos_token_ids
    stop = StopRule(config.max_new_tokens, eos)
    recordings: list[Recording] = []
    requests = [(prompt, _params(config, index)) for index, prompt in enumerate(prompts)]
    for start in range(0, len(requests), config.num_slots):
        recordings += _record_group(engine, requests[start : start + config.num_slots], stop)
        if progress is not None:
            progress(len(recordings))
    return _as_trace(pair, recordings, config)


def _params(config: RecordConfig, index: int) -> SamplingParams:
    sampling = config.sampling
    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, seed=config.seed + index
    )


def _record_group(
    engine: Engine, requests: Sequence[tuple[Sequence[int], SamplingParams]], stop: StopRule
) -> list[Recording]:
    recordings: list[Recording] = []
    running: set[int] = set()
    for slot, (prompt, params) in enumerate(requests):
        engine.require_fits(len(prompt), stop.max_new_tokens)
        tokens, ended = stop.cut([engine.prefill(slot, prompt, params)], [])
        recordings.append(Recording(tokens, []))
        if not ended:
            running.add(slot)
    for slot in set(range(engine.config.num_slots)) - running:
        engine.release(slot)
    while running:
        result = engine.step()
        for slot in sorted(running):
            recording = recordings[slot]
            kept, ended = stop.cut(result.tokens[slot], recording.tokens)
            recording.tokens.extend(kept)
            # Node i of a star is the child of rank i - 1; node 0, the root, means none.
            node = result.last_nodes[slot]
            recording.ranks.append(node - 1 if node else NO_RANK)
            if ended:
                running.discard(slot)
                engine.release(slot)
    return recordings


def _as_trace(pair: Pair, recordings: Sequence[Recording], config: RecordConfig) -> Trace:
    lengths = [len(recording.ranks) for recording in recordings]
    ranks = np.array([r for recording in recordings for r in recording.ranks], dtype=np.uint8)
    meta = TraceMeta(
        target=pair.target_ref,
        draft=pair.draft_ref,
        dataset=config.dataset,
        sampling=config.sampling,
        num_children=config.num_children,
        max_new_tokens=config.max_new_tokens,
        ignore_eos=config.ignore_eos,
        chat=config.chat,
        seed=config.seed,
        dtype=str(pair.target.dtype).removeprefix("torch."),
        num_prompts=len(recordings),
        statistics=_statistics(recordings),
        provenance=provenance(config.seed),
    )
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return Trace(ranks, offsets, meta)


def _statistics(recordings: Sequence[Recording]) -> dict[str, float]:
    """Return what a reader wants to know of the text behind a trace, without the text."""
    counts = Counter(rank for recording in recordings for rank in recording.ranks)
    total = max(1, sum(counts.values()))
    num_tokens = sum(len(recording.tokens) for recording in recordings)
    repeated = sum(repeated_positions(recording.tokens) for recording in recordings)
    shares = {
        "rank0_share": counts[0] / total,
        "rank1to3_share": sum(counts[rank] for rank in (1, 2, 3)) / total,
        "none_share": counts[NO_RANK] / total,
        "repeated_8gram_share": repeated / max(1, num_tokens),
        "mean_tokens": num_tokens / max(1, len(recordings)),
    }
    return {name: round(value, 6) for name, value in shares.items()}


def repeated_positions(tokens: Sequence[int]) -> int:
    """Return how many positions lie inside an 8-gram that stood earlier in the same output."""
    seen: set[tuple[int, ...]] = set()
    inside: set[int] = set()
    for start in range(len(tokens) - _GRAM + 1):
        gram = tuple(tokens[start : start + _GRAM])
        if gram in seen:
            inside.update(range(start, start + _GRAM))
        seen.add(gram)
    return len(inside)
