"""What a recording has finished so far: files beside the trace, a line for every prompt.

Each process appends to a file of its own, in one write, as soon as a prompt ends; so whatever ends
the process, only prompts under way are lost. The first line holds the settings: a recording goes on
from parts of the same settings only. The lines of all parts together are the trace.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, ValidationError

from stree_autotune.trace.record import Recording
from stree_core.errors import ConfigError, UnwritableFile, reason_of
from stree_core.files import read_limited, write_atomically
from stree_core.profile import Strict

MAX_PART_BYTES = 1 << 30

Settings = Mapping[str, str | int | bool | None]
Append = Callable[[int, Recording], None]


class PartLine(Strict):
    """A finished prompt: its index from 0, its repeated tokens, its ranks as hex digits."""

    prompt: NonNegativeInt
    repeated: NonNegativeInt
    ranks: Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]


@dataclass(frozen=True, slots=True)
class TraceCheckpoint:
    """The parts of the trace that will lie at `output`, recorded with `settings`."""

    output: Path
    settings: Settings

    def begin(self, *, force: bool) -> dict[int, Recording]:
        """Return what earlier runs, and processes beside this one, have finished.

        Raises ConfigError for parts of other settings; with `force` they are deleted.
        """
        found: dict[int, Recording] = {}
        for path in self._paths():
            lines = _whole_lines(path)
            if not lines:
                continue
            difference = self._difference(lines[0])
            if difference is None:
                found |= self._recordings(path, lines[1:])
            elif force:
                path.unlink(missing_ok=True)
            else:
                raise ConfigError(
                    f"{path} was begun with {difference}; use the same settings to go on with it, "
                    "or pass --force to begin anew"
                )
        return found

    @contextmanager
    def appending(self, rank: int) -> Iterator[Append]:
        """Open this process's part; yield a function that adds a finished prompt to it.

        Raises ConfigError when another process has it open or it cannot be written.
        """
        path = self.output.with_suffix(f".part-{rank}.jsonl")
        with explained_writing(path):
            if not path.exists():
                write_atomically(path, _as_line(dict(self.settings)))
            handle = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            _lock(handle, path)
            _cut_torn_line(handle)

            def append(prompt: int, recording: Recording) -> None:
                line = PartLine(
                    prompt=prompt, repeated=recording.num_repeated, ranks=recording.ranks.hex()
                )
                with explained_writing(path):
                    _write_all(handle, _as_line(line.model_dump()))

            yield append
        finally:
            os.close(handle)

    def remove(self) -> None:
        """Delete all parts."""
        for path in self._paths():
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        stem = glob.escape(self.output.stem)
        return sorted(self.output.parent.glob(f"{stem}.part-*.jsonl"))

    def _difference(self, line: bytes) -> str | None:
        """Return the first setting that a part's first line has otherwise, None when none has."""
        try:
            header = json.loads(line)
        except ValueError:
            header = None
        if not isinstance(header, dict):
            return "settings that cannot be read"
        for key in (*self.settings, *header):
            if header.get(key) != self.settings.get(key):
                return f"{key} {header.get(key)} and not {self.settings.get(key)}"
        return None

    def _recordings(self, path: Path, lines: list[bytes]) -> dict[int, Recording]:
        found = {}
        for number, text in enumerate(lines, start=2):
            try:
                line = PartLine.model_validate_json(text)
            except ValidationError as err:
                raise ConfigError(
                    f"{path} line {number} must be a finished prompt, it is damaged; delete the "
                    "file to record its prompts again"
                ) from err
            found[line.prompt] = Recording(bytes.fromhex(line.ranks), line.repeated)
        return found


@contextmanager
def explained_writing(path: Path) -> Iterator[None]:
    """Turn a failure to write, such as a full disk, into ConfigError."""
    try:
        yield
    except (OSError, UnwritableFile) as err:
        cause = err.__cause__ if isinstance(err, UnwritableFile) else err
        reason = reason_of(cause) if isinstance(cause, OSError) else str(err)
        raise ConfigError(
            f"{path} cannot be written ({reason}); what was recorded is kept: make room or "
            "mend the path, and run the same command again"
        ) from err


def _whole_lines(path: Path) -> list[bytes]:
    """Return a part's lines without one that was cut off; none when the part has gone."""
    try:
        return read_limited(path, MAX_PART_BYTES).split(b"\n")[:-1]
    except ConfigError:
        if not path.exists():
            return []
        raise


def _as_line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _write_all(handle: int, line: bytes) -> None:
    if os.write(handle, line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise ConfigError(
            f"one process at a time records into {path}, another one does; wait for it or end it"
        ) from err


def _cut_torn_line(handle: int) -> None:
    """Remove what a killed process has left behind the last whole line."""
    size = os.fstat(handle).st_size
    content = os.pread(handle, size, 0)
    os.ftruncate(handle, content.rfind(b"\n") + 1)
