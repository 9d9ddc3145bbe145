"""Files under a URL, by whichever fsspec driver it names: read whole and limited, written whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stree_core.errors import ConfigError, StreeError
from stree_core.files import write_atomically

EXTRA = "pip install 'stree[share]'"


class Unreachable(StreeError):
    """A library cannot be read or written now."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder under a URL, and the file system that it belongs to."""

    url: str
    root: str
    files: Any

    @classmethod
    def open(cls, url: str) -> Store:
        """Return the folder of a URL or a path; nothing is read yet.

        Raises ConfigError for an unknown protocol and for one whose driver is not installed.
        """
        import fsspec

        try:
            files, root = fsspec.url_to_fs(url)
        except ImportError as err:
            raise ConfigError(
                f"{url} needs a package that is not installed ({err}); {EXTRA} for http and hf"
            ) from err
        except ValueError as err:
            raise ConfigError(f"{url} must be a path or a URL that fsspec knows ({err})") from err
        return cls(url, str(root).rstrip("/"), files)

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return a file's bytes, None when it is not there.

        Raises ConfigError when it is larger than `max_bytes`, Unreachable when it cannot be read.
        """
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
                f"{name} of {self.url} may have {max_bytes} bytes and has more; do not use it"
            )
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole: locally by renaming, elsewhere as one object."""
        path = self._path(name)
        with self._failures("written"):
            if self.is_local:
                write_atomically(Path(path), data)
            else:
                self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.files.pipe_file(path, data)

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
            reason = err.__cause__ or err
            text = (str(reason) or type(reason).__name__).splitlines()[0]
            raise Unreachable(f"{self.url} cannot be {verb} ({text}); check the URL") from err


def _is_absent(err: FileNotFoundError) -> bool:
    """Tell a missing file from a missing server: drivers raise this class for both."""
    cause = err.__cause__
    response = getattr(cause, "response", None)
    status = getattr(cause, "status", None) or getattr(response, "status_code", None)
    return cause is None or status == 404
