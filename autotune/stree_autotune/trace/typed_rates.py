"""Acceptance that a user typed: the shares of steps that keep at least 1, 2, ... draft tokens."""

from __future__ import annotations

import hashlib
from itertools import pairwise

from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.profile import Source

MAX_RATES = 64
TYPED = "typed"
RATES = "rates"
"""The name of typed rates among a profile's sources; no file has it."""


def parse_rates(text: str) -> tuple[float, ...]:
    """Read `--rates 0.8,0.6,0.4`; raise ConfigError unless they are shares that never rise."""
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError as err:
        raise ConfigError(
            f"--rates takes numbers with commas, got {text!r}; drop the rest"
        ) from err
    falling = all(later <= before for before, later in pairwise(rates))
    if len(rates) > MAX_RATES or not all(0 <= rate <= 1 for rate in rates) or not falling:
        raise ConfigError(
            f"--rates takes up to {MAX_RATES} shares of steps from 0 to 1 that never rise, "
            f"got {text[:60]}; give the share that keeps at least 1, 2, ... draft tokens"
        )
    return rates


def rates_source(rates: tuple[float, ...], more: str = "") -> Source:
    """Return how a profile names typed rates, with what else its note says."""
    note = f"{TYPED}: {', '.join(f'{rate:g}' for rate in rates)[:300]}{more}"
    return Source(name=RATES, sha256=_digest(rates), status="estimated", note=note)


def rates_of(source: Source) -> tuple[float, ...]:
    """Return the typed rates that a profile names.

    Raises MissingMeasurement when its note has not all of them, or not all of their digits.
    """
    words = str(source.note).removeprefix(f"{TYPED}: ").partition(";")[0].replace(" ", "")
    try:
        rates = parse_rates(words)
    except ConfigError:
        rates = ()
    if _digest(rates) != source.sha256:
        raise MissingMeasurement(
            f"this needs the typed rates, and the profile's note {str(source.note)[:60]!r} does "
            "not hold them whole; tune again with --rates of up to six digits each"
        )
    return rates


def _digest(rates: tuple[float, ...]) -> str:
    return hashlib.sha256(repr(rates).encode()).hexdigest()
