"""Files under a URL, by whichever fsspec driver it names: read whole and limited, written whole.

Folders of this machine are read and written by stree_core.files instead: fsspec has no lock, and
its transactions move a temporary file that may lie on another disk, so that a reader sees a part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stree_core.errors import ConfigError, StreeError
from stree_core.extras import install_command
from stree_core.files import locked, read_limited, require_place, write_atomically
from stree_core.shown_text import clean_url, without_secrets

logger = logging.getLogger(__name__)

LOCK = ".lock"


class Unreachable(StreeError):
    """A library cannot be read or written now."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder under a URL, and the file system that it belongs to; `name` is for messages."""

    name: str
    root: str
    files: Any

    @classmethod
    def open(cls, url: str) -> Store:
        """Return the folder of a URL or a path; nothing is read yet.

        Raises ConfigError for an unknown protocol and for one whose driver is not installed.
        """
        import fsspec

        name = clean_url(url)
        try:
            files, root = fsspec.url_to_fs(url)
        except ImportError as err:
            raise ConfigError(
                f"{name} needs a package that is not installed ({err}); {install_command('share')} "
                "for http and hf"
            ) from err
        # Drivers parse URLs with whatever their own libraries raise.
        except Exception as err:
            reason = _reason(err).replace(url, name)
            raise ConfigError(
                f"{name} must be a path or a URL that fsspec knows ({reason}); check it"
            ) from err
        return cls(name, str(root).rstrip("/"), files)

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return a file's bytes, None when it is not there.

        Raises ConfigError when it is larger than `max_bytes`, Unreachable when it cannot be read.
        """
        if self.is_local:
            path = Path(self._path(name))
            return read_limited(path, max_bytes) if path.exists() else None
        with self._failures("read"):
            try:
                with self.files.open(self._path(name), "rb") as file:
                    data = bytes(file.read(max_bytes + 1))
            except FileNotFoundError as err:
                if not _is_absent(err):
                    raise
                return None
        if len(data) > max_bytes:
            raise ConfigError(
                f"{name} of {self.name} may have {max_bytes} bytes and has more; do not use it"
            )
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole: locally by renaming, elsewhere as one object."""
        path = self._path(name)
        if self.is_local:
            write_atomically(Path(path), data)
            return
        with self._failures("written"):
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.files.pipe_file(path, data)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from changing a folder of this machine; other stores have no lock."""
        if not self.is_local:
            logger.info(
                "note: %s has no lock; it is compared before it is changed, but let one push at a "
                "time go there",
                self.name,
            )
            yield
            return
        with locked(Path(self._path(LOCK)), self.name):
            yield

    def require_place(self) -> None:
        """Raise UnwritableFile when a folder of this machine cannot be written to."""
        if self.is_local:
            require_place(Path(self._path("file")))

    def refresh(self) -> None:
        """Forget what the driver keeps of earlier reads."""
        self.files.invalidate_cache()

    @property
    def is_local(self) -> bool:
        """True for a folder of this machine."""
        protocol = self.files.protocol
        return "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _failures(self, verb: str) -> Iterator[None]:
        """Turn whatever a driver raises into Unreachable."""
        try:
            yield
        # Drivers raise the classes of their own HTTP clients.
        except Exception as err:
            text = _reason(err.__cause__ or err)
            raise Unreachable(f"{self.name} cannot be {verb} ({text}); check the URL") from err


def _reason(err: BaseException) -> str:
    """Return the first line of a driver's error, without what it repeats of the URL."""
    return without_secrets(next(iter(str(err).splitlines()), type(err).__name__))


def _is_absent(err: FileNotFoundError) -> bool:
    """Tell a missing file from a missing server: drivers raise this class for both."""
    cause = err.__cause__
    response = getattr(cause, "response", None)
    status = getattr(cause, "status", None) or getattr(response, "status_code", None)
    return cause is None or status == 404
