"""What is benchmarked: layers, a hybrid model's shape, and balanced trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stree_core.checkpoint import load_shape
from stree_core.model_shape import AttentionShape, Block, Mamba2Shape, MlpShape, ModelShape
from stree_kernels.rows import MAX_KEPT, Pending, next_num_kept

MODELS = Path(__file__).resolve().parents[1] / "profiles" / "models"
ACCEPTED_ROWS = 3
# Three times around for paths of three rows, once for single ones.
PHASES = 18


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A Mamba2 layer's scan; heads may share x, and groups of B and C may differ in number."""

    name: str
    num_heads: int
    head_dim: int
    state_dim: int
    num_x_heads: int
    num_b_groups: int
    num_c_groups: int

    @property
    def conv_dims(self) -> tuple[int, int, int]:
        """Columns of x, B and C."""
        x = self.num_x_heads * self.head_dim
        return x, self.num_b_groups * self.state_dim, self.num_c_groups * self.state_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state in fp32."""
        return 4 * self.num_heads * self.head_dim * self.state_dim

    def floor_bytes(self, batch: int, tokens: int, path_rows: int) -> int:
        """Return the bytes that a replay and a scan cannot avoid.

        The state is read and written once; x, dt, B, C and y of the tokens, and x, dt and B of the
        replayed rows, are in bf16.
        """
        x, b, c = self.conv_dims
        replayed = x + self.num_heads + b
        scored = replayed + c + self.num_heads * self.head_dim
        return batch * (2 * self.state_bytes + 2 * (tokens * scored + path_rows * replayed))


LAYERS = {
    shape.name: shape
    for shape in (
        LayerShape("mamba2-2.7b", 80, 64, 128, 80, 1, 1),
        LayerShape("nemotron-3-nano", 64, 64, 128, 64, 8, 8),
        LayerShape("mamba-in-llama-8b", 32, 128, 128, 8, 8, 32),
    )
}


def balanced_tree(num_tokens: int) -> list[int]:
    """Return the parents of a tree whose nodes have two children each, level by level."""
    return [-1, *((node - 1) // 2 for node in range(1, num_tokens))]


def leaf_paths(parents: Sequence[int]) -> list[list[int]]:
    """Return the path from the root to every leaf."""
    leaves = sorted(set(range(len(parents))) - set(parents))
    paths = []
    for leaf in leaves:
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return paths


def accepted_path(num_tokens: int) -> list[int]:
    """Return rows of the balanced tree that a step may have accepted: first children."""
    path = [0]
    while len(path) < ACCEPTED_ROWS and 2 * path[-1] + 1 < num_tokens:
        path.append(2 * path[-1] + 1)
    return path


def pending_phases(num_tokens: int, batch: int, device: torch.device) -> list[Pending]:
    """Return what is pending in PHASES calls after one another, for every sequence alike.

    A step accepts `accepted_path` rows, one without a tree, and kept rows gather until the state is
    advanced by all of them, as in a decoder.
    """
    accepted = accepted_path(num_tokens)
    path = torch.tensor([accepted] * batch, dtype=torch.int32, device=device)
    length = torch.full((batch,), len(accepted), dtype=torch.int32, device=device)
    phases = [Pending(path, length, torch.zeros_like(length))]
    while len(phases) < PHASES:
        phases.append(Pending(path, length, next_num_kept(phases[-1])))
    return phases


def flushing(phases: list[Pending]) -> Pending:
    """Return a pending path that does not fit, so that a call advances and stores the state."""
    path, length, num_kept = phases[0]
    return Pending(path, length, torch.full_like(num_kept, MAX_KEPT))


def mamba_in_llama_8b() -> ModelShape:
    """Return the shape of Llama3.1-Mamba2-8B-distill: Mamba2 in even layers, attention in odd.

    x and B come from the keys' and values' 8 heads of the Llama layer that it replaces, C from the
    32 heads of its queries. Source: jxiw/MambaInLlama, llama3.1_8B/llama3.1_mamba2_0.5.yaml.
    """
    mamba = Mamba2Shape(
        num_heads=32, num_x_heads=8, num_b_groups=8, num_c_groups=32, num_groups=32, head_dim=128,
        state_dim=128, conv_width=4, conv_bias=True, dt_limit=(0.0, float("inf")),
    )  # fmt: skip
    attention = AttentionShape(
        num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128, rope_theta=500000.0
    )
    blocks: list[Block] = []
    for index in range(32):
        layer = f"model.layers.{index}."
        mixer = attention if index % 2 else mamba
        blocks += [
            Block(mixer, layer + "input_layernorm.weight", layer + "mixer."),
            Block(MlpShape(14336), layer + "post_attention_layernorm.weight", layer + "mlp."),
        ]
    return ModelShape(
        vocab_size=128256, hidden_size=4096, norm_eps=1e-5, residual_fp32=False, eos_token_ids=(),
        embed_key="model.embed_tokens.weight", final_norm_key="model.norm.weight",
        lm_head_key="lm_head.weight", blocks=tuple(blocks),
    )  # fmt: skip


def model_shape(name: str) -> ModelShape:
    """Return the shape of a benchmarked model."""
    return mamba_in_llama_8b() if name == "mamba-in-llama-8b" else load_shape(MODELS / name)


FORWARD_MODELS = ("mamba2-2.7b", "mamba2-130m", "mamba-in-llama-8b")
