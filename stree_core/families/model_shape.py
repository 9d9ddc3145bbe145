"""What a model is made of: a typed list of residual blocks, and where their weights are stored.

Shape letters are those of stree_kernels.launch.rows. A block is `x + sum of parts(norm(x))`; a
layer with a mixer and an MLP is two blocks, attention beside Mamba2 is one block of two parts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from stree_core.fp8 import Fp8Weights, Weight as Weight
from stree_kernels.launch.settings import GATED, Activation, Routing

LEAST_ROW_DIM = 16
PROJECTIONS = frozenset((
    "in_proj", "out_proj", "qkv_proj", "o_proj", "up_proj", "down_proj", "latent_in", "latent_out",
    "shared_up", "shared_down",
))  # fmt: skip
"""The weights of parts that a checkpoint may hold in FP8."""


@dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """One Mamba2 mixer (arXiv:2405.21060); neighbouring heads may share x, B and C.

    `norm_groups` and `norm_eps` are of the norm after the gate; 0 groups is no norm.
    """

    num_heads: int
    num_x_heads: int
    num_b_groups: int
    num_c_groups: int
    head_dim: int
    state_dim: int
    conv_width: int
    conv_bias: bool
    dt_limit: tuple[float, float]
    norm_groups: int
    norm_eps: float

    @property
    def inner_dim(self) -> int:
        """Width of the output and of the gate."""
        return self.num_heads * self.head_dim

    @property
    def conv_sections(self) -> tuple[int, int, int]:
        """Channels of x, B and C."""
        return (
            self.num_x_heads * self.head_dim,
            self.num_b_groups * self.state_dim,
            self.num_c_groups * self.state_dim,
        )

    @property
    def conv_dim(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return sum(self.conv_sections)

    @property
    def proj_sections(self) -> tuple[int, int, int, int, int]:
        """Columns of the input projection: gate, x, B, C, dt."""
        return (self.inner_dim, *self.conv_sections, self.num_heads)

    @property
    def proj_dim(self) -> int:
        """All columns of the input projection."""
        return sum(self.proj_sections)


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """One gated delta rule mixer (arXiv:2412.06464); neighbouring value heads share q and k.

    `norm_eps` is of the norm of every head, which comes before the gate.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int
    norm_eps: float

    @property
    def inner_dim(self) -> int:
        """Width of the output and of the gate."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_sections(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        keys = self.num_key_heads * self.key_head_dim
        return keys, keys, self.inner_dim

    @property
    def conv_dim(self) -> int:
        """Channels that pass the convolution: q, k and v."""
        return sum(self.conv_sections)

    @property
    def proj_sections(self) -> tuple[int, int, int, int]:
        """Columns of the input projection: gate, what the conv takes, raw decay, raw beta."""
        return self.inner_dim, self.conv_dim, self.num_value_heads, self.num_value_heads

    @property
    def proj_dim(self) -> int:
        """All columns of the input projection."""
        return sum(self.proj_sections)

    @property
    def solved_dim(self) -> int:
        """Columns that a row keeps in fp32: u, the log decay, beta."""
        return self.inner_dim + 2 * self.num_value_heads


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """How Llama 3.1 stretches rotations whose wavelength is long beside its first context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: the first `dim` dims of each head are rotated."""

    theta: float
    dim: int
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One grouped-query attention mixer; `scale` multiplies scores, `rope` None is no positions."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None

    @property
    def row_dim(self) -> int:
        """Width of a head as it is computed and kept: kernels take powers of two, the rest is 0."""
        return max(LEAST_ROW_DIM, 1 << (self.head_dim - 1).bit_length())


@dataclass(frozen=True, slots=True)
class GatedAttentionShape(AttentionShape):
    """Attention whose queries and keys are normed for each head, and whose output has a gate.

    The output is multiplied by the sigmoid of what the query projection says beside the queries.
    Heads are as wide as their rows: a norm over zeros beside them would be another one.
    """

    norm_eps: float


@dataclass(frozen=True, slots=True)
class MlpShape:
    """One MLP."""

    inner_dim: int
    activation: Activation

    @property
    def up_dim(self) -> int:
        """Rows of the first projection: gate and up, or up alone."""
        return self.inner_dim * (2 if self.activation in GATED else 1)


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Routed expert MLPs; with `latent_dim` they work between two projections to that width."""

    num_experts: int
    expert: MlpShape
    router: Routing
    latent_dim: int | None = None


@dataclass(frozen=True, slots=True)
class SharedMoeShape(MoeShape):
    """Routed experts beside a shared one, which every row takes times the sigmoid of a gate.

    The shared one is as wide as `num_shared` routed ones and runs as so many further experts.
    """

    num_shared: int = 1


Mixer = Mamba2Shape | DeltaShape | AttentionShape | MlpShape | MoeShape


@dataclass(frozen=True, slots=True)
class Part:
    """A mixer and its weights, by the names that stree_core.models.weights gives them."""

    mixer: Mixer
    weights: Mapping[str, Weight]


@dataclass(frozen=True, slots=True)
class SharedBlock:
    """A transformer layer beside the stream, whose output only the block's own parts read.

    It attends from the stream and the embedding side by side, and has no residual of its own:
    `linear(mlp(norm(attention(norm([x, embedding])))))` is added to what the parts' norm reads.
    Source: Zamba2 (arXiv:2411.15242).
    """

    attention_norm: Weight
    attention: Part
    mlp_norm: Weight
    mlp: Part
    linear: Weight


@dataclass(frozen=True, slots=True)
class Block:
    """Parts that read the same norm of the stream and are added to it."""

    norm: Weight
    parts: tuple[Part, ...]
    shared: SharedBlock | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """How an MTP head begins: `proj` reads the norms of a token's embedding and a hidden state.

    They lie side by side, the embedding first.
    """

    embed_norm: Weight
    hidden_norm: Weight
    proj: Weight


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A whole language model; `lm_head` equals `embed` when the two are tied.

    `max_positions` is the longest context that it was trained for, where its config says that.
    `extras` are patterns of tensors that its files may hold and decoding does not need, besides
    those of every family; `copies` are beginnings of names (copy, original) of tensors that repeat
    others; `renames` are beginnings (stored, as spelled here) of names in files that hold more than
    the language model. `mtp` is the multi-token-prediction head that its checkpoint has beside it.
    That is a shape with a `join`, whose embedding and LM head are the model's own. `fp8` says which
    tensors are in FP8; None is none.
    """

    vocab_size: int
    hidden_size: int
    norm_eps: float
    residual_fp32: bool
    eos_token_ids: tuple[int, ...]
    embed: Weight
    embed_scale: float
    blocks: tuple[Block, ...]
    final_norm: Weight
    lm_head: Weight
    max_positions: int | None = None
    extras: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    join: Join | None = None
    mtp: ModelShape | None = None
    fp8: Fp8Weights | None = None

    @property
    def parts(self) -> Iterator[Part]:
        """All parts in the order in which they run."""
        for block in self.blocks:
            if block.shared is not None:
                yield from (block.shared.attention, block.shared.mlp)
            yield from block.parts

    @property
    def has_attention(self) -> bool:
        """True when some part keeps keys and values, so that the context length costs time."""
        return any(isinstance(part.mixer, AttentionShape) for part in self.parts)

    @property
    def weights(self) -> Iterator[Weight]:
        """Every weight at each of its uses, the embedding and the LM head included."""
        yield self.embed
        if self.join is not None:
            yield from (self.join.embed_norm, self.join.hidden_norm, self.join.proj)
        for block in self.blocks:
            yield block.norm
            if block.shared is not None:
                yield from (block.shared.attention_norm, block.shared.mlp_norm, block.shared.linear)
        for part in self.parts:
            yield from part.weights.values()
        yield from (self.final_norm, self.lm_head)

    @property
    def projections(self) -> Iterator[Weight]:
        """Every weight that a checkpoint may hold in FP8."""
        if self.join is not None:
            yield self.join.proj
        for block in self.blocks:
            if block.shared is not None:
                yield block.shared.linear
        for part in self.parts:
            yield from (weight for name, weight in part.weights.items() if name in PROJECTIONS)

    @property
    def digest(self) -> str:
        """A hash of everything that time depends on: sizes and mixers, not keys nor values."""
        blocks = [
            (
                [part.mixer for part in block.parts],
                block.shared and (block.shared.attention.mixer, block.shared.mlp.mixer),
            )
            for block in self.blocks
        ]
        sizes = (self.vocab_size, self.hidden_size, self.residual_fp32, self.lm_head == self.embed)
        more: tuple[object, ...] = () if self.join is None else ("join",)
        if self.fp8 is not None:
            # How much of it is in FP8: excluded modules cost time.
            pieces = (piece for weight in self.projections for piece in self._pieces(weight))
            held = sum(piece.num_values for piece in pieces if self._is_fp8(piece))
            more += (self.fp8.kind, self.fp8.block, held)
        return hashlib.sha256(repr((sizes, blocks, *more)).encode()).hexdigest()

    @property
    def num_parameters(self) -> int:
        """Values of all weights as the decoder holds them: shared ones once, adapters merged.

        A head's embedding and LM head are held with its model.
        """
        return sum(weight.num_values for weight in self._held)

    def held_bytes(self, bytes_per_element: int) -> int:
        """Return the bytes of all weights as the decoder holds them.

        With weights in FP8 there is room for the largest as a tensor: many rows are multiplied by
        that.
        """
        total = sum(self._weight_bytes(weight, bytes_per_element) for weight in self._held)
        pieces = (piece for weight in self._held for piece in self._pieces(weight))
        tensors = (p.num_values for p in pieces if self._is_fp8(p) and len(p.shape) == 2)
        return total + bytes_per_element * max(tensors, default=0)

    @property
    def _held(self) -> Iterator[Weight]:
        """Every weight that the decoder holds, once."""
        held = {weight.keys + sum(weight.adapters, ()): weight for weight in self.weights}
        if self.join is not None:
            for borrowed in (self.embed, self.lm_head):
                held.pop(borrowed.keys, None)
        yield from held.values()

    def _is_fp8(self, weight: Weight) -> bool:
        """Tell whether a weight stays in FP8: all of it, and no adapters are merged into it."""
        return self.fp8 is not None and not weight.adapters and self.fp8.holds(weight.keys)

    def _pieces(self, weight: Weight) -> tuple[Weight, ...]:
        """Return the weights of which a weight that is in FP8 in part is made, else itself."""
        if self.fp8 is None or self._is_fp8(weight):
            return (weight,)
        return weight.split(self.fp8.scales) or (weight,)

    def _weight_bytes(self, weight: Weight, bytes_per_element: int) -> int:
        return sum(
            self.fp8.held_bytes(piece.shape)
            if self.fp8 is not None and self._is_fp8(piece)
            else piece.num_values * bytes_per_element
            for piece in self._pieces(weight)
        )

    def weight_bytes(self, bytes_per_element: int) -> int:
        """Return the bytes that a pass over one token reads of the weights.

        The embedding is a look-up of a few rows: it counts through the LM head only. Of experts,
        those that one token goes to count.
        """

        def size(weight: Weight) -> int:
            return self._weight_bytes(weight, bytes_per_element)

        total = sum(map(size, self.weights)) - size(self.embed)
        for part in self.parts:
            if isinstance(part.mixer, MoeShape):
                resting = part.mixer.num_experts - part.mixer.router.num_chosen
                stacks = size(part.weights["up_proj"]) + size(part.weights["down_proj"])
                total -= stacks * resting // part.mixer.num_experts
        return total

    def state_bytes(self, bytes_per_element: int) -> int:
        """Return the bytes of one sequence's recurrent state; scans' states are at least fp32."""
        total = 0
        for part in self.parts:
            if isinstance(part.mixer, Mamba2Shape):
                mamba = part.mixer
                total += max(4, bytes_per_element) * mamba.inner_dim * mamba.state_dim
                total += bytes_per_element * mamba.conv_dim * (mamba.conv_width - 1)
            elif isinstance(part.mixer, DeltaShape):
                delta = part.mixer
                total += max(4, bytes_per_element) * delta.inner_dim * delta.key_head_dim
                total += bytes_per_element * delta.conv_dim * (delta.conv_width - 1)
        return total

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Return the bytes of keys and values that one committed token adds."""
        return bytes_per_element * sum(
            2 * part.mixer.num_kv_heads * part.mixer.row_dim
            for part in self.parts
            if isinstance(part.mixer, AttentionShape)
        )


logger = logging.getLogger(__name__)


def warn_of_long_context(shape: ModelShape, num_positions: int) -> None:
    """Say once when slots hold more positions than the model's `max_position_embeddings`."""
    if shape.max_positions is not None and num_positions > shape.max_positions:
        _warn(num_positions, shape.max_positions)


@lru_cache
def _warn(num_positions: int, longest: int) -> None:
    logger.warning(
        "slots of %d positions exceed max_position_embeddings = %d: later text may degrade",
        num_positions,
        longest,
    )
