"""Record an acceptance trace: depth-1 speculation with K children at every position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stree_autotune.store import provenance
from stree_autotune.trace.file import MAX_CHILDREN, NO_RANK, Trace, TraceMeta
from stree_core.drafting import Pair
from stree_core.engine import (
    Engine,
    EngineConfig,
    SamplingParams,
    SamplingSupport,
    Speculator,
    StopRule,
    needed_positions,
)
from stree_core.errors import ConfigError, NonFiniteLogits, NotEnoughMemory
from stree_core.profile import Sampling
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

    def made(self, meta: TraceMeta, num_prompts: int) -> bool:
        """True when a trace is of these settings, as far as it says, and of so many prompts."""
        keys = ("dataset", "sampling", "num_children", "max_new_tokens", "seed", "ignore_eos")
        same = all(getattr(self, key) == getattr(meta, key) for key in (*keys, "chat"))
        return same and meta.num_prompts == num_prompts


@dataclass(frozen=True, slots=True)
class Recording:
    """One prompt's part of a trace: the rank of every token but the first, a byte each.

    `num_repeated` of its tokens lie inside an 8-gram that stood earlier in the same output.
    """

    ranks: bytes
    num_repeated: int


def record_trace(
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    config: RecordConfig,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Decode `prompts` and return their trace; `progress` is called with the number finished."""
    recordings: dict[int, Recording] = {}
    for index, recording in record_prompts(pair, prompts, config, range(len(prompts))):
        recordings[index] = recording
        if progress is not None:
            progress(len(recordings))
    return make_trace(pair, recordings, config)


def record_prompts(
    pair: Pair, prompts: Sequence[Sequence[int]], config: RecordConfig, wanted: Collection[int]
) -> Iterator[tuple[int, Recording]]:
    """Decode the prompts whose indices are `wanted`; yield each with its index when it ends.

    Every step drafts K children of the root, verifies them with the decoder's own accept code and
    notes the accepted child, but emits only the target's next token, so that every position is
    seen. Whether child i is accepted does not depend on how many there are, whatever the rule.

    `num_slots` neighbours form a batch, in which each prompt has its own slot; a slot whose prompt
    has ended, or is not wanted, computes on without effect. So a prompt's passes have the same
    shapes whichever others are wanted, and its ranks are the same.
    """
    if not 1 <= config.num_children <= MAX_CHILDREN:
        raise ConfigError(
            f"a trace records 1 to {MAX_CHILDREN} children, got {config.num_children}; "
            "change --num-children"
        )
    if not wanted:
        return
    engine = _make_engine(pair, prompts, config)
    eos = () if config.ignore_eos else pair.target.shape.eos_token_ids
    stop = StopRule(config.max_new_tokens, eos)
    for batch in range(num_batches(len(prompts), config)):
        first = batch * config.num_slots
        inside = range(first, min(first + config.num_slots, len(prompts)))
        requests = {
            index % config.num_slots: (prompts[index], _params(config, index))
            for index in inside
            if index in wanted
        }
        if requests:
            for slot, recording in _record_batch(engine, requests, stop):
                yield first + slot, recording


def num_batches(num_prompts: int, config: RecordConfig) -> int:
    """Return into how many batches prompts are divided."""
    return -(-num_prompts // config.num_slots)


def _make_engine(pair: Pair, prompts: Sequence[Sequence[int]], config: RecordConfig) -> Engine:
    """Return an engine for all prompts, wanted or not, so that its buffers' shapes are the same."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise ConfigError(
            f"a prompt must hold at least one token, number {lengths.index(0) + 1} has none; "
            "leave it out"
        )
    star = Tree.from_paths([[rank] for rank in range(config.num_children)])
    num_positions = needed_positions(max(lengths), config.max_new_tokens, [star])
    support = SamplingSupport.of(config.sampling)
    engine_config = EngineConfig(config.num_slots, num_positions, sampling=support)
    try:
        return Engine(pair.target, pair.draft, star, engine_config, step=Speculator.record)
    except NotEnoughMemory as err:
        longest = lengths.index(max(lengths)) + 1
        raise NotEnoughMemory(
            f"{err}; the longest prompt, number {longest}, has {max(lengths)} tokens"
        ) from err


def _params(config: RecordConfig, index: int) -> SamplingParams:
    return SamplingParams.of(config.sampling, config.seed + index)


def _record_batch(
    engine: Engine, requests: Mapping[int, tuple[Sequence[int], SamplingParams]], stop: StopRule
) -> Iterator[tuple[int, Recording]]:
    """Decode at most a prompt per slot; yield slots and recordings as prompts end."""
    tokens: dict[int, list[int]] = {}
    ranks: dict[int, list[int]] = {}
    ended = {}
    for slot in range(engine.config.num_slots):
        engine.release(slot)
    for slot, (prompt, params) in requests.items():
        tokens[slot], finish = stop.cut([engine.prefill(slot, prompt, params)], [])
        ranks[slot] = []
        if finish is not None:
            ended[slot] = finish
    while True:
        for slot in ended:
            engine.release(slot)
            yield slot, Recording(bytes(ranks.pop(slot)), repeated_positions(tokens.pop(slot)))
        if not tokens:
            return
        result = engine.step()
        ended = {}
        for slot in tokens:
            if not result.healthy[slot]:
                raise NonFiniteLogits(
                    "logits must be finite, they are not; check the weights and the dtype"
                )
            kept, finish = stop.cut(result.tokens[slot], tokens[slot])
            tokens[slot] += kept
            # Node i of a star is the child of rank i - 1; node 0, the root, means none.
            node = result.last_nodes[slot]
            ranks[slot].append(node - 1 if node else NO_RANK)
            if finish is not None:
                ended[slot] = finish


def make_meta(pair: Pair, config: RecordConfig, num_prompts: int) -> TraceMeta:
    """Return what a trace will say of itself, all but its statistics."""
    return TraceMeta(
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
        num_prompts=num_prompts,
        provenance=provenance(config.seed),
    )


def make_trace(pair: Pair, recordings: Mapping[int, Recording], config: RecordConfig) -> Trace:
    """Return the trace of all prompts, given by their index from 0 in any order."""
    ordered = [recordings[index] for index in range(len(recordings))]
    lengths = [len(recording.ranks) for recording in ordered]
    ranks = np.frombuffer(b"".join(recording.ranks for recording in ordered), dtype=np.uint8)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    meta = make_meta(pair, config, len(ordered))
    return Trace(ranks, offsets, meta.model_copy(update={"statistics": _statistics(ordered)}))


def _statistics(recordings: Sequence[Recording]) -> dict[str, float]:
    """Return what a reader wants to know of the text behind a trace, without the text."""
    counts = Counter(rank for recording in recordings for rank in recording.ranks)
    total = max(1, sum(counts.values()))
    # The first token of every prompt has no rank.
    num_tokens = sum(counts.values()) + len(recordings)
    shares = {
        "rank0_share": counts[0] / total,
        "rank1to3_share": sum(counts[rank] for rank in (1, 2, 3)) / total,
        "none_share": counts[NO_RANK] / total,
        "repeated_8gram_share": sum(r.num_repeated for r in recordings) / max(1, num_tokens),
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
