"""What mixers do in a pass over packed prompts: states, keys and values land in the slots.

`Model.read` runs it. A mixer reads its rows as it does in a tree's pass; only what looks at other
tokens differs, and every kind of mixer that does has a method of `PromptPass`.

Shape letters: M packed tokens, B slots, Q partial sums of a row, others as in
stree_kernels.launch.rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stree_core.families import AttentionShape, DeltaShape, GatedAttentionShape, Mamba2Shape
from stree_core.models.backend import Backend
from stree_core.models.cache import AttentionCache, Cache, DeltaCache, Mamba2Cache
from stree_core.models.weights import AttentionWeights, DeltaWeights, Mamba2Weights
from stree_kernels.delta.delta_chunk_scan_ref import PackedTokens
from stree_kernels.delta.rows import NORM_EPS
from stree_kernels.launch.packing import Packing
from stree_kernels.launch.rows import Gate, gate_width
from stree_kernels.linear.deferred_norm import DeferredNorm
from stree_kernels.ssm.prompt_scan_ref import PromptTokens


@dataclass(frozen=True, slots=True)
class PromptPass:
    """Which slots of a cache the packed tokens go on with; none has more than `longest`."""

    cache: Cache
    packing: Packing
    longest: int

    @property
    def one_token(self) -> bool:
        """False: rows are neighbours of one prompt."""
        return False

    def mamba2(
        self, backend: Backend, rows: DeferredNorm, w: Mamba2Weights, m: Mamba2Shape,
        layer: Mamba2Cache,
    ) -> DeferredNorm:  # fmt: skip
        """Run a Mamba2 mixer up to its last projection."""
        num_tokens, dtype = len(rows.values_MK), rows.values_MK.dtype
        proj_MX = rows.values_MK.new_empty(num_tokens, m.proj_dim)
        backend.linear(rows, w.in_proj, proj_MX)
        z, inputs_MC, dt_MH = proj_MX.split((m.inner_dim, m.conv_dim, m.num_heads), dim=1)
        outputs_MC = proj_MX.new_empty(num_tokens, m.conv_dim)
        backend.prompt_conv(
            layer.conv_BCK, inputs_MC, w.conv_CW, w.conv_bias_C, self.packing, out_MC=outputs_MC
        )
        x, b, c = outputs_MC.split(m.conv_sections, dim=1)
        tokens = PromptTokens(
            x.unflatten(1, (m.num_x_heads, m.head_dim)), dt_MH,
            b.unflatten(1, (m.num_b_groups, m.state_dim)),
            c.unflatten(1, (m.num_c_groups, m.state_dim)),
        )  # fmt: skip
        y_MHP = proj_MX.new_empty(num_tokens, m.num_heads, m.head_dim)
        num_sums = m.inner_dim // gate_width(m.head_dim, m.state_dim, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        sums_MQ = proj_MX.new_empty(num_tokens, num_sums, dtype=wide)
        backend.prompt_scan(
            layer.ssm_BHPN, tokens, w.heads, self.packing, longest=self.longest,
            dt_limit=m.dt_limit, out_MHP=y_MHP, gate=Gate(z.unflatten(1, y_MHP.shape[1:]), sums_MQ),
        )  # fmt: skip
        gated_MX = y_MHP.flatten(1)
        if not m.norm_groups:
            return DeferredNorm(gated_MX, None, 1, 0.0)
        return DeferredNorm(gated_MX, sums_MQ, m.norm_groups, m.norm_eps)

    def delta(
        self, backend: Backend, rows: DeferredNorm, w: DeltaWeights, m: DeltaShape,
        layer: DeltaCache,
    ) -> DeferredNorm:  # fmt: skip
        """Run a gated delta rule mixer up to its last projection."""
        num_tokens, dtype = len(rows.values_MK), rows.values_MK.dtype
        proj_MX = rows.values_MK.new_empty(num_tokens, m.proj_dim)
        backend.linear(rows, w.in_proj, proj_MX)
        z, inputs_MC, a_MH, b_MH = proj_MX.split(m.proj_sections, dim=1)
        outputs_MC = proj_MX.new_empty(num_tokens, m.conv_dim)
        backend.prompt_conv(
            layer.conv_BCK, inputs_MC, w.conv_CW, w.conv_CW.new_zeros(m.conv_dim), self.packing,
            out_MC=outputs_MC,
        )  # fmt: skip
        q, k, v = outputs_MC.split(m.conv_sections, dim=1)
        keys = (m.num_key_heads, m.key_head_dim)
        wide = torch.promote_types(dtype, torch.float32)
        tokens = PackedTokens(
            _unit(q.unflatten(1, keys), wide), _unit(k.unflatten(1, keys), wide),
            v.unflatten(1, (m.num_value_heads, m.value_head_dim)),
            w.heads.a_H * functional.softplus(a_MH.to(wide) + w.heads.bias_H),
            torch.sigmoid(b_MH.to(wide)),
        )  # fmt: skip
        o_MHP = proj_MX.new_empty(num_tokens, m.num_value_heads, m.value_head_dim)
        num_sums = m.inner_dim // gate_width(m.value_head_dim, m.key_head_dim, dtype)
        sums_MQ = proj_MX.new_empty(num_tokens, num_sums, dtype=wide)
        backend.delta_chunk_scan(
            layer.state_BHPN, tokens, self.packing, out_MHP=o_MHP,
            gate=Gate(z.unflatten(1, o_MHP.shape[1:]), sums_MQ),
        )  # fmt: skip
        return DeferredNorm(o_MHP.flatten(1), sums_MQ, m.num_value_heads, m.norm_eps)

    def attention(
        self, backend: Backend, rows: DeferredNorm, w: AttentionWeights, a: AttentionShape,
        layer: AttentionCache,
    ) -> DeferredNorm:  # fmt: skip
        """Run an attention mixer up to its last projection."""
        q_MHD, gate_MX = self.kv_write(backend, rows, w, a, layer)
        out_MHD = torch.empty_like(q_MHD)
        backend.prompt_attention(
            q_MHD, layer.committed, self.packing, scale=a.scale, out_MHD=out_MHD
        )
        out_MX = out_MHD.flatten(1)
        if isinstance(a, GatedAttentionShape):
            backend.gate_output(gate_MX, out_MX)
        return DeferredNorm(out_MX, None, 1, 0.0)

    def kv_write(
        self, backend: Backend, rows: DeferredNorm, w: AttentionWeights, a: AttentionShape,
        layer: AttentionCache,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Project rows, store their keys and values.

        Returns the queries [M, H, D], and [M, H * D], or no columns, of their gate's logits.
        """
        qkv_MX = rows.values_MK.new_empty(len(rows.values_MK), len(w.qkv_proj))
        backend.linear(rows, w.qkv_proj, qkv_MX)
        q_MHD = qkv_MX.new_empty(len(qkv_MX), a.num_heads, a.row_dim)
        num_columns = (a.num_heads + 2 * a.num_kv_heads) * a.row_dim
        backend.prompt_kv_write(
            qkv_MX[:, :num_columns], self.packing, w.inv_freq_X, q_MHD=q_MHD,
            cache=layer.committed, norms=w.norms,
        )  # fmt: skip
        return q_MHD, qkv_MX[:, num_columns:]


def _unit(x_MGN: Tensor, wide: torch.dtype) -> Tensor:
    """Return heads of unit norm, rounded once, as `delta_conv` leaves them."""
    heads_MGN = x_MGN.to(wide)
    scale_MG1 = torch.rsqrt(heads_MGN.square().sum(2, keepdim=True) + NORM_EPS)
    return (heads_MGN * scale_MG1).to(x_MGN.dtype)
