"""The command line `stree-tune`: one call per verb, results on stdout, the rest on stderr."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from stree_autotune.cli import completion, flags
from stree_autotune.cli.analyze import register_analyze
from stree_autotune.cli.deploy import register_deploy_verbs
from stree_autotune.cli.live import register_live_verbs
from stree_autotune.cli.report import register_report
from stree_autotune.cli.server import register_server_verbs, tune_on_server
from stree_autotune.cli.verbs import list_verbs, usage
from stree_autotune.store import command
from stree_core.errors import ConfigError, NoFeasibleTree, StreeError, os_sentence
from stree_core.shown_text import printable, shown

if TYPE_CHECKING:
    from stree_autotune.search import TuneRequest

logger = logging.getLogger(__name__)

EXIT_NO_RESULT = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 130

# typer keeps its copy of click in different places from version to version
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.mro()[1])

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(
    invoke_without_command=True,
    epilog="Example: stree-tune --gpu h100 --dataset gsm8k",
)
def tune_command(
    ctx: typer.Context,
    gpu: flags.Gpu = "",
    dataset: flags.Dataset = "",
    target: flags.Target = "",
    draft: flags.Drafts = "",
    rule: flags.Rules = "",
    temperature: flags.Temperature = 0.0,
    top_k: flags.TopK = 0,
    top_p: flags.TopP = 1.0,
    min_p: flags.MinP = 0.0,
    repetition_penalty: flags.RepetitionPenalty = 1.0,
    context: flags.Context = 1024,
    batch_size: flags.BatchSizes = flags.DEFAULT_BATCH_SIZES,
    max_nodes: flags.MeasuredNodes = 64,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    library: flags.Libraries = flags.NO_LIBRARIES,
    acceptance_from: flags.AcceptanceFrom = "",
    measure: flags.Measure = False,
    server: flags.Server = "",
    rates: flags.Rates = "",
    smooth: flags.Smooth = False,
    storage: flags.Storage = "",
    trials: flags.Trials = 0,
    max_token_ms: flags.MaxTokenMs = 0.0,
    prefer: flags.Prefer = "simple",
    seed: flags.Seed = 0,
    verbose: flags.Verbose = False,
    as_json: flags.AsJson = False,
    output: flags.Output = flags.DEFAULT_PROFILE,
    force: flags.Force = False,
    version: flags.Version = False,
) -> None:
    """Choose how to speculate, per batch size, from measured times and a recorded trace."""
    if ctx.invoked_subcommand is not None:
        _refuse_flags_before_verb(ctx)
        return
    if server or smooth:
        tune_on_server(ctx)
        return
    if not gpu or not (dataset or acceptance_from or rates):
        raise flags.needs_gpu_and_dataset("tuning", gpu, dataset or acceptance_from or rates)
    target, draft = flags.pair_names(target, draft)
    from stree_autotune.search import TuneRequest  # loads optuna and scipy
    from stree_autotune.store import data_folder

    samplings = flags.samplings(rule, temperature, top_p, top_k, min_p, repetition_penalty)
    request = TuneRequest(
        gpu=gpu,
        dataset=dataset,
        target=target,
        draft=draft,
        sampling=samplings[0],
        more_rules=samplings[1:],
        context=context,
        batch_sizes=tuple(sorted(set(batch_size))),
        max_nodes=max_nodes,
        data=flags.search_path(data, library),
        own_data=tuple(data),
        left_open=flags.left_open(ctx, batch_sizes="batch_size", max_nodes="max_nodes"),
        acceptance_from=acceptance_from,
        seed=seed,
        storage=storage,
        studies=data_folder(data) / "studies",
        num_trials=trials,
        max_token_ms=max_token_ms or math.inf,
        rates=flags.typed_rates(rates, measure=measure),
        prefer=flags.preference(prefer),
    )
    _tune(request, ctx)


def _tune(request: TuneRequest, ctx: typer.Context) -> None:
    """Tune, write the profile, print it; only measuring loads torch."""
    from stree_autotune.search import best_draft
    from stree_autotune.store import Working, print_profile, print_profile_json, result_console
    from stree_core.profile import require_writable, save_profile

    given = ctx.params
    output, is_default = given["output"], flags.is_default(ctx, "output")
    require_writable(output, force=given["force"], is_default=is_default)
    if given["measure"]:
        from stree_autotune.live import tune_live

        profile = best_draft(request, tune_live)
    else:
        from stree_autotune.search import tune

        with Working("searching trees for every batch size"):
            profile = best_draft(request, tune)
    save_profile(profile, output)
    console = result_console()
    print_profile(profile, console, verbose=given["verbose"])
    console.print(f"profile: {printable(str(output))}", soft_wrap=True)
    if given["as_json"]:
        print_profile_json(profile)


@app.command(epilog="Example: stree-tune show stree-profile.yaml")
def show(
    profiles: Annotated[
        list[str],
        typer.Argument(
            metavar="[PROFILE]...",
            autocompletion=completion.profiles,
            help="Paths or names; all shipped ones by default.",
        ),
    ] = flags.NO_NAMES,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    library: flags.Libraries = flags.NO_LIBRARIES,
    verbose: flags.Verbose = False,
    as_json: flags.AsJson = False,
) -> None:
    """Print profiles: verdicts, predictions, what is estimated, where the numbers come from."""
    from stree_autotune.store import Library, print_profile, print_profile_json, result_console
    from stree_core.profile import load_profile

    searched = Library.open(flags.search_path(data, library))
    paths = [searched.find_profile(name) for name in profiles] or searched.profile_paths()
    if not paths:
        raise ConfigError("no tuned profile is there; name a file, such as stree-profile.yaml")
    console = result_console()
    loaded = [load_profile(path) for path in paths]
    for index, profile in enumerate(loaded):
        if index:
            console.print()
        print_profile(profile, console, verbose=verbose)
    if as_json:
        print_profile_json(*loaded)


@app.command(epilog="Example: stree-tune certify demo-target--demo-draft--gsm8k--greedy")
def certify(
    traces: Annotated[list[str], typer.Argument(metavar="TRACE...", help="Paths or names.")],
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    as_json: flags.AsJson = False,
) -> None:
    """Bound what any static tree can reach on traces; `trace` does it for those it records."""
    from stree_autotune.search import certificate_path, certify_file, describe
    from stree_autotune.store import Library, Working
    from stree_core.files import require_place

    library = Library.open(data)
    found: dict[str, list[float]] = {}
    paths = [library.find_trace_file(name) for name in traces]
    for path in paths:
        require_place(certificate_path(path))
    for path in paths:
        with Working(f"bounding every tree on {printable(path.name)}"):
            certificate = certify_file(path, logger.info)
        sys.stdout.write(f"wrote {printable(str(certificate_path(path)))}\n")
        sys.stdout.write(f"{describe(certificate)}\n")
        found[str(certificate_path(path))] = list(certificate.most_tokens_per_step)
    if as_json:
        sys.stdout.write(json.dumps({"most_tokens_per_step": found}) + "\n")


register_live_verbs(app)
register_analyze(app)
register_deploy_verbs(app)
register_report(app)
register_server_verbs(app)

list_verbs(app)


def main() -> None:
    """Run the command line: expected failures are one line on stderr, exit code 1 or 2."""
    # the default looks through all objects after every 700 new ones, 5 % of a tuning
    gc.set_threshold(20_000)
    handler = _Stderr()
    handler.setFormatter(_ShownLines("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(prog_name="stree-tune", standalone_mode=False)
        sys.stdout.flush()
    except NoFeasibleTree as err:
        return _fail(str(err), EXIT_NO_RESULT)
    except StreeError as err:
        return _fail(str(err), EXIT_BAD_INPUT)
    except _UsageError as err:
        return _fail(usage(err.format_message()), EXIT_BAD_INPUT)
    except BrokenPipeError:
        # the reader of our output, such as head, has all that it wants
        _abandon_stdout()
        return EXIT_NO_RESULT
    except OSError as err:
        _abandon_stdout()
        return _fail(os_sentence(err), EXIT_BAD_INPUT)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped; what was finished is kept", EXIT_STOPPED)
    return code if isinstance(code, int) else 0


class _Stderr(logging.StreamHandler[TextIO]):
    """The stderr of the moment: while a spinner turns it is one that prints above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


class _ShownLines(logging.Formatter):
    """Lines without control characters and passwords, whatever file a name in them is from."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line as it may be shown."""
        return shown(super().format(record))


def _abandon_stdout() -> None:
    """Keep the interpreter from writing at its end what could not be written before."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {shown(' '.join(message.split()))}\n")
    return code


def _refuse_flags_before_verb(ctx: typer.Context) -> None:
    """Raise ConfigError for `stree-tune --gpu h200 probe`, which would drop the flag in silence."""
    given = [name for name in ctx.params if not flags.is_default(ctx, name)]
    if given:
        verb, words = str(ctx.invoked_subcommand), sys.argv[1:]
        place = words.index(verb)
        before, behind = words[:place], words[place + 1 :]
        whole, bare = [verb, *before, *behind], [verb, *behind]
        flag = "--" + given[0].replace("_", "-")
        raise ConfigError(
            f"flags stand behind their verb, got {flag} before {verb}; "
            f"write `{command(*(whole if _is_valid(whole) else bare))}`"
        )


def _is_valid(words: list[str]) -> bool:
    """True when the command line takes these words."""
    group = cast("Any", typer.main.get_command(app))
    verb = group.commands[words[0]]
    try:
        verb.make_context(words[0], words[1:])
    except _UsageError:
        return False
    return True
