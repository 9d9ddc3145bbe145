"""What may be shown: no control characters, no passwords, no private folders."""

from __future__ import annotations

import logging
import sys

import pytest

from stree_autotune.cli.commands import main
from stree_autotune.store.origin import command_line
from stree_core.errors import ConfigError
from stree_core.shown_text import clean_command, clean_url, printable, shown

PASSWORD = "correct-horse"
SECRET_URLS = [
    f"postgresql://me:{PASSWORD}@db.example/trees",
    f"postgresql+psycopg://me:{PASSWORD}/with@odd@db.example/trees",
    f"postgresql://me:12/{PASSWORD}@db.example/trees",
    f"mysql://db.example/trees?user=me&password={PASSWORD}",
    f"https://{PASSWORD}@example.org/library",
    f"https://me:{PASSWORD}@example.org:8080/library",
    f"https://example.org/library?token={PASSWORD}",
    f"https://example.org/library#{PASSWORD}",
    f"simplecache::https://me:{PASSWORD}@example.org/x",
    f"s3://key:{PASSWORD}@bucket/x",
    f"sqlite:///trials.db?timeout=3&pw={PASSWORD}",
]


@pytest.mark.parametrize("url", SECRET_URLS)
def test_no_password_of_a_url_is_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PASSWORD not in clean_url(url)
    assert PASSWORD not in shown(f"{url} cannot be read; check {url}.")
    for words in ([url], ["--storage", url], [f"--storage={url}"], ["--library", url, "-o", "x"]):
        monkeypatch.setattr(sys, "argv", ["stree-tune", *words])
        assert PASSWORD not in command_line()
    assert PASSWORD not in clean_command(f"stree-tune --storage '{url}' -o x")
    assert PASSWORD not in str(ConfigError(f"{url} is wrong"))


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org:8080/library",
        "hf://datasets/me/trees@v1/x",
        "sqlite:///trials.db",
        "memory://library",
        "/mnt/trees",
    ],
)
def test_a_plain_url_stays(url: str) -> None:
    assert clean_url(url) == url


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/home/me/trees", "trees"),
        ("--data=/home/me/trees", "--data=trees"),
        ("-o/home/me/x.yaml", "-ox.yaml"),
        ("--draft=/home/me/a,/home/me/b", "--draft=a,b"),
        ("~/trees", "trees"),
        ("file:///home/me/trees", "file:///trees"),
        ("sqlite:////home/me/s.db", "sqlite:///s.db"),
        ("--storage=sqlite:////home/me/s.db", "--storage=sqlite:///s.db"),
        ("PASSWORD=abc", "PASSWORD=***"),
        ("./own/x", "./own/x"),
        ("org/model", "org/model"),
        ("0:100", "0:100"),
    ],
)
def test_commands_name_no_folders_of_one_machine(
    word: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["stree-tune", "probe", word])
    assert command_line().replace("'", "") == f"stree-tune probe {kept}"
    assert clean_command(f"stree-tune probe {word}").replace("'", "") == f"stree-tune probe {kept}"


def test_cleaning_twice_changes_nothing_more() -> None:
    for text in ("stree-tune --gpu h200", "it's 'odd", "stree-tune --data=/a/b -o '/x y/z'"):
        assert clean_command(clean_command(text)) == clean_command(text)
    assert clean_command("stree-tune  --gpu   h200") == "stree-tune  --gpu   h200"


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\x9b", "\n", "\u202e", "\u2028", "\ud800"])
def test_control_characters_are_written_out(character: str) -> None:
    text = printable(f"a{character}b")
    assert character not in text
    assert text.isprintable()
    assert character not in str(ConfigError(f"no {character}"))


def test_letters_of_any_script_stay() -> None:
    text = "Zürich 東京 \U0001f333 · é"
    assert printable(text) == text


def test_neither_errors_nor_log_lines_carry_escapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stree-tune", "show", "\x1b[2Jnone"])
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    with pytest.raises(SystemExit):
        main()
    logging.getLogger("x").warning("left out: \x1b]0;title\x07 https://me:pw@host/x")
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "me:pw" not in err
    assert "\\x1b[2Jnone" in err
