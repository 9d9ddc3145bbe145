"""GPU specs: the published numbers of a GPU, used only to estimate what was not measured on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stree_core.files import load_yaml
from stree_core.profile import Name, Printable, Strict

Text = Annotated[str, Field(min_length=1, max_length=500), Printable]
Rate = Annotated[float, Field(ge=1e-6, le=1e6)]
Amount = Annotated[int, Field(ge=1, le=1_000_000)]


class GpuSpec(Strict):
    """What the maker publishes about one GPU; T is 1e12 a second, G 1e9 bytes, L2 MB 2**20.

    `launch_us`, what a kernel without work takes in a captured graph, is measured or a guess.
    """

    schema_version: Literal[1] = 1
    kind: Literal["stree-gpu"] = "stree-gpu"
    name: Name
    full_name: Name
    architecture: Name
    memory_bandwidth_tb_per_s: Rate
    matrix_tflop_per_s_bf16: Rate
    l2_mb: Amount
    memory_gb: Amount
    sms: Amount
    launch_us: Rate
    launch_is_guess: bool = False
    sources: Annotated[tuple[Text, ...], Field(min_length=1, max_length=16)]
    note: Text | None = None

    def likeness(self, other: GpuSpec) -> tuple[bool, float]:
        """Return how unlike another GPU is, least first: another architecture, then bandwidth."""
        ratio = self.memory_bandwidth_tb_per_s / other.memory_bandwidth_tb_per_s
        return self.architecture != other.architecture, abs(math.log(ratio))


def load_gpu_spec(path: Path) -> GpuSpec:
    """Read a GPU spec; raise ConfigError when it is malformed."""
    return load_yaml(path, GpuSpec)
