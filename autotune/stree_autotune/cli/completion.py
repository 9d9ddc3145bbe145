"""What a shell offers behind a flag: the names that the library knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from stree_core.errors import StreeError

if TYPE_CHECKING:
    from stree_autotune.store import Library


def gpus(incomplete: str) -> list[str]:
    """Return the GPUs whose names start like this."""
    return _starting(incomplete, lambda library: library.gpu_names())


def datasets(incomplete: str) -> list[str]:
    """Return the datasets whose names start like this."""
    return _starting(incomplete, lambda library: library.dataset_names())


def models(incomplete: str) -> list[str]:
    """Return the models whose names start like this."""
    return _starting(incomplete, lambda library: library.model_names())


def profiles(incomplete: str) -> list[str]:
    """Return the tuned profiles whose names start like this; files are the shell's own offer."""
    return _starting(incomplete, lambda library: (path.stem for path in library.profile_paths()))


def _starting(incomplete: str, names: Callable[[Library], Iterable[str]]) -> list[str]:
    # only a shell that completes needs the library here
    from stree_autotune.store import Library

    try:
        return sorted(name for name in set(names(Library.open())) if name.startswith(incomplete))
    except StreeError:
        # there is nowhere to show an error while somebody types
        return []
