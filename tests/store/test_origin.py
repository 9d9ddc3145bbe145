"""Who made a file: the distribution's version, the commit, the command without secrets."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from stree_autotune.store.origin import PACKAGES, git_sha, provenance, version_of
from stree_core.extras import DISTRIBUTION

ROOT = Path(__file__).resolve().parents[2]


def test_provenance_says_what_made_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/stree-tune", "--storage", "pg://me:secret@host"])
    made = provenance(7)
    assert made.version == importlib.metadata.version(DISTRIBUTION)
    assert made.seed == 7
    assert set(made.versions) == {"python", *PACKAGES}
    assert made.versions["numpy"] == importlib.metadata.version("numpy")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", made.git_sha)
    assert made.git_sha == git_sha()
    assert made.command.startswith("stree-tune --storage")
    assert "secret" not in made.command
    assert version_of("no-such-distribution") == "absent"


def test_the_changelog_begins_with_the_version_that_is_built() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
