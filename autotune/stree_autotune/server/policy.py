"""A choice for every batch size as one policy: smoothed where asked, and what would change it.

Nobody deploys K = 2, 1, 0, 2, 0. A K that rises with the batch size is mostly two options that are
about as fast; it is explained, or with `smooth` replaced by the fastest policy whose K never rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stree_autotune.server.choice import Choice, Options, name_of
from stree_core.errors import MissingMeasurement


@dataclass(frozen=True, slots=True)
class Doubt:
    """What is at stake at a batch size: the mean loss of the choice, and the likeliest better K."""

    batch_size: int
    draft_tokens: int
    rival: int
    loss: float


def smoothed(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the choices of the largest product of tokens/s whose K never rises with batch size."""
    counts = sorted({count for choice in choices for count in choice.options.draft_tokens})
    # best[k] is the best sum of logarithms so far whose last K is at least counts[k]
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * len(counts)
    for choice in choices:
        best = _extended(best, counts, choice.options)
    path = best[0][1]
    return tuple(_moved(choice, count) for choice, count in zip(choices, path, strict=True))


def _extended(
    best: Sequence[tuple[float, tuple[int, ...]]], counts: Sequence[int], options: Options
) -> list[tuple[float, tuple[int, ...]]]:
    longer = []
    for place, count in enumerate(counts):
        before, path = best[place]
        known = count in options.draft_tokens
        gain = float(np.log(options.tokens_per_s(count))) if known else -np.inf
        longer.append((before + gain, (*path, count)))
    # a later K may be any that is not above: keep the best of all that end at or above each
    for place in range(len(counts) - 2, -1, -1):
        longer[place] = max(longer[place], longer[place + 1], key=lambda each: each[0])
    return longer


def _moved(choice: Choice, count: int) -> Choice:
    if count == choice.draft_tokens:
        return choice
    gain = choice.options.gain(choice.draft_tokens, count)
    reason = (
        f"{name_of(count)}, so that K never rises with the batch size (--smooth); "
        f"{name_of(choice.draft_tokens)} would gain {gain}"
    )
    return replace(choice, draft_tokens=count, reason=reason)


def explained(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the choices, those where K rises with the batch size with a word about it."""
    done = []
    lowest: Choice | None = None
    for choice in choices:
        if lowest is not None and choice.draft_tokens > lowest.draft_tokens:
            count = lowest.draft_tokens
            text = f"K rises from {count} at batch size {lowest.batch_size}"
            if count in choice.options.draft_tokens:
                gain = choice.options.gain(choice.draft_tokens, count)
                text += f", {name_of(choice.draft_tokens)} gains {gain} over {name_of(count)} here"
            choice = replace(choice, reason=f"{choice.reason}; {text}; --smooth avoids it")
        if lowest is None or choice.draft_tokens < lowest.draft_tokens:
            lowest = choice
        done.append(choice)
    return tuple(done)


def at_sizes(choices: Sequence[Choice], wanted: Sequence[int]) -> tuple[Choice, ...]:
    """Return the choices at `wanted` batch sizes, all measured ones when it is empty.

    Between measured ones a choice is taken over where both neighbours have the same K. Raises
    MissingMeasurement where they differ, or beyond the measured ones.
    """
    if not wanted:
        return tuple(choices)
    by_size = {choice.batch_size: choice for choice in choices}
    sizes = sorted(by_size)
    found = []
    for size in wanted:
        if size in by_size:
            found.append(by_size[size])
            continue
        below = max((each for each in sizes if each < size), default=None)
        above = min((each for each in sizes if each > size), default=None)
        if below is None or above is None:
            raise MissingMeasurement(
                f"batch sizes {sizes[0]} to {sizes[-1]} were measured, not {size}; run the plan "
                f"with SIZES={size}"
            )
        first, last = by_size[below], by_size[above]
        if first.draft_tokens != last.draft_tokens:
            raise MissingMeasurement(
                f"batch size {size} lies between {below} ({name_of(first.draft_tokens)}) and "
                f"{above} ({name_of(last.draft_tokens)}), which differ; run the plan with "
                f"SIZES={size}"
            )
        found.append(_between(first, last, size))
    return tuple(found)


def _between(first: Choice, last: Choice, size: int) -> Choice:
    """Return the choice of two neighbours with one K, times in proportion on logarithmic axes."""
    low, high = first.options, last.options
    counts = [count for count in low.draft_tokens if count in high.draft_tokens]
    share = np.log(size / low.batch_size) / np.log(high.batch_size / low.batch_size)
    step_ms, rates = [], []
    for count in counts:
        below, above = low.place(count), high.place(count)
        step_ms.append(float(low.step_ms[below] ** (1 - share) * high.step_ms[above] ** share))
        rates.append((1 - share) * low.log_rates_RK[:, below] + share * high.log_rates_RK[:, above])
    options = Options(
        batch_size=size,
        draft_tokens=tuple(counts),
        step_ms=tuple(step_ms),
        tokens_per_step=tuple(low.tokens_per_step[low.place(count)] for count in counts),
        log_rates_RK=np.stack(rates, axis=1),
    )
    reason = (
        f"{name_of(first.draft_tokens)}, interpolated: batch sizes {low.batch_size} and "
        f"{high.batch_size} agree on it"
    )
    rivals = tuple(sorted({*first.rivals, *last.rivals} & set(counts)))
    return Choice(options, first.draft_tokens, rivals, reason)


def doubts(choices: Sequence[Choice]) -> list[Doubt]:
    """Return what each choice is expected to lose against the truth, the largest loss first."""
    found = []
    for choice in choices:
        options = choice.options
        place = options.place(choice.draft_tokens)
        over_RK = options.log_rates_RK - options.log_rates_RK[:, [place]]
        rival = int(np.argmax(np.maximum(over_RK, 0).mean(axis=0)))
        loss = float(over_RK.max(axis=1).mean())
        found.append(
            Doubt(choice.batch_size, choice.draft_tokens, options.draft_tokens[rival], loss)
        )
    return sorted(found, key=lambda doubt: -doubt.loss)


def next_measurement(choices: Sequence[Choice]) -> str:
    """Return which K and concurrency to measure next, and why."""
    for choice in choices:
        largest = choice.options.draft_tokens[-1]
        if choice.draft_tokens == largest and largest > 0:
            more = largest + max(1, largest // 2)
            return (
                f"batch size {choice.batch_size}: the largest K that was measured, {largest}, is "
                f"best; measure KS={more} next"
            )
    worst = doubts(choices)[0]
    if worst.loss < 0.001:
        return "nothing: no choice is expected to lose 0.1 %"
    return (
        f"batch size {worst.batch_size}: {name_of(worst.draft_tokens)} or {name_of(worst.rival)}, "
        f"the choice is expected to lose {100 * worst.loss:.1f} %; more rounds of "
        f'KS="{worst.draft_tokens} {worst.rival}" SIZES={worst.batch_size} would tell'
    )
