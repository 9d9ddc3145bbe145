"""What a user can cause: one class a kind, one sentence each (rule, value got, remedy)."""

from __future__ import annotations

import difflib
import errno
import reprlib
from collections.abc import Iterable

from stree_core.shown_text import shown

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)

_MAX_SHOWN = 60
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = _MAX_SHOWN


class StreeError(Exception):
    """Base of every expected failure; the command line turns it into one line and exit code 2.

    Its text is free of control characters and of passwords, whatever it was made from.
    """

    def __str__(self) -> str:
        return shown(super().__str__())


class ConfigError(StreeError):
    """A flag, a file or a key does not follow its rule."""


class UnwritableFile(ConfigError):
    """A file cannot be written where it was asked for."""


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


def unwritable(path: object, err: OSError) -> UnwritableFile:
    """Return the error that says why `path` cannot be written, and what helps."""
    remedy = "check the path"
    if err.errno in _FULL:
        remedy = "free some space or name another place"
    elif err.errno in _FORBIDDEN:
        remedy = "name a place that may be written"
    return UnwritableFile(
        f"{path} cannot be written ({reason_of(err)}), what was there is unchanged; {remedy}"
    )


def reason_of(err: OSError) -> str:
    """Return an operating system's reason in its own words."""
    return err.strerror or str(err) or type(err).__name__


def os_sentence(err: OSError) -> str:
    """Return the sentence for a failure of the operating system that nothing nearer explained."""
    where = "a file" if err.filename is None else str(err.filename)
    return f"{where} cannot be used ({reason_of(err)}); check its path, its rights and free space"


def brief(value: object) -> str:
    """Return a value as it appears in a sentence: on one line, shortened."""
    try:
        text = " ".join(_SHORT.repr(value).split())
    except ValueError:
        # Python refuses to print integers of thousands of digits.
        return "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
