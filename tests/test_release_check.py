"""The release checklist's own judgement; its steps run by `make release-check`."""

from __future__ import annotations

from pathlib import Path

import pytest
import release_check

ROOT = Path(__file__).resolve().parents[1]


def test_the_commands_of_readme_are_found() -> None:
    text = (ROOT / "README.md").read_text()
    assert release_check.readme_commands(text) == [["make", "tune"], ["make", "test"]]
    with pytest.raises(release_check.StepFailedError, match="two make commands"):
        release_check.readme_commands("```sh\npip install stree\n```\n")


def test_the_changelog_begins_with_the_version(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0\n\n## 1.1.0\n")
    release_check.changelog(tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.3.0\n\n## 1.2.0\n")
    with pytest.raises(release_check.StepFailedError, match=r"begins with 1\.3\.0"):
        release_check.changelog(tmp_path)


def test_a_step_that_fails_says_what_was_printed(tmp_path: Path) -> None:
    with pytest.raises(release_check.StepFailedError, match="no such thing"):
        release_check.run("sh", "-c", "echo no such thing; exit 3", folder=tmp_path)
