"""The verbs of stree-tune that take results elsewhere: export, push, pull, list."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stree_autotune.cli import flags
from stree_core.shown_text import clean_url, printable

LibraryUrl = Annotated[
    str, typer.Argument(metavar="URL", help="A path, an fsspec URL or hf://REPOSITORY.")
]


def register_deploy_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to `app`."""
    app.command(epilog="Example: stree-tune export stree-profile.yaml --to vllm")(export)
    app.command(epilog="Example: stree-tune push hf://datasets/me/trees stree-profile.yaml")(push)
    app.command(epilog="Example: stree-tune pull https://example.org/trees 'h200--*'")(pull)
    app.command("list", epilog="Example: stree-tune list --library /mnt/trees")(list_files)


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
            "--batch-size",
            metavar="N",
            min=0,
            help="The one batch size to serve, 0 for all of the profile.",
        ),
    ] = 0,
    target: flags.ProfileTarget = "",
    draft: flags.ProfileDraft = "",
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    library: flags.Libraries = flags.NO_LIBRARIES,
    force: flags.Force = False,
) -> None:
    """Write a profile as the settings of a server; what a format cannot say is chosen anew."""
    from stree_autotune.export import deployment_of, run_export
    from stree_autotune.store import Library, profile_model_name
    from stree_core.profile import load_profile

    searched = Library.open(flags.search_path(data, library))
    content = load_profile(searched.find_profile(profile))
    target = target or profile_model_name(content.target.name)
    draft = draft or profile_model_name(content.draft.name)
    deployment = deployment_of(content, searched, target, draft, batch_size)
    run_export(deployment, to, Path(output) if output else None, force=force)


def push(
    url: LibraryUrl,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[FILE]...",
            help="Profiles (by path or name), tables, traces; all of the data folder by default.",
        ),
    ] = flags.NO_NAMES,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    as_json: flags.AsJson = False,
    force: flags.Force = False,
) -> None:
    """Copy results to a shared library; a profile takes its table and its trace along."""
    from stree_autotune.share import named_files, own_files, push as push_files
    from stree_autotune.store import Library, Working, data_folder

    library = Library.open(data)
    folders = data or [data_folder(data)]
    with Working(f"copying to {clean_url(url)}"):
        files = named_files(names, library) if names else own_files(folders, library)
        new = push_files(url, files, force=force)
    lines = [*(f"pushed {path}" for path in new), f"{len(new)} of {len(files)} files were new"]
    _report(lines, {"url": clean_url(url), "pushed": new, "files": sorted(files)}, as_json=as_json)


def pull(
    url: LibraryUrl,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME]...", help="Names, which may have wildcards; everything by default."
        ),
    ] = flags.NO_NAMES,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    as_json: flags.AsJson = False,
    force: flags.Force = False,
) -> None:
    """Copy files of a shared library to the data folder; a profile brings its sources along."""
    from stree_autotune.share import pull as pull_files
    from stree_autotune.store import Working, data_folder

    folder = data_folder(data)
    with Working(f"copying from {clean_url(url)}"):
        paths = pull_files(url, folder, names, force=force)
    lines = [printable(str(folder / path)) for path in paths]
    _report(lines, {"url": clean_url(url), "folder": str(folder), "files": paths}, as_json=as_json)


def list_files(
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    library: flags.Libraries = flags.NO_LIBRARIES,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="Print the models whose shapes are known instead.")
    ] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Print which profiles, tables and traces are there, and how old they are."""
    from dataclasses import asdict

    from stree_autotune.cli.listing import list_rows, print_rows, print_shapes, shape_rows
    from stree_autotune.store import Library, Working, result_console

    with Working("reading what is there"):
        found = Library.open(flags.search_path(data, library))
        rows: list[Any] = shape_rows(found) if shapes else list_rows(found)
    if shapes:
        print_shapes(rows, result_console())
    else:
        print_rows(rows, result_console())
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows]) + "\n")


def _report(lines: list[str], summary: dict[str, object], *, as_json: bool) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
