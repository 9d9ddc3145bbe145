"""What callers give: numbers and ids are taken by their meaning, or refused in one sentence."""

from __future__ import annotations

import array
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stree_core.engine.request import Request
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.errors import ConfigError, brief
from stree_core.given import prompt_ids, real_number, token_ids, whole_number

HUGE = 10**5000
"""Python refuses to print it."""
HUGE_ONES = [pytest.param(HUGE, id="huge"), pytest.param(-HUGE, id="least")]


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 250
    return text


@pytest.mark.parametrize("number", [5, np.int32(5), np.uint8(5), torch.tensor(5), np.array(5)])
def test_integers_of_any_library_are_taken(number: Any) -> None:
    taken = whole_number("it", number)
    assert (taken, type(taken)) == (5, int)


@pytest.mark.parametrize(
    "value",
    [4.0, True, np.True_, "5", None, math.nan, 1j, [5], torch.tensor([5]), torch.tensor(5.0), b"5"],
)
def test_what_is_no_integer_is_refused(value: object) -> None:
    assert refusal(lambda: whole_number("it", value)).startswith("it must be a whole number, got ")


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), torch.tensor(0.5), np.array(0.5)])
def test_numbers_of_any_library_are_taken(number: Any) -> None:
    taken = real_number("it", number)
    assert (taken, type(taken)) == (0.5, float)
    assert real_number("it", HUGE) == math.inf
    assert real_number("it", -HUGE) == -math.inf


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, [0.5], torch.tensor([0.5])])
def test_what_is_no_number_is_refused(value: object) -> None:
    assert refusal(lambda: real_number("it", value)).startswith("it must be a number, got ")


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 2],
        (3, 1, 2),
        np.array([3, 1, 2]),
        torch.tensor([3, 1, 2], dtype=torch.int32),
        array.array("l", [3, 1, 2]),
        [torch.tensor(3), np.int64(1), 2],
        iter([3, 1, 2]),
    ],
)
def test_prompts_of_any_library_are_taken(ids: Any) -> None:
    request = Request(ids, StopRule(1))
    assert request.prompt == (3, 1, 2)
    assert {type(token) for token in request.prompt} == {int}


@pytest.mark.parametrize(
    ("ids", "rule"),
    [
        ([], "at least one token"),
        (torch.empty(0, dtype=torch.int64), "at least one token"),
        ("abc", "must be a list of token ids"),
        (b"abc", "must be a list of token ids"),
        (memoryview(b"abc"), "must be a list of token ids"),
        ({1: 2}, "must be a list of token ids"),
        ({1, 2}, "must have an order"),
        (7, "must be a list of token ids"),
        (None, "must be a list of token ids"),
        (torch.tensor(7), "must be a list of token ids"),
        ([1.5], "must be a whole number"),
        ([math.nan], "must be a whole number"),
        ([True], "must be a whole number"),
        (["1"], "must be a whole number"),
        (torch.tensor([1.0]), "must be a whole number"),
        (torch.tensor([[1, 2]]), "must be a whole number"),
        ([[HUGE]], "must be a whole number"),
    ],
)
def test_what_is_no_prompt_is_refused(ids: Any, rule: str) -> None:
    assert rule in refusal(lambda: prompt_ids(ids))
    assert rule in refusal(lambda: Request(ids, StopRule(1)))


def test_a_request_keeps_its_prompt_as_it_was_given() -> None:
    prompt = [1, 2]
    request = Request(prompt, StopRule(1))
    prompt.append(10**6)
    assert request.prompt == (1, 2)


@pytest.mark.parametrize(
    ("stop", "sampling", "rule"),
    [
        (32, SamplingParams(), "stop must be a StopRule, got 32"),
        (StopRule(3), 0.7, "sampling must be a SamplingParams, got 0.7"),
        (StopRule(3), None, "sampling must be a SamplingParams, got None"),
    ],
)
def test_the_rest_of_a_request_is_checked(stop: Any, sampling: Any, rule: str) -> None:
    assert rule in refusal(lambda: Request([1], stop, sampling))


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 4.5}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": "8"}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": math.inf}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": HUGE}, "max_new_tokens must be at least 1 and below 2^63"),
        ({"eos_token_ids": 0}, "pass (0,)"),
        ({"eos_token_ids": 5}, "pass (5,)"),
        ({"eos_token_ids": HUGE}, "must be a list"),
        ({"eos_token_ids": "5"}, "eos_token_ids must be a list"),
        ({"eos_token_ids": None}, "eos_token_ids must be a list"),
        ({"eos_token_ids": [2.0]}, "must be a whole number"),
        ({"eos_token_ids": [-1]}, "must be 0 or more"),
        ({"strings": "apples"}, "got one text, 'apples'; put it into a list"),
        ({"strings": ""}, "got one text, ''; put it into a list"),
        ({"strings": ["a", ""]}, "got an empty one"),
        ({"strings": [b"a"]}, "a stop string must be text"),
        ({"strings": b"a"}, "a stop string must be text"),
        ({"strings": 7}, "strings are a list of texts"),
        ({"strings": None}, "strings are a list of texts"),
    ],
)
def test_stop_rules_that_make_no_sense_are_refused(given: dict[str, Any], rule: str) -> None:
    assert rule in refusal(lambda: StopRule(**{"max_new_tokens": 3} | given))


def test_stop_rules_of_any_library_are_taken() -> None:
    rule = StopRule(np.int64(9), torch.tensor([4, 0]), ["\n"])  # type: ignore[arg-type]
    assert rule == StopRule(9, (4, 0), ("\n",))
    assert rule.cut([7, 0, 4], []) == ([7, 0], "eos")


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [None, "0.5", True, [0.5], *HUGE_ONES, 1e300, math.nan])
def test_sampling_takes_numbers_only(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: value}
    assert refusal(lambda: SamplingParams(**given)).startswith(f"{name} must be ")


@pytest.mark.parametrize("name", ["top_k", "seed"])
@pytest.mark.parametrize("value", [None, "5", True, 5.0, *HUGE_ONES, math.nan])
def test_sampling_takes_integers_where_they_are_meant(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: value}
    assert refusal(lambda: SamplingParams(**given)).startswith(f"{name} must be ")


def test_sampling_of_any_library_is_taken() -> None:
    params = SamplingParams(np.float64(0.5), torch.tensor(7), top_p=1, seed=np.int64(3))  # type: ignore[arg-type]
    assert params == SamplingParams(0.5, 7, 1.0, seed=3)
    assert (type(params.top_k), type(params.top_p)) == (int, float)


def test_what_is_shown_stays_short() -> None:
    values = ("x" * 1000, list(range(1000)), torch.ones(40, 40), HUGE, "a\nb\x1b[31m")
    for value, end in itertools.product(values, ("", "\n")):
        text = brief((value, end) if end else value)
        assert len(text) < 120
        assert text.isprintable()
    assert token_ids("ids", ()) == ()
