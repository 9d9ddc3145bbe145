"""The memory model against the caches that an engine allocates, and what fits a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mtp_models import HeadedModel, bamba_with_head, qwen_with_head
from safetensors.torch import load_file
from synthetic_data import make_table, memory_of
from tiny_models import save_pair

from stree_autotune.cost.memory import MemoryModel
from stree_autotune.cost.traffic import model_cost
from stree_autotune.store.gpu_spec import load_gpu_spec
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.runtime_table import RuntimeTable, load_runtime_table
from stree_autotune.store.step_rule import StepRule
from stree_core.drafting.pair import Pair, Runtime, load_pair, load_with_head
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.models.source import folder_source
from stree_core.tree import DEFAULT_TREE, Tree

LARGE = Tree.from_paths([[i] for i in range(32)] + [[i, 0] for i in range(32)])


def model_of(pair: Pair, context: int) -> MemoryModel:
    element = pair.target.dtype.itemsize
    target = model_cost(pair.target.shape, pair.target_ref, element)
    draft = model_cost(pair.draft.shape, pair.draft_ref, element)
    return MemoryModel(target, draft, context, pair.device.type)


def test_caches_are_those_of_an_engine(tmp_path: Path) -> None:
    save_pair(tmp_path)
    sources = [folder_source(tmp_path / "models" / n) for n in ("tiny-target", "tiny-draft")]
    pair = load_pair(*sources, Runtime("cpu"))
    for batch_size, context, trees in (
        (1, 64, (Tree.chain(0),)),
        (3, 100, (Tree.chain(5),)),
        (2, 80, (DEFAULT_TREE, Tree.chain(8), LARGE)),
    ):
        engine = Engine(pair.target, pair.draft, trees, EngineConfig(batch_size, context))
        found = model_of(pair, context).needed(batch_size, trees)
        assert found.caches == engine.needed_bytes() == engine.cache_bytes
        longer = model_of(pair, 2 * context).needed(batch_size, trees)
        assert longer.caches > found.caches


@pytest.mark.parametrize("make", [bamba_with_head, qwen_with_head])
def test_caches_of_a_head_are_those_of_an_engine(
    make: Callable[[Path], HeadedModel], tmp_path: Path
) -> None:
    """Its embedding and LM head are its target's, which holds them already."""
    headed = make(tmp_path)
    pair = headed.pair
    for batch_size, trees in ((3, (Tree.chain(5), Tree.chain(0))), (2, (DEFAULT_TREE, LARGE))):
        engine = Engine(pair.target, pair.draft, trees, EngineConfig(batch_size, 80))
        found = model_of(pair, 80).needed(batch_size, trees)
        assert found.caches == engine.needed_bytes() == engine.cache_bytes
        loaded = load_file(headed.folder / "model.safetensors")
        assert found.weights == 8 * sum(tensor.numel() for tensor in loaded.values())


def test_what_a_delta_layer_solves_for_is_wide_whatever_the_weights_are(tmp_path: Path) -> None:
    qwen_with_head(tmp_path)
    pair = load_with_head(folder_source(tmp_path), Runtime("cpu", "bfloat16"))
    engine = Engine(pair.target, pair.draft, (DEFAULT_TREE,), EngineConfig(2, 80))
    found = model_of(pair, 80).needed(2, (DEFAULT_TREE,))
    assert found.caches == engine.needed_bytes() == engine.cache_bytes


def shipped(name: str) -> RuntimeTable:
    return load_runtime_table(shipped_root() / "runtime" / f"{name}.yaml")


def test_the_largest_batch_is_the_last_that_fits() -> None:
    table = shipped("h200--mamba2-2.7b--mamba2-130m")
    batches = []
    for gpu in ("rtx4090", "l40s", "h100", "h200"):
        spec = load_gpu_spec(shipped_root() / "gpus" / f"{gpu}.yaml")
        for rule in (StepRule.GREEDY, StepRule.MSS_TRUNCATED):
            memory = replace(memory_of(table, spec.memory_gb * 1e9), rule=rule)
            most = memory.largest_batch(LARGE)
            assert memory.excess(most, LARGE) <= 0 < memory.excess(most + 1, LARGE)
            batches.append(most)
    greedy, sampled = batches[::2], batches[1::2]
    assert greedy == sorted(greedy)
    assert all(few < many for few, many in zip(sampled, greedy, strict=True))
    # 80 GB less 5.7 of weights and 1.6 reserved, by hand: 64 layers of 80 x 64 x 128 states in fp32
    # are 168 MB a sequence, buffered rows and those of 65 tokens 0.3 GB, logits 13 MB
    assert 120 < greedy[2] < 180


def test_a_model_larger_than_the_memory_fits_nowhere() -> None:
    table = make_table()
    large = table.target.model_copy(update={"held_bytes": 10**12})
    table = table.model_copy(update={"target": large})
    memory = memory_of(table, 192e9)
    assert memory.largest_batch(Tree.chain(2)) == 0
    assert memory.excess(1, Tree.chain(2)) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_bound_is_what_a_device_allocates(batch_size: int) -> None:
    folders = [Library.open().find_model(name) for name in ("demo-target", "demo-draft")]
    gc.collect()
    held = torch.cuda.memory_allocated()
    pair = load_pair(*map(folder_source, folders), Runtime("cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = Engine(pair.target, pair.draft, LARGE, EngineConfig(batch_size, 1024))
    for slot in range(batch_size):
        engine.prefill(slot, [1, 2, 3])
    for _ in range(3):
        engine.step()
    taken = torch.cuda.max_memory_allocated() - before
    found = model_of(pair, 1024).needed(batch_size, [LARGE])
    weights = sum(
        model.shape.num_parameters * pair.target.dtype.itemsize
        for model in (pair.target, pair.draft)
    )
    assert found.weights == weights
    assert before - held <= 1.05 * weights + (32 << 20)
    # Beyond what is counted: cuBLAS's workspaces, two of 32 MiB, and what a step's inputs take.
    assert found.caches <= taken <= 1.05 * (found.caches + found.scratch) + (72 << 20)
