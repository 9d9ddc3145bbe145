"""Which of several drafts and rules a profile is for: each is tuned, the simplest of the best kept.

A draft that needs no second model is simpler than one that does, and naive sampling than MSS.
Options are compared by the geometric mean of their speed over off, which is the same for all, over
the batch sizes that all of them have. Intervals of two are combined as if independent, and those of
one option's rows as if they erred together. Both make a tie likelier than it is.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import optuna

from stree_autotune.search.request import TuneRequest
from stree_autotune.search.study import StudyPlace, open_storage, optimize
from stree_core.errors import ConfigError, MissingMeasurement, NoFeasibleTree
from stree_core.models import MTP
from stree_core.profile import Profile, Sampling

logger = logging.getLogger(__name__)

_SIMPLEST_RULES = ("greedy", "naive", "mss")


@dataclass(frozen=True, slots=True)
class TunedDraft:
    """A draft with its profile: logarithm of its mean speed over off, and that of its interval.

    `rule` is named where there are several.
    """

    name: str
    profile: Profile
    rule: str = ""

    @property
    def log_speed(self) -> float:
        """The mean over batch sizes."""
        return statistics.fmean(math.log(row.predicted.speedup) for row in self.profile.policy)

    @property
    def log_error(self) -> float:
        """Half the width of the 95 % interval, all batch sizes erring together."""
        intervals = [row.predicted.speedup_interval for row in self.profile.policy]
        return statistics.fmean(
            math.log(max(interval.high, 1e-30) / max(interval.low, 1e-30)) / 2
            for interval in intervals
        )

    @property
    def words(self) -> str:
        """The draft and its speed, as a note says it."""
        name = f"{self.name} {self.rule}" if self.rule else self.name
        return f"{name} {math.exp(self.log_speed):.3f}x off"

    @property
    def complexity(self) -> tuple[bool, int]:
        """What it needs: a second model, and a rule that comes later in the list."""
        return self.name != MTP, _SIMPLEST_RULES.index(self.profile.sampling.rule)

    def at(self, batch_sizes: Collection[int]) -> TunedDraft:
        """Return what is compared: the rows of these batch sizes."""
        rows = tuple(row for row in self.profile.policy if row.batch_size in batch_sizes)
        return replace(self, profile=self.profile.model_copy(update={"policy": rows}))

    def ties_with(self, best: TunedDraft) -> bool:
        """True when the interval of how much faster `best` is includes not at all."""
        behind = best.log_speed - self.log_speed
        return behind <= math.hypot(best.log_error, self.log_error)


def best_draft(request: TuneRequest, tune: Callable[[TuneRequest], Profile]) -> Profile:
    """Tune every draft and rule of a request; return the profile to use.

    Names of drafts stand between commas; the rules are those of `sampling` and `more_rules`. Both
    are categorical choices of an Optuna study, whose trials take each pair of them once. Of several
    drafts, one that no batch size has room for is left out. Raises ConfigError for an empty or
    repeated name, and whatever `tune` raises.
    """
    names = request.draft.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"--draft names different drafts, got {request.draft!r}; list each once")
    samplings: dict[str, Sampling] = {
        each.rule: each for each in (request.sampling, *request.more_rules)
    }
    if len(names) == len(samplings) == 1:
        return tune(request)
    pairs = list(itertools.product(names, samplings))
    tuned: list[TunedDraft] = []

    def objective(trial: optuna.Trial) -> float:
        name = str(trial.suggest_categorical("draft", names))
        rule = str(trial.suggest_categorical("rule", list(samplings)))
        asked = replace(request, draft=name, sampling=samplings[rule], more_rules=())
        try:
            profile = tune(asked)
        except NoFeasibleTree as err:
            if trial.number - first == len(pairs) - 1 and not tuned:
                raise
            logger.info("draft %s is left out: %s", name, err)
            raise optuna.TrialPruned from err
        tuned.append(TunedDraft(name, profile, rule if len(samplings) > 1 else ""))
        logger.info("draft %s, mean of batch sizes", tuned[-1].words)
        return tuned[-1].log_speed

    options = f"{', '.join(names)} by {', '.join(samplings)}"
    question = f"drafts of {request.target} on {request.gpu}, {request.dataset}: {options}"
    study = StudyPlace(open_storage(request.storage), question, request.seed).open()
    first = len(study.get_trials(deepcopy=False))
    for name, rule in pairs:
        study.enqueue_trial({"draft": name, "rule": rule})
    optimize(study, objective, len(pairs))
    compared = at_common_sizes(tuned)
    chosen = choose(compared)
    return _noted(tuned[compared.index(chosen)].profile, chosen, compared)


def at_common_sizes(tuned: Sequence[TunedDraft]) -> list[TunedDraft]:
    """Return the options at the batch sizes that all have; MissingMeasurement where none is."""
    sizes = [{row.batch_size for row in draft.profile.policy} for draft in tuned]
    common = sorted(set.intersection(*sizes))
    if not common:
        raise MissingMeasurement(
            f"drafts are compared at batch sizes that all have, and "
            f"{', '.join(draft.name for draft in tuned)} share none; tune one at a time"
        )
    if any(len(each) > len(common) for each in sizes):
        logger.warning(
            "drafts are compared at batch sizes %s alone, which all have; tune one draft for "
            "the others",
            ", ".join(map(str, common)),
        )
    return [draft.at(common) for draft in tuned]


def choose(tuned: Sequence[TunedDraft]) -> TunedDraft:
    """Return the simplest draft and rule that are as fast as the fastest, for all that is known."""
    best = max(tuned, key=lambda draft: draft.log_speed)
    tied = [draft for draft in tuned if draft.ties_with(best)]
    simplest = min(draft.complexity for draft in tied)
    alike = [draft for draft in tied if draft.complexity == simplest]
    return max(alike, key=lambda draft: draft.log_speed)


def _noted(profile: Profile, chosen: TunedDraft, tuned: Sequence[TunedDraft]) -> Profile:
    """Return the profile of the chosen draft, whose trace's note names the others."""
    others = ", ".join(draft.words for draft in tuned if draft is not chosen)
    if not others:
        return profile
    trace = profile.sources.trace
    note = f"{chosen.words}, chosen beside {others}"
    trace = trace.model_copy(update={"note": "; ".join(filter(None, (trace.note, note)))[:500]})
    return profile.model_copy(
        update={"sources": profile.sources.model_copy(update={"trace": trace})}
    )
