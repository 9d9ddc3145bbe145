"""A target and its draft, loaded together, and whether a profile is about them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from stree_core.backend import (
    load_backend,
    resolve_backend,
    resolve_device,
    resolve_dtype,
)
from stree_core.checkpoint import load_model, load_shape, load_tokenizer, model_ref, random_model
from stree_core.errors import CheckpointError, ConfigError
from stree_core.model import Model
from stree_core.profile import ModelRef, Profile


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where and how to run: names as on the command line, "auto" resolved by the machine."""

    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"


@dataclass(frozen=True, slots=True)
class Pair:
    """A target and a draft with one vocabulary; `tokenizer` is None for random weights."""

    target: Model
    draft: Model
    target_ref: ModelRef
    draft_ref: ModelRef
    tokenizer: Tokenizer | None

    @property
    def device(self) -> torch.device:
        """The device that both run on."""
        return self.target.device

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Return the token ids of prompts; raise ConfigError on one that has no tokens."""
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.target_ref.name} needs tokenizer.json to read prompts, it has none; add it"
            )
        for number, prompt in enumerate(prompts, start=1):
            if not prompt.strip():
                raise ConfigError(f"prompt {number} must hold some text, it is empty; write it")
        return [encoding.ids for encoding in self.tokenizer.encode_batch(prompts)]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        assert self.tokenizer is not None
        text: str = self.tokenizer.decode(tokens)
        return text


def load_pair(target: Path, draft: Path, runtime: Runtime, *, random_weights: bool = False) -> Pair:
    """Load two model folders onto one device.

    With `random_weights` only the configs are read: for timing, which does not depend on values.
    Raises CheckpointError when the two do not share a vocabulary and a tokenizer.
    """
    device = resolve_device(runtime.device)
    dtype = resolve_dtype(runtime.dtype, device)
    backend = load_backend(resolve_backend(runtime.backend, device), device)
    refs = (model_ref(target), model_ref(draft))
    _require_same_tokenizer(*refs)

    def load(folder: Path) -> Model:
        if random_weights:
            return random_model(load_shape(folder), backend, dtype, device)
        return load_model(folder, backend, dtype, device)

    with_text = refs[0].tokenizer_sha256 is not None and not random_weights
    tokenizer = load_tokenizer(target) if with_text else None
    pair = Pair(load(target), load(draft), *refs, tokenizer)
    sizes = (pair.target.shape.vocab_size, pair.draft.shape.vocab_size)
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"target and draft need one vocabulary, they have {sizes[0]} and {sizes[1]} entries; "
            "choose a draft made for this target"
        )
    return pair


def require_profile_fits(profile: Profile, pair: Pair) -> None:
    """Raise ConfigError when the profile was made for another target, draft or tokenizer."""
    checks = (("target", profile.target, pair.target_ref), ("draft", profile.draft, pair.draft_ref))
    for role, expected, actual in checks:
        if expected != actual:
            part = "config" if expected.config_sha256 != actual.config_sha256 else "tokenizer"
            mine, theirs = (getattr(ref, f"{part}_sha256") for ref in (expected, actual))
            if mine == theirs:
                part, mine, theirs = "name", expected.name, actual.name
            raise ConfigError(
                f"the profile is for {role} {expected.name} with {part} {_short(mine)}, but "
                f"{actual.name} has {_short(theirs)}; use the model it was tuned for or tune again"
            )


def gpu_warning(profile: Profile, device: torch.device) -> str | None:
    """Return one line when the profile was tuned for another GPU than `device`, else None."""
    here = device_name(device)
    if short_gpu_name(here, device) == profile.gpu.name:
        return None
    return (
        f"the profile was tuned for {profile.gpu.name}, this is {here}: its tokens are right, "
        "its speed is not promised"
    )


def device_name(device: torch.device) -> str:
    """Return a device's full name: the driver's for a GPU, the processor's for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def short_gpu_name(full_name: str, device: torch.device) -> str:
    """Return the name to record a device under: h200 for "NVIDIA H200", cpu for a processor."""
    if device.type != "cuda":
        return "cpu"
    words = [w for w in full_name.lower().split() if w not in ("nvidia", "geforce", "tesla")]
    return "-".join(words[:2] if words[:1] == ["rtx"] else words[:1]) or "cuda"


def _require_same_tokenizer(target: ModelRef, draft: ModelRef) -> None:
    if target.tokenizer_sha256 != draft.tokenizer_sha256:
        raise CheckpointError(
            f"target and draft need one tokenizer, {target.name} has "
            f"{_short(target.tokenizer_sha256)} and {draft.name} {_short(draft.tokenizer_sha256)}; "
            "choose a draft made for this target"
        )


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
