"""Which session an engine serves: one at a time."""

from __future__ import annotations

import weakref
from typing import Protocol

from stree_core.errors import ConfigError


class Owner(Protocol):
    """What holds an engine: a session."""

    @property
    def busy(self) -> bool:
        """True while it has requests that have not ended, or updates that nobody has read."""


class Ownership:
    """The session that an engine serves.

    It is the one that was made last. While it is busy no other can be made; one that is closed, has
    nothing left to do or no longer exists makes way.
    """

    def __init__(self) -> None:
        self._owner: weakref.ref[Owner] | None = None

    def take(self, owner: Owner) -> None:
        """Make `owner` the one that is served; raise ConfigError while another is busy."""
        current = self._owner() if self._owner is not None else None
        if current is not None and current.busy:
            raise ConfigError(
                "an engine serves one session at a time, another one still has requests on it; "
                "step that one to its end, close() it, or make another engine"
            )
        self._owner = weakref.ref(owner)

    def leave(self, owner: Owner) -> None:
        """Make way for others, if `owner` is the one that is served."""
        if self.held_by(owner):
            self._owner = None

    def held_by(self, owner: Owner) -> bool:
        """Return whether `owner` is the one that is served."""
        return self._owner is not None and self._owner() is owner

    def require(self, owner: Owner) -> None:
        """Raise ConfigError unless `owner` is the one that is served."""
        if not self.held_by(owner):
            raise ConfigError(
                "a session has its engine until it is closed or another one is made, this one no "
                "longer has it; make a new session"
            )
