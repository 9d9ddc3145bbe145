"""Weight files mean what they say: all of it is read, or the folder is refused in one sentence."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import load, save_mamba_in_llama, save_native, save_shards
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_bamba, tiny_falcon_h1, tiny_mamba2, tiny_zamba2
from torch import Tensor

from stree_core.drafting.checkpoint import load_model
from stree_core.errors import CheckpointError
from stree_core.models import weight_index
from stree_core.models.backend import load_backend
from stree_core.models.source import folder_source
from stree_core.models.weight_files import WeightFiles
from stree_core.models.weight_index import shape_keys, weights_sha256

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny-bamba"
    tiny_bamba().save_pretrained(folder)
    return folder


@pytest.fixture
def bamba(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny-bamba"))


def edit(folder: Path, change: Callable[[Tensors], Tensors], stated: str = "pt") -> None:
    path = folder / "model.safetensors"
    tensors = change({key: value.clone() for key, value in load_file(path).items()})
    save_file(tensors, path, metadata={"format": stated})


def refused(folder: Path) -> str:
    """Return the one sentence that loading a folder ends in."""
    with pytest.raises(CheckpointError) as err:
        load(folder)
    assert "\n" not in str(err.value)
    assert "fetch the model again" not in str(err.value)
    return str(err.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_every_weight_that_its_shape_names(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    source = folder_source(tmp_path)
    got: set[str] = set()
    raw = WeightFiles._raw
    monkeypatch.setattr(WeightFiles, "_raw", lambda self, key: (got.add(key), raw(self, key))[1])
    load_model(source, load_backend("torch", CPU), torch.float32, CPU)
    stored = load_file(tmp_path / "model.safetensors")
    text = {
        key.replace("model.language_model.", "model.") for key in stored if ".visual." not in key
    }
    assert got == set(shape_keys(source.shape, got)) == text


@pytest.mark.parametrize(
    "key", ["model.layers.1.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight"]
)
def test_a_weight_that_nothing_reads_is_refused_by_name(bamba: Path, key: str) -> None:
    edit(bamba, lambda tensors: tensors | {key: torch.ones(32)})
    assert f"holds weight {key} that decoding would ignore" in refused(bamba)


def test_a_weight_that_only_a_shard_names_is_refused_too(tmp_path: Path) -> None:
    save_mamba_in_llama(tmp_path / "model", seed=0)
    shard = tmp_path / "model" / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {"model.layers.0.gate": torch.ones(4)}, shard)
    assert "model.layers.0.gate" in refused(tmp_path / "model")


def test_known_extras_are_skipped_and_said_once(
    bamba: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load(bamba)
    edit(
        bamba,
        lambda tensors: tensors | {
            "mtp.layers.0.norm.weight": torch.ones(32), "mtp.fc.weight": torch.ones(32, 64),
            "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        },
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        after = load(bamba)
    assert torch.equal(after.weights.lm_head_VD, before.weights.lm_head_VD)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "stree_core.models.weight_index"]
    assert line == (
        "tiny-bamba: weights that the model's own passes do not need: *.inv_freq (1), "
        "copies of model.embed_tokens.weight (1), mtp.* (2)"
    )


def test_a_tied_head_that_differs_is_refused(bamba: Path) -> None:
    edit(bamba, lambda tensors: tensors | {
        "lm_head.weight": tensors["model.embed_tokens.weight"] + 1e-3
    })  # fmt: skip
    assert "lm_head.weight must be a copy of model.embed_tokens.weight" in refused(bamba)


def test_a_shared_layer_may_be_stored_at_each_of_its_uses(tmp_path: Path) -> None:
    tiny_zamba2().save_pretrained(tmp_path)
    owner, user = (f"model.layers.{index}.shared_transformer." for index in (1, 4))

    def repeated(tensors: Tensors) -> Tensors:
        copies = {user + k.removeprefix(owner): v for k, v in tensors.items() if owner in k}
        return tensors | {key: value.clone() for key, value in copies.items()}

    edit(tmp_path, repeated)
    load(tmp_path)
    norm = user + "input_layernorm.weight"
    edit(tmp_path, lambda tensors: tensors | {norm: tensors[norm] + 1})
    assert f"{norm} must be a copy of {owner}input_layernorm.weight" in refused(tmp_path)


def test_conversions_of_other_frameworks_are_refused(tmp_path: Path) -> None:
    tiny_falcon_h1().save_pretrained(tmp_path)
    edit(tmp_path, dict, stated="mlx")
    assert "is a conversion for mlx" in refused(tmp_path)
    edit(tmp_path, lambda tensors: {
        key: value.movedim(1, 2).contiguous() if key.endswith("conv1d.weight") else value
        for key, value in tensors.items()
    })  # fmt: skip
    message = refused(tmp_path)
    assert "conv1d.weight is stored as (80, 4, 1), channels last as MLX conversions are" in message


def test_a_missing_weight_is_named_with_the_nearest_of_its_layer(bamba: Path) -> None:
    name, other = (f"model.layers.2.mamba.{part}" for part in ("out_proj.weight", "o_proj.weight"))
    edit(bamba, lambda tensors: {other if k == name else k: v for k, v in tensors.items()})
    assert f"needs weight {name}, no file has one of that name; the nearest is {other}" in refused(
        bamba
    )
    edit(bamba, lambda tensors: {})
    assert "the files hold no weights at all" in refused(bamba)


@pytest.mark.parametrize(
    "content",
    [
        {}, [], {"weight_map": []}, {"weight_map": {}}, {"weight_map": "all"},
        {"weight_map": {"a": 1}}, {"weight_map": {"a": None}}, {"weight_map": {"a": ["b"]}},
        {"weight_map": {"a": ""}}, {"weight_map": {"a": ".."}}, {"weight_map": {"a": "../b"}},
        {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": "b" * 900}},
        {"weight_map": {"a\u001b[2J": "b.safetensors"}}, {"weight_map": {"a" * 900: "b"}},
        {"weight_map": {"a": "absent.safetensors"}}, {"weight_map": {"a": "."}},
    ],
    ids=lambda content: json.dumps(content)[:40],
)  # fmt: skip
def test_an_index_that_is_none_is_one_sentence(bamba: Path, content: Any) -> None:
    (bamba / INDEX).write_text(json.dumps(content))
    message = refused(bamba)
    assert len(message) < 400
    assert message.isprintable()


def test_an_index_is_bounded(bamba: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_index, "MAX_TENSORS", 4)
    weight_map = {f"w{index}": "model.safetensors" for index in range(5)}
    (bamba / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "it has 5 tensors, at most 4 are read" in refused(bamba)
    (bamba / INDEX).unlink()
    assert "tensors, at most 4 are read" in refused(bamba)


def save_header(folder: Path, header: object, data: bytes = bytes(64)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(size + text + data)


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "header",
    [
        [], "w", {"w": 1}, {"w": {}}, {"__metadata__": []}, {"w\n": {}}, {"w" * 501: {}},
        entry([10**12], [0, 64]), entry([10**6, 10**6], [0, 64]), entry([10**40], [0, 64]),
        entry([4], [0, 10**12]), entry([4], [16, 0]), entry([4], [-16, 0]), entry([4], [0]),
        entry([4.0], [0, 16]), entry([True], [0, 4]), entry("4", [0, 16]), entry([1] * 99, [0, 4]),
        entry([4], [0, 16], dtype=32), entry([4], [0, 16], dtype="F33"),
        entry([4], [0, 16], dtype="\ud83d"), b"\xff" * 9, b"[" * 9999,
        b'{"w": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda header: ascii(header)[:40],
)  # fmt: skip
def test_a_damaged_header_is_one_sentence(bamba: Path, header: Any) -> None:
    save_header(bamba, header)
    message = refused(bamba)
    assert "model.safetensors cannot be read (" in message
    assert len(message) < 500


@pytest.mark.parametrize("length", [0, 3, 8, 9])
def test_a_file_shorter_than_its_header_is_one_sentence(bamba: Path, length: int) -> None:
    (bamba / "model.safetensors").write_bytes((10**12).to_bytes(8, "little")[:length])
    assert "cannot be read" in refused(bamba)
    (bamba / "model.safetensors").write_bytes((10**12).to_bytes(9, "little")[:length])
    assert "cannot be read" in refused(bamba)


def test_only_regular_files_are_opened(bamba: Path) -> None:
    path = bamba / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    assert "name a regular file" in refused(bamba)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "name a regular file" in refused(bamba)
    path.unlink()
    path.mkdir()
    assert "name a regular file" in refused(bamba)


@pytest.fixture
def native(tmp_path: Path) -> Path:
    save_native(tmp_path / "native", seed=0)
    return tmp_path / "native"


def replaced_bytes(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes that stand in a file once or more by as many others."""
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"littlePK", b"li2tlePK"),
        (b"backbone.embedding.weight", b"\x8backbone.embedding.weigh"),
        (b"ctorch._utils\n", b"h\xfa\x0ah\xfah\xfah\xfah\xfah\xfa."),
        (b"PK\x05\x06", b"PK\x05\x07"),
    ],
    ids=["byte order", "name is not UTF-8", "unknown memo", "no directory"],
)
def test_a_damaged_bin_file_is_one_sentence(native: Path, old: bytes, new: bytes) -> None:
    path = native / "pytorch_model.bin"
    new = new[: len(old)] + old[len(new) :]
    replaced_bytes(path, old, new)
    message = refused(native)
    assert "pytorch_model.bin cannot be read (" in message
    assert len(message) < 500


def test_a_bin_file_may_not_announce_more_than_it_has(native: Path) -> None:
    path = native / "pytorch_model.bin"
    torch.save({"w": torch.zeros(1).expand(10**12)}, path)
    assert "w of shape (1000000000000,) has more values than the file" in refused(native)
    torch.save({"w": torch.zeros(4).to_sparse()}, path)
    assert "w is not a plain tensor" in refused(native)


def test_names_in_a_bin_file_are_bounded(native: Path) -> None:
    for name in ("a\nb", "w" * 501):
        torch.save({name: torch.zeros(4)}, native / "pytorch_model.bin")
        assert "a tensor is named" in refused(native)


def test_a_compressed_bin_file_is_refused(native: Path) -> None:
    path = native / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    assert "is compressed, torch writes none so" in refused(native)


def test_the_hash_of_weights_is_of_values_not_of_files(tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    tiny_mamba2().save_pretrained(whole)
    shutil.copytree(whole, sharded)
    save_shards(load_file(whole / "model.safetensors"), sharded, "model", "safetensors")
    (sharded / "model.safetensors").unlink()
    first = weights_sha256(whole)
    assert first is not None
    assert folder_source(whole).ref.weights_sha256 == first == weights_sha256(sharded)
    edit(whole, lambda tensors: tensors | {
        "backbone.layers.1.mixer.D": tensors["backbone.layers.1.mixer.D"] + 1
    })  # fmt: skip
    again = folder_source(whole).ref
    assert again.weights_sha256 != first
    assert again.config_sha256 == folder_source(sharded).ref.config_sha256
    (whole / "model.safetensors").unlink()
    assert folder_source(whole).ref.weights_sha256 is None


def test_the_hash_of_a_bin_file_follows_its_values(native: Path, tmp_path: Path) -> None:
    first = weights_sha256(native)
    assert first is not None
    shutil.copytree(native, tmp_path / "same")
    assert weights_sha256(tmp_path / "same") == first
    tensors = torch.load(native / "pytorch_model.bin", weights_only=True)
    tensors["backbone.layers.1.mixer.D"][-1] += 1
    torch.save(tensors, native / "pytorch_model.bin")
    assert weights_sha256(native) != first
    (native / "pytorch_model.bin").write_bytes(b"no archive")
    assert weights_sha256(native) not in (None, first)
