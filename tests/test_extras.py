"""The optional dependencies: their command is the one that installs them here."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from stree_core import extras
from stree_core.extras import DISTRIBUTION, install_command

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_checkout_installs_itself() -> None:
    assert shlex.split(install_command("hf")) == ["pip", "install", "-e", f"{ROOT}[hf]"]


def test_an_installed_package_names_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "site-packages" / "stree_core" / "extras.py"
    monkeypatch.setattr(extras, "__file__", str(module))
    assert install_command("hf") == "pip install 'stree-tune[hf]'"
    assert PROJECT["name"] == DISTRIBUTION


def test_messages_name_extras_that_exist() -> None:
    optional = PROJECT["optional-dependencies"]
    for word in (word for needed in optional.values() for word in needed):
        name, _, listed = word.rstrip("]").partition("[")
        if name.startswith("stree"):
            assert name == DISTRIBUTION
            assert set(listed.split(",")) <= set(optional)
    folders = (ROOT / "stree_core", ROOT / "autotune" / "stree_autotune")
    texts = [path.read_text() for folder in folders for path in folder.rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"install_command\(['\"](\w+)", text)}
    assert {"hf", "data", "share", "postgres"} == named
    assert named <= set(optional)
    assert not any("pip install 'stree" in text for text in texts), "one place says how"
