"""Model folders that cannot be used end in one sentence; those that can need little memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import save_mamba_in_llama, save_native
from safetensors.torch import load_file, save_file
from synthetic_data import make_profile
from tiny_models import VOCAB_SIZE, ours, save_pair, tiny_mamba2, word_tokenizer
from transformers import Mamba2Config, Mamba2ForCausalLM

from stree_core import memory
from stree_core.drafting.checkpoint import load_model
from stree_core.drafting.pair import Pair, Runtime, load_pair, require_profile_fits
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.stop import StopRule
from stree_core.errors import BackendUnavailable, CheckpointError, ConfigError, NotEnoughMemory
from stree_core.families.model_shape import Weight
from stree_core.models.backend import load_backend
from stree_core.models.source import find_source, folder_source
from stree_core.models.weight_files import WeightFiles
from stree_core.tree import Tree

CPU = torch.device("cpu")
Folders = tuple[Path, Path]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    save_pair(tmp_path)
    return tmp_path / "models" / "tiny-target", tmp_path / "models" / "tiny-draft"


def _load(target: Path, draft: Path, runtime: Runtime | None = None) -> Pair:
    return load_pair(find_source(target), find_source(draft), runtime or Runtime("cpu"))


def _edit_config(folder: Path, changes: dict[str, Any], name: str = "config.json") -> None:
    path = folder / name
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_missing_and_broken_files_are_named(folders: Folders) -> None:
    target, _ = folders
    weights = target / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        _load(*folders)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"needs model\.safetensors or pytorch_model\.bin"):
        _load(*folders)
    (target / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        _load(*folders)
    (target / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"must hold a config\.json"):
        _load(*folders)
    with pytest.raises(CheckpointError, match=r"a folder with config\.json, a Hugging Face id or"):
        find_source("no/such/folder")


def test_weights_must_fit_the_config(folders: Folders) -> None:
    path = folders[0] / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("out_proj.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=f"needs weight {name}"):
        _load(*folders)
    save_file(tensors | {name: tensors[name][:, :3].contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"out_proj\.weight must hold \(32, 64\) by config"):
        _load(*folders)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path)
    with pytest.raises(CheckpointError, match=r"must be bf16, fp16 or fp32, got torch\.int8"):
        _load(*folders)


def test_shards_that_are_not_whole_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_mamba_in_llama(folder, seed=0)
    second = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, second)
    with pytest.raises(CheckpointError, match=f"must hold {re.escape(name)} by its index"):
        _weights(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"needs the file {second.name}"):
        _weights(folder)


def _weights(folder: Path) -> None:
    load_model(folder_source(folder), load_backend("torch", CPU), torch.float32, CPU)


class _Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_bin_file_runs_no_code(tmp_path: Path) -> None:
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    save_native(folder, seed=0)
    torch.save({"backbone.embedding.weight": _Trap(sprung)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        _weights(folder)
    assert not sprung.exists()
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no dictionary of tensors"):
        _weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(CheckpointError, match="cannot be read"):
        _weights(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_files_load_exactly_into_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    narrow = tiny_mamba2().to(dtype)
    model = ours(narrow, tmp_path / "narrow", torch.float32)
    wide = ours(narrow.float(), tmp_path / "wide", torch.float32)
    assert torch.equal(model.weights.embed_VD, wide.weights.embed_VD)
    mixers = [m.weights.blocks[0].parts[0] for m in (model, wide)]
    assert torch.equal(*(mixer.in_proj for mixer in mixers))  # type: ignore[union-attr]


def test_which_layers_attend_is_part_of_a_models_hash(tmp_path: Path) -> None:
    save_mamba_in_llama(tmp_path / "model", seed=0)
    before = folder_source(tmp_path / "model").ref
    _edit_config(tmp_path / "model", {"attn_layers": [3]}, "mamba_config.json")
    after = folder_source(tmp_path / "model").ref
    assert before.config_sha256 != after.config_sha256
    assert before.shape_sha256 != after.shape_sha256


def test_another_tokenizer_is_refused_with_both_hashes(folders: Folders) -> None:
    path = folders[1] / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"has [0-9a-f]{12} and tiny-draft [0-9a-f]{12}"):
        _load(*folders)


def _save_mamba2(folder: Path, vocab_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = Mamba2Config(
        num_heads=4, head_dim=16, hidden_size=32, state_size=16, num_hidden_layers=1, n_groups=1,
        vocab_size=vocab_size, tie_word_embeddings=False, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    Mamba2ForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save(str(folder / "tokenizer.json"))


def test_a_draft_knows_at_least_the_targets_tokens(tmp_path: Path) -> None:
    _save_mamba2(tmp_path / "small", VOCAB_SIZE, seed=0)
    _save_mamba2(tmp_path / "padded", VOCAB_SIZE + 32, seed=1)
    with pytest.raises(CheckpointError, match="padded has 128 tokens and small 96; choose"):
        _load(tmp_path / "padded", tmp_path / "small")
    pair = _load(tmp_path / "small", tmp_path / "padded")
    (prompt,) = pair.encode(["w1 w2 w3"])
    texts = []
    for tree in (Tree.chain(0), Tree.chain(3)):
        engine = Engine(pair.target, pair.draft, tree, EngineConfig(num_positions=64))
        texts.append(generate(engine, [prompt], StopRule(24)).generations[0].tokens)
    assert texts[0] == texts[1]


def test_a_profile_for_another_model_is_refused(folders: Folders, tmp_path: Path) -> None:
    pair = _load(*folders)
    profile = make_profile()
    with pytest.raises(ConfigError, match="the profile is for target"):
        require_profile_fits(profile, pair)
    fitting = profile.model_copy(update={"target": pair.target_ref, "draft": pair.draft_ref})
    require_profile_fits(fitting, pair)
    for part in ("config", "tokenizer"):
        wrong = pair.draft_ref.model_copy(update={f"{part}_sha256": "f" * 64})
        with pytest.raises(ConfigError, match=f"{part} ffffffffffff"):
            require_profile_fits(fitting.model_copy(update={"draft": wrong}), pair)
    renamed = tmp_path / "renamed"
    shutil.copytree(folders[0], renamed)
    with pytest.raises(ConfigError, match="with name tiny-target, but renamed has renamed"):
        require_profile_fits(fitting, _load(renamed, folders[1]))


def test_empty_prompts_are_refused(folders: Folders) -> None:
    with pytest.raises(ConfigError, match="prompt 2 must hold some text"):
        _load(*folders).encode(["w1", "  "])


def test_devices_that_are_not_there_are_refused(folders: Folders) -> None:
    with pytest.raises(BackendUnavailable, match="device must be auto, cpu or cuda"):
        _load(*folders, Runtime("tpu"))


def test_what_does_not_fit_is_said_beforehand(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = _load(*folders)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 20)
    config = EngineConfig(num_slots=64, num_positions=4096)
    with pytest.raises(NotEnoughMemory, match=r"64 sequences of 4096 positions needs 0\.\d GiB"):
        Engine(pair.target, pair.draft, Tree.chain(2), config)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match="holding the weights of tiny-target needs"):
        _load(*folders)


def test_caches_take_what_was_said(folders: Folders) -> None:
    pair = _load(*folders)
    engine = Engine(pair.target, pair.draft, Tree.chain(3), EngineConfig(3, 100))
    assert engine.needed_bytes() == engine.cache_bytes


def test_loading_holds_little_more_than_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of bf16 shards become fp32 one by one; mapped file pages are not counted."""
    torch.manual_seed(0)
    config = Mamba2Config(
        num_heads=16, head_dim=64, hidden_size=512, state_size=64, num_hidden_layers=8, n_groups=1,
        vocab_size=16384, tie_word_embeddings=True,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="8MB")
    del model
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    samples: list[int] = []
    read = WeightFiles.read

    def watched(files: WeightFiles, weight: Weight) -> torch.Tensor:
        samples.append(_anonymous_bytes())
        return read(files, weight)

    monkeypatch.setattr(WeightFiles, "read", watched)
    before = _anonymous_bytes()
    source = folder_source(tmp_path)
    loaded = load_model(source, load_backend("torch", CPU), torch.float32, CPU)
    samples.append(_anonymous_bytes())
    assert max(samples) - before < 1.3 * 4 * loaded.shape.num_parameters


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10
