"""Many workers, one study: who evaluates which tree, and what happens when a worker dies.

Trials live in the study's storage, which may be a file or a database that many machines share. A
worker claims trials, and as long as it lives a counter in the study, its heartbeat, goes on. A
running trial whose worker's heartbeat has stood still for a while is given up, and its tree is
taken over by whoever has seen that; as every worker watches for itself, no clocks need to agree. A
result that comes after that is dropped. A tree that another trial has, or is being given, is never
evaluated twice.

This is written by hand because Optuna's own heartbeat exists for RDBStorage alone and beats only
inside `study.optimize`. Here the storage is a journal file by default, and several trees are asked
for, measured side by side and told together.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from stree_autotune.search import EXACT, TreeSpace, suggest, text_of, tree_from_text
from stree_core.tree import Tree

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Seconds after which a worker without a heartbeat is taken for dead."""

HEARTBEATS_PER_PATIENCE = 5
MOST_REJECTED = 50
"""Proposals in a row that may be known already before the space counts as exhausted."""

TREE, WORKER, HEARTBEAT, RETRY_OF = "tree", "worker", "heartbeat of ", "retry of"
STEP_MS, SPREAD_MS, TOKENS = "step_ms", "spread_ms", "tokens_per_step"


@dataclass(frozen=True, slots=True)
class Claim:
    """A tree that this worker, and nobody else, is to evaluate."""

    trial: optuna.Trial
    tree: Tree


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a finished trial found."""

    tree: Tree
    tokens_per_step: float
    step_ms: float
    spread_ms: float
    tokens_per_s: float


class Worker:
    """One of the workers of a study, until `budget` trees are evaluated by all of them together.

    `excess` is by which share a tree is too large for the memory. Use it as a context: it has a
    heartbeat inside.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: TreeSpace,
        budget: int,
        excess: Callable[[Tree], float] = lambda tree: -1.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._study, self._space, self._budget = study, space, budget
        self._excess, self._patience_s = excess, patience_s
        self._name = uuid.uuid4().hex
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._last_seen: dict[int, tuple[object, float]] = {}

    def __enter__(self) -> Worker:
        self._study.set_user_attr(HEARTBEAT + self._name, 0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def claim(self, most: int) -> list[Claim]:
        """Return up to `most` trees to evaluate, none when the budget leaves no room for more.

        Trees that do not fit are told to the sampler on the way, and do not count.
        """
        claims = self._take_over()
        rejected = 0
        trials = self._trials()
        while len(claims) < most and rejected < MOST_REJECTED and self._has_room(trials):
            trial = self._study.ask()
            trial.set_user_attr(WORKER, self._name)
            tree = suggest(trial, self._space)
            excess = self._excess(tree)
            trial.set_constraint("memory", excess)
            trial.set_user_attr(TREE, text_of(tree))
            # Two workers that are given one tree, or the last room, at once both see the other's
            # trial, as they look after they have written; the older trial stays.
            trials = self._trials()
            rejected += 1
            older = [other for other in trials if _rank(other) < trial.number]
            if _is_taken(trial.number, tree, trials) or not self._has_room(older):
                self._study.tell(trial, state=TrialState.FAIL)
            elif excess > 0:
                self._study.tell(trial, 0.0)
            else:
                claims.append(Claim(trial, tree))
                rejected = 0
        return claims

    def tell(self, claim: Claim, found: Evaluated) -> None:
        """Record what a claim found, unless it was given up in the meantime."""
        try:
            claim.trial.set_user_attr(TOKENS, found.tokens_per_step)
            claim.trial.set_user_attr(SPREAD_MS, found.spread_ms)
            claim.trial.set_user_attr(STEP_MS, found.step_ms)
            self._study.tell(claim.trial, found.tokens_per_s, skip_if_finished=True)
        except UpdateFinishedTrialError:
            logger.warning("trial %d was given up before its result came", claim.trial.number)

    def wait(self) -> bool:
        """Wait a little for the other workers; return False when none has anything under way."""
        busy = bool(self._others())
        if busy:
            time.sleep(self._patience_s / 20)
        return busy

    def _live(self) -> None:
        beat = 0
        while not self._stopped.wait(self._patience_s / HEARTBEATS_PER_PATIENCE):
            beat += 1
            try:
                self._study.set_user_attr(HEARTBEAT + self._name, beat)
            except StorageInternalError as err:
                logger.warning("the study's storage did not answer: %s", err)

    def _trials(self) -> list[FrozenTrial]:
        """Return the trials that are running or complete."""
        states = (TrialState.RUNNING, TrialState.COMPLETE)
        return self._study.get_trials(deepcopy=False, states=states)

    def _has_room(self, trials: list[FrozenTrial]) -> bool:
        # A trial and its retry are both there for a moment, and stand for one tree.
        counted = {
            _rank(trial)
            for trial in trials
            if trial.state == TrialState.RUNNING or STEP_MS in trial.user_attrs
        }
        return len(counted) < self._budget

    def _others(self) -> list[FrozenTrial]:
        """Return the running trials of other workers."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if trial.user_attrs.get(WORKER) != self._name]

    def _take_over(self) -> list[Claim]:
        """End the running trials of workers without a heartbeat, and claim their trees."""
        heartbeats, now = self._study.user_attrs, time.monotonic()
        claims = []
        for trial in self._others():
            heartbeat = heartbeats.get(HEARTBEAT + trial.user_attrs.get(WORKER, ""))
            before, since = self._last_seen.get(trial.number, (None, now))
            if trial.number not in self._last_seen or before != heartbeat:
                self._last_seen[trial.number] = (heartbeat, now)
            elif now - since > self._patience_s:
                claims += self._inherit(trial)
        return claims

    def _give_up(self, trial: FrozenTrial) -> bool:
        """End a trial; False when it has ended: its worker lives, or another one was faster."""
        try:
            self._study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, UpdateFinishedTrialError):
            return False
        logger.warning("trial %d is given up, its worker has no heartbeat", trial.number)
        return True

    def _inherit(self, dead: FrozenTrial) -> list[Claim]:
        """Give up a trial and claim its tree; queue it again if it had none yet."""
        if TREE not in dead.user_attrs:
            queued = dead.system_attrs.get("fixed_params")
            if self._give_up(dead) and queued is not None:
                exact = {key: dead.user_attrs[key] for key in (EXACT,) if key in dead.user_attrs}
                self._study.enqueue_trial(queued, user_attrs=exact)
            return []
        text = dead.user_attrs[TREE]
        attrs = {WORKER: self._name, TREE: text, EXACT: text, RETRY_OF: _rank(dead)}
        # The retry comes first: without either, others would find room, or the tree untaken.
        self._study.add_trial(
            optuna.create_trial(
                state=TrialState.RUNNING,
                params=dead.params,
                distributions=dead.distributions,
                user_attrs=attrs,
            )
        )
        (own,) = (trial for trial in self._trials() if attrs.items() <= trial.user_attrs.items())
        trial = optuna.Trial(self._study, own._trial_id)
        if not self._give_up(dead):
            self._study.tell(trial, state=TrialState.FAIL)
            return []
        tree = tree_from_text(text)
        trial.set_constraint("memory", self._excess(tree))
        return [Claim(trial, tree)]


def _rank(trial: FrozenTrial) -> int:
    """Return the number by which trials give way to each other: retries have the first owner's."""
    return int(trial.user_attrs.get(RETRY_OF, trial.number))


def _is_taken(number: int, tree: Tree, trials: list[FrozenTrial]) -> bool:
    """Return whether a finished trial has the tree, or an older one is being given it."""
    text = text_of(tree)
    return any(
        other.user_attrs.get(TREE) == text
        and (other.state == TrialState.COMPLETE or _rank(other) < number)
        for other in trials
        if other.number != number
    )


def evaluated(study: optuna.Study) -> list[Evaluated]:
    """Return what the trials of a study have found, in order, but for trees that do not fit."""
    return [
        Evaluated(
            tree_from_text(trial.user_attrs[TREE]),
            trial.user_attrs[TOKENS],
            trial.user_attrs[STEP_MS],
            trial.user_attrs[SPREAD_MS],
            trial.values[0],
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if STEP_MS in trial.user_attrs
    ]
