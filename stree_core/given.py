"""Numbers and token ids that callers give: taken by their meaning, or refused in one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set

from stree_core.errors import ConfigError, brief

LIMIT = 1 << 63
"""Integers stay below it, so that the device can hold them."""

_NOT_NUMBERS = (str, bytes, bytearray, memoryview, Mapping)


def whole_number(what: str, value: object) -> int:
    """Return an integer of Python, numpy or torch as Python's; raise ConfigError on all else."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise ConfigError(f"{what} must be a whole number, got {brief(value)}; pass an int")
    return int(plain)


def real_number(what: str, value: object) -> float:
    """Return a number of Python, numpy or torch as a float; raise ConfigError on all else."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise ConfigError(f"{what} must be a number, got {brief(value)}; pass a float")
    try:
        return float(plain)
    except OverflowError:
        return math.inf if plain > 0 else -math.inf


def token_ids(what: str, value: object) -> tuple[int, ...]:
    """Return token ids from a list, a tensor or another collection of whole numbers.

    Raises ConfigError on all else: text, bytes, one number, fractions, more than one dimension.
    """
    plain = value if isinstance(value, _NOT_NUMBERS) else _plain(value)
    if isinstance(plain, _NOT_NUMBERS) or not isinstance(plain, Iterable):
        raise ConfigError(f"{what} must be a list of token ids, got {brief(value)}; pass a list")
    return tuple(
        token if type(token) is int else whole_number(f"a token id of {what}", token)
        for token in plain
    )


def prompt_ids(value: object) -> tuple[int, ...]:
    """Return a prompt's token ids; raise ConfigError when there are none, or in no order."""
    if isinstance(value, Set):
        raise ConfigError(f"a prompt must have an order, got {brief(value)}; pass a list")
    prompt = token_ids("a prompt", value)
    if not prompt:
        raise ConfigError("a prompt must hold at least one token, got none; write something")
    return prompt


def _plain(value: object) -> object:
    """Return what numpy or torch hold as Python's numbers, and lists of them."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value
