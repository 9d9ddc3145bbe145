"""A profile in the formats of servers and simulators: the registry, and the verb's one call."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stree_autotune.export.compatibility import limit_notes, model_notes
from stree_autotune.export.deployment import Deployment, Exported
from stree_autotune.export.nvidia import (
    export_aiconfigurator,
    export_dynamo,
    export_speculation_profile,
)
from stree_autotune.export.served import times_notes
from stree_autotune.export.sglang import export_sglang, export_sglang_adaptive
from stree_autotune.export.tensorrt_llm import export_tensorrt_llm
from stree_autotune.export.trees import export_choices, export_sequoia
from stree_autotune.export.vllm import export_vllm, export_vllm_synthetic
from stree_autotune.store import is_path, say_note
from stree_core.errors import ConfigError, nearest
from stree_core.files import require_place, write_atomically

logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """An exporter, the models that its server loads by name, and whether it writes text."""

    export: Callable[[Deployment], Exported]
    loads: tuple[str, ...] = ()
    is_text: bool = True
    server: str = ""


FORMATS = {
    "vllm": Format(export_vllm, loads=("draft",), server="vllm"),
    "vllm-synthetic": Format(export_vllm_synthetic, loads=("draft",)),
    "sglang": Format(export_sglang, loads=("target", "draft"), server="sglang"),
    "sglang-adaptive": Format(export_sglang_adaptive, server="sglang"),
    "tensorrt-llm": Format(export_tensorrt_llm, loads=("draft",)),
    "choices": Format(export_choices),
    "sequoia": Format(export_sequoia, is_text=False),
    "speculation-profile": Format(export_speculation_profile),
    "aiconfigurator": Format(export_aiconfigurator),
    "dynamo": Format(export_dynamo),
}


def run_export(deployment: Deployment, name: str, output: Path | None, *, force: bool) -> None:
    """Write a profile in the format `name` to `output`, or to stdout; notes go to stderr.

    Raises ConfigError for an unknown format or a file that is in the way, NoFeasibleTree when there
    is nothing to set, MissingMeasurement when something must be judged without the sources.
    """
    if name not in FORMATS:
        raise ConfigError(f"--to names a format, got {name}; {nearest(name, FORMATS)}")
    chosen = FORMATS[name]
    if output is None and not chosen.is_text:
        raise ConfigError(f"{name} is a binary format; name a file with -o")
    if output is not None:
        require_place(output)
        if output.exists() and not force:
            raise ConfigError(f"{output} exists already; pass --force to replace it")
    exported = chosen.export(deployment)
    if deployment.profile.estimated:
        say_note(f"estimated: {deployment.title}")
    notes = (
        *_server_notes(deployment, chosen),
        *exported.notes,
        *_name_notes(deployment, chosen),
    )
    for note in notes:
        say_note(note)
    if output is None:
        sys.stdout.write(exported.content.decode())
    else:
        write_atomically(output, exported.content)
        logger.info("wrote %s", output)


def _server_notes(deployment: Deployment, chosen: Format) -> list[str]:
    """Say whose times these are, and what is known of the server with such a pair."""
    if not chosen.server:
        return []
    profile, largest = deployment.profile, max(row.batch_size for row in deployment.rows)
    names = (
        f"{profile.target.name} {deployment.target}",
        f"{profile.draft.name} {deployment.draft}",
    )
    return [
        *times_notes(profile, chosen.server),
        *model_notes(chosen.server, *names),
        *limit_notes(chosen.server, largest),
    ]


def _name_notes(deployment: Deployment, chosen: Format) -> list[str]:
    """Say which names are the profile's own, which no server knows."""
    names = {role: getattr(deployment, role) for role in chosen.loads}
    return [
        f"{name} is the profile's name of the {role}; pass --{role} with its folder or hub id"
        for role, name in names.items()
        if not is_path(name) and (role != "draft" or deployment.drafts_with_model)
    ]
