"""Typed reading of a model's config: every value has a kind and bounds, checked before use."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stree_core.errors import brief

Config = dict[str, Any]

# Keys that change nothing about how a trained model runs: training, bookkeeping, tokens that only
# a tokenizer adds, how other programs schedule the same arithmetic, and how positions of images
# enter rotations: those of text are the same on every axis.
_WITHOUT_EFFECT = frozenset((
    "_name_or_path", "adapter_rank", "architectures", "attention_dropout", "auto_map",
    "bos_token_id", "chunk_size", "chunk_size_feed_forward", "dtype", "hidden_dropout", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "mamba_chunk_size", "mamba_ssm_dtype",
    "model_type", "mrope_interleaved", "mrope_section", "num_logits_to_keep", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type",
    "rescale_prenorm_residual", "return_dict", "router_aux_loss_coef", "time_step_floor",
    "time_step_max", "time_step_min", "time_step_rank", "torch_dtype", "transformers_version",
    "use_cache", "use_mamba_kernels", "use_mem_eff_path", "z_loss_coefficient",
))  # fmt: skip
_NEAR = 0.6


class Refused(Exception):
    """A config that cannot be run; its text says the rule, the value and the remedy."""


def refuse_value(key: str, value: object, supported: str) -> Refused:
    """Return the refusal of a setting that would change the result and is not implemented."""
    return Refused(
        f"{key} = {brief(value)} is not supported, only {supported}; "
        "use a checkpoint without that setting"
    )


@dataclass(frozen=True, slots=True)
class Bound:
    """The least and greatest whole number that a kind of count may have."""

    least: int
    most: int


# Several times what the largest published models have.
WIDTH = Bound(1, 1 << 20)
LAYERS = Bound(1, 1024)
HEADS = Bound(1, 1 << 14)
HEAD_DIM = Bound(1, 1 << 12)
EXPERTS = Bound(1, 1024)
CONV_WIDTH = Bound(2, 16)
EXPANSION = Bound(1, 64)
VOCABULARY = Bound(1, 1 << 24)
TOKEN_ID = Bound(0, (1 << 24) - 1)
POSITIONS = Bound(1, 1 << 31)
_MAX_NUMBER = 1e15


class Keys:
    """The keys of one JSON object, read by kind; a key may have several spellings.

    Spellings that stand side by side must agree. Every reader raises Refused for a value that is
    missing, of another kind or out of bounds. A `null` counts as missing.
    """

    def __init__(self, values: Config, file: str = "config.json", prefix: str = "") -> None:
        self.values = values
        self.file = file
        self._prefix = prefix
        self._read: set[str] = set()
        self._sections: dict[str, Keys] = {}

    def has(self, *names: str) -> bool:
        """True when one of the spellings stands there with a value."""
        return any(self.values.get(name) is not None for name in names)

    def count(self, bound: Bound, *names: str, default: int | None = None) -> int:
        """Read a whole number."""
        value = self.optional_count(bound, *names)
        if value is not None:
            return value
        if default is None:
            raise self.missing(names[0])
        return default

    def optional_count(self, bound: Bound, *names: str) -> int | None:
        """Read a whole number, None where there is none."""
        name, value = self._find(names)
        return None if value is None else self._whole(name, value, bound)

    def counts(self, bound: Bound, name: str, most: int) -> list[int] | None:
        """Read a list of up to `most` whole numbers, None where there is none."""
        values = self._list(name, most)
        if values is None:
            return None
        return [self._whole(f"{name}[{i}]", value, bound) for i, value in enumerate(values)]

    def number(self, *names: str, default: float | None = None) -> float:
        """Read a finite number."""
        name, value = self._find(names)
        if value is None:
            if default is None:
                raise self.missing(names[0])
            return default
        return self._number(name, value)

    def positive(self, *names: str, default: float | None = None) -> float:
        """Read a finite number above zero."""
        value = self.number(*names, default=default)
        if value <= 0:
            raise self.wrong(names[0], "a number above 0", value)
        return value

    def numbers(self, name: str, length: int, *, infinite: bool = False) -> list[float] | None:
        """Read a list of `length` numbers, None where there is none."""
        values = self._list(name, length)
        if values is None:
            return None
        if len(values) != length:
            raise self.wrong(name, f"a list of {length} numbers", values)
        return [self._number(f"{name}[{i}]", v, infinite=infinite) for i, v in enumerate(values)]

    def flag(self, *names: str, default: bool | None = None) -> bool:
        """Read true or false."""
        name, value = self._find(names)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.missing(names[0])
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def texts(self, name: str, most: int) -> list[str] | None:
        """Read a list of up to `most` texts, None where there is none."""
        values = self._list(name, most)
        for index, value in enumerate(values or ()):
            if not isinstance(value, str):
                raise self.wrong(f"{name}[{index}]", "a text", value)
        return None if values is None else list(values)

    def text(self, name: str, default: str | None = None) -> str:
        """Read a text."""
        _, value = self._find((name,))
        if value is None:
            if default is None:
                raise self.missing(name)
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a text", value)
        return value

    def section(self, name: str, file: str | None = None) -> Keys:
        """Return the keys of an object inside, which `file` holds where it is not this one."""
        _, value = self._find((name,))
        if value is None:
            raise self.missing(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        if name not in self._sections:
            prefix = "" if file else f"{self._prefix}{name}."
            self._sections[name] = Keys(value, file or self.file, prefix)
        return self._sections[name]

    def overlaid(self, name: str, file: str) -> Keys:
        """Return these keys with those of an object inside, which `file` holds, before them."""
        inner = self.section(name, file)
        both = Keys({**self.values, **inner.values}, file)
        inner._read = both._read = self._read
        return both

    def skip(self, *names: str) -> None:
        """Count keys as read that another module reads."""
        self._read.update(names)

    def inside(self, name: str, outer: Sequence[str]) -> Keys:
        """Return the keys of an object inside; those of `outer` that stand outside go before."""
        inner = self.section(name)
        self._read.update(outer)
        above = {key: self.values[key] for key in outer if self.has(key)}
        inner.values = {**inner.values, **above}
        return inner

    def refuse(self, **expected: object) -> None:
        """Raise Refused for the first key that is there with another value than expected."""
        self._read |= expected.keys()
        for key, value in expected.items():
            got = self.values.get(key, value)
            if got != value or isinstance(got, bool) != isinstance(value, bool):
                raise refuse_value(self._prefix + key, got, repr(value))

    def unread(self) -> Iterator[str]:
        """Yield the keys that nothing has read and that might mean something."""
        given = {name for name, value in self.values.items() if value is not None}
        for name in sorted(given - self._read - _WITHOUT_EFFECT):
            yield self._prefix + (name if name.isprintable() else repr(name))
        for section in self._sections.values():
            yield from section.unread()

    def missing(self, name: str) -> Refused:
        """Return the refusal of a config without a key; a similar key that is there is named."""
        others = [key for key in self.values if key not in self._read and key != name]
        near = difflib.get_close_matches(name, others, n=1, cutoff=_NEAR)
        hint = f", the nearest it has is {brief(self._prefix + near[0])}" if near else ""
        return Refused(f"{self.file} needs key '{self._prefix}{name}'{hint}; add it")

    def wrong(self, name: str, rule: str, value: object) -> Refused:
        """Return the refusal of a value that is not what `rule` asks for."""
        return Refused(
            f"{self._prefix}{name} must be {rule}, got {brief(value)}; correct {self.file}"
        )

    def require_divides(self, name: str, part: int, of: str, whole: int) -> None:
        """Raise Refused unless the first count divides the second."""
        if whole % part:
            raise self.wrong(name, f"a divisor of {of} ({whole})", part)

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        self._read.update(names)
        there = [name for name in names if self.values.get(name) is not None]
        for other in there[1:]:
            if self.values[other] != self.values[there[0]]:
                raise Refused(
                    f"{there[0]} = {brief(self.values[there[0]])} and {other} = "
                    f"{brief(self.values[other])} are one setting; remove the wrong one"
                )
        return (there[0], self.values[there[0]]) if there else (names[0], None)

    def _list(self, name: str, most: int) -> Any:
        _, value = self._find((name,))
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        if value is not None and len(value) > most:
            raise self.wrong(name, f"a list of at most {most}", f"{len(value)} values")
        return value

    def _whole(self, name: str, value: Any, bound: Bound) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, "a whole number", value)
        if not bound.least <= value <= bound.most:
            raise self.wrong(name, f"from {bound.least} to {bound.most}", value)
        return value

    def _number(self, name: str, value: Any, *, infinite: bool = False) -> float:
        # transformers writes infinity as an object.
        if isinstance(value, dict) and value.keys() == {"__float__"}:
            value = {"Infinity": math.inf, "-Infinity": -math.inf}.get(str(value["__float__"]))
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
            raise self.wrong(name, "a number", value)
        if abs(value) > _MAX_NUMBER and not (infinite and abs(value) == math.inf):
            also = ", or infinite" if infinite else ""
            raise self.wrong(name, f"from {-_MAX_NUMBER:g} to {_MAX_NUMBER:g}{also}", value)
        return float(value)
