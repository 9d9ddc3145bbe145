"""One target, several drafts: tune each, keep the one that is fastest over all batch sizes.

A profile has one draft, as a server loads one. Drafts are few and are tuned in seconds, so all of
them are, rather than left to a sampler.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from stree_autotune.tune_request import TuneRequest
from stree_core.errors import ConfigError
from stree_core.profile import Profile

logger = logging.getLogger(__name__)


def best_draft(request: TuneRequest, tune: Callable[[TuneRequest], Profile]) -> Profile:
    """Tune every draft of a request, whose names stand between commas; return the best profile.

    Raises ConfigError for an empty or repeated name, and whatever `tune` raises.
    """
    names = request.draft.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"--draft names different drafts, got {request.draft!r}; list each once")
    profiles = {name: tune(replace(request, draft=name)) for name in names}
    if len(names) > 1:
        for name, profile in profiles.items():
            logger.info("draft %s: %.3fx off, mean of batch sizes", name, _mean_speedup(profile))
    return max(profiles.values(), key=_mean_speedup)


def _mean_speedup(profile: Profile) -> float:
    """Return the geometric mean over batch sizes; off is the same target's for every draft."""
    logs = [math.log(row.predicted.speedup) for row in profile.policy]
    return math.exp(sum(logs) / len(logs))
