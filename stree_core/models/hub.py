"""Models by their Hugging Face id: the files that decoding needs, in the local cache."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

from stree_core.errors import CheckpointError
from stree_core.extras import install_command

TEXT_FILES = (
    "config.json",
    "mamba_config.json",
    "hf_quant_config.json",
    "mtp_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
# Only what holds weights: a trainer's own pickles may lie beside them.
PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
# The same weights once more in another layout, and everything in subfolders.
UNWANTED = ("consolidated*", "*/*")

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"{_PART}/{_PART}")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A fetched model: its folder in the cache, which a hash names, and the name it goes by."""

    folder: Path
    name: str


def is_hub_id(name: str) -> bool:
    """True when `name` has the form "organisation/repository"; a local folder may have it too."""
    return _ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def fetch_model(name: str, cache_dir: Path | None = None) -> HubModel:
    """Fetch a model's config, tokenizer and weights from the hub; offline, use what was fetched.

    Pickled weights are fetched only where there are no safetensors.
    Raises CheckpointError when the files cannot be had.
    """
    _require_id(name)
    folder = _snapshot(name, SAFETENSORS, cache_dir)
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(name, PICKLES, cache_dir)
    return _with_config(name, folder)


def fetch_config(name: str, cache_dir: Path | None = None) -> HubModel:
    """Fetch what describes a model without its weights; offline, use what was fetched.

    Raises CheckpointError when it cannot be had.
    """
    _require_id(name)
    return _with_config(name, _snapshot(name, (), cache_dir))


def _require_id(name: str) -> None:
    if not is_hub_id(name):
        raise CheckpointError(
            f"a Hugging Face id has the form organisation/repository, got {name!r}; check it"
        )


def _with_config(name: str, folder: Path) -> HubModel:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name} must hold a config.json, it has none; use another model")
    return HubModel(folder, name.split("/")[1])


def _snapshot(name: str, weights: tuple[str, ...], cache_dir: Path | None) -> Path:
    try:
        import huggingface_hub
    except ImportError as err:
        raise CheckpointError(
            f"fetching {name} needs the package huggingface_hub, it is not installed; "
            f"{install_command('hf')} or give a local folder"
        ) from err
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=[*TEXT_FILES, *weights],
            ignore_patterns=list(UNWANTED),
            cache_dir=cache_dir,
        )
    # The library also raises the classes of its HTTP client and of its transfer engine.
    except Exception as err:
        raise CheckpointError(_sentence(name, err)) from err
    return Path(folder)


def _sentence(name: str, err: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(err, errors.GatedRepoError):
        return (
            f"{name} is gated and this account may not read it; accept its terms on "
            f"https://huggingface.co/{name} and log in with `hf auth login`"
        )
    if isinstance(err, errors.RepositoryNotFoundError):
        return (
            f"no repository {name} is on the hub for this account; check the id, and log in with "
            "`hf auth login` if it is private"
        )
    if isinstance(err, errors.HfHubHTTPError) and _status(err) in (401, 403):
        return f"the hub refused to hand out {name} ({_status(err)}); log in with `hf auth login`"
    if isinstance(err, errors.LocalEntryNotFoundError):
        return (
            f"{name} is not whole in the local cache and the hub cannot be reached; fetch it while "
            "online, or give a local folder"
        )
    if _disk_is_full(err):
        return f"the disk is full, so {name} cannot be fetched; free some space or set HF_HOME"
    text = str(err) or type(err).__name__
    return f"{name} cannot be fetched ({text.splitlines()[0]}); try again or give a local folder"


def _status(err: Exception) -> int | None:
    return getattr(getattr(err, "response", None), "status_code", None)


def _disk_is_full(err: BaseException | None) -> bool:
    """True when the error or a cause of it is a full disk; the transfer engine only says so."""
    while err is not None:
        if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left on device" in str(err).lower():
            return True
        err = err.__cause__ or err.__context__
    return False
