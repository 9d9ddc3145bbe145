"""What a set of runs shows beside its numbers: what is left out of a table, and warnings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from stree_autotune.server.counters import Accepted
from stree_autotune.server.runs import BenchRun
from stree_autotune.server.tables import median

CAPPED = 0.7
"""A run where less than this share of the asked requests decodes at once is of another size."""
PAUSED = 1.2
THROTTLED = 0.06
ENOUGH_ROUNDS = 3
ENOUGH_STEPS = 100
EXPECTED = 30
COUNTERS_DIFFER = 0.03


def usable_runs(runs: Sequence[BenchRun]) -> tuple[list[BenchRun], tuple[str, ...]]:
    """Return the runs that are what they claim to be, and why each other one is left out."""
    kept, notes = [], []
    for run in runs:
        if note := next((note for note in run.notes if "left out" in note), ""):
            notes.append(note)
        elif run.running < CAPPED * run.batch_size and run.batch_size > 1:
            notes.append(
                f"{run.file}: only {run.running:.1f} of {run.batch_size} requests decode at once, "
                "the rest waits for memory or a limit such as --max-num-seqs; left out, raise "
                "the limit or ask for less concurrency"
            )
        else:
            kept.append(run)
    slow = _throttled(kept)
    notes += [note for _, note in slow]
    dropped = {id(run) for run, _ in slow}
    return [run for run in kept if id(run) not in dropped], tuple(notes)


def _throttled(runs: Sequence[BenchRun]) -> list[tuple[BenchRun, str]]:
    """Return runs that took far longer than others of their cell, where rounds can tell."""
    by_key: dict[tuple[int, int], list[BenchRun]] = defaultdict(list)
    for run in runs:
        by_key[run.key].append(run)
    deviations = [
        abs(math.log(run.step_ms / median([other.step_ms for other in members])))
        for members in by_key.values()
        if len(members) >= ENOUGH_ROUNDS
        for run in members
    ]
    usual = median(deviations) if deviations else 0.0
    found = []
    for members in by_key.values():
        middle = median([run.step_ms for run in members])
        for run in members:
            over = run.step_ms / middle - 1
            # the half of all deviations lie within `usual`, ten times that is no noise
            if len(members) >= ENOUGH_ROUNDS and over > max(THROTTLED, 10 * usual):
                note = (
                    f"{run.file}: steps take {100 * over:.0f} % longer than in other rounds, as "
                    "when clocks are throttled or the machine is shared; left out, run it again"
                )
                found.append((run, note))
    return found


def findings_of(runs: Sequence[BenchRun], counted: Sequence[Accepted]) -> tuple[str, ...]:
    """Return the warnings of runs that were kept and of other counts."""
    notes = [note for run in runs for note in run.notes]
    notes += [each.note for each in counted if each.note]
    notes += _pauses(runs)
    notes += _dead_positions(runs)
    notes += _counters(runs, counted)
    if runs and all(len({run.round for run in runs if run.key == each.key}) == 1 for each in runs):
        notes.append("every cell ran once, so the noise is assumed; run three rounds or more")
    return tuple(notes)


def _pauses(runs: Sequence[BenchRun]) -> list[str]:
    """Say how much of the step times are pauses, where chunks' mean is far above their median."""
    shares = {
        run.key: run.step_ms / run.usual_ms
        for run in runs
        if run.usual_ms and run.step_ms > PAUSED * run.usual_ms
    }
    if not shares:
        return []
    (size, tokens), worst = max(shares.items(), key=lambda item: item[1])
    return [
        f"steps are {100 * (worst - 1):.0f} % longer on average than usual at batch size {size} "
        f"and K = {tokens} ({len(shares)} cells in all): prefill of new requests is part of them, "
        "as in serving; a load with longer outputs has less of it"
    ]


def _dead_positions(runs: Sequence[BenchRun]) -> list[str]:
    """Say where nothing is ever accepted though it should be, summed over the runs of a K."""
    notes = []
    for tokens in sorted({run.draft_tokens for run in runs if run.draft_tokens}):
        members = [run for run in runs if run.draft_tokens == tokens]
        steps = sum(run.steps for run in members)
        if steps >= ENOUGH_STEPS and not any(run.accepted for run in members):
            notes.append(
                f"K = {tokens}: accept length is exactly 1.000 in {steps} steps, so nothing was "
                "ever accepted; the draft's weights were dropped (MTP heads often are) or are "
                "another model's"
            )
            continue
        counts = [
            sum(run.by_position[place] for run in members if place < len(run.by_position))
            for place in range(tokens)
        ]
        dead = next(
            (
                place
                for place in range(1, tokens)
                if counts[place] == 0 and counts[place - 1] >= EXPECTED
            ),
            None,
        )
        if dead is not None:
            notes.append(
                f"K = {tokens}: position {dead + 1} never accepts, {counts[dead - 1]} steps "
                f"accepted position {dead}; later steps of the draft are broken there, use "
                f"K = {dead} or less"
            )
    return notes


def _counters(runs: Sequence[BenchRun], counted: Sequence[Accepted]) -> list[str]:
    """Say where /metrics or records have another accept length than the runs of that K."""
    notes = []
    for each in counted:
        members = [run for run in runs if run.draft_tokens == each.draft_tokens]
        steps = sum(run.steps for run in members)
        if not steps or each.note:
            continue
        ours = 1 + sum(run.accepted for run in members) / steps
        theirs = 1 + each.accepted / each.steps
        if abs(theirs / ours - 1) > COUNTERS_DIFFER:
            notes.append(
                f"{each.file}: {theirs:.3f} tokens per step, the runs of K = {each.draft_tokens} "
                f"have {ours:.3f}; it counts other requests as well, the runs are used"
            )
    return notes
