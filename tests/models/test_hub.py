"""Models by their hub id: what is fetched, from a fake cache, and what is said when it fails."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from stree_core.errors import CheckpointError
from stree_core.extras import install_command
from stree_core.families import HF_QUANT_CONFIG_FILE, MTP_FILE
from stree_core.models.hub import (
    PICKLES,
    SAFETENSORS,
    TEXT_FILES,
    UNWANTED,
    HubModel,
    fetch_model,
    is_hub_id,
)
from stree_core.models.source import CONFIG, GENERATION_CONFIG, MAMBA_CONFIG

SHA = "0123456789abcdef0123456789abcdef01234567"
NAME = "org/some-model_1.5"


def fake_cache(root: Path, files: Iterable[str], name: str = NAME) -> Path:
    """Lay out a cache as the hub's library does; return the snapshot."""
    repository = root / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


@pytest.mark.parametrize("name", [NAME, "a/b", "state-spaces/mamba2-2.7b", "A1/b_"])
def test_ids(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "model", "a/b/c", "/a", "a/", "./a", "../a", "a/..", "a/.b", ".a/b", "~/a", "a/b ", "a b/c",
        "a--b/c", "a/b..c", "a/-b", "a/b.", "a\\b", "", "a/b\n", "a/" + "b" * 97,
    ],
)  # fmt: skip
def test_what_is_no_id(name: str, tmp_path: Path) -> None:
    assert not is_hub_id(name)
    with pytest.raises(CheckpointError, match="organisation/repository, got"):
        fetch_model(name, tmp_path)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_offline_uses_what_the_cache_holds(tmp_path: Path, weights: str) -> None:
    snapshot = fake_cache(tmp_path, ["config.json", "tokenizer.json", weights])
    assert fetch_model(NAME, tmp_path) == HubModel(snapshot, "some-model_1.5")


def test_offline_without_the_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{NAME} is not whole in the local cache"):
        fetch_model(NAME, tmp_path)


def test_a_snapshot_needs_a_config(tmp_path: Path) -> None:
    fake_cache(tmp_path, ["model.safetensors"])
    with pytest.raises(CheckpointError, match=r"must hold a config\.json"):
        fetch_model(NAME, tmp_path)


def replace_download(
    monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]
) -> list[dict[str, Any]]:
    """Put `download` in the library's place; return the arguments of its calls."""
    calls: list[dict[str, Any]] = []

    def recorded(name: str, **arguments: Any) -> str:
        calls.append({"name": name, **arguments})
        return download(**arguments)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
    return calls


@pytest.mark.parametrize(("files", "num_calls"), [(["model.safetensors"], 1), ([], 2)])
def test_pickles_are_fetched_only_without_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], num_calls: int
) -> None:
    snapshot = fake_cache(tmp_path, ["config.json", *files])
    calls = replace_download(monkeypatch, lambda **_: str(snapshot))
    fetch_model(NAME)
    assert len(calls) == num_calls
    assert not any("bin" in pattern for pattern in calls[0]["allow_patterns"])
    assert all("config.json" in call["allow_patterns"] for call in calls)
    assert ("pytorch_model*.bin" in calls[-1]["allow_patterns"]) == (num_calls == 2)


def test_what_says_how_a_model_is_built_is_fetched() -> None:
    read = {CONFIG, MAMBA_CONFIG, GENERATION_CONFIG, HF_QUANT_CONFIG_FILE, MTP_FILE}
    assert read <= set(TEXT_FILES)


def test_patterns_select_the_wanted_files() -> None:
    wanted = [
        "config.json", "mamba_config.json", "tokenizer.model", "chat_template.jinja",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    pickles = [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
    ]
    others = [
        "README.md", "modeling_x.py", "consolidated.safetensors", "original/config.json",
        "onnx/model.safetensors", "training_args.bin", "optimizer.pt",
    ]  # fmt: skip
    files = [*wanted, *pickles, *others]

    library: Any = huggingface_hub
    select = library.utils.filter_repo_objects

    def selected(weights: tuple[str, ...]) -> list[str]:
        patterns = [*TEXT_FILES, *weights]
        return list(select(files, allow_patterns=patterns, ignore_patterns=list(UNWANTED)))

    assert selected(SAFETENSORS) == wanted
    assert selected(PICKLES) == [*wanted[:4], *pickles]


def http_error(kind: type[Exception], status: int) -> Exception:
    """Return an error of the library without the response that its constructor asks for."""
    error = kind.__new__(kind)
    error.args = ("a long answer",)
    error.__dict__["response"] = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError, 403), f"{NAME} is gated .*https://huggingface.co/{NAME}"),
        (http_error(errors.RepositoryNotFoundError, 404), f"no repository {NAME} is on the hub"),
        (http_error(errors.HfHubHTTPError, 403), rf"refused to hand out {NAME} \(403\).*log in"),
        (http_error(errors.HfHubHTTPError, 500), rf"{NAME} cannot be fetched \(a long answer\)"),
        (errors.LocalEntryNotFoundError("x"), "not whole in the local cache"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("Data processing error: No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "denied"), r"cannot be fetched \(.*denied\)"),
        (ConnectionResetError(), r"cannot be fetched \(ConnectionResetError\)"),
    ],
)  # fmt: skip
def test_failures_become_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(**_: Any) -> str:
        raise error

    replace_download(monkeypatch, fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch_model(NAME)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_recognised_behind_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> str:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as err:
            raise RuntimeError("the transfer failed") from err

    replace_download(monkeypatch, fail)
    with pytest.raises(CheckpointError, match="the disk is full"):
        fetch_model(NAME)


def test_the_library_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=re.escape(install_command("hf"))):
        fetch_model(NAME)
