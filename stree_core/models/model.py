"""One forward pass of a Mamba2 or hybrid model over a block of rows.

Activations are time-major (T, B, ...), like the cache's row buffers; projections take them as M
rows. The residual stream carries its sums of squares, so that a norm is part of the projection
after it: the norms' weights are folded into the projections' (stree_core.models.weights).

Shape letters: T rows of this pass, B slots, M = T * B, D hidden size, V vocabulary, Q partial sums
of a row, L path capacity, others as in stree_kernels.launch.rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.families import (
    AttentionShape,
    DeltaShape,
    GatedAttentionShape,
    Mamba2Shape,
    Mixer,
    MlpShape,
    ModelShape,
    MoeShape,
    SharedBlock,
    SharedMoeShape,
)
from stree_core.models.backend import Backend
from stree_core.models.cache import (
    AttentionCache,
    Cache,
    CacheSize,
    DeltaCache,
    LayerCache,
    Mamba2Cache,
    make_cache,
)
from stree_core.models.prompt_pass import PromptPass
from stree_core.models.row_block import RowBlock, copied, like, side_by_side
from stree_core.models.weights import (
    AttentionWeights,
    DeltaWeights,
    Mamba2Weights,
    MlpWeights,
    ModelWeights,
    MoeWeights,
    PartWeights,
    SharedWeights,
)
from stree_kernels.delta.rows import DeltaPast, DeltaTokens
from stree_kernels.fp8.scaled_weight import Projection
from stree_kernels.launch.rows import ConvTail, Gate, Past, Pending, gate_width
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM, DeferredNorm, Residual
from stree_kernels.routing.router_ref import Router


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
    def one_token(self) -> bool:
        """Whether every row is another slot's."""
        return self.num_tokens == 1

    @property
    def pending(self) -> Pending | None:
        """The path that this pass commits."""
        return self.cache.pending if self.commit else None


AnyPass = Pass | PromptPass


class Model:
    """A model's weights and the backend that runs them."""

    def __init__(self, shape: ModelShape, weights: ModelWeights, backend: Backend) -> None:
        self.shape = shape
        self.weights = weights
        self.backend = backend
        self.dtype = weights.embed_VD.dtype
        self.device = weights.embed_VD.device
        self.conv_widths = frozenset(
            p.mixer.conv_width for p in shape.parts if isinstance(p.mixer, Mamba2Shape | DeltaShape)
        )

    def make_cache(self, size: CacheSize, device: torch.device | None = None) -> Cache:
        """Allocate an empty cache for this model, on its device unless another is given."""
        return make_cache(self.shape, size, self.dtype, device or self.device)

    def forward(
        self, tokens_TB: Tensor, block: RowBlock, cache: Cache, *, first: int, commit: bool
    ) -> Tensor:
        """Run rows first..first + T - 1 of `block`, whose earlier rows this step has already run.

        With `commit` the cache's pending path is applied first: once a step, by its first pass.
        Returns hidden states [T, B, D] after the final norm.
        """
        this = Pass(block, cache, first, len(tokens_TB), commit)
        residual = self._start(tokens_TB)
        hidden_MD = torch.empty_like(residual.values_MD)
        self.run_blocks(residual, residual.rows(self.shape.norm_eps), this, hidden_MD)
        return hidden_MD.view(*tokens_TB.shape, -1)

    def read(self, tokens_M: Tensor, this: PromptPass) -> Tensor:
        """Run packed prompts into their slots; return hidden states [M, D] after the final norm."""
        residual = self._start(tokens_M)
        hidden_MD = torch.empty_like(residual.values_MD)
        self.run_blocks(residual, residual.rows(self.shape.norm_eps), this, hidden_MD)
        return hidden_MD

    def run_blocks(
        self, residual: Residual, rows: DeferredNorm, this: AnyPass, out_MD: Tensor
    ) -> None:
        """Run all blocks on a stream whose rows the first reads; write the final norm's output."""
        embedding = copied(rows) if any(b.shared for b in self.shape.blocks) else rows
        layers = iter(this.cache.layers)
        for shape, weights in zip(self.shape.blocks, self.weights.blocks, strict=True):
            if shape.shared is not None and weights.shared is not None:
                rows = self._beside(residual, embedding, shape.shared, weights.shared, layers, this)
            # All parts read the same rows, so all are run before any is added.
            mixed = [
                self._mix(rows, part.mixer, part_weights, next(layers), this)
                for part, part_weights in zip(shape.parts, weights.parts, strict=True)
            ]
            for output, out_proj in mixed:
                rows = self._add(output, out_proj, residual, this)
        self.backend.scale_rows(rows, self.weights.final_norm, out_MD)

    def logits(self, hidden_TBD: Tensor) -> Tensor:
        """Return fp32 logits [T, B, V]: bf16 ones would tie in several percent of positions."""
        weight_VD = self.weights.lm_head_VD
        logits_TBV = weight_VD.new_empty(*hidden_TBD.shape[:2], len(weight_VD), dtype=torch.float32)
        rows = DeferredNorm(hidden_TBD.flatten(0, 1), None, 1, 0.0)
        one_token = len(hidden_TBD) == 1
        self.backend.linear(rows, weight_VD, logits_TBV.flatten(0, 1), one_token=one_token)
        return logits_TBV

    def _start(self, tokens_TB: Tensor) -> Residual:
        """Return the residual stream that the embeddings start."""
        residual = self.empty_residual(tokens_TB.numel())
        self.backend.start_residual(
            self.weights.embed_VD, tokens_TB.flatten(), residual, scale=self.shape.embed_scale
        )
        return residual

    def empty_residual(self, num_rows: int) -> Residual:
        """Return a residual stream of some rows, not filled."""
        embed_VD = self.weights.embed_VD
        wide = torch.promote_types(self.dtype, torch.float32)
        values_MD = embed_VD.new_empty(num_rows, embed_VD.shape[1])
        stream_MD = torch.empty_like(values_MD, dtype=wide)
        if wide == self.dtype or not self.shape.residual_fp32:
            stream_MD = values_MD
        sums_MQ = values_MD.new_empty(num_rows, embed_VD.shape[1] // COLUMNS_PER_SUM, dtype=wide)
        return Residual(stream_MD, values_MD, sums_MQ)

    def _mix(
        self,
        rows: DeferredNorm,
        mixer: Mixer,
        weights: PartWeights,
        layer: LayerCache,
        this: AnyPass,
    ) -> tuple[DeferredNorm, Projection | None]:
        """Return a part's output before its last projection, and that; None where there is none."""
        if isinstance(weights, Mamba2Weights):
            assert isinstance(layer, Mamba2Cache)
            assert isinstance(mixer, Mamba2Shape)
            if isinstance(this, PromptPass):
                output = this.mamba2(self.backend, rows, weights, mixer, layer)
                return output, weights.out_proj
            return self._mamba2(rows, weights, mixer, layer, this), weights.out_proj
        if isinstance(weights, DeltaWeights):
            assert isinstance(layer, DeltaCache)
            assert isinstance(mixer, DeltaShape)
            if isinstance(this, PromptPass):
                output = this.delta(self.backend, rows, weights, mixer, layer)
                return output, weights.out_proj
            return self._delta(rows, weights, mixer, layer, this), weights.out_proj
        if isinstance(weights, AttentionWeights):
            assert isinstance(layer, AttentionCache)
            assert isinstance(mixer, AttentionShape)
            if isinstance(this, PromptPass):
                output = this.attention(self.backend, rows, weights, mixer, layer)
                return output, weights.o_proj
            return self._attention(rows, weights, mixer, layer, this), weights.o_proj
        if isinstance(weights, MlpWeights):
            assert isinstance(mixer, MlpShape)
            return self._mlp(rows, weights, mixer, this), weights.down_proj
        assert isinstance(mixer, MoeShape)
        return self._moe(rows, weights, mixer, this), weights.latent_out

    def _add(
        self, output: DeferredNorm, out_proj: Projection | None, residual: Residual, this: AnyPass
    ) -> DeferredNorm:
        """Add a part's output to the stream; return its rows for the next projection."""
        eps = self.shape.norm_eps
        if out_proj is not None:
            return self.backend.linear_add(
                output, out_proj, residual, eps=eps, one_token=this.one_token
            )
        self.backend.add_residual(output.values_MK, residual)
        return residual.rows(eps)

    def _beside(
        self, residual: Residual, embedding: DeferredNorm, shape: SharedBlock, w: SharedWeights,
        layers: Iterator[LayerCache], this: AnyPass,
    ) -> DeferredNorm:  # fmt: skip
        """Return the stream's rows plus what the shared layer says, the stream as it was."""
        eps = self.shape.norm_eps
        inputs = side_by_side(residual.rows(eps), embedding)
        mixed, out_proj = self._mix(inputs, shape.attention.mixer, w.attention, next(layers), this)
        assert out_proj is not None
        one = this.one_token
        attended = like(residual, zero=True)
        rows = self.backend.linear_add(mixed, out_proj, attended, eps=eps, one_token=one)
        inner, down_proj = self._mix(rows, shape.mlp.mixer, w.mlp, next(layers), this)
        assert down_proj is not None
        out_MD = torch.empty_like(residual.values_MD)
        self.backend.linear(inner, down_proj, out_MD, one_token=one)
        said = DeferredNorm(out_MD, None, 1, 0.0)
        total = like(residual, zero=False)
        return self.backend.linear_add(said, w.linear, total, eps=eps, one_token=one)

    def _mlp(self, rows: DeferredNorm, w: MlpWeights, m: MlpShape, this: AnyPass) -> DeferredNorm:
        out_MF = rows.values_MK.new_empty(len(rows.values_MK), m.inner_dim)
        self.backend.linear_activated(
            rows, w.up_proj, out_MF, m.activation, one_token=this.one_token
        )
        return DeferredNorm(out_MF, None, 1, 0.0)

    def _moe(self, rows: DeferredNorm, w: MoeWeights, m: MoeShape, this: AnyPass) -> DeferredNorm:
        hidden_MD = torch.empty_like(rows.values_MK)
        num_shared = m.num_shared if isinstance(m, SharedMoeShape) else 0
        router = Router(w.norm_D, w.router_ED, w.bias_E, m.router, num_shared)
        choice_MC, share_MC = self.backend.route(rows, router, hidden_MD)
        out_dtype = w.router_ED.dtype
        if w.latent_in is not None:
            out_dtype = hidden_MD.dtype
            latent_ML = hidden_MD.new_empty(len(hidden_MD), len(w.latent_in))
            hidden = DeferredNorm(hidden_MD, None, 1, 0.0)
            self.backend.linear(hidden, w.latent_in, latent_ML, one_token=this.one_token)
            hidden_MD = latent_ML
        out_MD = torch.empty_like(hidden_MD, dtype=out_dtype)
        self.backend.expert_mlps(
            hidden_MD, choice_MC, share_MC, w.up_EZD, w.down_EDF, out_MD,
            activation=m.expert.activation,
        )  # fmt: skip
        return DeferredNorm(out_MD, None, 1, 0.0)

    def _mamba2(
        self, rows: DeferredNorm, w: Mamba2Weights, m: Mamba2Shape, layer: Mamba2Cache, this: Pass
    ) -> DeferredNorm:
        current = this.cache.current
        now, before = layer.sets[current], layer.sets[1 - current]
        proj_TB = layer.proj_RB[current][this.first : this.end]
        conv = ConvTail(
            layer.conv_BCK, now.conv_inputs_BRE, w.conv_CW, w.conv_bias_C,
            this.block.ancestors_RK[m.conv_width], this.first, now.conv_outputs_BRE,
            before.conv_inputs_BRE if this.commit else None, this.pending, m.inner_dim,
        )  # fmt: skip
        self.backend.project_and_convolve(
            rows, w.in_proj, proj_TB.flatten(0, 1), conv, one_token=this.one_token
        )
        y_TBHP = proj_TB.new_empty(*proj_TB.shape[:2], m.num_heads, m.head_dim)
        num_sums = m.inner_dim // gate_width(m.head_dim, m.state_dim, self.dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        sums_TBQ = proj_TB.new_empty(*proj_TB.shape[:2], num_sums, dtype=wide)
        z_TBHP = proj_TB[..., : m.inner_dim].unflatten(-1, (m.num_heads, m.head_dim))
        self.backend.tree_scan(
            layer.ssm_BHPN, now.scan_rows, now.c_BRGN[:, this.first : this.end],
            this.block.mask_RR, w.heads, first=this.first, dt_limit=m.dt_limit,
            out_BTHP=y_TBHP.transpose(0, 1),
            gate=Gate(z_TBHP.transpose(0, 1), sums_TBQ.transpose(0, 1)),
            past=Past(layer.all_rows, before.start, this.cache.pending, this.commit),
        )  # fmt: skip
        gated_MX = y_TBHP.view(len(rows.values_MK), -1)
        if not m.norm_groups:
            return DeferredNorm(gated_MX, None, 1, 0.0)
        return DeferredNorm(gated_MX, sums_TBQ.view(len(gated_MX), -1), m.norm_groups, m.norm_eps)

    def _delta(
        self, rows: DeferredNorm, w: DeltaWeights, m: DeltaShape, layer: DeltaCache, this: Pass
    ) -> DeferredNorm:
        current, here = this.cache.current, slice(this.first, this.end)
        now, before = layer.sets[current], layer.sets[1 - current]
        proj_TB = layer.proj_RB[current][here]
        self.backend.linear(rows, w.in_proj, proj_TB.flatten(0, 1), one_token=this.one_token)
        self.backend.delta_conv(
            layer.conv_BCK, now.inputs, w.conv_CW, w.heads, this.block.ancestors_RK[m.conv_width],
            num_key_heads=m.num_key_heads, key_head_dim=m.key_head_dim, first=this.first,
            num_tokens=this.num_tokens, out=now.outputs,
            previous_BRC=before.inputs.qkv_BRC if this.commit else None, pending=this.pending,
        )  # fmt: skip
        o_TBHP = proj_TB.new_empty(*proj_TB.shape[:2], m.num_value_heads, m.value_head_dim)
        num_sums = m.inner_dim // gate_width(m.value_head_dim, m.key_head_dim, self.dtype)
        sums_TBQ = layer.solved_RBX.new_empty(*proj_TB.shape[:2], num_sums)
        z_TBHP = proj_TB[..., : m.inner_dim].unflatten(-1, o_TBHP.shape[2:])
        self.backend.delta_scan(
            layer.state_BHPN, now.scan_rows, DeltaTokens(*(x[:, here] for x in now.tokens)),
            this.block.mask_RR, first=this.first, out_BTHP=o_TBHP.transpose(0, 1),
            gate=Gate(z_TBHP.transpose(0, 1), sums_TBQ.transpose(0, 1)),
            past=DeltaPast(layer.all_rows, before.start, this.cache.pending, this.commit),
        )  # fmt: skip
        gated_MX = o_TBHP.view(len(rows.values_MK), -1)
        return DeferredNorm(
            gated_MX, sums_TBQ.view(len(gated_MX), -1), m.num_value_heads, m.norm_eps
        )

    def _attention(
        self, rows: DeferredNorm, w: AttentionWeights, a: AttentionShape, layer: AttentionCache,
        this: Pass,
    ) -> DeferredNorm:  # fmt: skip
        """Attend to the committed cache and, in the block, to ancestors."""
        q_TBHD, gate_MX = self.rope_kv_write(rows, w, a, layer, this)
        now, out_TBHD = this.cache.current, torch.empty_like(q_TBHD)
        num_values = self.backend.workspace_size(
            *q_TBHD.shape[:2], a.num_heads, a.num_kv_heads, a.row_dim, self.dtype
        )
        self.backend.tree_attention(
            q_TBHD, layer.committed, layer.rows[now], this.block.mask_RR, this.cache.committed_B,
            first=this.first, scale=a.scale, out_TBHD=out_TBHD,
            workspace=q_TBHD.new_empty(num_values, dtype=torch.float32),
        )  # fmt: skip
        out_MX = out_TBHD.view(len(rows.values_MK), -1)
        if isinstance(a, GatedAttentionShape):
            self.backend.gate_output(gate_MX, out_MX)
        return DeferredNorm(out_MX, None, 1, 0.0)

    def rope_kv_write(
        self, rows: DeferredNorm, w: AttentionWeights, a: AttentionShape, layer: AttentionCache,
        this: Pass, committed_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """File the keys and values of a pass's rows.

        Returns their queries [T, B, H, D], and [M, H * D], or no columns, of their gate's logits.
        `committed_B` is where the block begins, behind the committed tokens by default.
        """
        now, cache = this.cache.current, this.cache
        size = (this.num_tokens, len(cache.committed_B))
        qkv_MX = rows.values_MK.new_empty(len(rows.values_MK), len(w.qkv_proj))
        self.backend.linear(rows, w.qkv_proj, qkv_MX, one_token=this.one_token)
        q_TBHD = qkv_MX.new_empty(*size, a.num_heads, a.row_dim)
        begin_B = cache.committed_B if committed_B is None else committed_B
        num_columns = (a.num_heads + 2 * a.num_kv_heads) * a.row_dim
        self.backend.rope_kv_write(
            qkv_MX.view(*size, -1)[..., :num_columns], this.block.depth_R, begin_B, w.inv_freq_X,
            first=this.first, q_TBHD=q_TBHD, rows=layer.rows[now], cache=layer.committed,
            previous=layer.rows[1 - now] if this.commit else None, pending=this.pending,
            norms=w.norms,
        )  # fmt: skip
        return q_TBHD, qkv_MX[:, num_columns:]
