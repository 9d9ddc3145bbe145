"""The optional dependencies by name, and the command that installs them."""

from __future__ import annotations

import shlex
from pathlib import Path

DISTRIBUTION = "stree-tune"


def install_command(extra: str) -> str:
    """Return the command that adds an extra: to this checkout, else to the installed wheel."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{root}[{extra}]')}"
    return f"pip install {shlex.quote(f'{DISTRIBUTION}[{extra}]')}"
