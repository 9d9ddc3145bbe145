"""Optuna studies: where their trials are kept, and under which name."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalStorage

from stree_core.errors import ConfigError, StreeError, UnwritableFile, reason_of, unwritable
from stree_core.extras import install_command
from stree_core.files import open_regular, require_place

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

_URL = re.compile(r"(?P<dialect>\w+)(?P<driver>\+\w+)?://.+", re.DOTALL)
_POSTGRES_DRIVER = "postgresql+psycopg"


@dataclass(frozen=True, slots=True)
class StudyPlace:
    """Where studies are kept: nowhere but in memory, or in a file or database that is shared.

    `question` tells this question from others in the same place; `seed` is the samplers'.
    """

    storage: BaseStorage | None = None
    question: str = ""
    seed: int = 0

    def open(self, batch_size: int) -> optuna.Study:
        """Return the study of one batch size, with the trials that it has already."""
        # Optuna reports trials, and errors that are raised anyway, on stderr by its own handler.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        name = None
        if self.storage is not None:
            name = f"{self.question} batch {batch_size}"
        return optuna.create_study(
            storage=self.storage,
            study_name=name,
            sampler=optuna.samplers.TPESampler(seed=self.seed % 2**32),
            direction="maximize",
            load_if_exists=True,
        )


def optimize(
    study: optuna.Study, objective: Callable[[optuna.Trial], float], num_trials: int
) -> None:
    """Run trials; raise the storage's own error where it fails, which Optuna's assertion hides."""
    try:
        study.optimize(objective, n_trials=num_trials)
    except AssertionError as err:
        if isinstance(err.__context__, StreeError):
            raise err.__context__ from err
        raise


def open_storage(text: str) -> BaseStorage | None:
    """Open a journal file by its path or a database by its URL; nothing for an empty text.

    Raises ConfigError when the driver is missing or the place cannot be reached.
    """
    if not text:
        return None
    url = _URL.fullmatch(text)
    if url is None:
        return _open_journal(Path(text))
    if url["dialect"] in ("postgres", "postgresql") and not url["driver"]:
        text = _POSTGRES_DRIVER + text[text.index("://") :]
    return _open_database(text)


class _Journal(JournalFileBackend):
    """A journal file whose failures are the project's own.

    Where the disk fails, Optuna's lock of the file raises RuntimeError and AssertionError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(str(path))

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield what stands from a line on."""
        with self._explained():
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines at the end."""
        with self._explained():
            super().append_logs(logs)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise unwritable(self._path, err) from err
        except (RuntimeError, AssertionError) as err:
            cause = err.__context__
            reason = reason_of(cause) if isinstance(cause, OSError) else str(err)
            raise UnwritableFile(
                f"{self._path} cannot be written ({reason}), the trials before are kept; free some "
                "space or name another place with --storage"
            ) from err


def _open_journal(path: Path) -> BaseStorage:
    require_place(path)
    if path.exists():
        with open_regular(path):
            pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(_Journal(path))
    except StreeError:
        raise
    # A file that is no journal fails wherever Optuna first misses something in it.
    except Exception as err:
        raise ConfigError(
            f"--storage {path} must be a journal file that can be written, got "
            f"{type(err).__name__} {err}; name another"
        ) from err


def _open_database(url: str) -> BaseStorage:
    from sqlalchemy.exc import SQLAlchemyError

    shown = re.sub(r"//[^@/]*@", "//", url)
    try:
        # A connection that broke while a tree was measured is made anew.
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as err:
        extra = install_command("postgres") if "psycopg" in url else "install its driver"
        raise ConfigError(f"--storage {shown} needs a driver, {err}; {extra}") from err
    except (SQLAlchemyError, ValueError) as err:
        # Drivers repeat the whole URL, with its password, and the statement on further lines.
        problem = str(err).splitlines()[0].replace(url, shown)
        raise ConfigError(
            f"--storage {shown} must be a database that can be reached, got {problem}; "
            "check the URL, and that the server runs"
        ) from err
