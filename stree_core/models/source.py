"""Where a model comes from: a folder with weights, a Hugging Face id, or a shape alone.

Nothing here loads torch: tuning asks for names and hashes only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stree_core.errors import CheckpointError
from stree_core.families import (
    HF_QUANT_CONFIG,
    HF_QUANT_CONFIG_FILE,
    MTP_CONFIG,
    MTP_FILE,
    ModelShape,
    in_fp8,
    load_shape_spec,
    shape_from_config,
)
from stree_core.files import read_json, read_json_bytes, sha256_of
from stree_core.fp8 import Fp8Kind, Fp8Scheme, Header, find_scheme, stored_fp8
from stree_core.models.hub import fetch_config, fetch_model, is_hub_id
from stree_core.models.text import tokenizer_sha256
from stree_core.models.weight_index import (
    find_weights,
    read_headers,
    renamed,
    shape_keys,
    weights_sha256,
)
from stree_core.profile import ModelRef
from stree_core.shipped import shipped_path

logger = logging.getLogger(__name__)

CONFIG = "config.json"
MAMBA_CONFIG = "mamba_config.json"
GENERATION_CONFIG = "generation_config.json"
MTP = "mtp"
"""The name of a target's own head, where drafts are named."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model before it is loaded; without a folder its weights are drawn at random."""

    ref: ModelRef
    shape: ModelShape
    folder: Path | None

    @property
    def name(self) -> str:
        """The name that files keep of it."""
        return self.ref.name


def hub_config_source(name: str) -> ModelSource:
    """Return the source of a Hugging Face id by its config alone, which is fetched.

    Raises CheckpointError when it cannot be had or used.
    """
    fetched = fetch_config(name)
    source = config_source(fetched.folder)
    return replace(source, ref=source.ref.model_copy(update={"name": fetched.name}))


def find_source(name: str | Path) -> ModelSource:
    """Return the source of a model folder, of a model that ships, or of a Hugging Face id.

    The last is fetched. Raises CheckpointError when it is none of them, cannot be fetched, or
    cannot be used.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder_source(folder)
    shipped = shipped_path("models", name)
    if shipped is not None:
        return folder_source(shipped)
    if isinstance(name, str) and is_hub_id(name):
        fetched = fetch_model(name)
        return folder_source(fetched.folder, fetched.name)
    raise CheckpointError(
        f"a model is a folder with config.json, a Hugging Face id or demo-target, got {name}; "
        "check the path"
    )


def folder_source(folder: Path, name: str | None = None) -> ModelSource:
    """Return the source of a model folder; raise CheckpointError when it cannot be used."""
    name = name or folder.resolve().name
    config, digest = _read_config(folder)
    shape = _as_stored(shape_from_config(config, name), config, folder, name)
    ref = ModelRef(
        name=name,
        config_sha256=digest,
        tokenizer_sha256=tokenizer_sha256(folder),
        shape_sha256=shape.digest,
        weights_sha256=weights_sha256(folder),
        weights=_kind(shape),
    )
    return ModelSource(ref, shape, folder)


def config_source(path: Path) -> ModelSource:
    """Return the source of a config alone: a folder with config.json, or such a file by any name.

    A file of another name goes by that. Raises CheckpointError when it cannot be used.
    """
    is_file = path.is_file()
    if is_file and path.name != CONFIG:
        name = path.stem
        config, data = read_json_bytes(path)
        digest = hashlib.sha256(data).hexdigest()
    else:
        folder = path.resolve().parent if is_file else path
        name = folder.resolve().name
        config, digest = _read_config(folder)
    shape = shape_from_config(config, name)
    ref = ModelRef(name=name, config_sha256=digest, shape_sha256=shape.digest, weights=_kind(shape))
    return ModelSource(ref, shape, None)


def _as_stored(shape: ModelShape, config: dict[str, Any], folder: Path, name: str) -> ModelShape:
    """Return a shape with those tensors in FP8 that the files hold so, if they are there."""
    scheme = find_scheme(config)
    if scheme is None or find_weights(folder) is None:
        return shape
    if scheme.quantised_cache:
        logger.warning(
            "%s: %s declares a quantised key-value cache; keys and values are kept in the model's "
            "dtype instead", name, scheme.file,
        )  # fmt: skip
    headers = read_headers(folder)
    if headers is None:
        raise CheckpointError(
            f"{name} is quantised by {scheme.file}, and FP8 is read from safetensors files alone; "
            "use a checkpoint in that format"
        )
    stored = {
        renamed(key, shape.renames): Header(tensor.dtype, tensor.shape)
        for key, tensor in headers.items()
    }
    plain = dataclasses.replace(shape, fp8=None)
    fp8 = stored_fp8(shape_keys(plain, stored), scheme, stored, name)
    head = shape.mtp
    if head is not None:
        keys = shape_keys(dataclasses.replace(head, fp8=None), stored)
        head = dataclasses.replace(head, fp8=stored_fp8(keys, scheme, stored, name))
    return dataclasses.replace(shape, fp8=fp8, mtp=head)


def spec_source(path: Path, weights: Fp8Kind | None = None) -> ModelSource:
    """Return the source of a shape spec; raise ConfigError when it is malformed.

    With `weights` its projections are in FP8 and the name says so: files of the two lie apart.
    """
    spec = load_shape_spec(path)
    shape, name = shape_from_config(spec.config_dict, spec.name), spec.name
    if weights is not None:
        shape, name = in_fp8(shape, Fp8Scheme(weights, path.name)), f"{name}-{weights}"
    ref = ModelRef(
        name=name,
        config_sha256=sha256_of(path),
        shape_sha256=shape.digest,
        weights=_kind(shape),
    )
    return ModelSource(ref, shape, None)


def _kind(shape: ModelShape) -> Fp8Kind | None:
    return None if shape.fp8 is None else shape.fp8.kind


def head_source(target: ModelSource) -> ModelSource:
    """Return the source of a target's own MTP head, whose config is in two files where it is.

    Raises CheckpointError when the target's config names none.
    """
    if target.shape.mtp is None:
        raise CheckpointError(
            f"--draft {MTP} needs a checkpoint with an MTP head, the config of {target.name} names "
            "none; give a draft model"
        )
    digest = target.ref.config_sha256
    if target.folder is not None and (target.folder / MTP_FILE).is_file():
        both = digest + sha256_of(target.folder / MTP_FILE)
        digest = hashlib.sha256(both.encode()).hexdigest()
    ref = ModelRef(
        name=MTP,
        config_sha256=digest,
        tokenizer_sha256=target.ref.tokenizer_sha256,
        shape_sha256=target.shape.mtp.digest,
        weights=_kind(target.shape.mtp),
    )
    return ModelSource(ref, target.shape.mtp, target.folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json, with what stands in further files under keys of its own.

    generation_config.json knows all end tokens, hf_quant_config.json how weights are quantised;
    Mamba-in-Llama keeps its mixers in mamba_config.json; mtp_config.json describes a head that was
    trained for a model whose config stays as it is. Raises CheckpointError when a file cannot be
    read.
    """
    return _read_config(folder)[0]


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the config and its hash: of config.json and the file that says which layers attend."""
    config, data = read_json_bytes(folder / CONFIG)
    digest = hashlib.sha256(data).hexdigest()
    if (folder / MAMBA_CONFIG).is_file():
        config["mamba_config"], data = read_json_bytes(folder / MAMBA_CONFIG)
        both = digest + hashlib.sha256(data).hexdigest()
        digest = hashlib.sha256(both.encode()).hexdigest()
    if (folder / HF_QUANT_CONFIG_FILE).is_file():
        config[HF_QUANT_CONFIG] = read_json(folder / HF_QUANT_CONFIG_FILE)
    if (folder / MTP_FILE).is_file():
        config[MTP_CONFIG] = read_json(folder / MTP_FILE)
    if (folder / GENERATION_CONFIG).is_file():
        eos = read_json(folder / GENERATION_CONFIG).get("eos_token_id")
        if eos is not None:
            config["eos_token_id"] = eos
    return config, digest
