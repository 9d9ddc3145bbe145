"""The verb `report` of stree-tune; what draws loads inside it alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from stree_autotune.cli import completion, flags
from stree_core.errors import ConfigError
from stree_core.shown_text import printable

DEFAULT_REPORT = Path("report.html")


def register_report(app: typer.Typer) -> None:
    """Add the verb of this module to `app`."""
    app.command(epilog="Example: stree-tune report stree-profile.yaml -o report.html")(report)


def report(
    profiles: Annotated[
        list[str],
        typer.Argument(
            metavar="PROFILE...",
            autocompletion=completion.profiles,
            help="Profiles by path or name.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Page to write."),
    ] = DEFAULT_REPORT,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    library: flags.Libraries = flags.NO_LIBRARIES,
    as_json: flags.AsJson = False,
    force: flags.Force = False,
) -> None:
    """Write one HTML page of profiles: verdict, figures, sources; it needs no network."""
    from stree_autotune.report import is_report, write_report
    from stree_autotune.store import Library, Working
    from stree_core.files import require_place

    require_place(output)
    if output.exists() and not force and not is_report(output):
        raise ConfigError(f"{output} exists and is no stree report; pass --force or another -o")
    searched = Library.open(flags.search_path(data, library))
    paths = [searched.find_profile(name) for name in profiles]
    with Working("searching again and drawing"):
        sections = write_report(paths, searched, output)
    for section in sections:
        sys.stdout.write(f"{printable(section.file_name)}: {section.verdicts.headline}\n")
        for sentence in section.missing:
            sys.stdout.write(f"  left out: {sentence}\n")
    sys.stdout.write(f"report: {printable(str(output))}\n")
    if as_json:
        content = [
            {
                "profile": section.file_name,
                "headline": section.verdicts.headline,
                "estimated": section.profile.estimated,
                "figures": [figure.key for figure in section.figures],
                "missing": list(section.missing),
            }
            for section in sections
        ]
        sys.stdout.write(json.dumps({"report": str(output), "profiles": content}) + "\n")
