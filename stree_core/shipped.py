"""The data that ships with the package: models, profiles, tables, traces."""

from __future__ import annotations

from pathlib import Path


def shipped_root() -> Path:
    """Return the folder of the data that ships with the package."""
    import stree_profiles

    return Path(next(iter(stree_profiles.__path__)))


def shipped_path(folder: str, name: str | Path) -> Path | None:
    """Return what ships under a bare name, None where nothing does or the name is a path."""
    text = str(name)
    if not text or text.startswith(".") or Path(text).name != text:
        return None
    path = shipped_root() / folder / text
    return path if path.exists() else None
