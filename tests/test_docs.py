"""The docs: pages that the code says, every key of a profile, links, and snippets that run.

docs/snippets.py says which blocks run, and which output is compared.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

import stree_autotune
import stree_core
from stree_autotune.cli.commands import app
from stree_core.profile import Profile, load_profile, save_profile

ROOT = Path(__file__).resolve().parents[1]


def docs_script(name: str) -> ModuleType:
    """Return a script of docs, which is no package's module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SNIPPETS = docs_script("snippets")
PAGES: list[Path] = SNIPPETS.PAGES


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_run(page: Path) -> bool:
    return any(not block["why"] for block in SNIPPETS.BLOCK.finditer(page.read_text()))


@pytest.mark.parametrize("name", ["commands.md", "api.md"])
def test_commands_flags_and_public_names_change_with_their_page_only(name: str) -> None:
    page = ROOT / "docs" / name
    written = page.read_text().splitlines()
    generated = docs_script("generate").pages()[page].splitlines()
    assert written == generated, "run `make docs`, look at the diff"


def test_tables_and_marked_numbers_are_those_of_the_results_files() -> None:
    for page, text in docs_script("generate").marked_pages().items():
        assert page.read_text().splitlines() == text.splitlines(), f"{page}: run `make docs`"


def test_figures_show_the_rows_of_their_results_files() -> None:
    assert docs_script("generate").outdated_figures() == [], "run `make docs`"


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Return the dotted name of every key that a file of this schema may have."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from keys_of(inner, f"{prefix}{name}.")


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def test_every_key_of_a_profile_is_documented_and_nothing_else() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    text = page.partition("\n## The profile\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `([a-z0-9_.]+)` \|", text, re.MULTILINE)
    assert documented == list(dict.fromkeys(keys_of(Profile)))


def messages() -> str:
    """Return every text of the packages, one a line, with … for what a message fills in."""
    lines = []
    for package in (stree_core, stree_autotune):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                    lines.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    lines.append(node.value)
    return "\n".join(lines)


def test_messages_in_the_docs_are_the_code_s() -> None:
    text = (ROOT / "docs" / "get-started.md").read_text()
    quoted = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(quoted) > 5
    known = messages()
    for message in quoted:
        pattern = r"[^\n]*".join(re.escape(part.strip()) for part in message.split("…"))
        assert re.search(pattern, known), message


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Return the fragments of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if is_run(page)], ids=name_of)
def test_snippets_run_and_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    assert SNIPPETS.filled(page.read_text(), tmp_path) == page.read_text(), "run `make docs`"


def calls() -> Iterator[tuple[str, list[str]]]:
    """Yield every call of stree-tune that is shown but not run, with where it stands."""
    shown = [
        (page, block["text"])
        for page in PAGES
        for block in SNIPPETS.BLOCK.finditer(page.read_text())
        if block["why"]
    ]
    shown += [(script, script.read_text()) for script in sorted(ROOT.glob("examples/*.sh"))]
    for page, text in shown:
        for line in re.sub(r"\\\n", " ", text).split("\n"):
            if re.match(r"\s*(exec )?stree-tune ", line):
                yield name_of(page), shlex.split(line, comments=True)


def test_shown_commands_and_their_flags_exist() -> None:
    group: Any = typer.main.get_command(app)
    checked = 0
    for where, words in calls():
        words = words[words.index("stree-tune") + 1 :]
        command = group.commands[words[0]] if words[0][0] != "-" else group
        known = {opt for parameter in command.params for opt in parameter.opts} | {"--help"}
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert flags <= known, (where, words, flags - known)
        checked += 1
    assert checked > 5


def test_the_example_of_embedding_runs(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "embed.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    ended = re.findall(r"^  (\w+), (\d+) tokens in (\d+) steps$", run.stdout, re.MULTILINE)
    assert len(ended) == 4
    assert all(int(tokens) > int(steps) for _, tokens, steps in ended), "drafts are accepted"


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/*.sh")), ids=name_of)
def test_examples_are_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    assert f"]({script.name})" in (script.parent / "README.md").read_text()


@pytest.mark.parametrize(
    ("script", "server", "profile", "words"),
    [
        ("serve_vllm", "vllm", "h200--demo-target--demo-draft--demo", "--speculative-config"),
        ("serve_vllm", "vllm", "off.yaml", ""),
        (
            "serve_sglang",
            "python",
            "h200--demo-target--demo-draft--demo",
            "--speculative-num-steps",
        ),
        ("serve_sglang", "python", "off.yaml", ""),
    ],
)
def test_servers_start_with_what_a_profile_says(
    script: str, server: str, profile: str, words: str, tmp_path: Path
) -> None:
    gsm8k = load_profile(ROOT / "profiles/tuned/h200--demo-target--demo-draft--gsm8k.yaml")
    off = next(row for row in gsm8k.policy if row.verdict == "off")
    save_profile(gsm8k.model_copy(update={"policy": (off,)}), tmp_path / "off.yaml")
    stand_in = tmp_path / server
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    tools = Path(sys.executable).parent
    run = subprocess.run(
        [ROOT / "examples" / f"{script}.sh", profile, "org/target", "org/draft", "--port", "1"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    given = run.stdout.split("\n")
    assert "org/target" in given
    assert given[-3:] == ["--port", "1", ""]
    assert ("--speculative" in run.stdout) == bool(words)
    assert not words or words in given


def test_the_changelog_knows_the_version() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version is not None
    assert f"\n## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
    # one place: everything else asks the installed distribution
    for package in (stree_core, stree_autotune):
        sources = Path(package.__path__[0]).rglob("*.py")
        assert not any(f'"{version[1]}"' in source.read_text() for source in sources)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_fences_say_what_they_hold(page: Path) -> None:
    """A command outside a fence of `sh` would never be tried."""
    for info, text in re.findall(r"^```([a-z]*)\n(.*?)^```$", page.read_text(), re.M | re.S):
        first = text.lstrip().split("\n", maxsplit=1)[0]
        is_command = first.startswith(("stree-tune ", "pip ", "make ", "python "))
        assert not (info in ("", "bash", "shell") and is_command), first
