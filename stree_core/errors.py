"""What a user can cause: one class a kind, one sentence each (rule, value got, remedy)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StreeError(Exception):
    """Base of every expected failure; the command line turns it into one line and exit code 2."""


class ConfigError(StreeError):
    """A flag, a file or a key does not follow its rule."""


class TreeError(StreeError):
    """A token tree is malformed or beyond a limit."""


class CheckpointError(StreeError):
    """A model folder cannot be loaded."""


class BackendUnavailable(StreeError):
    """The named kernel backend cannot run on this machine."""


class NotEnoughMemory(StreeError):
    """A device has too little free memory for what was asked."""


class NonFiniteLogits(StreeError):
    """A model's logits are NaN or infinite."""


class NoFeasibleTree(StreeError):
    """No tree satisfies the limits of a search, or none is worth running."""


class MissingMeasurement(StreeError):
    """A table or trace that the question needs has not been recorded."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a half sentence that offers the known names closest to `name`."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(options)}" if options else "none is known"
