"""From logits to the scores that a request samples from, with the semantics of transformers.

Every slot has its own settings, kept on the device, so that one captured step serves all of them.
A temperature of 0 is greedy. Scores are fp32 in decoding; tests use float64.

Shape letters: N rows (nodes of a tree, or of a level), B slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.errors import ConfigError, brief
from stree_core.given import LIMIT, real_number, whole_number
from stree_core.profile import Sampling

LEAST_FACTOR, MOST_FACTOR = 1e-6, 1e6
"""What scores may be divided by without leaving fp32's range."""

_REAL = ("temperature", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request samples. 0 is off for `top_k` and `min_p`, 1 for `top_p` and the penalty.

    Numbers may be numpy's or torch's. Raises ConfigError when a value is none, or is outside its
    range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            read = real_number if field.name in _REAL else whole_number
            object.__setattr__(self, field.name, read(field.name, getattr(self, field.name)))
        factors = f"from {LEAST_FACTOR:g} to {MOST_FACTOR:g}"
        warm = LEAST_FACTOR <= self.temperature <= MOST_FACTOR
        penalty = self.repetition_penalty
        checks = (
            ("temperature", self.temperature, self.temperature == 0 or warm, f"0 or {factors}"),
            ("top_k", self.top_k, 0 <= self.top_k < 1 << 31, "0 or more and below 2^31"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", penalty, LEAST_FACTOR <= penalty <= MOST_FACTOR, factors),
            ("seed", self.seed, 0 <= self.seed < LIMIT, "0 or more and below 2^63"),
        )
        for name, value, holds, rule in checks:
            if not holds:
                raise ConfigError(f"{name} must be {rule}, got {brief(value)}; change it")

    @classmethod
    def of(cls, sampling: Sampling, seed: int = 0) -> SamplingParams:
        """Return the parameters of a request under a profile's or a trace's setting."""
        return cls(
            temperature=sampling.temperature,
            top_k=sampling.top_k or 0,
            top_p=sampling.top_p,
            min_p=sampling.min_p or 0.0,
            repetition_penalty=sampling.repetition_penalty or 1.0,
            seed=seed,
        )

    @property
    def truncates(self) -> bool:
        """True when some tokens are cut off from the distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalises(self) -> bool:
        """True when tokens that were seen score differently."""
        return self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class SlotSettings:
    """The sampling parameters of every slot [B], on the device.

    `step_B` counts a sequence's steps: with the seed it decides every random number.
    """

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    penalty_B: Tensor
    seed_B: Tensor
    step_B: Tensor

    def set(self, slot: int, params: SamplingParams) -> None:
        """Give a slot the settings of a request that starts."""
        self.temperature_B[slot] = params.temperature
        self.top_k_B[slot] = params.top_k
        self.top_p_B[slot] = params.top_p
        self.min_p_B[slot] = params.min_p
        self.penalty_B[slot] = params.repetition_penalty
        self.seed_B[slot] = params.seed
        self.step_B[slot] = 0


def make_settings(
    num_slots: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> SlotSettings:
    """Allocate settings; all slots are greedy."""

    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((num_slots,), value, dtype=dtype, device=device)

    return SlotSettings(
        temperature_B=full(0, dtype),
        top_k_B=full(0, torch.int64),
        top_p_B=full(1, dtype),
        min_p_B=full(0, dtype),
        penalty_B=full(1, dtype),
        seed_B=full(0, torch.int64),
        step_B=full(0, torch.int64),
    )


def processed(
    logits_NBV: Tensor, settings: SlotSettings, seen_NBV: Tensor | None, *, truncates: bool
) -> Tensor:
    """Return the scores [N, B, V] whose softmax, over the temperature, slots sample from.

    In the order of transformers: repetition penalty (where `seen_NBV` (bool) is given), then, at
    each slot's temperature, top-k, top-p and min-p (with `truncates`), which give -inf to what they
    cut. A greedy slot needs no cut.
    """
    scores_NBV = logits_NBV
    if seen_NBV is not None:
        penalty_B1 = settings.penalty_B[:, None]
        changed_NBV = torch.where(scores_NBV < 0, scores_NBV * penalty_B1, scores_NBV / penalty_B1)
        scores_NBV = torch.where(seen_NBV, changed_NBV, scores_NBV)
    if not truncates:
        return scores_NBV
    greedy_B1 = settings.temperature_B[:, None] == 0
    return torch.where(greedy_B1 | _kept(scores_NBV, settings), scores_NBV, -torch.inf)


def _kept(scores_NBV: Tensor, settings: SlotSettings) -> Tensor:
    """Return which tokens top-k, top-p and min-p keep, in one order of the tokens."""
    num_tokens = scores_NBV.shape[-1]
    temperature_B1 = settings.temperature_B[:, None]
    heated_NBV = scores_NBV / torch.where(temperature_B1 == 0, 1, temperature_B1)
    ascending_NBV, token_NBV = heated_NBV.sort(dim=-1, stable=True)
    buffered_B = torch.where(settings.top_k_B == 0, num_tokens, settings.top_k_B).clamp(
        max=num_tokens
    )
    first_NB1 = (num_tokens - buffered_B)[:, None].expand(*scores_NBV.shape[:2], 1)
    least_NB1 = ascending_NBV.gather(-1, first_NB1)
    ascending_NBV = ascending_NBV.masked_fill(ascending_NBV < least_NB1, -torch.inf)
    # The likeliest token, the last, always stays.
    below_NBV = ascending_NBV.softmax(-1).cumsum(-1) <= 1 - settings.top_p_B[:, None]
    below_NBV[..., -1] = False
    ascending_NBV = ascending_NBV.masked_fill(below_NBV, -torch.inf)
    p_NBV = ascending_NBV.softmax(-1)
    least_NB1 = p_NBV[..., -1:] * settings.min_p_B[:, None]
    kept_NBV = (ascending_NBV > -torch.inf) & (p_NBV >= least_NB1)
    return torch.empty_like(kept_NBV).scatter_(-1, token_NBV, kept_NBV)
