"""The scan of packed prompts against a recurrence, and the kernels against the reference.

Shape letters: M packed tokens, B slots, H heads, P head dim, N state dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from packed_case import SPARE_TOKENS, make_packing
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch.packing import Packing
from stree_kernels.launch.rows import Gate, ScanHeads, gate_width
from stree_kernels.ssm import prompt_scan as kernel, prompt_scan_ref as reference
from stree_kernels.ssm.prompt_scan_ref import PromptTokens
from stree_kernels.testing import assert_close, poisoned

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
LENGTHS = (1, 2, 63, 0, 64, 65, 130)
STATE_ERRORS = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 2e-6}
"""What enters a state is taken apart into two bf16 numbers; measured 3e-6 to 2e-5."""


@dataclass(frozen=True)
class Case:
    """The tensors of one scan of prompts side by side; a state per slot, NaN where it is new."""

    state: Tensor
    tokens: PromptTokens
    heads: ScanHeads
    packing: Packing
    z: Tensor
    dt_limit: tuple[float, float]

    def scan(self, op: Any) -> Tensor:
        """Return y of all tokens; the states advance in place."""
        z = self.z
        out = poisoned(*z.shape, dtype=z.dtype, device=z.device)
        width = gate_width(*self.state.shape[2:], z.dtype)
        wide = torch.promote_types(torch.float32, z.dtype)
        sums = poisoned(len(z), z[0].numel() // width, dtype=wide, device=z.device)
        lengths = self.packing.offsets_S1.diff()
        op.prompt_scan(
            self.state, self.tokens, self.heads, self.packing, longest=int(lengths.max()),
            dt_limit=self.dt_limit, out_MHP=out, gate=Gate(z, sums),
        )  # fmt: skip
        read = int(self.packing.offsets_S1[-1])
        runs = out[:read].double().flatten(1).unflatten(1, (sums.shape[1], -1))
        coarse = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(z.dtype, 1e-5)
        assert_close("sums", sums[:read], runs.square().sum(2), tolerance=coarse)
        return out[:read]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in another dtype; states and constants are fp32 unless it is float64."""
        wide = torch.promote_types(dtype, torch.float32)
        return dataclasses.replace(
            self,
            state=self.state.to(device, wide, copy=True),
            tokens=PromptTokens(*(t.to(device, dtype) for t in self.tokens)),
            heads=ScanHeads(*(t.to(device, wide) for t in self.heads)),
            packing=Packing(*(t.to(device) for t in self.packing)),
            z=self.z.to(device, dtype),
        )


def make_case(
    lengths: Sequence[int], *, starts: Sequence[int] | None = None, heads: int = 4,
    x_heads: int = 4, groups: int = 1, c_groups: int = 2, head_dim: int = 4, state_dim: int = 3,
    dt_mean: float = 0.0, dt_limit: tuple[float, float] = (0.0, float("inf")),
    skip_per_channel: bool = False,
) -> Case:  # fmt: skip
    """Build a case in float64."""
    random = np.random.default_rng(sum(lengths))
    num_tokens = sum(lengths) + SPARE_TOKENS

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape))

    starts = starts or [0, 5] * len(lengths)
    packing = make_packing(lengths, starts[: len(lengths)])
    state = normal(len(lengths), heads, head_dim, state_dim)
    for slot, start in zip(packing.slots_S.tolist(), packing.starts_S.tolist(), strict=True):
        if not start and lengths[len(lengths) - 1 - slot]:
            state[slot] = torch.nan
    tokens = PromptTokens(
        normal(num_tokens, x_heads, head_dim), normal(num_tokens, heads) + dt_mean,
        normal(num_tokens, groups, state_dim), normal(num_tokens, c_groups, state_dim),
    )  # fmt: skip
    for tensor in tokens:
        tensor[-SPARE_TOKENS:] = torch.nan
    skip = normal(heads, head_dim) if skip_per_channel else normal(heads)
    constants = ScanHeads(-normal(heads).exp(), skip, normal(heads))
    z = normal(num_tokens, heads, head_dim)
    return Case(state, tokens, constants, packing, z, dt_limit)


def by_recurrence(case: Case) -> tuple[Tensor, Tensor]:
    """Return all states and y, token after token, in float64."""
    states, outs = case.state.double().clone(), []
    x, dt, b, c = (tensor.double() for tensor in case.tokens)
    a, skip, bias = (tensor.double() for tensor in case.heads)
    num_heads = states.shape[1]
    offsets, slots, starts = (table.tolist() for table in case.packing)
    for sequence, slot in enumerate(slots):
        state = states[slot] if starts[sequence] else torch.zeros_like(states[slot])
        if offsets[sequence] == offsets[sequence + 1]:
            continue
        for row in range(offsets[sequence], offsets[sequence + 1]):
            d = functional.softplus(dt[row] + bias).clamp(*case.dt_limit)
            x_HP, b_HN, c_HN = (
                t[row].repeat_interleave(num_heads // t.shape[1], 0) for t in (x, b, c)
            )
            state = state * (d * a).exp()[:, None, None]
            state = state + (d[:, None] * x_HP)[..., None] * b_HN[:, None]
            y = (state @ c_HN[..., None])[..., 0] + skip.view(num_heads, -1) * x_HP
            outs.append(y * functional.silu(case.z[row].double()))
        states[slot] = state
    return states, torch.stack(outs)


HARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared x": {"x_heads": 2, "groups": 2, "c_groups": 4},
    "long steps": {"dt_mean": 4.0},
    "limited, skip per channel": {"dt_limit": (0.3, 0.9), "skip_per_channel": True},
}


@pytest.mark.parametrize("hard", HARD)
def test_reference_equals_the_recurrence(hard: str) -> None:
    case = make_case(LENGTHS, **{"state_dim": 8, **HARD[hard]})
    states, y = by_recurrence(case)
    assert_close("y", case.scan(reference), y, tolerance=1e-11)
    assert_close("states", case.state, states, tolerance=1e-11)


def pieces(case: Case, op: Any, bounds: Sequence[int]) -> Tensor:
    """Return y of the one prompt of a case, read in pieces that end at `bounds`."""
    outs, begin = [], 0
    for end in bounds:
        piece = dataclasses.replace(
            case, tokens=PromptTokens(*(t[begin:end] for t in case.tokens)), z=case.z[begin:end],
            packing=make_packing([end - begin], [begin], str(case.state.device)),
        )  # fmt: skip
        outs.append(piece.scan(op))
        begin = end
    return torch.cat(outs)


def test_a_prompt_in_pieces_equals_the_whole() -> None:
    case = make_case([150], starts=[0])
    whole = case.to(torch.float64)
    y = whole.scan(reference)
    assert_close("y", pieces(case, reference, (1, 100, 150)), y, tolerance=1e-11)
    assert_close("state", case.state, whole.state, tolerance=1e-11)


def check_kernel(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare the kernels with the reference in float64 on the values that they see."""
    ours = case.to(dtype, device)
    truth = ours.to(torch.float64, device)
    assert_close("y", ours.scan(kernel), truth.scan(reference))
    assert_close("states", ours.state, truth.state, tolerance=STATE_ERRORS[dtype])


@interpreted
@pytest.mark.parametrize("hard", HARD)
def test_interpreted_kernels_equal_the_reference(hard: str) -> None:
    case = make_case([17, 0, 3, 32], head_dim=16, state_dim=16, **HARD[hard])
    check_kernel(case, torch.float32)


@interpreted
def test_interpreted_segments_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one, several and exactly two segments, the second of them going on."""
    monkeypatch.setattr(kernel, "SEGMENT", 32)
    case = make_case([5, 70, 64, 0, 33], head_dim=16, state_dim=16, heads=2, x_heads=2)
    check_kernel(case, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(64, 128), (128, 128), (64, 64), (64, 256)], ids=str)
def test_kernels_equal_the_reference(dims: tuple[int, int], dtype: torch.dtype, hard: str) -> None:
    if dtype == torch.float32 and dims[1] > 128:
        pytest.skip("refused in fp32")
    lengths = (*LENGTHS, 2047, 2048, 2049, 6200)
    check_kernel(
        make_case(lengths, head_dim=dims[0], state_dim=dims[1], **HARD[hard]), dtype, "cuda"
    )


@pytest.mark.gpu
def test_a_prompt_of_33000_tokens_in_pieces() -> None:
    case = make_case([33000], starts=[0], head_dim=64, state_dim=128)
    ours = case.to(torch.bfloat16, "cuda")
    truth = ours.to(torch.float64, "cuda")
    y = pieces(ours, kernel, (8192, 16384, 16385, 33000))
    assert_close("y", y, truth.scan(reference))
    assert_close("state", ours.state, truth.state, tolerance=STATE_ERRORS[torch.bfloat16])


@pytest.mark.gpu
def test_repeated_calls_give_the_same_bits() -> None:
    case = make_case((700, 4300, 3), head_dim=64, state_dim=128).to(torch.bfloat16, "cuda")
    first, second = case.to(torch.bfloat16, "cuda"), case.to(torch.bfloat16, "cuda")
    assert torch.equal(first.scan(kernel), second.scan(kernel))
    assert torch.equal(first.state, second.state)


@pytest.mark.gpu
def test_sanitized_prompt_scan() -> None:
    check_kernel(make_case((1, 0, 2100), head_dim=64, state_dim=64), torch.bfloat16, "cuda")


def test_what_the_kernels_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes head dims .*, got 4 and 3"):
        make_case([2]).to(torch.float32).scan(kernel)
    case = make_case([2], head_dim=16, state_dim=16).to(torch.float32)
    with pytest.raises(ValueError, match="one offset more"):
        dataclasses.replace(
            case, packing=case.packing._replace(starts_S=torch.zeros(2, dtype=torch.int32))
        ).scan(kernel)
    with pytest.raises(ValueError, match="one dtype of"):
        dataclasses.replace(
            case, packing=case.packing._replace(starts_S=torch.zeros(1, dtype=torch.int64))
        ).scan(kernel)
