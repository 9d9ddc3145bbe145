"""Attention of packed prompts against plain softmax, and the kernels against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from packed_case import SPARE_TOKENS, make_packing
from torch import Tensor

from stree_kernels.attention import (
    prompt_attention as kernel,
    prompt_attention_ref as reference,
    rope_kv_write_ref,
)
from stree_kernels.attention.rope_kv_write_ref import HeadNorms, KeyValues
from stree_kernels.launch.packing import Packing
from stree_kernels.testing import assert_close, poisoned

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


class Case(NamedTuple):
    """A projection, and caches with some tokens in them, NaN behind."""

    qkv: Tensor
    inv_freq: Tensor
    cache: KeyValues
    packing: Packing
    num_heads: int
    norms: HeadNorms | None = None

    def write(self, op: Any) -> Tensor:
        """Return the queries; the caches change in place."""
        head_dim = self.cache.key.shape[3]
        q = poisoned(
            len(self.qkv), self.num_heads, head_dim, dtype=self.qkv.dtype, device=self.qkv.device
        )
        op.prompt_kv_write(
            self.qkv, self.packing, self.inv_freq, q_MHD=q, cache=self.cache, norms=self.norms
        )
        return q

    def attend(self, op: Any, q: Tensor) -> Tensor:
        """Return what every token of a prompt sees."""
        out = poisoned(*q.shape, dtype=q.dtype, device=q.device)
        op.prompt_attention(q, self.cache, self.packing, scale=0.3, out_MHD=out)
        return out[: int(self.packing.offsets_S1[-1])]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in another dtype; angles are fp32 unless it is float64."""
        wide = torch.promote_types(dtype, torch.float32)
        return Case(
            self.qkv.to(device, dtype), self.inv_freq.to(device, wide),
            KeyValues(*(kept.to(device, dtype, copy=True) for kept in self.cache)),
            Packing(*(table.to(device) for table in self.packing)), self.num_heads,
            self.norms and HeadNorms(*(w.to(device, wide) for w in self.norms[:2]), self.norms.eps),
        )  # fmt: skip


def make_case(
    lengths: Sequence[int], starts: Sequence[int], *, heads: int, kv_heads: int, head_dim: int,
    normed: bool = False,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(sum(lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    ends = [length + start for length, start in zip(lengths, starts, strict=True)]
    cache = KeyValues(*(normal(len(lengths), max(ends) + 2, kv_heads, head_dim) for _ in range(2)))
    for kept in cache:
        for slot, start in enumerate(starts[::-1]):
            kept[slot, start:] = torch.nan
    qkv = normal(sum(lengths) + SPARE_TOKENS, (heads + 2 * kv_heads) * head_dim)
    qkv[-SPARE_TOKENS:] = torch.nan
    inv_freq = 1.0 / 100.0 ** (torch.arange(head_dim // 4).double() / head_dim)
    norms = HeadNorms(normal(head_dim), normal(head_dim), 1e-3) if normed else None
    return Case(qkv, inv_freq, cache, make_packing(lengths, starts), heads, norms)


def test_reference_equals_softmax_token_by_token() -> None:
    case = make_case((1, 5, 0, 9), (0, 3, 2, 0), heads=4, kv_heads=2, head_dim=16)
    before = case.cache.key.clone()
    q = case.write(reference)
    out = case.attend(reference, q)
    offsets, slots, starts = (table.tolist() for table in case.packing)
    for sequence, slot in enumerate(slots):
        for token in range(offsets[sequence], offsets[sequence + 1]):
            position = starts[sequence] + token - offsets[sequence]
            turned = []
            for head in case.qkv[token].view(-1, 16):
                angle = position * case.inv_freq
                low, high, kept = head.tensor_split((4, 8))
                turned.append(
                    torch.cat((
                        low * angle.cos() - high * angle.sin(),
                        high * angle.cos() + low * angle.sin(), kept,
                    ))
                )  # fmt: skip
            assert_close("q", q[token], torch.stack(turned[:4]))
            assert_close("k", case.cache.key[slot, position], torch.stack(turned[4:6]))
            assert torch.equal(case.cache.value[slot, position], case.qkv[token].view(-1, 16)[6:])
            for head in range(4):
                keys, values = (kept[slot, : position + 1, head // 2] for kept in case.cache)
                weights = torch.softmax(keys @ q[token, head] * 0.3, 0)
                assert_close("out", out[token, head], weights @ values)
        kept, end = starts[sequence], starts[sequence] + offsets[sequence + 1] - offsets[sequence]
        assert torch.equal(case.cache.key[slot, :kept], before[slot, :kept])
        assert case.cache.key[slot, end:].isnan().all()


def test_normed_heads_are_those_of_a_tree_pass() -> None:
    case = make_case((6,), (0,), heads=4, kv_heads=2, head_dim=16, normed=True)
    q = case.write(reference)
    rows = KeyValues(*(torch.zeros(6, 1, 2, 16, dtype=torch.float64) for _ in range(2)))
    q_TBHD = torch.zeros(6, 1, 4, 16, dtype=torch.float64)
    rope_kv_write_ref.rope_kv_write(
        case.qkv[:6, None], torch.arange(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32),
        case.inv_freq, first=0, q_TBHD=q_TBHD, rows=rows, cache=case.cache, previous=None,
        pending=None, norms=case.norms,
    )  # fmt: skip
    assert_close("q", q[:6], q_TBHD[:, 0])
    assert_close("k", case.cache.key[0, :6], rows.key[:, 0])
    assert_close("v", case.cache.value[0, :6], rows.value[:, 0])


def check_kernel(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    ours = case.to(dtype, device)
    truth = ours.to(torch.float64, device)
    q, q_true = ours.write(kernel), truth.write(reference)
    read = int(ours.packing.offsets_S1[-1])
    assert_close("q", q[:read], q_true[:read])
    for name, kept, expected in zip(("key", "value"), ours.cache, truth.cache, strict=True):
        assert torch.equal(kept.isnan(), expected.isnan())
        assert_close(name, kept.nan_to_num(), expected.nan_to_num())
    # On the queries and keys as they were rounded.
    truth = Case(ours.qkv, *ours.to(torch.float64, device)[1:])
    assert_close("out", ours.attend(kernel, q), truth.attend(reference, q.double()))


@interpreted
@pytest.mark.parametrize("normed", [False, True])
def test_interpreted_kernels_equal_the_reference(normed: bool) -> None:
    case = make_case((1, 17, 0, 40), (0, 30, 2, 0), heads=4, kv_heads=2, head_dim=16, normed=normed)
    check_kernel(case, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(8, 8, 64), (32, 8, 128), (4, 1, 16), (16, 2, 256)], ids=str)
def test_kernels_equal_the_reference(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = sizes
    if dtype == torch.float32 and head_dim > 128:
        pytest.skip("refused in fp32")
    case = make_case(
        (1, 2, 63, 0, 64, 65, 127, 129, 1000), (0, 700, 1, 4, 64, 0, 65, 128, 31), heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, normed=head_dim == 256,
    )  # fmt: skip
    check_kernel(case, dtype, "cuda")


def test_what_the_kernels_cannot_take_is_refused() -> None:
    case = make_case((2,), (0,), heads=2, kv_heads=1, head_dim=8).to(torch.float32)
    with pytest.raises(ValueError, match="take head dims"):
        case.write(kernel)
    case = make_case((2,), (0,), heads=2, kv_heads=1, head_dim=16).to(torch.float32)
    wide = make_case((2,), (0,), heads=1, kv_heads=1, head_dim=256).to(torch.float32)
    with pytest.raises(ValueError, match="takes head dims up to 128, got 256"):
        wide.attend(kernel, wide.write(reference))
    with pytest.raises(ValueError, match="got 48 columns"):
        case._replace(qkv=case.qkv[:, :48]).write(kernel)
