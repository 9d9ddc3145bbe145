"""A target and its draft, loaded together, and whether a profile is about them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from stree_core.drafting.checkpoint import load_head, load_model
from stree_core.drafting.draft import Draft, ModelDraft
from stree_core.errors import CheckpointError, ConfigError
from stree_core.models import (
    Backend,
    Chat,
    Model,
    ModelSource,
    TextCodec,
    head_source,
    load_backend,
    load_text_codec,
    resolve_backend,
    resolve_device,
    resolve_dtype,
)
from stree_core.profile import ModelRef, Profile


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where and how to run: names as on the command line, "auto" resolved by the machine."""

    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"


@dataclass(frozen=True, slots=True)
class Pair:
    """A target and its draft with one tokenizer; `codec` is None where there is none to read."""

    target: Model
    draft: Draft
    target_source: ModelSource
    draft_source: ModelSource
    codec: TextCodec | None

    @property
    def target_ref(self) -> ModelRef:
        """What files keep of the target."""
        return self.target_source.ref

    @property
    def draft_ref(self) -> ModelRef:
        """What files keep of the draft."""
        return self.draft_source.ref

    @property
    def device(self) -> torch.device:
        """The device that both run on."""
        return self.target.device

    def encode(self, prompts: list[str], *, chat: bool = False) -> list[list[int]]:
        """Return the token ids of prompts, with `chat` each as a user's turn of the chat template.

        Raises ConfigError on a prompt without text, CheckpointError without tokenizer or template.
        """
        for number, prompt in enumerate(prompts, start=1):
            if not prompt.strip():
                raise ConfigError(f"prompt {number} must hold some text, it is empty; write it")
        if chat:
            return self.encode_chats([Chat.of_user(prompt) for prompt in prompts])
        return self._known_codec().encode(prompts)

    def encode_chats(self, chats: list[Chat]) -> list[list[int]]:
        """Return the token ids of conversations; raises as `encode` does."""
        return self._known_codec().encode_chats(chats)

    def _known_codec(self) -> TextCodec:
        if self.codec is None:
            raise CheckpointError(
                f"{self.target_ref.name} needs tokenizer.json to read prompts, it has none; add it"
            )
        return self.codec

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        assert self.codec is not None
        return self.codec.decode(tokens)


def load_single(source: ModelSource, runtime: Runtime) -> Model:
    """Load one model alone; raise CheckpointError or NotEnoughMemory when it cannot be."""
    return load_model(source, *_resolved(runtime))


def load_pair(target: ModelSource, draft: ModelSource, runtime: Runtime) -> Pair:
    """Load two models onto one device; the draft scores the target's tokens only.

    Raises CheckpointError when they do not share a tokenizer, it has ids beyond the target's
    embedding, or the draft lacks tokens.
    """
    _require_same_tokenizer(target.ref, draft.ref)
    num_tokens, num_known = target.shape.vocab_size, draft.shape.vocab_size
    # Vocabularies are padded to round sizes, so those of one tokenizer may differ.
    if num_known < num_tokens:
        raise CheckpointError(
            f"a draft needs the target's whole vocabulary, {target.name} has {num_tokens} tokens "
            f"and {draft.name} {num_known}; choose a draft made for this target"
        )
    where = _resolved(runtime)
    codec = _codec(target)
    model = load_model(target, *where)
    drafting = ModelDraft(load_model(draft, *where, num_logits=num_tokens))
    return Pair(model, drafting, target, draft, codec)


def load_with_head(target: ModelSource, runtime: Runtime) -> Pair:
    """Load a model and the MTP head in its checkpoint, which drafts for it.

    Raises CheckpointError when it has none.
    """
    head, codec = head_source(target), _codec(target)
    model = load_model(target, *_resolved(runtime))
    return Pair(model, load_head(head, model, target.name), target, head, codec)


def _codec(source: ModelSource) -> TextCodec | None:
    if source.folder is None or source.ref.tokenizer_sha256 is None:
        return None
    return load_text_codec(source.folder, source.name, source.shape.vocab_size)


def _resolved(runtime: Runtime) -> tuple[Backend, torch.dtype, torch.device]:
    device = resolve_device(runtime.device)
    backend = load_backend(resolve_backend(runtime.backend, device), device)
    return backend, resolve_dtype(runtime.dtype, device), device


def require_profile_fits(profile: Profile, pair: Pair) -> None:
    """Raise ConfigError when the profile was made for another target, draft or tokenizer.

    Weights count where the profile knows them.
    """
    checks = (("target", profile.target, pair.target_ref), ("draft", profile.draft, pair.draft_ref))
    for role, expected, actual in checks:
        parts = (
            ("weights in", expected.weights or "no FP8", actual.weights or "no FP8"),
            ("config", _short(expected.config_sha256), _short(actual.config_sha256)),
            ("tokenizer", _short(expected.tokenizer_sha256), _short(actual.tokenizer_sha256)),
            ("name", expected.name, actual.name),
            ("weights", *expected.weights_beside(actual)),
        )
        for part, mine, theirs in parts:
            if mine != theirs:
                raise ConfigError(
                    f"the profile is for {role} {expected.name} with {part} {mine}, but "
                    f"{actual.name} has {theirs}; use the model it was tuned for or tune again"
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
