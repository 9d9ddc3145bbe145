"""Whether a file may go into a library or out of it: each kind is read by its own schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stree_autotune.search import Certificate
from stree_autotune.store import GpuSpec, RuntimeTable
from stree_autotune.trace import MAX_FILE_BYTES, parse_trace, trace_meta
from stree_core.errors import ConfigError
from stree_core.files import MAX_YAML_BYTES, dump_yaml, read_limited, validate
from stree_core.profile import Profile, Strict
from stree_core.shown_text import clean_command, without_secrets
from stree_core.strict_yaml import parse_yaml

TRACE_SUFFIX = ".safetensors"
_SCHEMAS: dict[str, type[Strict]] = {
    "gpus": GpuSpec,
    "runtime": RuntimeTable,
    "traces": Certificate,
    "tuned": Profile,
}


def check_shared(path: str, data: bytes) -> Strict | None:
    """Return the content of a file by its path inside a library; ConfigError when it is broken.

    None for a certificate in a format of a later version.
    """
    if path.endswith(TRACE_SUFFIX):
        return parse_trace(data, path).meta
    if not path.endswith(".yaml"):
        return None
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(f"{path} may have at most {MAX_YAML_BYTES} bytes, it has more; check it")
    return validate(parse_yaml(data, path), _SCHEMAS[path.partition("/")[0]], path)


def shareable(path: str, file: Path) -> bytes:
    """Return the bytes of a file as it may be shared: a profile's command goes without secrets.

    Raises ConfigError for a broken file, and for another one whose command has a password: profiles
    name those by their digests, so that they cannot be changed on the way.
    """
    data = read_limited(file, MAX_FILE_BYTES)
    content = check_shared(path, data)
    if content is None:
        return data
    command = _written_command(path, data)
    if isinstance(content, Profile):
        return data if clean_command(command) == command else dump_yaml(content)
    if without_secrets(command) != command:
        raise ConfigError(
            f"{file} has a password in the command that made it; make it again without one, "
            "or leave it out"
        )
    return data


def _written_command(path: str, data: bytes) -> str:
    """Return the command as the file has it, which its schema would clean; empty without one."""
    raw: Any = trace_meta(data) if path.endswith(TRACE_SUFFIX) else parse_yaml(data, path)
    made = raw.get("measured" if path.startswith("runtime/") else "provenance", {})
    return str(made.get("command", "")) if isinstance(made, dict) else ""
