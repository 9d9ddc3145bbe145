"""One forward pass of a Mamba2 or hybrid model over a block of rows.

Shape letters: T rows of this pass, B slots, D hidden size, V vocabulary, S committed
positions, Q queries, K keys, L path capacity, others as in stree_kernels.rows. Activations are
time-major (T, B, ...), like the cache's row buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stree_core.backend import Backend
from stree_core.cache import (
    KEY_MULTIPLE,
    AttentionCache,
    Cache,
    CacheSize,
    Mamba2Cache,
    make_cache,
)
from stree_core.model_shape import AttentionShape, Mamba2Shape, ModelShape
from stree_core.row_block import RowBlock
from stree_kernels.rows import ScanHeads


@dataclass(frozen=True, slots=True)
class Mamba2Weights:
    """Parameters of a Mamba2 mixer."""

    in_proj: Tensor
    conv_CW: Tensor
    conv_bias_C: Tensor
    heads: ScanHeads
    gate_norm: Tensor
    out_proj: Tensor


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Parameters of an attention mixer; queries, keys and values are one projection."""

    qkv_proj: Tensor
    o_proj: Tensor


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """Parameters of a gated MLP; gate and up are one projection."""

    gate_up_proj: Tensor
    down_proj: Tensor


MixerWeights = Mamba2Weights | AttentionWeights | MlpWeights


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All parameters, blocks in order as (norm, mixer)."""

    embed_VD: Tensor
    blocks: tuple[tuple[Tensor, MixerWeights], ...]
    final_norm: Tensor
    lm_head_VD: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all attention mixers of one pass share.

    Queries [B, Q] are the pass's rows once for each query head of a kv head; keys [K] are the first
    `num_committed` of the cache, then the rows of the block. `bias_BQK` is 0 where a query sees a
    key, else -inf. `slot_B1` and `position_BL` say where the pending path is appended.
    """

    rotation: tuple[Tensor, Tensor]
    num_committed: int
    bias_BQK: Tensor
    slot_B1: Tensor
    position_BL: Tensor


@dataclass(frozen=True, slots=True)
class Pass:
    """What all blocks of one pass share: its rows, whether it commits, attention's tables."""

    block: RowBlock
    first: int
    num_tokens: int
    commit: bool
    attention: AttentionPlan | None

    @property
    def end(self) -> int:
        """One past the last row."""
        return self.first + self.num_tokens


class Model:
    """A model's weights and the backend that runs them."""

    def __init__(self, shape: ModelShape, weights: ModelWeights, backend: Backend) -> None:
        self.shape = shape
        self.weights = weights
        self.backend = backend
        self.dtype = weights.embed_VD.dtype
        self.device = weights.embed_VD.device
        self.conv_widths = frozenset(
            b.mixer.conv_width for b in shape.blocks if isinstance(b.mixer, Mamba2Shape)
        )

    def make_cache(self, size: CacheSize) -> Cache:
        """Allocate an empty cache for this model."""
        return make_cache(self.shape, size, self.dtype, self.device)

    def forward(
        self, tokens_TB: Tensor, block: RowBlock, cache: Cache, *, first: int, commit: bool
    ) -> Tensor:
        """Run rows first..first + T - 1 of `block`, whose earlier rows this step has already run.

        With `commit` the cache's pending path is applied first: once a step, by its first pass.
        Returns hidden states [T, B, D] after the final norm.
        """
        num_tokens = tokens_TB.shape[0]
        attention = self._plan_attention(block, cache, first, first + num_tokens)
        this = Pass(block, first, num_tokens, commit, attention)
        x_TBD = self.weights.embed_VD[tokens_TB]
        x_TBD = x_TBD.to(self.weights.final_norm.dtype)
        layers = zip(self.shape.blocks, self.weights.blocks, cache.layers, strict=True)
        for shape, (norm, weights), layer in layers:
            normed_TBD = self._norm(x_TBD, norm)
            if isinstance(weights, MlpWeights):
                x_TBD = x_TBD + _mlp(normed_TBD, weights)
            elif isinstance(weights, Mamba2Weights):
                assert isinstance(layer, Mamba2Cache)
                x_TBD = x_TBD + self._mamba2(normed_TBD, weights, layer, cache, this)
            else:
                assert isinstance(layer, AttentionCache)
                assert isinstance(shape.mixer, AttentionShape)
                x_TBD = x_TBD + _attention(normed_TBD, weights, shape.mixer, layer, cache, this)
        return self._norm(x_TBD, self.weights.final_norm)

    def logits(self, hidden_TBD: Tensor) -> Tensor:
        """Return fp32 logits [T, B, V]: bf16 ones would tie in several percent of positions."""
        weight = self.weights.lm_head_VD
        if weight.dtype in (torch.float32, torch.float64):
            return functional.linear(hidden_TBD, weight).float()
        rows = hidden_TBD.flatten(0, 1)
        if weight.is_cuda:
            logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
        else:
            logits = functional.linear(rows.float(), weight.float())
        return logits.view(*hidden_TBD.shape[:2], -1)

    def _plan_attention(
        self, block: RowBlock, cache: Cache, first: int, end: int
    ) -> AttentionPlan | None:
        if not self.shape.has_attention:
            return None
        shape = next(b.mixer for b in self.shape.blocks if isinstance(b.mixer, AttentionShape))
        layer = next(layer for layer in cache.layers if isinstance(layer, AttentionCache))
        committed_B1 = cache.committed_B[:, None]
        num_slots = len(committed_B1)
        num_committed = layer.key_BSHD.shape[1] - end % KEY_MULTIPLE
        visible_BK = torch.arange(num_committed, device=self.device) < committed_B1
        visible_BTK = torch.cat(
            (
                visible_BK[:, None].expand(-1, end - first, -1),
                block.mask_RR[first:end, :end].expand(num_slots, -1, -1),
            ),
            dim=2,
        )
        bias_BTK = torch.zeros(visible_BTK.shape, dtype=self.dtype, device=self.device)
        bias_BTK.masked_fill_(~visible_BTK, -torch.inf)
        path_BL, length_B = cache.pending
        return AttentionPlan(
            _rotation(block.depth_R[first:end, None] + cache.committed_B, shape, self.dtype),
            num_committed,
            bias_BTK.repeat(1, shape.num_heads // shape.num_kv_heads, 1),
            torch.arange(num_slots, device=self.device)[:, None],
            committed_B1 - length_B[:, None] + torch.arange(path_BL.shape[1], device=self.device),
        )

    def _norm(self, x_TBD: Tensor, weight: Tensor) -> Tensor:
        """Return the RMS norm of x in the model's dtype."""
        normed = functional.rms_norm(
            x_TBD, weight.shape, weight.to(x_TBD.dtype), self.shape.norm_eps
        )
        return normed.to(self.dtype)

    def _mamba2(
        self, x_TBD: Tensor, w: Mamba2Weights, layer: Mamba2Cache, cache: Cache, this: Pass
    ) -> Tensor:
        m, now, before = layer.shape, cache.current, 1 - cache.current
        pending = cache.pending if this.commit else None
        proj_TB = layer.proj_RB[now][this.first : this.end]
        torch.mm(x_TBD.flatten(0, 1), w.in_proj.t(), out=proj_TB.flatten(0, 1))
        self.backend.tree_conv(
            layer.conv_BCK, layer.conv_inputs_BRC(now), w.conv_CW, w.conv_bias_C,
            this.block.ancestors_RK[m.conv_width], first=this.first, num_tokens=this.num_tokens,
            out_BRC=layer.conv_RBC[now].transpose(0, 1),
            previous_BRC=layer.conv_inputs_BRC(before) if this.commit else None, pending=pending,
        )  # fmt: skip
        y_TBHP = x_TBD.new_empty(*x_TBD.shape[:2], m.num_heads, m.head_dim)
        self.backend.tree_scan(
            layer.ssm_BHPN, layer.scan_rows(now), layer.c_BRGN(now)[:, this.first : this.end],
            this.block.mask_RR, w.heads, first=this.first, dt_limit=m.dt_limit,
            out_BTHP=y_TBHP.transpose(0, 1),
            previous=layer.scan_rows(before) if this.commit else None, pending=pending,
        )  # fmt: skip
        gated = y_TBHP.flatten(2) * functional.silu(proj_TB[..., : m.inner_dim])
        grouped = gated.unflatten(2, (m.num_groups, -1))
        normed = functional.rms_norm(grouped, grouped.shape[-1:], None, self.shape.norm_eps)
        return functional.linear(normed.flatten(2) * w.gate_norm, w.out_proj)


def _mlp(x_TBD: Tensor, w: MlpWeights) -> Tensor:
    gate, up = functional.linear(x_TBD, w.gate_up_proj).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, w.down_proj)


def _attention(
    x_TBD: Tensor, w: AttentionWeights, a: AttentionShape, layer: AttentionCache, cache: Cache,
    this: Pass,
) -> Tensor:  # fmt: skip
    """Attend to the committed cache and, in the block, to ancestors."""
    plan = this.attention
    assert plan is not None
    if this.commit:
        _commit_keys(layer, cache, plan)
    qkv = functional.linear(x_TBD, w.qkv_proj).unflatten(-1, (-1, a.head_dim))
    turned_TBHD = _rotate(qkv[:, :, : a.num_heads + a.num_kv_heads], plan.rotation)
    q_TBHD, k_TBHD = turned_TBHD.split((a.num_heads, a.num_kv_heads), dim=2)
    keys_RBHD, values_RBHD = layer.key_RBHD[cache.current], layer.value_RBHD[cache.current]
    keys_RBHD[this.first : this.end] = k_TBHD
    values_RBHD[this.first : this.end] = qkv[:, :, -a.num_kv_heads :]
    out = functional.scaled_dot_product_attention(
        q_TBHD.unflatten(2, (a.num_kv_heads, -1)).permute(1, 2, 3, 0, 4).flatten(2, 3),
        _seen(layer.key_BSHD, keys_RBHD, plan, this.end),
        _seen(layer.value_BSHD, values_RBHD, plan, this.end),
        attn_mask=plan.bias_BQK[:, None],
    )
    heads = out.unflatten(2, (-1, this.num_tokens)).permute(3, 0, 1, 2, 4)
    return functional.linear(heads.flatten(2), w.o_proj)


def _seen(committed_BSHD: Tensor, rows_RBHD: Tensor, plan: AttentionPlan, end: int) -> Tensor:
    """Return the keys or values of a pass [B, kv heads, K, head dim]."""
    parts = (committed_BSHD[:, : plan.num_committed], rows_RBHD[:end].transpose(0, 1))
    return torch.cat(parts, dim=1).transpose(1, 2)


def _commit_keys(layer: AttentionCache, cache: Cache, plan: AttentionPlan) -> None:
    """Append the pending path's keys and values to the committed ones.

    Unused entries land behind the committed length, where nothing looks before it is rewritten.
    """
    rows = (cache.pending.path_BL, plan.slot_B1)
    where = (plan.slot_B1, plan.position_BL)
    layer.key_BSHD[where] = layer.key_RBHD[1 - cache.current][rows]
    layer.value_BSHD[where] = layer.value_RBHD[1 - cache.current][rows]


def _rotation(position_TB: Tensor, a: AttentionShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, B, 1, rotary dim]; angles are formed in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, a.rotary_dim, 2, device=position_TB.device, dtype=wide)
    angle = position_TB[..., None].to(wide) / a.rope_theta ** (exponent / a.rotary_dim)
    angle = torch.cat((angle, angle), dim=-1)[:, :, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x_TBHD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first dimensions of every head, halves paired (the Llama convention)."""
    cos, sin = rotation
    rotary_dim = cos.shape[-1]
    turned, kept = x_TBHD[..., :rotary_dim], x_TBHD[..., rotary_dim:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1)
