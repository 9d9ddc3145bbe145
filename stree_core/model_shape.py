"""What a model is made of: a typed list of residual blocks, independent of any file format.

Shape letters are those of stree_kernels.rows. Every block is `x + mixer(norm(x))`; a layer with a
mixer and an MLP is two blocks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """One Mamba2 mixer (arXiv:2405.21060); neighbouring heads may share x, B and C.

    `num_groups` is that of the norm after the gate.
    """

    num_heads: int
    num_x_heads: int
    num_b_groups: int
    num_c_groups: int
    num_groups: int
    head_dim: int
    state_dim: int
    conv_width: int
    conv_bias: bool
    dt_limit: tuple[float, float]

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
    def proj_dim(self) -> int:
        """Columns of the input projection: gate, x, B, C, dt."""
        return self.inner_dim + self.conv_dim + self.num_heads


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One grouped-query attention mixer; the first `rotary_dim` of each head are rotated."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float


@dataclass(frozen=True, slots=True)
class MlpShape:
    """One gated SiLU MLP."""

    inner_dim: int


Mixer = Mamba2Shape | AttentionShape | MlpShape


@dataclass(frozen=True, slots=True)
class Block:
    """A mixer and the checkpoint keys of its norm and of its own parameters (a prefix)."""

    mixer: Mixer
    norm_key: str
    prefix: str


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A whole language model; `lm_head_key` equals `embed_key` when the two are tied."""

    vocab_size: int
    hidden_size: int
    norm_eps: float
    residual_fp32: bool
    eos_token_ids: tuple[int, ...]
    embed_key: str
    final_norm_key: str
    lm_head_key: str
    blocks: tuple[Block, ...]

    @property
    def has_attention(self) -> bool:
        """True when some block keeps keys and values, so that the context length costs time."""
        return any(isinstance(block.mixer, AttentionShape) for block in self.blocks)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every parameter's checkpoint key and shape."""
        shapes: dict[str, tuple[int, ...]] = {
            self.embed_key: (self.vocab_size, self.hidden_size),
            self.final_norm_key: (self.hidden_size,),
            self.lm_head_key: (self.vocab_size, self.hidden_size),
        }
        for block in self.blocks:
            shapes[block.norm_key] = (self.hidden_size,)
            for name, shape in mixer_parameters(block.mixer, self.hidden_size).items():
                shapes[block.prefix + name] = shape
        return shapes

    def weight_bytes(self, bytes_per_element: int) -> int:
        """Return the bytes that one forward pass reads of the parameters.

        The embedding is a look-up of a few rows: it counts through the LM head only.
        """
        total = self.vocab_size * self.hidden_size
        for key, shape in self.parameter_shapes().items():
            if key in (self.embed_key, self.lm_head_key):
                continue
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total * bytes_per_element

    def state_bytes(self, bytes_per_element: int) -> int:
        """Return the bytes of one sequence's recurrent state; SSM states are at least fp32."""
        total = 0
        for block in self.blocks:
            if isinstance(block.mixer, Mamba2Shape):
                mamba = block.mixer
                total += max(4, bytes_per_element) * mamba.inner_dim * mamba.state_dim
                total += bytes_per_element * mamba.conv_dim * (mamba.conv_width - 1)
        return total

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Return the bytes of keys and values that one committed token adds."""
        return bytes_per_element * sum(
            2 * block.mixer.num_kv_heads * block.mixer.head_dim
            for block in self.blocks
            if isinstance(block.mixer, AttentionShape)
        )


def mixer_parameters(mixer: Mixer, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return a mixer's parameter names (below its prefix) and shapes."""
    if isinstance(mixer, Mamba2Shape):
        shapes: dict[str, tuple[int, ...]] = {
            "in_proj.weight": (mixer.proj_dim, hidden_size),
            "conv1d.weight": (mixer.conv_dim, 1, mixer.conv_width),
            "dt_bias": (mixer.num_heads,),
            "A_log": (mixer.num_heads,),
            "D": (mixer.num_heads,),
            "norm.weight": (mixer.inner_dim,),
            "out_proj.weight": (hidden_size, mixer.inner_dim),
        }
        if mixer.conv_bias:
            shapes["conv1d.bias"] = (mixer.conv_dim,)
        return shapes
    if isinstance(mixer, AttentionShape):
        queries, keys = (n * mixer.head_dim for n in (mixer.num_heads, mixer.num_kv_heads))
        return {
            "q_proj.weight": (queries, hidden_size),
            "k_proj.weight": (keys, hidden_size),
            "v_proj.weight": (keys, hidden_size),
            "o_proj.weight": (hidden_size, queries),
        }
    return {
        "gate_proj.weight": (mixer.inner_dim, hidden_size),
        "up_proj.weight": (mixer.inner_dim, hidden_size),
        "down_proj.weight": (hidden_size, mixer.inner_dim),
    }
