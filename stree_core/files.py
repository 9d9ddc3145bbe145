"""Files that are whole or absent, and YAML that cannot surprise."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from stree_core.errors import CheckpointError, ConfigError, nearest

MAX_JSON_BYTES = 64 << 20
MAX_YAML_BYTES = 4 << 20
MAX_YAML_DEPTH = 24
MAX_YAML_VALUES = 250_000

ModelT = TypeVar("ModelT", bound=BaseModel)

# The C parser is twenty times faster; both are the safe subset of YAML.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates private files; a result is as readable as any other file of its user.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Return a file's bytes; raise ConfigError when it is missing or larger than `max_bytes`."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ConfigError(f"{path} may have at most {max_bytes} bytes, it has {size}; check it")
        return path.read_bytes()
    except OSError as err:
        raise ConfigError(f"{path} cannot be read ({err.strerror}); check the path") from err


def read_json(path: Path) -> dict[str, Any]:
    """Read a model's JSON object; raise CheckpointError when it is missing or holds none."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} must hold a {path.name}, it has none; check the path")
    try:
        content = json.loads(read_limited(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError, ConfigError) as err:
        raise CheckpointError(f"{path} is not valid JSON ({err}); fetch it again") from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; fetch it again")
    return content


def parse_yaml(text: bytes, name: str) -> Any:
    """Parse YAML without tags, anchors, duplicate keys or deep nesting; `name` goes into errors.

    Raises ConfigError.
    """
    try:
        _refuse_surprises(text, name)
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as err:
        problem = getattr(err, "problem", None) or "not valid YAML"
        mark = getattr(err, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{name} must be plain YAML: {problem}{where}; mend that line") from err
    except (UnicodeDecodeError, ValueError) as err:
        raise ConfigError(f"{name} must be plain YAML in UTF-8: {err}; mend it") from err


def load_yaml(path: Path, model: type[ModelT]) -> ModelT:
    """Read a YAML file into `model`; raise ConfigError with one sentence when it does not fit."""
    return validate(parse_yaml(read_limited(path, MAX_YAML_BYTES), str(path)), model, str(path))


def validate(content: Any, model: type[ModelT], name: str) -> ModelT:
    """Check parsed content against `model`; raise ConfigError that names the first offence."""
    try:
        return model.model_validate(content)
    except ValidationError as err:
        raise ConfigError(f"{name}: {_first_offence(err, model)}") from err


def dump_yaml(model: BaseModel) -> bytes:
    """Return the YAML text of `model`: keys in declared order, short lists on one line."""
    content = model.model_dump(mode="json", exclude_none=True)
    return yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100,
        default_flow_style=None,
    ).encode()  # fmt: skip


class _Dumper(_SafeDumper):  # type: ignore[misc]
    """The safe dumper, with a list of paths on as few lines as fit."""


def _represent_list(dumper: Any, values: list[Any]) -> yaml.Node:
    node: yaml.SequenceNode = dumper.represent_sequence("tag:yaml.org,2002:seq", values)
    if values and all(isinstance(v, list) and all(isinstance(i, int) for i in v) for v in values):
        node.flow_style = True
    return node


_Dumper.add_representer(list, _represent_list)


class _StrictLoader(_SafeLoader):  # type: ignore[misc]
    """The safe loader, with duplicate keys refused."""


def _construct_mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float)):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a plain word or number", key_node.start_mark
            )
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} stands twice", key_node.start_mark
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _refuse_surprises(text: bytes, name: str) -> None:
    """Walk the parser's events, which are flat, before anything recursive sees the text."""
    depth = num_values = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{name} must not use YAML anchors or aliases; write values out")
        if isinstance(event, yaml.NodeEvent):
            num_values += 1
        if num_values > MAX_YAML_VALUES:
            raise ConfigError(f"{name} may hold at most {MAX_YAML_VALUES} values; check it")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            raise ConfigError(f"{name} may nest at most {MAX_YAML_DEPTH} levels; flatten it")


def _first_offence(err: ValidationError, model: type[BaseModel]) -> str:
    offences = err.errors(include_url=False)
    # a misspelt key is both unknown and missing; only the first of the two helps
    offence = next((o for o in offences if o["type"] == "extra_forbidden"), offences[0])
    where = ".".join(map(str, offence["loc"])) or "the file"
    if offence["type"] == "extra_forbidden":
        known = _keys_beside(model, offence["loc"])
        return f"unknown key {where}; {nearest(str(offence['loc'][-1]), known)}"
    if offence["type"] == "missing":
        return f"key {where} is required; add it"
    value = repr(offence["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    message = offence["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {value}; mend it"


def _keys_beside(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that would have been valid where `loc` points."""
    current: Any = model
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(part)
        # a part that is no field is the key of a mapping whose values are models
        if field is not None:
            current = _model_inside(field.annotation)
    return list(getattr(current, "model_fields", {}))


def _model_inside(annotation: Any) -> Any:
    """Return the pydantic model inside an annotation such as `tuple[Row, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_inside(argument)
        if found is not None:
            return found
    return None
