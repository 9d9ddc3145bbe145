"""Names and settings that kernels share with descriptions of models; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["swiglu", "geglu", "relu2"]
"""What an MLP does between its projections: silu(gate) * up, gelu(gate) * up, relu(up) ** 2."""

GATED: tuple[Activation, ...] = ("swiglu", "geglu")
"""Activations whose first projection holds the rows of gate, then those of up."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router's logits become a choice of experts.

    `softmax`: the `num_chosen` largest logits, shares their softmax, or what the softmax of all
    says of them where they are not `normalised`. `sigmoid` (DeepSeek-V3,
    arXiv:2412.19437, sec. 2.1.2): the largest biased scores within the `num_open_groups` groups
    whose two best sum highest; shares are the scores without bias, which add up to 1 when
    `normalised`, times `scale`.
    """

    kind: Literal["softmax", "sigmoid"]
    num_chosen: int
    num_groups: int = 1
    num_open_groups: int = 1
    normalised: bool = True
    scale: float = 1.0
