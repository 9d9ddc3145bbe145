"""The tensors of a model as the forward pass takes them, and how they come from a checkpoint.

A norm's weights are folded into the projections that read it, a family's multipliers into the
weights that they multiply; both before the one rounding to the model's dtype.

Shape letters: V vocabulary, D hidden size, C conv channels, W conv width, X angles, E experts,
F MLP inner, Z = 2 F if gated, else F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from stree_core.families import (
    AttentionShape,
    Block,
    DeltaShape,
    GatedAttentionShape,
    Llama3Scaling,
    Mamba2Shape,
    MlpShape,
    ModelShape,
    Part,
    SharedBlock,
    SharedMoeShape,
    Weight,
)
from stree_kernels.attention.rope_kv_write_ref import HeadNorms
from stree_kernels.delta.rows import DeltaHeads
from stree_kernels.fp8.scaled_weight import (
    InProjection,
    Projection,
    ScaledWeight,
    StackedWeight,
    dense,
    with_expert,
)
from stree_kernels.launch.rows import ScanHeads

Read = Callable[[Weight], Tensor]
"""Returns a weight in its shape, on the model's device, in any float dtype, not yet scaled."""

ReadProjection = Callable[[Weight], Projection]
"""The same for weights that rows are multiplied by, which may stay in FP8, rows in their order."""

ReadParts = Callable[[Weight], Sequence[Projection] | None]
"""The parts of a projection of which some are in FP8 and some are not, None where all are alike."""


@dataclass(frozen=True, slots=True)
class Mamba2Weights:
    """Parameters of a Mamba2 mixer; the norms before it and after its gate are folded in."""

    in_proj: Projection
    conv_CW: Tensor
    conv_bias_C: Tensor
    heads: ScanHeads
    out_proj: Projection


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """Parameters of a gated delta rule mixer; norms before it and before its gate are folded in."""

    in_proj: InProjection
    conv_CW: Tensor
    heads: DeltaHeads
    out_proj: Projection


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Parameters of an attention mixer; queries, keys, values and a gate are one projection.

    `inv_freq_X` are the rotation's angles per position, `norms` those of queries and keys.
    """

    qkv_proj: Projection
    o_proj: Projection
    inv_freq_X: Tensor
    norms: HeadNorms | None = None


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """Parameters of an MLP; gate and up are one projection."""

    up_proj: Projection
    down_proj: Projection


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """Parameters of routed experts; the norm before them is not folded in, the router is wide.

    A shared expert stands behind them, its gate behind the router's rows.
    """

    norm_D: Tensor
    router_ED: Tensor
    bias_E: Tensor | None
    latent_in: Projection | None
    up_EZD: Projection
    down_EDF: Projection
    latent_out: Projection | None


PartWeights = Mamba2Weights | DeltaWeights | AttentionWeights | MlpWeights | MoeWeights


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Parameters of the transformer layer beside the stream."""

    attention: AttentionWeights
    mlp: MlpWeights
    linear: Projection


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Parameters of one block, its parts in order."""

    parts: tuple[PartWeights, ...]
    shared: SharedWeights | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All parameters, blocks in order; the LM head may have fewer rows than the embedding.

    `join` is a head's first projection, the norms before it folded in.
    """

    embed_VD: Tensor
    blocks: tuple[BlockWeights, ...]
    final_norm: Tensor
    lm_head_VD: Tensor
    join: Projection | None = None


def assemble(
    shape: ModelShape,
    read: Read,
    dtype: torch.dtype,
    num_logits: int | None = None,
    read_projection: ReadProjection | None = None,
    read_parts: ReadParts | None = None,
) -> ModelWeights:
    """Read all weights one by one and return them as `dtype`.

    The LM head keeps the first `num_logits` tokens, all by default. Projections that
    `read_projection` leaves in FP8 stay so: multipliers go into their scales, norms beside them.
    """
    maker = _Maker(read, dtype, read_projection, read_parts)
    embed = maker.plain(shape.embed)
    blocks = tuple(maker.block(block) for block in shape.blocks)
    head = embed if shape.lm_head == shape.embed else maker.plain(shape.lm_head)
    stream_dtype = maker.wide if shape.residual_fp32 else dtype
    final_norm = maker.scaled(shape.final_norm).to(stream_dtype)
    return ModelWeights(embed, blocks, final_norm, head[:num_logits])


def assemble_head(
    shape: ModelShape,
    read: Read,
    model: ModelWeights,
    read_projection: ReadProjection | None = None,
    read_parts: ReadParts | None = None,
) -> ModelWeights:
    """Read an MTP head's own weights; its embedding and LM head are those of its model."""
    assert shape.join is not None
    maker = _Maker(read, model.embed_VD.dtype, read_projection, read_parts)
    norms = [maker.scaled(norm) for norm in (shape.join.embed_norm, shape.join.hidden_norm)]
    join = maker.projection(shape.join.proj, torch.cat(norms))
    blocks = tuple(maker.block(block) for block in shape.blocks)
    final_norm = maker.scaled(shape.final_norm).to(model.final_norm.dtype)
    return ModelWeights(model.embed_VD, blocks, final_norm, model.lm_head_VD, join)


def _same(weight: Projection) -> Projection:
    return weight


class _Maker:
    """Makes the parameters of parts; weights that several blocks share are made once."""

    def __init__(
        self, read: Read, dtype: torch.dtype, read_projection: ReadProjection | None,
        read_parts: ReadParts | None,
    ) -> None:  # fmt: skip
        self._read = read
        self._read_parts = read_parts
        self._read_projection = read_projection or read
        self._dtype = dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self._shared: dict[tuple[Weight, Weight | None], Projection] = {}

    def scaled(self, weight: Weight) -> Tensor:
        """Return a weight times its factors, in fp32 at least."""
        return self._times_rows(weight, self._ordered(weight, self._read(weight)).to(self.wide))

    def _times_rows(self, weight: Weight, values: Tensor) -> Tensor:
        if weight.offset:
            values = values + weight.offset
        if weight.row_scales:
            values = values * self._factors(weight, values.device).view(
                -1, *[1] * (values.ndim - 1)
            )
        return values

    def _factors(self, weight: Weight, device: torch.device) -> Tensor:
        """Return the factor of each entry of a weight's first dim."""
        counts, factors = zip(*weight.row_scales, strict=True)
        factor = torch.tensor(factors, dtype=self.wide, device=device)
        return factor.repeat_interleave(torch.tensor(counts, device=device))

    def projection(self, weight: Weight, norm_K: Tensor | None = None) -> Projection:
        """Return a weight that rows are multiplied by, times the norm that they come from.

        In FP8 nothing is quantised again: factors of rows go into the scales, the norm stays a
        factor of the columns.
        """
        values = self._read_projection(weight)
        if isinstance(values, ScaledWeight):
            if weight.row_scales:
                values = values.times_rows(self._factors(weight, values.device))
            return values if norm_K is None else values.times_columns(norm_K)
        values = self._ordered(weight, values)
        if norm_K is None and not weight.row_scales:
            return values.to(self._dtype).contiguous()
        return self._times(self._times_rows(weight, values.to(self.wide)), norm_K)

    def _times(self, values: Tensor, norm_K: Tensor | None) -> Tensor:
        return (values if norm_K is None else values * norm_K).to(self._dtype).contiguous()

    def _normed(self, weight: Weight, norm: Weight | None) -> Projection:
        return self.projection(weight, None if norm is None else self.scaled(norm))

    def _in_proj(self, weight: Weight, norm: Weight) -> InProjection:
        """Return a projection that may be in FP8 in part; then its parts are multiplied apart."""
        parts = None if self._read_parts is None else self._read_parts(weight)
        if parts is None:
            return self._normed(weight, norm)
        norm_K = self.scaled(norm)
        return StackedWeight(
            tuple(
                part.times_columns(norm_K)
                if isinstance(part, ScaledWeight)
                else self._times(part.to(self.wide), norm_K)
                for part in parts
            )
        )

    def plain(self, weight: Weight) -> Tensor:
        """Return a weight in the model's dtype."""
        if not weight.row_scales and not weight.offset:
            return self._ordered(weight, self._read(weight)).to(self._dtype).contiguous()
        return self.scaled(weight).to(self._dtype).contiguous()

    def _ordered(self, weight: Weight, values: Tensor) -> Tensor:
        """Return a weight with its rows in the model's order."""
        if not weight.row_order:
            return values
        return torch.cat([values[first : first + count] for first, count in weight.row_order])

    def block(self, block: Block) -> BlockWeights:
        """Make one block."""
        parts = tuple(self._part(part, block.norm) for part in block.parts)
        return BlockWeights(parts, None if block.shared is None else self._beside(block.shared))

    def _part(self, part: Part, norm: Weight) -> PartWeights:
        if isinstance(part.mixer, Mamba2Shape):
            return self._mamba2(part, norm)
        if isinstance(part.mixer, DeltaShape):
            return self._delta(part, part.mixer, norm)
        if isinstance(part.mixer, AttentionShape):
            return self._attention(part, norm)
        return self._mlp(part, norm) if isinstance(part.mixer, MlpShape) else self._moe(part, norm)

    def _mamba2(self, part: Part, norm: Weight) -> Mamba2Weights:
        weights = part.weights
        conv = self.plain(weights["conv"])
        # Kept in fp32 at least: they act in exponents.
        a_log, skip, dt_bias = (self.scaled(weights[n]) for n in ("a_log", "skip", "dt_bias"))
        return Mamba2Weights(
            in_proj=self._normed(weights["in_proj"], norm),
            conv_CW=conv,
            conv_bias_C=(
                self.plain(weights["conv_bias"])
                if "conv_bias" in weights
                else conv.new_zeros(conv.shape[0])
            ),
            heads=ScanHeads(-a_log.exp(), skip, dt_bias),
            out_proj=self._normed(weights["out_proj"], weights.get("norm")),
        )

    def _delta(self, part: Part, mixer: DeltaShape, norm: Weight) -> DeltaWeights:
        weights = part.weights
        a_log, bias = (self.scaled(weights[name]) for name in ("a_log", "dt_bias"))
        # One norm for every head, over the columns of each.
        head_norm = self.scaled(weights["norm"]).repeat(mixer.num_value_heads)
        return DeltaWeights(
            in_proj=self._in_proj(weights["in_proj"], norm),
            conv_CW=self.plain(weights["conv"]),
            heads=DeltaHeads(-a_log.exp(), bias),
            out_proj=self.projection(weights["out_proj"], head_norm),
        )

    def _attention(self, part: Part, norm: Weight) -> AttentionWeights:
        assert isinstance(part.mixer, AttentionShape)
        qkv_proj = self._once(part.weights["qkv_proj"], norm, partial(_widened, part.mixer, 0))
        o_proj = self._once(part.weights["o_proj"], None, partial(_widened, part.mixer, 1))
        angles = inv_freq(part.mixer, self._dtype, qkv_proj.device)
        norms = None
        if isinstance(part.mixer, GatedAttentionShape):
            of_q, of_k = (self.scaled(part.weights[name]) for name in ("q_norm", "k_norm"))
            norms = HeadNorms(of_q, of_k, part.mixer.norm_eps)
        return AttentionWeights(qkv_proj, o_proj, angles, norms)

    def _mlp(self, part: Part, norm: Weight) -> MlpWeights:
        up_proj, down_proj = part.weights["up_proj"], part.weights["down_proj"]
        return MlpWeights(self._once(up_proj, norm), self._once(down_proj))

    def _moe(self, part: Part, norm: Weight) -> MoeWeights:
        weights = part.weights

        def maybe(name: str) -> Projection | None:
            return self.projection(weights[name]) if name in weights else None

        made = MoeWeights(
            norm_D=self.scaled(norm),
            router_ED=self.scaled(weights["router"]),
            bias_E=self.scaled(weights["bias"]) if "bias" in weights else None,
            latent_in=maybe("latent_in"),
            up_EZD=self.projection(weights["up_proj"]),
            down_EDF=self.projection(weights["down_proj"]),
            latent_out=maybe("latent_out"),
        )
        if isinstance(part.mixer, SharedMoeShape):
            return self._with_shared(made, part.mixer, weights)
        return made

    def _with_shared(
        self, routed: MoeWeights, mixer: SharedMoeShape, weights: Mapping[str, Weight]
    ) -> MoeWeights:
        """Return experts with those that make up the shared one behind them."""
        count = mixer.num_shared
        router_ED = torch.cat((routed.router_ED, self.scaled(weights["shared_gate"])))
        up, down = (self.projection(weights[name]) for name in ("shared_up", "shared_down"))
        if count == 1:
            pairs = ((routed.up_EZD, up), (routed.down_EDF, down))
            both = [with_expert(experts, one) for experts, one in pairs]
            if both[0] is not None and both[1] is not None:
                return replace(routed, router_ED=router_ED, up_EZD=both[0], down_EDF=both[1])
        up_X = dense(up).unflatten(0, (2, count, -1)).transpose(0, 1).flatten(1, 2)
        down_X = dense(down).unflatten(1, (count, -1)).transpose(0, 1)
        return replace(
            routed,
            router_ED=router_ED,
            up_EZD=torch.cat((dense(routed.up_EZD), up_X)),
            down_EDF=torch.cat((dense(routed.down_EDF), down_X)),
        )

    def _beside(self, shared: SharedBlock) -> SharedWeights:
        return SharedWeights(
            self._attention(shared.attention, shared.attention_norm),
            self._mlp(shared.mlp, shared.mlp_norm),
            self.projection(shared.linear),
        )

    def _once(
        self,
        weight: Weight,
        norm: Weight | None = None,
        finish: Callable[[Projection], Projection] = _same,
    ) -> Projection:
        key = (weight, norm)
        if key not in self._shared:
            self._shared[key] = finish(self._normed(weight, norm))
        return self._shared[key]


def _widened(a: AttentionShape, dim: int, weight: Projection) -> Projection:
    """Return a projection whose heads along `dim` are filled up with zeros to the rows' width.

    That makes a tensor of a weight in FP8.
    """
    if a.row_dim == a.head_dim:
        return weight
    heads = dense(weight).unflatten(dim, (-1, a.head_dim)).movedim(dim + 1, -1)
    filled: Tensor = functional.pad(heads, (0, a.row_dim - a.head_dim))
    return filled.movedim(-1, dim + 1).flatten(dim, dim + 1).contiguous()


def inv_freq(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the angle per position of each pair of rotated dims, in fp32 at least.

    Without rotary positions all angles are 0: a rotation by 0 changes nothing, and is exact.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if shape.rope is None:
        return torch.zeros(shape.head_dim // 2, dtype=wide, device=device)
    rope = shape.rope
    exponent = torch.arange(0, rope.dim, 2, dtype=wide, device=device) / rope.dim
    plain = 1.0 / rope.theta**exponent
    return plain if rope.scaling is None else _stretched(plain, rope.scaling)


def _stretched(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide slow angles by the factor, keep fast ones, and blend those between.

    Source: the reference code of Llama 3.1, as in transformers' rope type `llama3`.
    """
    turns = scaling.original_positions * plain / (2 * math.pi)
    spread = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / spread).clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)
