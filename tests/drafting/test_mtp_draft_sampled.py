"""Sampled texts of an MTP head against the target's own distribution.

The command benchmarks/sampled.py does the same over more than 10^5 tokens of the demo target.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mtp_models import BAMBA_KEYS, add_head
from sampled_case import LENGTH, NUM_TOKENS, PARAMS, TREES, decode, judge
from transformers import BambaConfig, BambaForCausalLM

from stree_core.drafting.pair import Pair, Runtime, load_with_head
from stree_core.engine.rules import RuleName
from stree_core.models.source import folder_source


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("headed")
    torch.manual_seed(3)
    config = BambaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_layer_indices=[1], mamba_n_heads=2, mamba_d_head=16,
        mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, vocab_size=NUM_TOKENS,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        initializer_range=0.7,
    )  # fmt: skip
    BambaForCausalLM(config).save_pretrained(folder)
    (folder / "mtp_config.json").write_text(json.dumps(BAMBA_KEYS))
    add_head(Path(folder))
    return load_with_head(folder_source(folder), Runtime("cpu", "float32"))


@pytest.mark.parametrize("rule", ["naive", "mss"])
def test_every_token_follows_the_targets_law(pair: Pair, rule: RuleName) -> None:
    models = (pair.target, pair.draft)
    texts, tokens_per_step = decode(models, TREES["ragged"], rule, PARAMS["plain"], LENGTH // 8)
    assert sum(map(len, texts)) > 10_000
    assert tokens_per_step > 1.1
    uniform, surplus = judge(pair.target, texts, PARAMS["plain"])
    assert uniform > 1e-4
    assert abs(surplus) < 4
