"""One forward pass of a Mamba2 or hybrid model over a block of rows.

Activations are time-major (T, B, ...), like the cache's row buffers; projections take them as M
rows. The residual stream carries its sums of squares, so that a norm is part of the projection
after it: the norms' weights are folded into the projections' (stree_core.checkpoint).

Shape letters: T rows of this pass, B slots, M = T * B, D hidden size, V vocabulary, Q partial sums
of a row, L path capacity, others as in stree_kernels.rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.backend import Backend
from stree_core.cache import AttentionCache, Cache, CacheSize, Mamba2Cache, make_cache
from stree_core.model_shape import AttentionShape, Mamba2Shape, ModelShape
from stree_core.row_block import RowBlock
from stree_kernels.rows import Gate, Past, Pending, ScanHeads, gate_width
from stree_kernels.unscaled import COLUMNS_PER_SUM, Residual, UnscaledRows


@dataclass(frozen=True, slots=True)
class Mamba2Weights:
    """Parameters of a Mamba2 mixer; the norms before it and after its gate are folded in."""

    in_proj: Tensor
    conv_CW: Tensor
    conv_bias_C: Tensor
    heads: ScanHeads
    out_proj: Tensor


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Parameters of an attention mixer; queries, keys and values are one projection.

    `inv_freq_X` are the rotation's angles per position.
    """

    qkv_proj: Tensor
    o_proj: Tensor
    inv_freq_X: Tensor


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """Parameters of a gated MLP; gate and up are one projection."""

    gate_up_proj: Tensor
    down_proj: Tensor


MixerWeights = Mamba2Weights | AttentionWeights | MlpWeights


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All parameters; mixers in order."""

    embed_VD: Tensor
    mixers: tuple[MixerWeights, ...]
    final_norm: Tensor
    lm_head_VD: Tensor


@dataclass(frozen=True, slots=True)
class Pass:
    """What all mixers of one pass share: its rows, the cache, and whether it commits."""

    block: RowBlock
    cache: Cache
    first: int
    num_tokens: int
    commit: bool

    @property
    def end(self) -> int:
        """One past the last row."""
        return self.first + self.num_tokens

    @property
    def pending(self) -> Pending | None:
        """The path that this pass commits."""
        return self.cache.pending if self.commit else None


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
        this = Pass(block, cache, first, len(tokens_TB), commit)
        residual, eps = self._start(tokens_TB), self.shape.norm_eps
        rows = residual.rows(eps)
        layers = zip(self.shape.blocks, self.weights.mixers, cache.layers, strict=True)
        for shape, weights, layer in layers:
            if isinstance(weights, MlpWeights):
                mixed, out_proj = self._mlp(rows, weights), weights.down_proj
            elif isinstance(weights, Mamba2Weights):
                assert isinstance(layer, Mamba2Cache)
                mixed, out_proj = self._mamba2(rows, weights, layer, this), weights.out_proj
            else:
                assert isinstance(layer, AttentionCache)
                assert isinstance(shape.mixer, AttentionShape)
                mixed = self._attention(rows, weights, shape.mixer, layer, this)
                out_proj = weights.o_proj
            rows = self.backend.linear_add(mixed, out_proj, residual, eps=eps)
        hidden_MD = torch.empty_like(residual.values_MD)
        self.backend.scale_rows(rows, self.weights.final_norm, hidden_MD)
        return hidden_MD.view(*tokens_TB.shape, -1)

    def logits(self, hidden_TBD: Tensor) -> Tensor:
        """Return fp32 logits [T, B, V]: bf16 ones would tie in several percent of positions."""
        weight_VD = self.weights.lm_head_VD
        logits_TBV = weight_VD.new_empty(*hidden_TBD.shape[:2], len(weight_VD), dtype=torch.float32)
        rows = UnscaledRows(hidden_TBD.flatten(0, 1), None, 1, 0.0)
        self.backend.linear(rows, weight_VD, logits_TBV.flatten(0, 1))
        return logits_TBV

    def _start(self, tokens_TB: Tensor) -> Residual:
        """Return the residual stream that the embeddings start."""
        embed_VD = self.weights.embed_VD
        num_rows, hidden_size = tokens_TB.numel(), embed_VD.shape[1]
        wide = torch.promote_types(self.dtype, torch.float32)
        values_MD = embed_VD.new_empty(num_rows, hidden_size)
        stream_MD = torch.empty_like(values_MD, dtype=wide)
        if wide == self.dtype or not self.shape.residual_fp32:
            stream_MD = values_MD
        sums_MQ = values_MD.new_empty(num_rows, hidden_size // COLUMNS_PER_SUM, dtype=wide)
        residual = Residual(stream_MD, values_MD, sums_MQ)
        self.backend.start_residual(embed_VD, tokens_TB.flatten(), residual)
        return residual

    def _mlp(self, rows: UnscaledRows, w: MlpWeights) -> UnscaledRows:
        out_MF = rows.values_MK.new_empty(len(rows.values_MK), w.down_proj.shape[1])
        self.backend.linear_swiglu(rows, w.gate_up_proj, out_MF)
        return UnscaledRows(out_MF, None, 1, 0.0)

    def _mamba2(
        self, rows: UnscaledRows, w: Mamba2Weights, layer: Mamba2Cache, this: Pass
    ) -> UnscaledRows:
        m, now = layer.shape, this.cache.current
        before = 1 - now
        proj_TB = layer.proj_RB[now][this.first : this.end]
        self.backend.linear(rows, w.in_proj, proj_TB.flatten(0, 1))
        self.backend.tree_conv(
            layer.conv_BCK, layer.conv_inputs_BRE(now), w.conv_CW, w.conv_bias_C,
            this.block.ancestors_RK[m.conv_width], first=this.first, num_tokens=this.num_tokens,
            out_BRE=layer.conv_outputs_BRE(now),
            previous_BRE=layer.conv_inputs_BRE(before) if this.commit else None,
            pending=this.pending,
        )  # fmt: skip
        y_TBHP = proj_TB.new_empty(*proj_TB.shape[:2], m.num_heads, m.head_dim)
        num_sums = m.inner_dim // gate_width(m.head_dim, m.state_dim, self.dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        sums_TBQ = proj_TB.new_empty(*proj_TB.shape[:2], num_sums, dtype=wide)
        z_TBHP = proj_TB[..., : m.inner_dim].unflatten(-1, (m.num_heads, m.head_dim))
        self.backend.tree_scan(
            layer.ssm_BHPN, layer.scan_rows(now), layer.c_BRGN(now)[:, this.first : this.end],
            this.block.mask_RR, w.heads, first=this.first, dt_limit=m.dt_limit,
            out_BTHP=y_TBHP.transpose(0, 1),
            gate=Gate(z_TBHP.transpose(0, 1), sums_TBQ.transpose(0, 1)),
            past=Past(layer.all_rows(), layer.start(before), this.cache.pending, this.commit),
        )  # fmt: skip
        gated_MX = y_TBHP.view(len(rows.values_MK), -1)
        sums_MQ = sums_TBQ.view(len(gated_MX), -1)
        return UnscaledRows(gated_MX, sums_MQ, m.num_groups, self.shape.norm_eps)

    def _attention(
        self, rows: UnscaledRows, w: AttentionWeights, a: AttentionShape, layer: AttentionCache,
        this: Pass,
    ) -> UnscaledRows:  # fmt: skip
        """Attend to the committed cache and, in the block, to ancestors."""
        now, num_slots = this.cache.current, len(this.cache.committed_B)
        size = (this.num_tokens, num_slots)
        qkv_MX = rows.values_MK.new_empty(len(rows.values_MK), len(w.qkv_proj))
        self.backend.linear(rows, w.qkv_proj, qkv_MX)
        q_TBHD = qkv_MX.new_empty(*size, a.num_heads, a.head_dim)
        self.backend.store_keys(
            qkv_MX.view(*size, -1), this.block.depth_R, this.cache.committed_B, w.inv_freq_X,
            first=this.first, q_TBHD=q_TBHD, rows=layer.rows[now], cache=layer.committed,
            previous=layer.rows[1 - now] if this.commit else None, pending=this.pending,
        )  # fmt: skip
        out_TBHD = torch.empty_like(q_TBHD)
        num_values = self.backend.workspace_size(
            *size, a.num_heads, a.num_kv_heads, a.head_dim, self.dtype
        )
        self.backend.tree_attention(
            q_TBHD, layer.committed, layer.rows[now], this.block.mask_RR, this.cache.committed_B,
            first=this.first, scale=a.head_dim**-0.5, out_TBHD=out_TBHD,
            workspace=qkv_MX.new_empty(num_values, dtype=torch.float32),
        )  # fmt: skip
        return UnscaledRows(out_TBHD.view(len(qkv_MX), -1), None, 1, 0.0)
