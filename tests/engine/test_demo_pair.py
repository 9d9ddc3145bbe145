"""The shipped pair: real text, decoded the same with and without trees, described by its traces.

The whole proof, 64 prompts of 128 tokens in two precisions, is benchmarks/lossless.py; here is the
same on a few prompts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chain_prefill import read_prompt
from margin import logit_margin
from transformers import AutoModelForCausalLM

import stree_core
from stree_autotune.live.validation import RAGGED
from stree_autotune.store.advice import KNOWN_DATASETS
from stree_autotune.store.library import Library, shipped_root, trace_file_name
from stree_autotune.store.prompts import load_prompts
from stree_autotune.trace.file import load_trace
from stree_autotune.trace.record import RecordConfig, record_trace
from stree_autotune.trace.tree_walk import walk
from stree_core.drafting.pair import load_single
from stree_core.models.source import MTP, head_source
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.testing import assert_close

MODELS = shipped_root() / "models"
TRACES = sorted((shipped_root() / "traces").glob("*.safetensors"))
NUM_TOKENS = 40
TREES = {
    "chain2": Tree.chain(2),
    "chain4": Tree.chain(4),
    "published": DEFAULT_TREE,
    "ragged": RAGGED,
    "wide": Tree.from_paths([[i] for i in range(8)] + [[i, j] for i in range(4) for j in (0, 1)]),
}


def _pair(dtype: str) -> stree_core.Pair:
    runtime = stree_core.Runtime("cpu", dtype, "torch")
    sources = (stree_core.find_source(MODELS / name) for name in ("demo-target", "demo-draft"))
    return stree_core.load_pair(*sources, runtime)


@pytest.fixture(scope="module", params=["float64", "float32"])
def pair(request: pytest.FixtureRequest) -> stree_core.Pair:
    return _pair(request.param)


@pytest.fixture(scope="module")
def prompts(pair: stree_core.Pair) -> list[list[int]]:
    texts = load_prompts("demo", str(MODELS / "demo-target" / "prompts.jsonl"), limit=3).texts
    return pair.encode([*texts, "def add(a, b):\n", "Explain what a list is."])


def _run(pair: stree_core.Pair, prompts: list[list[int]], tree: Tree) -> stree_core.Run:
    engine = stree_core.Engine(
        pair.target, pair.draft, tree, stree_core.EngineConfig(num_positions=256)
    )
    return stree_core.generate(engine, prompts, stree_core.StopRule(NUM_TOKENS))


@pytest.fixture(scope="module")
def alone(pair: stree_core.Pair, prompts: list[list[int]]) -> stree_core.Run:
    return _run(pair, prompts, Tree.chain(0))


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_trees_decode_the_targets_own_text(
    tree: Tree, pair: stree_core.Pair, prompts: list[list[int]], alone: stree_core.Run
) -> None:
    run = _run(pair, prompts, tree)
    together = zip(prompts, alone.generations, run.generations, strict=True)
    for prompt, expected, actual in together:
        if expected.tokens != actual.tokens:
            assert pair.target.dtype == torch.float32, "float64 texts must be equal"
            assert logit_margin(pair.target, prompt, expected.tokens, actual.tokens) <= 1e-4
    assert run.tokens_per_step > 1.3


def test_the_targets_own_head_drafts_its_text(
    pair: stree_core.Pair, prompts: list[list[int]], alone: stree_core.Run
) -> None:
    """What was recorded of the target before it had a head is still of this target."""
    target = stree_core.find_source(MODELS / "demo-target")
    old = next(path for path in TRACES if path.stem.startswith("demo-target--demo-draft"))
    assert target.ref.config_sha256 == load_trace(old).meta.target.config_sha256
    headed = stree_core.load_with_head(
        target, stree_core.Runtime("cpu", str(pair.target.dtype)[6:], "torch")
    )
    run = _run(headed, prompts, TREES["ragged"])
    for prompt, expected, actual in zip(prompts, alone.generations, run.generations, strict=True):
        if expected.tokens != actual.tokens:
            assert pair.target.dtype == torch.float32, "float64 texts must be equal"
            assert logit_margin(pair.target, prompt, expected.tokens, actual.tokens) <= 1e-4
    assert run.tokens_per_step > 2


def test_the_delta_target_decodes_its_own_text_with_its_head() -> None:
    """As the head of demo-target; texts are long enough for states to be flushed many times."""
    source = stree_core.find_source(MODELS / "demo-gdn")
    pair = stree_core.load_with_head(source, stree_core.Runtime("cpu", "float64", "torch"))
    prompts = pair.encode(["def add(a, b):\n", "Tom has 3 boxes with 5 apples each. How many?"])
    expected = _run(pair, prompts, Tree.chain(0))
    for name in ("chain4", "ragged"):
        run = _run(pair, prompts, TREES[name])
        assert [g.tokens for g in run.generations] == [g.tokens for g in expected.generations]
        assert run.tokens_per_step > 1.5, name


def test_walking_a_trace_equals_live_decoding() -> None:
    pair = _pair("float64")
    texts = load_prompts("demo", str(MODELS / "demo-target" / "prompts.jsonl"), limit=4).texts
    prompts = pair.encode(texts)
    eos = pair.target.shape.eos_token_ids
    config = RecordConfig("demo", max_new_tokens=NUM_TOKENS, num_slots=4)
    trace = record_trace(pair, prompts, config)
    for name, tree in TREES.items():
        engine = stree_core.Engine(
            pair.target, pair.draft, tree, stree_core.EngineConfig(num_positions=256)
        )
        run = stree_core.generate(engine, prompts, stree_core.StopRule(NUM_TOKENS, eos))
        steps = [generation.num_steps for generation in run.generations]
        assert walk(trace, tree).starts_P.tolist() == steps, name


@pytest.mark.parametrize("name", ["demo-target", "demo-draft", "demo-gdn"])
def test_logits_equal_transformers(name: str, prompts: list[list[int]]) -> None:
    folder = MODELS / name
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runtime = stree_core.Runtime("cpu", "float32", "torch")
    model = load_single(stree_core.find_source(folder), runtime)
    for prompt in prompts:
        with torch.inference_mode():
            expected = theirs(torch.tensor(prompt)[None]).logits[0, -1]
            logits = model.logits(read_prompt(model, prompt)[None])[0, 0]
            assert_close("logits", logits, expected, tolerance=1e-4)


def test_there_is_a_trace_of_every_known_dataset() -> None:
    for dataset in KNOWN_DATASETS:
        assert Library.open().find_trace("demo-target", "demo-draft", dataset) in TRACES


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_shipped_traces_belong_to_the_shipped_models(path: Path) -> None:
    trace = load_trace(path)
    names = (trace.meta.target.name, trace.meta.draft.name, trace.meta.dataset)
    assert path.name == trace_file_name(*names, trace.meta.sampling.label)
    target = stree_core.find_source(MODELS / trace.meta.target.name)
    own_head = trace.meta.draft.name == MTP
    draft = head_source(target) if own_head else stree_core.find_source(MODELS / "demo-draft")
    for traced, source in ((trace.meta.target, target), (trace.meta.draft, draft)):
        shipped, name = source.ref, source.name
        assert (traced.config_sha256, traced.tokenizer_sha256, traced.name) == (
            shipped.config_sha256, shipped.tokenizer_sha256, name,
        )  # fmt: skip
    assert trace.reliable
    share = float(np.mean(trace.ranks.reshape(trace.num_positions, -1)[:, 0] == 0))
    assert trace.meta.statistics["rank0_share"] == pytest.approx(share, abs=1e-5)


def test_files_are_small_enough_to_ship() -> None:
    assert max(path.stat().st_size for path in TRACES) < 1_000_000
    assert sum(path.stat().st_size for path in TRACES) < 5_000_000
    for path in Path(MODELS).rglob("*.safetensors"):
        assert path.stat().st_size < 16_000_000, path.name
