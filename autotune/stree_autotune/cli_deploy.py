"""The verbs of stree-tune that take results elsewhere: export, push, pull, list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stree_autotune import cli_flags as flags


def register_deploy_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to `app`."""
    app.command(epilog="Example: stree-tune export stree-profile.yaml --to vllm")(export)


def export(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="Path or name.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="vllm, vllm-synthetic, sglang, sglang-adaptive, tensorrt-llm, choices (Medusa and "
            "EAGLE), sequoia, speculation-profile, aiconfigurator or dynamo.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE", show_default="stdout", help="File to write."
        ),
    ] = "",
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", min=0, help="The one batch size to serve, 0 for all of the profile."
        ),
    ] = 0,
    target: flags.ProfileTarget = "",
    draft: flags.ProfileDraft = "",
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    force: flags.Force = False,
) -> None:
    """Write a profile as the settings of a server; what a format cannot say is chosen anew."""
    from stree_autotune.deployment import Deployment
    from stree_autotune.export import run_export
    from stree_autotune.library import Library
    from stree_core.profile import load_profile

    library = Library.open(data)
    content = load_profile(library.find_profile(profile))
    target, draft = target or content.target.name, draft or content.draft.name
    deployment = Deployment(content, library, target, draft, batch_size)
    run_export(deployment, to, Path(output) if output else None, force=force)
