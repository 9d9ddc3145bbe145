"""Model folders that cannot be used end in one sentence that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from synthetic_data import make_profile
from tiny_models import save_pair

from stree_core.errors import BackendUnavailable, CheckpointError, ConfigError
from stree_core.pair import Runtime, load_pair, require_profile_fits


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    save_pair(tmp_path)
    return tmp_path / "models" / "tiny-target", tmp_path / "models" / "tiny-draft"


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_missing_and_broken_files_are_named(folders: tuple[Path, Path]) -> None:
    target, draft = folders
    weights = target / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pair(target, draft, Runtime("cpu"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"needs model\.safetensors"):
        load_pair(target, draft, Runtime("cpu"))
    (target / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_pair(target, draft, Runtime("cpu"))


def test_weights_must_fit_the_config(folders: tuple[Path, Path]) -> None:
    target, draft = folders
    path = target / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("out_proj.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=f"needs weight {name}"):
        load_pair(target, draft, Runtime("cpu"))
    save_file(tensors | {name: tensors[name][:, :3].contiguous()}, path)
    with pytest.raises(CheckpointError, match="must have shape"):
        load_pair(target, draft, Runtime("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "banba"}, "did you mean bamba"),
        ({"mamba_d_state": None}, "needs key 'mamba_d_state'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"time_step_limit": "wide"}, "wrong kind"),
    ],
)
def test_configs_that_cannot_be_run_are_refused(
    folders: tuple[Path, Path], changes: dict[str, object], message: str
) -> None:
    target, draft = folders
    _edit_config(target, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_pair(target, draft, Runtime("cpu"))


def test_another_tokenizer_is_refused_with_both_hashes(folders: tuple[Path, Path]) -> None:
    target, draft = folders
    path = draft / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"has [0-9a-f]{12} and tiny-draft [0-9a-f]{12}"):
        load_pair(target, draft, Runtime("cpu"))


def test_a_profile_for_another_model_is_refused(folders: tuple[Path, Path]) -> None:
    pair = load_pair(*folders, Runtime("cpu"))
    profile = make_profile()
    with pytest.raises(ConfigError, match="the profile is for target"):
        require_profile_fits(profile, pair)
    fitting = profile.model_copy(update={"target": pair.target_ref, "draft": pair.draft_ref})
    require_profile_fits(fitting, pair)
    wrong = pair.draft_ref.model_copy(update={"tokenizer_sha256": "f" * 64})
    with pytest.raises(ConfigError, match="tokenizer ffffffffffff"):
        require_profile_fits(fitting.model_copy(update={"draft": wrong}), pair)


def test_empty_prompts_are_refused(folders: tuple[Path, Path]) -> None:
    pair = load_pair(*folders, Runtime("cpu"))
    with pytest.raises(ConfigError, match="prompt 2 must hold some text"):
        pair.encode(["w1", "  "])


def test_devices_that_are_not_there_are_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(BackendUnavailable, match="device must be auto, cpu or cuda"):
        load_pair(*folders, Runtime("tpu"))
