"""Where GPU specs, runtime tables, traces, profiles and models are found, by name.

Every root holds gpus/, shapes/, runtime/, traces/, tuned/ and models/. The folders given with
`--data` come first (./stree-data when none is given and it exists), then the copies of libraries
(see share.py), what ships with the package last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from stree_autotune.store.advice import KNOWN_DATASETS, PairWords, probe_command, trace_command
from stree_autotune.store.gpu_spec import GpuSpec, load_gpu_spec
from stree_autotune.store.runtime_table import runtime_file_name
from stree_core.errors import ConfigError, MissingMeasurement, nearest
from stree_core.families import find_shape_spec
from stree_core.fp8 import Fp8Kind
from stree_core.models import (
    MTP,
    ModelSource,
    config_source,
    folder_source,
    hub_config_source,
    is_hub_id,
    spec_source,
)
from stree_core.profile import ModelRef
from stree_core.shipped import shipped_root as shipped_root

DEFAULT_DATA = Path("stree-data")
CONFIG = "config.json"
SEPARATOR = "--"
GREEDY = "greedy"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True, slots=True)
class RuntimeSource:
    """A runtime table's file, the asked GPU's spec, and that of the GPU it was measured on.

    `wanted` is None for a GPU without a spec, `measured` where that is the GPU asked for.
    """

    path: Path
    measured: GpuSpec | None = None
    wanted: GpuSpec | None = None

    @property
    def is_exact(self) -> bool:
        """True when the table was measured on the GPU that was asked for."""
        return self.measured is None


@dataclass(frozen=True, slots=True)
class Library:
    """The roots, in the order in which they are searched."""

    roots: tuple[Path, ...]

    @classmethod
    def open(cls, data: Sequence[Path] = (), *, missing_ok: bool = False) -> Library:
        """Return the library over `data` and what ships.

        Raises ConfigError for a missing folder, unless it is about to be written (`missing_ok`).
        """
        for folder in data:
            if not folder.is_dir() and not missing_ok:
                raise ConfigError(f"--data names an existing folder, got {folder}; check the path")
        own = tuple(data) or ((DEFAULT_DATA,) if DEFAULT_DATA.is_dir() else ())
        return cls((*own, shipped_root()))

    def label(self, path: Path) -> str:
        """Return a file's name inside its root, which is the same on every machine."""
        for root in self.roots:
            if path.is_relative_to(root):
                return path.relative_to(root).as_posix()
        return path.name

    def gpu_names(self) -> set[str]:
        """Return every GPU with a spec or a table, and `cpu`."""
        measured = {parts[0] for parts in self._parts("runtime", "yaml", 3)}
        return {"cpu"} | measured | {path.stem for path in self._files("gpus", "yaml")}

    def dataset_names(self) -> set[str]:
        """Return every dataset with a trace, and those that `stree-tune trace` can fetch."""
        return {parts[2] for parts in self._parts("traces", "safetensors", 4)} | set(KNOWN_DATASETS)

    def model_names(self) -> set[str]:
        """Return every model with a folder, a shape spec, a table or a trace."""
        names = {path.parent.name for path in self._files("models/*", "json")}
        names |= {path.stem for path in self._files("shapes", "yaml")}
        for parts in self._parts("runtime", "yaml", 3):
            names |= set(parts[1:])
        for parts in self._parts("traces", "safetensors", 4):
            names |= set(parts[:2])
        return names

    def profile_paths(self) -> list[Path]:
        """Return the tuned profiles, by name."""
        return sorted(self._files("tuned", "yaml"), key=lambda path: path.name)

    def gpu_spec(self, gpu: str) -> GpuSpec | None:
        """Return a GPU's spec; `cpu` and GPUs that only have tables have none."""
        path = self._first(f"gpus/{gpu}.yaml")
        return None if path is None else load_gpu_spec(path)

    def find_runtime(self, gpu: str, target: str, draft: str, command: str = "") -> RuntimeSource:
        """Return the pair's table for `gpu`, else the most alike GPU's to estimate from.

        `command` records one, in the user's words; without it the names are taken.
        Raises ConfigError for an unknown GPU, MissingMeasurement when nothing fits.
        """
        command = command or probe_command(gpu, PairWords(target, draft))
        known(gpu, self.gpu_names(), "GPU", f"or measure a new one with `{command}`")
        exact, wanted = self.measured_runtime(gpu, target, draft), self.gpu_spec(gpu)
        if exact is not None:
            return RuntimeSource(exact, wanted=wanted)
        found = []
        for other in sorted(self.gpu_names() - {gpu}):
            path = self.measured_runtime(other, target, draft)
            spec = self.gpu_spec(other) if path and wanted else None
            if path and spec and wanted:
                source = RuntimeSource(path, spec, wanted)
                found.append((wanted.likeness(spec), other, source))
        if found:
            return min(found, key=lambda each: each[:2])[2]
        raise MissingMeasurement(
            f"no runtime table of {target} with {draft} is there for {gpu} or another GPU to "
            f"estimate from; record one on that machine with `{command}`"
        )

    def runtime_paths(self, gpu: str, target: str = "") -> list[Path]:
        """Return all tables of a GPU, or those of one target on it."""
        paths = self._files("runtime", "yaml")
        start = SEPARATOR.join((gpu, target, "") if target else (gpu, ""))
        return [path for path in paths if path.name.startswith(start)]

    def measured_runtime(self, gpu: str, target: str, draft: str) -> Path | None:
        """Return the pair's table measured on `gpu` itself, None when there is none."""
        return self._first(f"runtime/{runtime_file_name(gpu, target, draft)}")

    def find_trace(
        self, target: str, draft: str, dataset: str, label: str = GREEDY, command: str = ""
    ) -> Path:
        """Return the pair's trace on `dataset` with the sampling setting of a label.

        `command` records one, in the user's words; without it the names are taken.
        Raises ConfigError for an unknown dataset, MissingMeasurement when there is no trace.
        """
        command = command or trace_command(PairWords(target, draft), dataset)
        known(dataset, self.dataset_names(), "dataset", f"or record it with `{command}`")
        path = self._first(f"traces/{trace_file_name(target, draft, dataset, label)}")
        if path is None:
            raise MissingMeasurement(
                f"no trace of {target} with {draft} on {dataset} is there; record it with "
                f"`{command}` or borrow one with --acceptance-from"
            )
        return path

    def find_trace_file(self, name: str) -> Path:
        """Return a trace by path or by file name (with or without suffix); else ConfigError."""
        if Path(name).is_file():
            return Path(name)
        stem = name.removesuffix(".safetensors")
        path = self._first(f"traces/{stem}.safetensors") if _NAME.fullmatch(stem) else None
        if path is None:
            names = {path.stem for path in self._files("traces", "safetensors")}
            raise ConfigError(
                f"a trace is named by its path or file name, got {name}; {nearest(name, names)}"
            )
        return path

    def find_profile(self, name: str) -> Path:
        """Return a profile by path or by the name of a tuned one; else ConfigError."""
        stem = name.removesuffix(".yaml")
        path = self._first(f"tuned/{stem}.yaml") if _NAME.fullmatch(stem) else None
        if Path(name).is_file() or path is None:
            path = Path(name)
        if not path.is_file():
            names = [path.stem for path in self.profile_paths()]
            raise ConfigError(f"no profile {name} is there; {nearest(name, names)}")
        return path

    def find_model(self, name: str) -> Path:
        """Return a model's folder by its path or by its name; else ConfigError."""
        if not is_path(name):
            config = self._first(f"models/{check_name(name, 'model')}/config.json")
            if config is not None:
                return config.parent
        if (Path(name) / "config.json").is_file():
            return Path(name)
        names = {path.parent.name for path in self._files("models/*", "json")}
        raise ConfigError(
            f"a model is a folder with config.json, a Hugging Face id or a shipped name, got "
            f"{name}; name another with --target or --draft; {nearest(name, names)}"
        )

    def find_shape(self, name: str) -> Path:
        """Return a shape spec by its name; else ConfigError."""
        path = find_shape_spec(self.roots, name)
        if path is None:
            names = {path.stem for path in self._files("shapes", "yaml")}
            raise ConfigError(f"{name} is no known shape; {nearest(name, names)}")
        return path

    def find_shape_and_weights(self, name: str) -> tuple[Path, Fp8Kind | None]:
        """Return a shape spec by its name, or by that with the ending of weights in FP8.

        Raises ConfigError for another name.
        """
        for kind in get_args(Fp8Kind):
            if name.endswith(f"-{kind}") and find_shape_spec(self.roots, name) is None:
                return self.find_shape(name.removesuffix(f"-{kind}")), kind
        return self.find_shape(name), None

    def model_name(self, name: str) -> str:
        """Return the name that a model's files go by; a folder or id goes by its last part.

        A target's own head goes by `mtp`, a config by its file's name or its folder's.

        Raises ConfigError for a name that no folder, shape spec, table or trace has.
        """
        if name == MTP:
            return name
        if Path(name).is_file():
            path = Path(name).resolve()
            return check_name(path.parent.name if path.name == CONFIG else path.stem, "model")
        if is_hub_id(name) and not Path(name).exists():
            return check_name(name.split("/")[1], "model")
        if is_path(name) or (name not in self.model_names() and Path(name).is_dir()):
            return check_name(self.find_model(name).resolve().name, "model folder")
        if not self._is_shape(name):
            known(name, self.model_names(), "model", "or give its folder")
        return name

    def find_source(self, name: str) -> ModelSource | None:
        """Return what a model's files say now, None when they are not on this machine."""
        try:
            folder = self.find_model(name)
        except ConfigError:
            return None
        return folder_source(folder, self.model_name(name))

    def find_described(self, name: str) -> ModelSource:
        """Return what is known of a model without its weights.

        A config.json or its folder, a shipped model, a shape spec's name, or a Hugging Face id.
        Raises ConfigError when there is none, CheckpointError when it cannot be used.
        """
        if Path(name).is_file() or (is_path(name) and (Path(name) / CONFIG).is_file()):
            return config_source(Path(name))
        if not is_path(name):
            known_folder = self._first(f"models/{check_name(name, 'model')}/{CONFIG}")
            if known_folder is None and self._is_shape(name):
                return spec_source(*self.find_shape_and_weights(name))
        elif is_hub_id(name):
            return hub_config_source(name)
        return config_source(self.find_model(name))

    def _is_shape(self, name: str) -> bool:
        """True for a shape spec's name, also with the ending of weights in FP8."""
        endings = ("", *(f"-{kind}" for kind in get_args(Fp8Kind)))
        names = (name.removesuffix(ending) for ending in endings)
        return any(find_shape_spec(self.roots, each) is not None for each in names)

    def _first(self, name: str) -> Path | None:
        paths = (root / name for root in self.roots)
        return next((path for path in paths if path.is_file()), None)

    def _files(self, folder: str, suffix: str) -> list[Path]:
        return [path for root in self.roots for path in sorted(root.glob(f"{folder}/*.{suffix}"))]

    def _parts(self, folder: str, suffix: str, count: int) -> list[list[str]]:
        """Return the parts of every well-formed file name."""
        split = (path.stem.split(SEPARATOR) for path in self._files(folder, suffix))
        return [parts for parts in split if len(parts) == count]


def trace_file_name(target: str, draft: str, dataset: str, label: str = GREEDY) -> str:
    """Return the file name of a trace with a sampling setting, see Sampling.label."""
    return f"{SEPARATOR.join((target, draft, dataset, label))}.safetensors"


def require_same_model(
    first: ModelRef, second: ModelRef, first_file: str, second_file: str, remedy: str
) -> None:
    """Raise ConfigError unless two files speak of one model; what both know of it counts."""
    kind = ("weights in", first.weights or "no FP8", second.weights or "no FP8")
    config = ("config", first.config_sha256[:12], second.config_sha256[:12])
    for part in (kind, config, ("weights", *first.weights_beside(second))):
        _require_equal(first, second, part, f"{first_file} and {second_file}", remedy)


def require_same_shape(
    first: ModelRef, second: ModelRef, first_file: str, second_file: str, remedy: str
) -> None:
    """Raise ConfigError unless two models of one name take the same time; tokenizers count too.

    Files that know no shape are compared by their configs.
    """
    weights = ("weights in", first.weights or "no FP8", second.weights or "no FP8")
    _require_equal(first, second, weights, f"{first_file} and {second_file}", remedy)
    part = ("config", first.config_sha256[:12], second.config_sha256[:12])
    if first.shape_sha256 and second.shape_sha256:
        part = ("shape", first.shape_sha256[:12], second.shape_sha256[:12])
    _require_equal(first, second, part, f"{first_file} and {second_file}", remedy)


def _require_equal(
    first: ModelRef, second: ModelRef, part: tuple[str, str, str], files: str, remedy: str
) -> None:
    parts = [("name", first.name, second.name), part]
    if first.tokenizer_sha256 and second.tokenizer_sha256:
        parts.append(("tokenizer", first.tokenizer_sha256[:12], second.tokenizer_sha256[:12]))
    for what, one, other in parts:
        if one != other:
            raise ConfigError(
                f"{files} must be of the same {first.name}, got {what} {one} and {other}; {remedy}"
            )


def data_folder(data: Sequence[Path]) -> Path:
    """Return the folder that probe and trace write to: the first of `--data`, else the default."""
    return data[0] if data else DEFAULT_DATA


def is_path(name: str) -> bool:
    """True when a model is given by its folder rather than by name."""
    return "/" in name or "\\" in name or name in (".", "..")


def check_name(name: str, kind: str) -> str:
    """Return `name`; raise ConfigError when it could not be a part of a file name."""
    if not _NAME.fullmatch(name) or SEPARATOR in name or ".." in name:
        raise ConfigError(
            f"a {kind} name has letters, digits and single . _ + - only, got {name!r}; rename it"
        )
    return name


def known(name: str, names: Iterable[str], kind: str, remedy: str) -> None:
    """Raise ConfigError, offering the nearest, unless `name` is one of `names`."""
    options = set(names)
    if check_name(name, kind) not in options:
        raise ConfigError(f"{name} is no known {kind}; {nearest(name, options)} {remedy}")


def profile_model_name(name: str) -> str:
    """Return the name of a model in a profile; raise ConfigError for a path or a hub id."""
    if is_path(name):
        raise ConfigError(
            f"a profile names its models by plain names, this one by {name!r}; pass --target and "
            "--draft with the folders or hub ids that you trust"
        )
    return name
