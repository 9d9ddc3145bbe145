"""Where a model comes from: a folder with weights, a Hugging Face id, or a shape alone.

Nothing here loads torch: tuning asks for names and hashes only.
"""

from __future__ import annotations

import hashlib
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
    load_shape_spec,
    shape_from_config,
)
from stree_core.files import read_json, read_json_bytes, sha256_of
from stree_core.models.hub import fetch_config, fetch_model, is_hub_id
from stree_core.models.text import tokenizer_sha256
from stree_core.models.weight_index import weights_sha256
from stree_core.profile import ModelRef
from stree_core.shipped import shipped_path

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
    shape = shape_from_config(config, name)
    ref = ModelRef(
        name=name,
        config_sha256=digest,
        tokenizer_sha256=tokenizer_sha256(folder),
        shape_sha256=shape.digest,
        weights_sha256=weights_sha256(folder),
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
    ref = ModelRef(name=name, config_sha256=digest, shape_sha256=shape.digest)
    return ModelSource(ref, shape, None)


def spec_source(path: Path) -> ModelSource:
    """Return the source of a shape spec; raise ConfigError when it is malformed."""
    spec = load_shape_spec(path)
    shape = shape_from_config(spec.config_dict, spec.name)
    ref = ModelRef(name=spec.name, config_sha256=sha256_of(path), shape_sha256=shape.digest)
    return ModelSource(ref, shape, None)


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
