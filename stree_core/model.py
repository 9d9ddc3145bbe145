"""One forward pass of a Mamba2 or hybrid model over a block of rows.

Shape letters: T rows of this pass, B slots, D hidden size, V vocabulary, E rows up to this pass's
last, S committed positions, L path capacity, others as in stree_kernels.rows. Activations are
time-major (T, B, ...), like the cache's row buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stree_core.backend import Backend
from stree_core.cache import AttentionCache, Cache, CacheSize, Mamba2Cache, make_cache
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
class Pass:
    """What all blocks of one pass share: its rows, whether it commits, attention's tables."""

    block: RowBlock
    first: int
    num_tokens: int
    commit: bool
    rotation: tuple[Tensor, Tensor] | None = None
    visible_BQK: Tensor | None = None

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
        this = self._plan_pass(block, cache, first, tokens_TB.shape[0], commit)
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

    def _plan_pass(
        self, block: RowBlock, cache: Cache, first: int, num_tokens: int, commit: bool
    ) -> Pass:
        if not self.shape.has_attention:
            return Pass(block, first, num_tokens, commit)
        attention = next(b.mixer for b in self.shape.blocks if isinstance(b.mixer, AttentionShape))
        layer = next(layer for layer in cache.layers if isinstance(layer, AttentionCache))
        end = first + num_tokens
        rows_TB = block.depth_R[first:end, None] + cache.committed_B
        position_S = torch.arange(layer.key_BSHD.shape[1], device=self.device)
        committed_BTS = (position_S < cache.committed_B[:, None])[:, None].expand(
            -1, num_tokens, -1
        )
        tree_BTE = block.mask_RR[first:end, :end].expand(len(cache.committed_B), -1, -1)
        visible_BTK = torch.cat((committed_BTS, tree_BTE), dim=2)
        # Query heads that share a kv head are folded into the rows of one attention problem.
        group_size = attention.num_heads // attention.num_kv_heads
        visible_BQK = visible_BTK.repeat(1, group_size, 1)
        return Pass(
            block, first, num_tokens, commit, _rotation(rows_TB, attention, self.dtype), visible_BQK
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
    if this.commit:
        _commit_keys(layer, cache)
    assert this.rotation is not None
    assert this.visible_BQK is not None
    qkv = functional.linear(x_TBD, w.qkv_proj).unflatten(-1, (-1, a.head_dim))
    q_TBHD, k_TBHD, v_TBHD = qkv.split((a.num_heads, a.num_kv_heads, a.num_kv_heads), dim=2)
    keys_RBHD, values_RBHD = layer.key_RBHD[cache.current], layer.value_RBHD[cache.current]
    keys_RBHD[this.first : this.end] = _rotate(k_TBHD, this.rotation)
    values_RBHD[this.first : this.end] = v_TBHD
    keys = torch.cat((layer.key_BSHD, keys_RBHD[: this.end].transpose(0, 1)), dim=1)
    values = torch.cat((layer.value_BSHD, values_RBHD[: this.end].transpose(0, 1)), dim=1)
    queries = _rotate(q_TBHD, this.rotation).unflatten(2, (a.num_kv_heads, -1))
    out = functional.scaled_dot_product_attention(
        queries.permute(1, 2, 3, 0, 4).flatten(2, 3),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=this.visible_BQK[:, None],
    )
    heads = out.unflatten(2, (-1, this.num_tokens)).permute(3, 0, 1, 2, 4)
    return functional.linear(heads.flatten(2), w.o_proj)


def _commit_keys(layer: AttentionCache, cache: Cache) -> None:
    """Append the pending path's keys and values to the committed ones.

    Unused entries land behind the committed length, where nothing looks before it is rewritten.
    """
    path_BL, length_B = cache.pending
    slot_B1 = torch.arange(path_BL.shape[0], device=path_BL.device)[:, None]
    start_B1 = (cache.committed_B - length_B)[:, None]
    position_BL = start_B1 + torch.arange(path_BL.shape[1], device=path_BL.device)
    before = 1 - cache.current
    layer.key_BSHD[slot_B1, position_BL] = layer.key_RBHD[before][path_BL, slot_B1]
    layer.value_BSHD[slot_B1, position_BL] = layer.value_RBHD[before][path_BL, slot_B1]


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
