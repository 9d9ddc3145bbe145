"""Text that may be shown and kept: no control characters, no passwords, no private folders.

Names and commands come from files and shells; they reach terminals, pages, logs and shared files.
"""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath

MAX_COMMAND_CHARS = 4000

# C0 and C1 controls, line and paragraph separators, direction marks, halves of surrogate pairs
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://[^\s'\"`<>|]+")
_ASSIGNMENT = re.compile(
    r"(?i)\b((?:pass(?:word|wd|phrase)?|pwd|secret|token|(?:api|access)[-_]?key)=)[^\s&;'\"`]+"
)
_SHORT_FLAG = re.compile(r"-[A-Za-z](?=[/~])")
_LOCAL_SCHEMES = ("file", "local")


def printable(text: str) -> str:
    """Return `text` with control characters written as escapes, such as \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def require_printable(text: str) -> str:
    """Return `text`; raise ValueError when it has a control character."""
    if _CONTROL.search(text):
        raise ValueError("text has no control characters")
    return text


def shown(text: str) -> str:
    """Return `text` as messages may show it: printable, without what is secret in URLs."""
    return printable(without_secrets(text))


def without_secrets(text: str) -> str:
    """Return `text` without the user, password and query of every URL, and password=... values."""
    return _ASSIGNMENT.sub(r"\1***", _URL.sub(_clean_match, text))


def clean_url(url: str) -> str:
    """Return a URL without user, password and query; anything else as it is."""
    scheme, colon, rest = url.partition("://")
    if not colon:
        return url
    first = rest.partition("/")[0]
    # a password that was not percent-encoded may hold any character, so the last @ counts
    if "@" in rest and ("@" in first or ":" in first):
        rest = rest.rpartition("@")[2]
    return scheme + colon + re.split("[?#]", rest, maxsplit=1)[0]


def clean_command(command: str) -> str:
    """Return a command line as it may be shared; one that needs no cleaning stays as it is."""
    try:
        words = shlex.split(command)
    except ValueError:
        return printable(without_secrets(command))[:MAX_COMMAND_CHARS]
    cleaned = [clean_word(word) for word in words]
    text = command if cleaned == words else shlex.join(cleaned)
    return printable(text)[:MAX_COMMAND_CHARS]


def clean_word(word: str) -> str:
    """Return a word of a command with absolute paths cut to their last part, and no secrets.

    Files are shared: where one machine keeps its folders is of no use on another.
    """
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("-"):
        return f"{flag}={clean_word(value)}"
    short = _SHORT_FLAG.match(word)
    if short is not None:
        return short[0] + clean_word(word[short.end() :])
    if "://" in word:
        return without_secrets(_without_folders(clean_url(word)))
    return without_secrets(",".join(_last_part(part) for part in word.split(",")))


def _clean_match(found: re.Match[str]) -> str:
    """Clean a URL inside a sentence, whose punctuation may follow it."""
    url = found[0].rstrip(";,.)")
    return clean_url(url) + found[0][len(url) :]


def _without_folders(url: str) -> str:
    """Cut the absolute path of a URL of this machine: file:///home/me/x, sqlite:////home/me/x."""
    scheme, _, rest = url.partition("://")
    if rest.startswith("/") and scheme.rpartition("::")[2] in _LOCAL_SCHEMES:
        return f"{scheme}:///{_last_part(rest)}"
    if rest.startswith("//"):
        return f"{scheme}:///{_last_part(rest[1:])}"
    return url


def _last_part(path: str) -> str:
    return PurePosixPath(path).name if path.startswith(("/", "~")) else path
