"""The verbs plan and import of stree-tune, and tuning with `--server`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stree_autotune.cli import flags
from stree_core.errors import ConfigError
from stree_core.shown_text import printable

if TYPE_CHECKING:
    from stree_autotune.server import ServerAcceptance, ServerRequest, ServerTable

logger = logging.getLogger(__name__)

NO_FILES: list[Path] = []
PLAN_SIZES = [1, 4, 16, 64]
WITHOUT_EFFECT = (
    "context", "max_nodes", "measure", "storage", "trials", "max_token_ms", "prefer", "top_k",
    "min_p", "repetition_penalty",
)  # fmt: skip
"""Parameters of tuning that choosing among a server's own runs has no use for."""

ServerFlag = Annotated[
    str, typer.Option("--server", metavar="NAME", help="The server that serves: vllm or sglang.")
]


def register_server_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to `app`."""
    app.command(epilog="Example: stree-tune plan --target ID --draft mtp --gpu h100 -o plan.sh")(
        plan
    )
    app.command(
        "import",
        epilog="Example: stree-tune import stree-plan/*.json stree-plan/*.prom --dataset mine",
    )(import_verb)


def plan(
    server: ServerFlag = "vllm",
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="NAME", help="Target as the server loads it: a folder or hub id."
        ),
    ] = "",
    draft: Annotated[
        str,
        typer.Option(
            "--draft",
            metavar="NAME",
            help="Draft model; mtp, eagle3:MODEL, ngram, suffix; none measures off alone.",
        ),
    ] = "mtp",
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="Name of the GPU, for the results.")
    ] = "",
    batch_size: Annotated[
        list[int],
        typer.Option("--batch-size", min=1, metavar="N", help="Requests at once; repeatable."),
    ] = PLAN_SIZES,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="FILE",
            show_default="random tokens",
            help="Your prompts, as the server's load generator reads them.",
        ),
    ] = "",
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE", show_default="stdout", help="File to write."
        ),
    ] = "",
    force: flags.Force = False,
) -> None:
    """Write a shell script that measures a server by K and concurrency with its own load."""
    from stree_autotune.server import Plan, plan_script
    from stree_core.files import require_place, write_atomically

    if not gpu:
        raise ConfigError("results are filed by GPU, none was named; pass --gpu, such as h100")
    sizes = tuple(sorted(set(batch_size)))
    made = Plan(server, target, draft, gpu, sizes, prompts=prompts)
    script = plan_script(made)
    if not output:
        sys.stdout.write(script)
        return
    path = Path(output)
    require_place(path)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; pass --force to replace it")
    write_atomically(path, script.encode())
    name = printable(output)
    sys.stdout.write(f"{name}: about {made.minutes():.0f} minutes; run it with `sh {name}`\n")


def import_verb(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Results, /metrics, /server_info, responses."),
    ],
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="GPU, where no file says it.")
    ] = "",
    dataset: Annotated[
        str, typer.Option("--dataset", metavar="NAME", help="Name for this kind of prompts.")
    ] = "",
    target: Annotated[
        str, typer.Option("--target", metavar="NAME", help="Target, where no file says it.")
    ] = "",
    draft: Annotated[
        str, typer.Option("--draft", metavar="NAME", help="Draft, where no file says it.")
    ] = "",
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    as_json: flags.AsJson = False,
    force: flags.Force = False,
) -> None:
    """Read what a server and its load generator wrote: step times, acceptance, warnings."""
    from stree_autotune.server import Names, acceptance_path, import_files, save, table_path
    from stree_autotune.store import data_folder

    found = import_files(files, Names(gpu=gpu, target=target, draft=draft, dataset=dataset))
    folder = data_folder(data)
    written: list[tuple[Path, ServerTable | ServerAcceptance]] = []
    if found.table is not None:
        written.append((table_path(folder, found.table.served), found.table))
    if found.acceptance is not None:
        accepted = found.acceptance
        written.append((acceptance_path(folder, accepted.served, accepted.dataset), accepted))
    for path, _ in written:
        if path.exists() and not force:
            raise ConfigError(f"{path} exists already; pass --force to replace it")
    for finding in found.findings:
        logger.warning("finding: %s", finding)
    for path, content in written:
        save(content, path)
        sys.stdout.write(f"wrote {printable(str(path))}\n  {content.derived}\n")
    if as_json:
        names = [str(path) for path, _ in written]
        sys.stdout.write(json.dumps({"files": names, "findings": found.findings}) + "\n")


def tune_on_server(ctx: typer.Context) -> None:
    """Tune as the flags of `stree-tune --server` say: profile, its print, what to measure next."""
    from stree_autotune.server import tune_server
    from stree_autotune.store import print_profile, print_profile_json, result_console
    from stree_core.profile import require_writable, save_profile

    output = ctx.params["output"]
    is_default = flags.is_default(ctx, "output")
    require_writable(output, force=ctx.params["force"], is_default=is_default)
    verdict = tune_server(_server_request(ctx))
    save_profile(verdict.profile, output)
    console = result_console()
    print_profile(verdict.profile, console, verbose=ctx.params["verbose"])
    console.print(f"to measure next: {verdict.next_step}")
    console.print(f"profile: {printable(str(output))}", soft_wrap=True)
    if ctx.params["as_json"]:
        print_profile_json(verdict.profile)


def _server_request(ctx: typer.Context) -> ServerRequest:
    """Return what was asked; batch sizes that nobody gave are the table's."""
    from stree_autotune.server import ServerRequest

    given = ctx.params
    if not given["server"]:
        raise ConfigError("--smooth belongs to --server NAME, it was not given; add it")
    for name in WITHOUT_EFFECT:
        if not flags.is_default(ctx, name):
            raise ConfigError(
                f"--server chooses among the chains that ran there, and --{name.replace('_', '-')} "
                "changes none of them; drop it"
            )
    is_open = flags.is_default(ctx, "batch_size")
    return ServerRequest(
        server=given["server"],
        gpu=given["gpu"],
        dataset=given["dataset"],
        target=given["target"],
        draft=given["draft"],
        sampling=flags.sampling(given["rule"], given["temperature"], given["top_p"]),
        batch_sizes=() if is_open else tuple(sorted(set(given["batch_size"]))),
        data=flags.search_path(given["data"], given["library"]),
        acceptance_from=given["acceptance_from"],
        rates=given["rates"],
        smooth=given["smooth"],
        seed=given["seed"],
    )
