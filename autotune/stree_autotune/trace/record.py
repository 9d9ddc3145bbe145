"""Record an acceptance trace: speculation with K children at every position of the text.

A draft that sees the text alone speculates one level while the text is decoded. One that feeds
itself is led along the text afterwards, from every position (stree_autotune.trace.depth_ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from stree_autotune.store import provenance
from stree_autotune.trace.depth_ranks import DepthRanks
from stree_autotune.trace.file import MAX_CHILDREN, MAX_DEPTHS, NO_RANK, Trace, TraceMeta
from stree_core.drafting import Draft, Pair
from stree_core.engine import (
    Engine,
    EngineConfig,
    SamplingParams,
    SamplingSupport,
    Speculator,
    StepResult,
    StopRule,
    needed_positions,
)
from stree_core.errors import ConfigError, NonFiniteLogits, NotEnoughMemory
from stree_core.profile import Sampling
from stree_core.tree import Tree

GREEDY_SAMPLING = Sampling()
Requests = Mapping[int, tuple[Sequence[int], SamplingParams]]
_GRAM = 8


@dataclass(frozen=True, slots=True)
class RecordConfig:
    """What to record; `num_slots` prompts run together; `chat` says how they were encoded.

    Prompt number i samples with the seed `seed + i`, whatever runs beside it. `depths` is for
    drafts that feed themselves; others have one.
    """

    dataset: str
    sampling: Sampling = GREEDY_SAMPLING
    num_children: int = 16
    max_new_tokens: int = 256
    num_slots: int = 16
    seed: int = 0
    ignore_eos: bool = False
    chat: bool = False
    depths: int = 8

    def depths_of(self, draft: Draft) -> int:
        """Return how many depths are recorded of a draft."""
        return self.depths if draft.feeds_itself else 1

    def made(self, meta: TraceMeta, num_prompts: int) -> bool:
        """True when a trace is of these settings, as far as it says, and of so many prompts."""
        keys = ("dataset", "sampling", "num_children", "max_new_tokens", "seed", "ignore_eos")
        same = all(getattr(self, key) == getattr(meta, key) for key in (*keys, "chat"))
        return same and meta.num_prompts == num_prompts and meta.depths in (1, self.depths)


@dataclass(frozen=True, slots=True)
class Recording:
    """One prompt's part of a trace: the ranks of every token but the first, a byte each.

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

    With a draft that sees the text alone every step drafts K children of the root, verifies them
    with the decoder's own accept code and notes the accepted child, but emits only the target's
    next token, so that every position is seen. Whether child i is accepted does not depend on how
    many there are, whatever the rule. With one that feeds itself, prompts are yielded when the last
    of their batch has ended.

    `num_slots` neighbours form a batch, in which each prompt has its own slot; a slot whose prompt
    has ended, or is not wanted, computes on without effect. So a prompt's passes have the same
    shapes whichever others are wanted, and its ranks are the same.
    """
    if not 1 <= config.num_children <= MAX_CHILDREN:
        raise ConfigError(
            f"a trace records 1 to {MAX_CHILDREN} children, got {config.num_children}; "
            "change --num-children"
        )
    if pair.draft.feeds_itself and not 2 <= config.depths <= MAX_DEPTHS:
        raise ConfigError(
            f"a trace of a draft that feeds itself has 2 to {MAX_DEPTHS} depths, got "
            f"{config.depths}; change --depths"
        )
    if not wanted:
        return
    engine = _make_engine(pair, prompts, config)
    record_batch = _record_batch
    if pair.draft.feeds_itself:
        by_depth = DepthRanks(engine, config.num_children, config.depths)
        record_batch = partial(_record_by_depth, by_depth)
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
            for slot, recording in record_batch(engine, requests, stop):
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
    trees = [Tree.from_paths([[rank] for rank in range(config.num_children)])]
    step = Speculator.record
    if pair.draft.feeds_itself:
        # the steps are those of the first; the other makes the engine keep its draft
        trees, step = [Tree.chain(0), Tree.chain(1)], Speculator.step
    num_positions = needed_positions(max(lengths), config.max_new_tokens, trees)
    support = SamplingSupport.of(config.sampling)
    engine_config = EngineConfig(config.num_slots, num_positions, sampling=support)
    try:
        return Engine(pair.target, pair.draft, trees, engine_config, step=step)
    except NotEnoughMemory as err:
        longest = lengths.index(max(lengths)) + 1
        raise NotEnoughMemory(
            f"{err}; the longest prompt, number {longest}, has {max(lengths)} tokens"
        ) from err


def _params(config: RecordConfig, index: int) -> SamplingParams:
    return SamplingParams.of(config.sampling, config.seed + index)


def _record_batch(
    engine: Engine, requests: Requests, stop: StopRule
) -> Iterator[tuple[int, Recording]]:
    """Decode at most a prompt per slot; yield slots and recordings as prompts end."""
    ranks: dict[int, list[int]] = {slot: [] for slot in requests}

    def note(result: StepResult, writing: Collection[int]) -> None:
        for slot in writing:
            # Node i of a star is the child of rank i - 1; node 0, the root, means none.
            node = result.last_nodes[slot]
            ranks[slot].append(node - 1 if node else NO_RANK)

    for slot, tokens in _write(engine, _read(engine, requests), stop, note):
        yield slot, Recording(bytes(ranks.pop(slot)), repeated_positions(tokens))


def _record_by_depth(
    by_depth: DepthRanks, engine: Engine, requests: Requests, stop: StopRule
) -> Iterator[tuple[int, Recording]]:
    """Decode at most a prompt per slot; yield slots and recordings when all have ended."""
    first = _read(engine, requests)
    by_depth.begin()
    texts = dict(_write(engine, first, stop, lambda *_: by_depth.look()))
    for slot, ranks_ND in by_depth.ranks(texts).items():
        yield slot, Recording(ranks_ND.tobytes(), repeated_positions(texts[slot]))


def _read(engine: Engine, requests: Requests) -> dict[int, int]:
    """Read at most a prompt per slot; return their first tokens. Other slots rest."""
    for slot in range(engine.config.num_slots):
        engine.release(slot)
    return {
        slot: engine.prefill(slot, prompt, params) for slot, (prompt, params) in requests.items()
    }


def _write(
    engine: Engine, first: Mapping[int, int], stop: StopRule,
    note: Callable[[StepResult, Collection[int]], None],
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """Decode texts that begin with these tokens; yield slots and tokens as they end.

    `note` is called after every step, with the slots that it gave a token to.
    """
    texts: dict[int, list[int]] = {slot: [] for slot in first}
    given = {slot: [token] for slot, token in first.items()}
    while True:
        ended = []
        for slot, tokens in given.items():
            kept, finish = stop.cut(tokens, texts[slot])
            texts[slot] += kept
            if finish is not None:
                ended.append(slot)
        for slot in ended:
            engine.release(slot)
            yield slot, texts.pop(slot)
        if not texts:
            return
        result = engine.step()
        if not all(result.healthy[slot] for slot in texts):
            raise NonFiniteLogits(
                "logits must be finite, they are not; check the weights and the dtype"
            )
        note(result, texts)
        given = {slot: result.tokens[slot] for slot in texts}


def make_meta(pair: Pair, config: RecordConfig, num_prompts: int) -> TraceMeta:
    """Return what a trace will say of itself, all but its statistics."""
    depths = config.depths_of(pair.draft)
    return TraceMeta(
        target=pair.target_ref,
        draft=pair.draft_ref,
        dataset=config.dataset,
        sampling=config.sampling,
        schema_version=1 if depths == 1 else 2,
        num_children=config.num_children,
        depths=depths,
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
    depths = config.depths_of(pair.draft)
    lengths = [len(recording.ranks) // depths for recording in ordered]
    ranks = np.frombuffer(b"".join(recording.ranks for recording in ordered), dtype=np.uint8)
    if depths > 1:
        ranks = ranks.reshape(-1, depths)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    meta = make_meta(pair, config, len(ordered))
    trace = Trace(ranks, offsets, meta)
    statistics = _statistics(trace, sum(recording.num_repeated for recording in ordered))
    return replace(trace, meta=meta.model_copy(update={"statistics": statistics}))


def _statistics(trace: Trace, num_repeated: int) -> dict[str, float]:
    """Return what a reader wants to know of the text behind a trace, without the text.

    The first three are of the tokens that follow a root; with a depth axis there is the share of
    rank 0 at the deepest, of the starts whose text goes so far.
    """
    counts = np.bincount(trace.ranks_ND[:, 0], minlength=NO_RANK + 1)
    total = max(1, trace.num_positions)
    # The first token of every prompt has no rank.
    num_tokens = trace.num_positions + trace.num_prompts
    shares = {
        "rank0_share": counts[0] / total,
        "rank1to3_share": counts[1:4].sum() / total,
        "none_share": counts[NO_RANK] / total,
        "repeated_8gram_share": num_repeated / max(1, num_tokens),
        "mean_tokens": num_tokens / max(1, trace.num_prompts),
    }
    depths = trace.meta.depths
    if depths > 1:
        lengths = np.diff(trace.offsets)
        starts = max(1, int(np.maximum(lengths - depths + 1, 0).sum()))
        shares[f"rank0_share_at_depth_{depths}"] = (trace.ranks_ND[:, -1] == 0).sum() / starts
    return {name: round(float(value), 6) for name, value in shares.items()}


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
