"""The flags of stree-tune, each defined once and shared by the verbs that take it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stree_autotune.cli import completion
from stree_autotune.cli.verbs import print_version
from stree_autotune.store import command
from stree_core.errors import ConfigError
from stree_core.limits import MAX_BATCH_SIZE, MAX_CONTEXT, MAX_SEED
from stree_core.tree import MAX_NODES

if TYPE_CHECKING:
    from stree_core.profile import Sampling

DEFAULT_TARGET = "demo-target"
DEFAULT_DRAFT = "demo-draft"
DEFAULT_PROFILE = Path("stree-profile.yaml")
DEFAULT_BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64]
ANALYZED_BATCH_SIZES = [1, 8, 64]
DEFAULT_DATA_PATHS: list[Path] = []
NO_NAMES: list[str] = []
NO_LIBRARIES: list[str] = []

# tuning
Gpu = Annotated[
    str,
    typer.Option(
        "--gpu",
        metavar="NAME",
        autocompletion=completion.gpus,
        help="GPU by name: h100, h200, cpu, ...",
    ),
]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        metavar="NAME",
        autocompletion=completion.datasets,
        help="Dataset by name: demo, gsm8k, human_eval, mt_bench, ...",
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="NAME",
        show_default=DEFAULT_TARGET,
        autocompletion=completion.models,
        help="Target model: a name, a model folder, a config.json or a hub id.",
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="NAME",
        show_default="demo-draft for the demo target",
        autocompletion=completion.models,
        help="Draft: a model's name, folder or hub id; mtp is the target's own head.",
    ),
]
Drafts = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="NAME[,NAME]",
        show_default="demo-draft for the demo target",
        help="Draft model, as --target, or mtp, the target's own head; the best of several is "
        "taken, which stand between commas.",
    ),
]
Rules = Annotated[
    str,
    typer.Option(
        "--rule",
        metavar="RULE[,RULE]",
        show_default="greedy, mss at a temperature",
        help="greedy, naive or mss; the best of naive,mss is taken.",
    ),
]
Rule = Annotated[
    str,
    typer.Option(
        "--rule",
        metavar="RULE",
        show_default="greedy, mss at a temperature",
        help="greedy, naive or mss.",
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="Sampling temperature.")
]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="X", help="Nucleus of the sampling distribution.")
]
TopK = Annotated[
    int,
    typer.Option("--top-k", metavar="N", min=0, help="Likeliest tokens to sample from, 0 for all."),
]
MinP = Annotated[
    float,
    typer.Option("--min-p", metavar="X", help="Least share of the likeliest token's probability."),
]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", metavar="X", help="Above 1 against repetition.")
]
Context = Annotated[
    int,
    typer.Option(
        "--context",
        metavar="N",
        min=1,
        max=MAX_CONTEXT,
        help="Positions per sequence, prompt and output.",
    ),
]
BatchSizes = Annotated[
    list[int],
    typer.Option(
        "--batch-size", min=1, max=MAX_BATCH_SIZE, metavar="N", help="Active sequences; repeatable."
    ),
]
MaxNodes = Annotated[
    int,
    typer.Option(
        "--max-nodes", metavar="N", min=1, max=MAX_NODES, help="Most draft tokens of a tree."
    ),
]
MeasuredNodes = Annotated[
    int,
    typer.Option(
        "--max-nodes",
        metavar="N",
        min=1,
        max=MAX_NODES,
        show_default="64, fewer where fewer are measured",
        help="Most draft tokens of a tree.",
    ),
]
Data = Annotated[
    list[Path],
    typer.Option(
        "--data",
        metavar="DIR",
        show_default="./stree-data if it exists",
        help="Folder with own tables, traces and models, searched before what ships; repeatable.",
    ),
]
Libraries = Annotated[
    list[str],
    typer.Option(
        "--library",
        metavar="URL",
        help="Shared library, a path, an fsspec URL or hf://..., searched after own folders and "
        "before what ships; repeatable.",
    ),
]
AcceptanceFrom = Annotated[
    str,
    typer.Option(
        "--acceptance-from",
        metavar="TRACE",
        help="Borrow another pair's trace (name or path); marks the result as estimated.",
    ),
]
Measure = Annotated[
    bool,
    typer.Option("--measure", help="Measure trees live on this machine, and decide by that."),
]
Server = Annotated[
    str,
    typer.Option(
        "--server",
        metavar="NAME",
        help="Tune a server by what the verb import read of it: vllm or sglang.",
    ),
]
Rates = Annotated[
    str,
    typer.Option(
        "--rates",
        metavar="R[,R]",
        help="Shares of steps that keep at least 1, 2, ... draft tokens, in place of a trace.",
    ),
]
Smooth = Annotated[
    bool,
    typer.Option("--smooth", help="With --server: K never rises with the batch size."),
]
Prefer = Annotated[
    str,
    typer.Option(
        "--prefer",
        metavar="simple|fast",
        help="The simplest option that may be as fast as the fastest, or the fastest.",
    ),
]
Storage = Annotated[
    str,
    typer.Option(
        "--storage",
        metavar="FILE|URL",
        show_default="memory; with --measure a journal in the data folder",
        help="Keep trials in a journal file or a database, which many workers may share.",
    ),
]
Trials = Annotated[
    int,
    typer.Option(
        "--trials",
        metavar="N",
        min=0,
        show_default="24, with --measure 40",
        help="Trees that Optuna tries per batch size.",
    ),
]
MaxTokenMs = Annotated[
    float,
    typer.Option(
        "--max-token-ms",
        min=0,
        metavar="MS",
        show_default="no limit",
        help="Most time per output token of one sequence; rows say where it binds.",
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", min=0, max=MAX_SEED, help="Seed of every random choice."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Make the last line of stdout one JSON document.")
]
Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Show trees, certificates, reasons and how estimates are made, too."
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Profile to write; the default is replaced when it is a profile.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]

# running models
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda; auto takes a GPU.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="auto, bfloat16, float16, float32, float64; auto is bfloat16 on a GPU, else float32.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="auto, torch, triton; auto is triton on a GPU, else torch.",
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
]
ProfilePath = Annotated[
    Path, typer.Option("--profile", "-p", metavar="FILE", help="Profile to read: a path or a name.")
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="JSON lines with a prompt, question or turns field, or hub:OWNER/NAME[:CONFIG]:SPLIT.",
    ),
]
ProfileTarget = Annotated[
    str,
    typer.Option(
        "--target", metavar="NAME", show_default="the profile's name", help="Where the target lies."
    ),
]
ProfileDraft = Annotated[
    str,
    typer.Option(
        "--draft", metavar="NAME", show_default="the profile's name", help="Where the draft lies."
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        min=1,
        max=MAX_CONTEXT,
        help="Tokens after which a text ends.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", metavar="N", min=1, max=MAX_BATCH_SIZE, help="Sequences that run together."
    ),
]
Limit = Annotated[
    int,
    typer.Option("--limit", metavar="N", min=0, help="Prompts to take from the start, 0 for all."),
]


def pair_names(target: str, draft: str) -> tuple[str, str]:
    """Return the names of a pair, the demo's where none is given.

    Raises ConfigError for a target without its draft: the demo's is made for the demo target.
    """
    target = target or DEFAULT_TARGET
    if not draft and target != DEFAULT_TARGET:
        raise ConfigError(f"--target {target} needs its draft, got none; pass --draft as well")
    return target, draft or DEFAULT_DRAFT


def needs_gpu_and_dataset(what: str, gpu: str, dataset: str) -> ConfigError:
    """Return the error of a call without one of both; it proposes the call with an example's."""
    words = sys.argv[1:]
    words += [] if gpu else ["--gpu", "h100"]
    words += [] if dataset else ["--dataset", "gsm8k"]
    return ConfigError(
        f"{what} needs --gpu and --dataset, got {'one' if gpu or dataset else 'neither'}; for "
        f"example `{command(*words)}`"
    )


def left_open(ctx: typer.Context, **flags: str) -> frozenset[str]:
    """Return the keys of the flags, by their parameters, that the user did not type."""
    return frozenset(key for key, name in flags.items() if is_default(ctx, name))


def is_default(ctx: typer.Context, name: str) -> bool:
    """True when a parameter has its default, rather than what the user typed."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name.startswith("DEFAULT")


def typed_rates(text: str, *, measure: bool) -> tuple[float, ...]:
    """Return the shares of --rates, none without; raise ConfigError for others and with measuring.

    Live steps accept by a trace, which typed rates are not.
    """
    if not text:
        return ()
    from stree_autotune.trace import parse_rates

    if measure:
        raise ConfigError("--measure needs a trace to walk, got --rates; drop one of them")
    return parse_rates(text)


def preference(word: str) -> Literal["simple", "fast"]:
    """Return the word of --prefer; raise ConfigError for another."""
    if word == "simple":
        return "simple"
    if word == "fast":
        return "fast"
    raise ConfigError(f"--prefer is simple or fast, got {word!r}; pass one of them")


def search_path(data: list[Path], libraries: list[str]) -> tuple[Path, ...]:
    """Return the folders to search before what ships: own ones, then copies of the libraries."""
    if not libraries:
        return tuple(data)
    from stree_autotune.share import sync
    from stree_autotune.store import DEFAULT_DATA

    own = data or ([DEFAULT_DATA] if DEFAULT_DATA.is_dir() else [])
    return (*own, *map(sync, libraries))


def samplings(
    rules: str,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
) -> tuple[Sampling, ...]:
    """Return the setting of these flags for each rule between commas, one for none; see `sampling`.

    Raises ConfigError for a rule that is named twice.
    """
    names = rules.split(",")
    if len(set(names)) < len(names):
        raise ConfigError(f"--rule names different rules, got {rules!r}; list each once")
    others = (temperature, top_p, top_k, min_p, repetition_penalty)
    if len(names) > 1 and not all(names):
        raise ConfigError(f"--rule is greedy, naive or mss, got {rules!r}; pass one of them")
    return tuple(sampling(name, *others) for name in names)


def sampling(
    rule: str, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Sampling:  # fmt: skip
    """Return the setting of these flags; raise ConfigError when they do not fit each other."""
    rule = rule or ("mss" if temperature > 0 else "greedy")
    if rule not in ("greedy", "naive", "mss"):
        raise ConfigError(f"--rule is greedy, naive or mss, got {rule!r}; pass one of them")
    # help needs no schema, and pydantic takes longer to import than all else together
    from pydantic import ValidationError

    from stree_core.profile import Sampling

    try:
        return Sampling(
            rule=rule,  # type: ignore[arg-type]
            temperature=temperature,
            top_p=top_p,
            top_k=top_k or None,
            min_p=min_p or None,
            repetition_penalty=None if repetition_penalty == 1 else repetition_penalty,
        )
    except ValidationError as err:
        problem = err.errors()[0]
        where = "".join(f"--{str(part).replace('_', '-')}: " for part in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}{text}; change the flags") from err
