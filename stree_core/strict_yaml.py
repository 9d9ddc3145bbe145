"""YAML that cannot surprise: no tags, anchors, duplicate keys, deep nesting or odd scalars."""

from __future__ import annotations

import re
from typing import Any

import yaml

from stree_core.errors import ConfigError

MAX_YAML_DEPTH = 24
MAX_YAML_VALUES = 250_000

# The C parser is twenty times faster; both are the safe subset of YAML.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_TAG = "tag:yaml.org,2002:"
_WORDS = r"~|null|Null|NULL|"
_BOOLS = r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
_INTS = r"[-+]?(?:0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)"
_FLOATS = (
    r"[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def parse_yaml(text: bytes, name: str) -> Any:
    """Parse YAML without tags, anchors, duplicate keys or deep nesting; `name` goes into errors.

    Raises ConfigError.
    """
    try:
        _refuse_surprises(text, name)
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as err:
        problem = getattr(err, "problem", None) or "not valid YAML"
        mark = getattr(err, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{name} must be plain YAML: {problem}{where}; mend that line") from err
    except (UnicodeDecodeError, ValueError) as err:
        raise ConfigError(f"{name} must be plain YAML in UTF-8: {err}; mend it") from err
    if content is None:
        raise ConfigError(f"{name} holds no YAML, it may have been cut short; make it again")
    return content


def format_yaml(content: Any) -> bytes:
    """Return the YAML text of plain content: keys in their order, short lists on one line."""
    text: str = yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100,
        default_flow_style=None,
    )  # fmt: skip
    return text.encode()


class _Dumper(_SafeDumper):  # type: ignore[misc]
    """The safe dumper, with a list of paths on as few lines as fit."""


def _represent_list(dumper: Any, values: list[Any]) -> yaml.Node:
    node: yaml.SequenceNode = dumper.represent_sequence("tag:yaml.org,2002:seq", values)
    if values and all(isinstance(v, list) and all(isinstance(i, int) for i in v) for v in values):
        node.flow_style = True
    return node


_Dumper.add_representer(list, _represent_list)


class _StrictLoader(_SafeLoader):  # type: ignore[misc]
    """The safe loader, with duplicate keys refused and only plain words and numbers resolved.

    Dates, numbers to base 60 and merge keys stay text: nothing here needs them, and reading them
    fails in ways of its own.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as the base class has it


for _kind, _pattern, _first in (
    ("null", _WORDS, ["~", "n", "N", ""]),
    ("bool", _BOOLS, list("yYnNtTfFoO")),
    ("int", _INTS, list("-+0123456789")),
    ("float", _FLOATS, list("-+0123456789.")),
):
    _StrictLoader.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), _first)


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


_StrictLoader.add_constructor(_TAG + "map", _construct_mapping)


def _refuse_surprises(text: bytes, name: str) -> None:
    """Walk the parser's events, which are flat, before anything recursive sees the text."""
    depth = num_values = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{name} must not use YAML anchors or aliases; write values out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            where = f" at line {event.start_mark.line + 1}" if event.start_mark else ""
            raise ConfigError(
                f"{name} must be plain YAML: it has the tag {tag}{where}; remove tags"
            )
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
