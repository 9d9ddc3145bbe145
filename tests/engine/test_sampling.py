"""Sampling distributions against transformers' own processors, and the ranges of sampling
parameters.

Shape letters: N rows, B slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stree_core.engine.sampling import SamplingParams, SlotSettings, make_settings, processed
from stree_core.errors import ConfigError
from stree_kernels.sampling.children_ref import softmax_distribution

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Largest difference of one probability. The same sums in another order differ by roundings."""

SLOTS = (
    SamplingParams(temperature=0.7),
    SamplingParams(),
    SamplingParams(temperature=1.3, top_k=7),
    SamplingParams(temperature=0.9, top_p=0.83),
    SamplingParams(temperature=1.1, min_p=0.07),
    SamplingParams(temperature=1.0, repetition_penalty=1.4),
    SamplingParams(temperature=0.6, top_k=20, top_p=0.77, min_p=0.03, repetition_penalty=1.2),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(temperature=2.5, top_k=12, top_p=0.95, repetition_penalty=0.8),
    SamplingParams(temperature=1.7, top_k=5000),
    SamplingParams(temperature=0.4, top_k=1),
    SamplingParams(temperature=1.2, top_p=1e-9),
    SamplingParams(temperature=1.4, min_p=1.0),
)
"""Every setting alone and with others, greedy slots between."""


def settings_of(slots: Sequence[SamplingParams], dtype: torch.dtype) -> SlotSettings:
    settings = make_settings(len(slots), torch.device("cpu"), dtype)
    for slot, params in enumerate(slots):
        settings.set(slot, params)
    return settings


def distribution(
    logits_NBV: Tensor, settings: SlotSettings, seen_NBV: Tensor | None, *, truncates: bool
) -> Tensor:
    """Return the probabilities [N, B, V] that slots sample from."""
    scores_NBV = processed(logits_NBV, settings, seen_NBV, truncates=truncates)
    return softmax_distribution(scores_NBV, settings.temperature_B)


def random_logits(
    num_rows: int, num_slots: int, num_tokens: int, dtype: torch.dtype, *, tied: bool = False
) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    logits_NBV = 3 * torch.randn(num_rows, num_slots, num_tokens, generator=generator)
    return (logits_NBV.mul(2).round().div(2) if tied else logits_NBV).to(dtype)


def random_seen(logits_NBV: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    seen_NBV = torch.rand(logits_NBV.shape, generator=generator) < 0.3
    # The likeliest token, whose score decides most, is seen in the first row.
    return seen_NBV.scatter(-1, logits_NBV[:1].argmax(-1, keepdim=True), value=True)


def transformers_law(logits_V: Tensor, params: SamplingParams, seen_V: Tensor) -> Tensor:
    """Return the distribution [V] of transformers' `generate`, whose arguments have two
    dimensions."""
    processors: list[Any] = []
    if params.penalises:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature > 0:
        processors.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k > 0:
            processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(TopPLogitsWarper(params.top_p))
        if params.min_p > 0:
            processors.append(MinPLogitsWarper(params.min_p))
    scores_1V, ids_1S = logits_V[None].clone(), seen_V.nonzero().t()
    for processor in processors:
        scores_1V = processor(ids_1S, scores_1V)
    if params.temperature > 0:
        return scores_1V[0].softmax(-1)
    # Of equal scores a greedy slot takes the first; `argmax` alone promises nothing.
    first = int((scores_1V[0] == scores_1V.max()).nonzero()[0])
    return torch.zeros_like(logits_V).index_fill_(0, torch.tensor([first]), 1.0)


@pytest.fixture
def stable_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers choose among equal scores: its sort may give them in any order."""
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))


@pytest.mark.usefixtures("stable_sort")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("num_tokens", [50, 1000])
def test_laws_equal_those_of_transformers(num_tokens: int, tied: bool, dtype: torch.dtype) -> None:
    logits_NBV = random_logits(4, len(SLOTS), num_tokens, dtype, tied=tied)
    seen_NBV = random_seen(logits_NBV)
    before = logits_NBV.clone()
    p_NBV = distribution(logits_NBV, settings_of(SLOTS, dtype), seen_NBV, truncates=True)
    assert torch.equal(logits_NBV, before), "logits are read alone"
    assert p_NBV.dtype == dtype
    for n, (p_BV, logits_BV, seen_BV) in enumerate(zip(p_NBV, logits_NBV, seen_NBV, strict=True)):
        for b, params in enumerate(SLOTS):
            expected_V = transformers_law(logits_BV[b], params, seen_BV[b])
            difference = (p_BV[b] - expected_V).abs().max()
            assert difference <= TOLERANCE[dtype], (n, params)
            assert torch.equal(p_BV[b] > 0, expected_V > 0), (n, params)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_of_logit_minus_infinity_stay_impossible(dtype: torch.dtype) -> None:
    logits_NBV = random_logits(2, len(SLOTS), 50, dtype)
    logits_NBV[..., ::3] = -torch.inf
    seen_NBV = random_seen(logits_NBV)
    p_NBV = distribution(logits_NBV, settings_of(SLOTS, dtype), seen_NBV, truncates=True)
    assert p_NBV[..., ::3].max() == 0
    for b, params in enumerate(SLOTS):
        expected_V = transformers_law(logits_NBV[1, b], params, seen_NBV[1, b])
        torch.testing.assert_close(p_NBV[1, b], expected_V, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.usefixtures("stable_sort")
def test_top_p_cuts_what_is_exactly_the_rest() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.75)
    logits_NBV = torch.zeros(2, 1, 4)
    p_NBV = distribution(logits_NBV, settings_of([params], torch.float32), None, truncates=True)
    expected_V = transformers_law(logits_NBV[0, 0], params, torch.zeros(4, dtype=torch.bool))
    assert expected_V.count_nonzero() == 3
    torch.testing.assert_close(p_NBV, expected_V.expand_as(p_NBV))


@pytest.mark.parametrize("truncates", [False, True])
def test_a_greedy_slot_takes_the_lowest_of_the_likeliest(truncates: bool) -> None:
    logits_NBV = torch.tensor([[[1.0, 3.0, -1.0, 3.0, 2.0]]]).expand(2, 3, 5)
    slots = (SamplingParams(), SamplingParams(temperature=1), SamplingParams(top_k=2, top_p=0.5))
    p_NBV = distribution(logits_NBV, settings_of(slots, torch.float32), None, truncates=truncates)
    assert p_NBV[:, 0].tolist() == p_NBV[:, 2].tolist() == [[0, 1, 0, 0, 0]] * 2
    torch.testing.assert_close(p_NBV[:, 1], logits_NBV[:, 1].softmax(-1))


def test_a_penalty_changes_seen_tokens_alone() -> None:
    logits_NBV = torch.tensor([[[2.0, -2.0, 1.5, -3.0]]]).expand(1, 2, 4)
    seen_NBV = torch.tensor([[[True, True, False, False], [False] * 4]])
    slots = (SamplingParams(temperature=1, repetition_penalty=2),) * 2
    p_NBV = distribution(logits_NBV, settings_of(slots, torch.float32), seen_NBV, truncates=False)
    scores_2V = torch.tensor([[1.0, -4.0, 1.5, -3.0], [2.0, -2.0, 1.5, -3.0]])
    torch.testing.assert_close(p_NBV[0], scores_2V.softmax(-1))
    # The penalty comes before a greedy slot's choice too.
    greedy = settings_of((SamplingParams(repetition_penalty=2),) * 2, torch.float32)
    assert distribution(logits_NBV, greedy, seen_NBV, truncates=False).argmax(-1).tolist() == [
        [2, 0]
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [50, 1000])
def test_truncation_that_cuts_nothing_changes_nothing(num_tokens: int, dtype: torch.dtype) -> None:
    slots = (
        SamplingParams(temperature=0.8),
        SamplingParams(),
        SamplingParams(temperature=1, top_k=num_tokens),
        SamplingParams(temperature=1.5, top_k=num_tokens + 1),
        SamplingParams(temperature=1, top_k=2**31 - 1),
        SamplingParams(temperature=1, min_p=1e-30),
    )
    logits_NBV = random_logits(3, len(slots), num_tokens, dtype)
    settings = settings_of(slots, dtype)
    cut_NBV, plain_NBV = (
        distribution(logits_NBV, settings, None, truncates=truncates) for truncates in (True, False)
    )
    torch.testing.assert_close(cut_NBV, plain_NBV, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(cut_NBV > 0, plain_NBV > 0)


def test_settings_start_greedy_and_are_set_by_slot() -> None:
    settings = make_settings(3, torch.device("cpu"), torch.float64)
    fresh = {f.name: getattr(settings, f.name).tolist() for f in dataclasses.fields(settings)}
    defaults = [0.0, 0, 1.0, 0.0, 1.0, 0, 0]
    assert list(fresh.values()) == [[value] * 3 for value in defaults]
    settings.step_B[:] = 5
    settings.set(1, SamplingParams(0.5, 3, 0.75, 0.25, 1.5, 2**63 - 1))
    values = [0.5, 3, 0.75, 0.25, 1.5, 2**63 - 1, 0]
    for (name, before), value in zip(fresh.items(), values, strict=True):
        rest = 5 if name == "step_B" else before[0]
        assert getattr(settings, name).tolist() == [rest, value, rest]


@pytest.mark.parametrize(
    ("params", "truncates", "penalises"),
    [
        (SamplingParams(temperature=2, seed=3), False, False),
        (SamplingParams(top_k=1), True, False),
        (SamplingParams(top_p=0.99), True, False),
        (SamplingParams(min_p=0.01), True, False),
        (SamplingParams(repetition_penalty=0.9), False, True),
    ],
    ids=str,
)
def test_params_tell_what_they_ask_for(
    params: SamplingParams, truncates: bool, penalises: bool
) -> None:
    assert (params.truncates, params.penalises) == (truncates, penalises)


BAD_VALUES = {
    "temperature": (-0.1, math.inf, math.nan),
    "top_k": (-1,),
    "top_p": (0.0, -0.5, 1.001, math.nan),
    "min_p": (-0.01, 1.01, math.nan),
    "repetition_penalty": (0.0, -1.0, 1e-45, math.inf, math.nan),
    "seed": (-1, 2**63),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values]
)
def test_a_value_outside_its_range_is_refused(name: str, value: float) -> None:
    bad: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError) as refusal:
        SamplingParams(**bad)
    text = str(refusal.value)
    assert text.startswith(f"{name} must be ")
    assert f"got {value}; " in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0), ("top_k", 0), ("top_p", 1e-6), ("top_p", 1.0), ("min_p", 0.0),
        ("min_p", 1.0), ("repetition_penalty", 0.01), ("seed", 0), ("seed", 2**63 - 1),
    ],
)  # fmt: skip
def test_the_ends_of_a_range_are_allowed(name: str, value: float) -> None:
    good: dict[str, Any] = {name: value}
    assert getattr(SamplingParams(**good), name) == value
