"""Whole passes on the Triton backend against the torch backend in float64, over several steps.

Shape letters: T rows of a pass, B slots, L path capacity, V vocabulary.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from stree_core.backend import load_backend
from stree_core.cache import Cache, CacheSize
from stree_core.checkpoint import build_model
from stree_core.model import Model
from stree_core.model_shape import AttentionShape, Block, Mamba2Shape, Mixer, MlpShape, ModelShape
from stree_core.row_block import make_block
from stree_kernels.testing import assert_close

NUM_SLOTS = 3
UNLIMITED = (0.0, float("inf"))
MAMBA = Mamba2Shape(8, 8, 1, 1, 1, 64, 128, 4, True, UNLIMITED)
SHARED = Mamba2Shape(8, 2, 2, 8, 8, 128, 128, 4, True, UNLIMITED)
GROUPED = Mamba2Shape(8, 8, 2, 2, 2, 64, 64, 4, False, (0.01, 0.5))
ATTENTION = AttentionShape(8, 2, 64, 32, 10000.0)
MODELS: dict[str, tuple[bool, list[Mixer]]] = {
    "mamba2": (True, [MAMBA, MAMBA, GROUPED]),
    "hybrid": (False, [MAMBA, MlpShape(512), ATTENTION, MlpShape(512)]),
    "shared x and B": (False, [SHARED, MlpShape(512), ATTENTION, SHARED]),
}
# Rounding of a few layers in bf16; fp32 products are exact to about 1e-6 each.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
TREES = {
    "one token": [-1],
    "13 nodes": [-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 7, 9, 9],
    "200 nodes": [-1, *((node - 1) // 3 for node in range(1, 200))],
    "chain of 256": list(range(-1, 255)),
}
PATHS = {
    "one token": [[0], [0], [0]],
    "13 nodes": [[0, 1, 4, 7, 9], [0, 2], [0]],
    "200 nodes": [[0, 1, 5], [0], [0, 3, 10, 32]],
    "chain of 256": [list(range(20)), [0], []],
}


def shape_of(name: str) -> ModelShape:
    residual_fp32, mixers = MODELS[name]
    blocks = [Block(mixer, f"{i}.before.weight", f"{i}.") for i, mixer in enumerate(mixers)]
    return ModelShape(
        96, 256, 1e-5, residual_fp32, (), "embed", "norm.weight", "embed", tuple(blocks)
    )


def make_models(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Model, Model]:
    """Return a model on the Triton backend, and the same weights in float64 on the torch one."""
    shape = shape_of(name)
    sizes = shape.parameter_shapes()

    @functools.cache
    def fetch(key: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(sum(map(ord, key)))
        values = torch.randn(sizes[key], generator=generator, device=device)
        scaled = values * sizes[key][-1] ** -0.5 if len(sizes[key]) > 1 else 1 + 0.1 * values
        return scaled.to(dtype)

    ours = build_model(shape, fetch, load_backend("triton", device), dtype, device)
    reference = load_backend("torch", device)
    # A folded norm is rounded once more in a narrow dtype, so the reference takes what we hold.
    truth = build_model(shape, fetch, reference, torch.float64, device)
    return ours, truth


def advance(cache: Cache, paths: list[list[int]]) -> None:
    """Make these paths pending, as the end of a step does."""
    capacity = cache.pending.path_BL.shape[1]
    rows = [[*path, *[0] * (capacity - len(path))] for path in paths]
    lengths = torch.tensor([len(path) for path in paths], dtype=torch.int32)
    device = cache.committed_B.device
    cache.advance(torch.tensor(rows, device=device), lengths.to(device))
    cache.flip()


def run(model: Model, cache: Cache, name: str, tokens_TB: Tensor) -> Tensor:
    """Return the logits [T, B, V] of a tree."""
    block = make_block(TREES[name], model.conv_widths, model.device)
    hidden = model.forward(tokens_TB, block, cache, first=0, commit=True)
    return model.logits(hidden)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_steps_with_trees_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    models = make_models(name, dtype, device)
    caches = [model.make_cache(CacheSize(NUM_SLOTS, 256, 20, 128)) for model in models]
    generator = torch.Generator(device).manual_seed(7)
    steps = ["13 nodes", "200 nodes", *["one token"] * 3, *["13 nodes"] * 4, "chain of 256"] * 2
    for number, tree in enumerate(steps):
        size = (len(TREES[tree]), NUM_SLOTS)
        tokens_TB = torch.randint(96, size, generator=generator, device=device)
        ours, truth = (
            run(model, cache, tree, tokens_TB) for model, cache in zip(models, caches, strict=True)
        )
        assert_close(f"{tree}, step {number}", ours, truth, tolerance=TOLERANCES[dtype])
        for cache in caches:
            advance(cache, PATHS[tree])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_sanitized_steps(name: str) -> None:
    """A few steps through every kernel, short enough for `make sanitize`."""
    device = torch.device("cuda")
    model, _ = make_models(name, torch.bfloat16, device)
    cache = model.make_cache(CacheSize(NUM_SLOTS, 200, 20, 128))
    for tree in ("13 nodes", "one token", "200 nodes", *["13 nodes"] * 3, "one token"):
        tokens_TB = torch.ones(len(TREES[tree]), NUM_SLOTS, dtype=torch.int64, device=device)
        assert torch.isfinite(run(model, cache, tree, tokens_TB)).all()
        advance(cache, PATHS[tree])
