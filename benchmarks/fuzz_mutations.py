"""Seeded mutations of files: of their bytes, and of what the bytes mean."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml
from safetensors import deserialize

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 256, 2**31, 2**32, 2**53, 2**63, -(2**63), 10**18, 10**30,
    0.0, -0.0, 0.5, 1e-300, 1e300, -1e300, 5e-324, float("inf"), float("nan"), "", " ", "0", "-1",
    "nan", "../../x", "/etc/passwd", "\x1b[2Jx", "\u202ex", "\x00", "a" * 1000, "é\U0001f333",
    "https://me:password@host/x", [], {}, [[]], [0], [None], {"": 0}, {"a": {"b": []}},
    [0] * 300, ["x"] * 300, "{}", "!!int ''",
)  # fmt: skip
ODD_BYTES = (b"\x00", b"\xff", b"\x1b[2J", b"\xed\xa0\x80", b"\n", b"\r", b"\t", b"'", b'"', b"{",
             b"[", b"&a ", b"*a", b"!!bool x", b": ", b"- ", b"?", b"---\n", b"%", b"9" * 40,
             b"\\ud800", b"1e999", b"\xef\xbb\xbf", b"\xc2\x9b")  # fmt: skip


class Form(NamedTuple):
    """How bytes become content that can be changed, and bytes again."""

    split: Callable[[bytes], Any]
    join: Callable[[Any], bytes]


def mutate(generator: random.Random, data: bytes, form: Form | None) -> bytes:
    """Return a mutation: two of three of the content where there is a form, else of the bytes."""
    if form is None or generator.random() < 1 / 3:
        for _ in range(generator.choice((1, 1, 2, 4))):
            data = _mutated_bytes(generator, data)
        return data
    content = form.split(data)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        content = _mutated_content(generator, content)
    return form.join(content)


def _mutated_bytes(generator: random.Random, data: bytes) -> bytes:
    at = generator.randrange(len(data) + 1)
    end = min(len(data), at + generator.choice((1, 1, 2, 8, 64, 1024)))
    kind = generator.randrange(6)
    if kind == 0:
        flipped = bytes(byte ^ (1 << generator.randrange(8)) for byte in data[at : at + 1])
        return data[:at] + flipped + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:at] + data[at:end] * generator.choice((2, 3, 20)) + data[end:]
    if kind == 3:
        return data[:at] + generator.choice(ODD_BYTES) + data[at:]
    if kind == 4:
        return data[:at] + generator.randbytes(end - at) + data[end:]
    return data[:at]


def _mutated_content(generator: random.Random, content: Any) -> Any:
    """Return a copy with one value changed, dropped, doubled, renamed or swapped for another."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    if not places:
        return generator.choice(ODD_VALUES)
    if generator.random() < 0.4:
        # a value of the right kind goes further than a wrong one
        leaves = [(p, k) for p, k in places if not isinstance(p[k], dict | list)]
        parent, key = generator.choice(leaves or places)
        parent[key] = _near(generator, parent[key])
        return content
    parent, key = generator.choice(places)
    value, kind = parent[key], generator.randrange(9)
    if kind <= 2:
        parent[key] = copy.deepcopy(generator.choice(ODD_VALUES))
    elif kind == 3:
        parent[key] = _near(generator, value)
    elif kind == 4:
        del parent[key]
    elif kind == 5:
        other, name = generator.choice(places)
        parent[key] = copy.deepcopy(other[name])
    elif kind == 6 and isinstance(parent, dict):
        parent[generator.choice(("x", "", "\x1b", f"{key}s", "kind"))] = parent.pop(key)
    elif kind == 6:
        parent.insert(key, copy.deepcopy(value))
    elif kind == 7:
        parent[key] = _nested(value, generator.choice((2, 20, 60)))
    else:
        parent[key] = str(value) if not isinstance(value, str) else [value]
    return content


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Return every place of a value, as its parent and its key."""
    found: list[tuple[Any, Any]] = []
    waiting = [content] if isinstance(content, dict | list) else []
    while waiting:
        parent = waiting.pop()
        keys = parent if isinstance(parent, dict) else range(len(parent))
        for key in list(keys):
            found.append((parent, key))
            if isinstance(parent[key], dict | list):
                waiting.append(parent[key])
    return found


def _near(generator: random.Random, value: Any) -> Any:
    """Return a value of the same kind that is a little or a lot off."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return generator.choice((-value, value + 1, value - 1, value * 2, value * 1000, value / 3))
    if isinstance(value, str) and value:
        at = generator.randrange(len(value))
        return value[:at] + generator.choice("x0/\x1b\n ✓") + value[at + 1 :]
    if isinstance(value, list):
        return value[::-1] if generator.random() < 0.5 else value * 3
    return value


def _nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def _split_lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def _join_lines(content: Any) -> bytes:
    rows = content if isinstance(content, list) else [content]
    return b"".join(_join_json(row) + b"\n" for row in rows)


def _join_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def _join_yaml(content: Any) -> bytes:
    text: str = yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, default_flow_style=None)
    return text.encode("utf-8", "surrogatepass")


class _PlainDumper(yaml.SafeDumper):
    """Writes values out where they stand twice: anchors are refused anyway."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _split_tensors(data: bytes) -> Any:
    """Return the header of a safetensors file, and its bytes as Latin-1 text."""
    size = int.from_bytes(data[:8], "little")
    return {"header": json.loads(data[8 : 8 + size]), "body": data[8 + size :].decode("latin-1")}


def _join_tensors(content: Any) -> bytes:
    if not isinstance(content, dict):
        return _join_json(content)
    header = _join_json(content.get("header"))
    body = content.get("body")
    raw = body.encode("latin-1", "replace") if isinstance(body, str) else _join_json(body)
    return len(header).to_bytes(8, "little") + header + raw


def _split_trace(data: bytes) -> Any:
    """Return a trace's meta, offsets and ranks as plain content."""
    tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
    size = int.from_bytes(data[:8], "little")
    meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["meta"])
    raw = bytes(tensors["offsets"]["data"])
    offsets = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
    return {"meta": meta, "offsets": offsets, "ranks": list(bytes(tensors["ranks"]["data"]))}


def _join_trace(content: Any) -> bytes:
    """Write a trace whose digest is right, whatever it says: past the first check."""
    content = content if isinstance(content, dict) else {}
    meta = json.dumps(content.get("meta"))
    offsets = b"".join(_int64(value) for value in _list(content.get("offsets")))
    ranks = bytes(_whole(value) % 256 for value in _list(content.get("ranks")))
    digest = hashlib.sha256(meta.encode() + ranks + offsets).hexdigest()
    header = _join_json({
        "__metadata__": {"meta": meta, "sha256": digest},
        "offsets": {
            "dtype": "I64",
            "shape": [len(offsets) // 8],
            "data_offsets": [0, len(offsets)],
        },
        "ranks": {
            "dtype": "U8",
            "shape": [len(ranks)],
            "data_offsets": [len(offsets), len(offsets) + len(ranks)],
        },
    })  # fmt: skip
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + offsets + ranks


def _int64(value: Any) -> bytes:
    return (_whole(value) % 2**64).to_bytes(8, "little")


def _whole(value: Any) -> int:
    finite = isinstance(value, int) or (isinstance(value, float) and abs(value) < 1e300)
    return int(value) if finite else 0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


JSON = Form(json.loads, _join_json)
LINES = Form(_split_lines, _join_lines)
YAML = Form(yaml.safe_load, _join_yaml)
TENSORS = Form(_split_tensors, _join_tensors)
TRACE = Form(_split_trace, _join_trace)
