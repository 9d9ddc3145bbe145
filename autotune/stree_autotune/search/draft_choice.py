"""Which of several drafts a profile is for: each is tuned, and the simplest of the fastest kept.

A draft that needs no second model is simpler than one that does. Drafts are compared by the
geometric mean over batch sizes of their speed over off, which is the same for all. Intervals of two
drafts are combined as if independent, and those of one draft's rows as if they erred together. Both
make a tie likelier than it is.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stree_autotune.search.request import TuneRequest
from stree_core.errors import ConfigError, NoFeasibleTree
from stree_core.models import MTP
from stree_core.profile import Profile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TunedDraft:
    """A draft with its profile: logarithm of its mean speed over off, and that of its interval."""

    name: str
    profile: Profile

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
        return f"{self.name} {math.exp(self.log_speed):.3f}x off"

    def ties_with(self, best: TunedDraft) -> bool:
        """True when the interval of how much faster `best` is includes not at all."""
        behind = best.log_speed - self.log_speed
        return behind <= math.hypot(best.log_error, self.log_error)


def best_draft(request: TuneRequest, tune: Callable[[TuneRequest], Profile]) -> Profile:
    """Tune every draft of a request, whose names stand between commas; return the profile to use.

    Of several, a draft that no batch size has room for is left out. Raises ConfigError for an empty
    or repeated name, and whatever `tune` raises.
    """
    names = request.draft.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"--draft names different drafts, got {request.draft!r}; list each once")
    if len(names) == 1:
        return tune(request)
    tuned = []
    for name in names:
        try:
            tuned.append(TunedDraft(name, tune(replace(request, draft=name))))
        except NoFeasibleTree as err:
            if name == names[-1] and not tuned:
                raise
            logger.info("draft %s is left out: %s", name, err)
            continue
        logger.info("draft %s, mean of batch sizes", tuned[-1].words)
    return _noted(choose(tuned), tuned)


def choose(tuned: Sequence[TunedDraft]) -> TunedDraft:
    """Return the simplest draft that is as fast as the fastest, for all that is known."""
    best = max(tuned, key=lambda draft: draft.log_speed)
    own_head = [draft for draft in tuned if draft.name == MTP and draft.ties_with(best)]
    return own_head[0] if own_head else best


def _noted(chosen: TunedDraft, tuned: Sequence[TunedDraft]) -> Profile:
    """Return the profile of the chosen draft, whose trace's note names the others."""
    profile = chosen.profile
    others = ", ".join(draft.words for draft in tuned if draft is not chosen)
    if not others:
        return profile
    trace = profile.sources.trace
    note = f"{chosen.words}, chosen beside {others}"
    trace = trace.model_copy(update={"note": "; ".join(filter(None, (trace.note, note)))[:500]})
    return profile.model_copy(
        update={"sources": profile.sources.model_copy(update={"trace": trace})}
    )
