"""The verbs of stree-tune that run models; torch is imported inside them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stree_autotune.cli import flags
from stree_core.errors import ConfigError

LOADING = "loading torch"
Weights = Annotated[
    Literal["bf16", "fp8", "fp8-block", "fp8-tensor", "fp8-channel"],
    typer.Option(
        "--weights", help="How the target of --shapes is stored; fp8 is by blocks of 128 x 128."
    ),
]


def register_live_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to `app`."""
    app.command(epilog="Example: stree-tune probe --shapes granite-4-h-1b --batch-size 1")(probe)
    app.command(epilog="Example: stree-tune trace --dataset demo --limit 64")(trace)
    app.command(epilog="Example: stree-tune validate --limit 16")(validate)
    app.command(epilog='Example: stree-tune decode --prompt "Tom has 3 apples."')(decode)


def probe(
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu", metavar="NAME", show_default="from the device", help="Name to record under."
        ),
    ] = "",
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="NAME", show_default="demo-target", help="Name, folder or hub id."
        ),
    ] = "",
    draft: Annotated[
        str,
        typer.Option(
            "--draft",
            metavar="NAME",
            show_default="none with a target of your own, which is then timed alone",
            help="Name, folder or hub id; mtp is the target's own head.",
        ),
    ] = "",
    shapes: Annotated[
        str,
        typer.Option(
            "--shapes",
            metavar="TARGET[,DRAFT]",
            help="Time shipped shapes with random weights, a pair or one alone.",
        ),
    ] = "",
    weights: Weights = "bf16",
    context: flags.Context = 1024,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    batch_size: flags.BatchSizes = flags.DEFAULT_BATCH_SIZES,
    max_nodes: flags.MaxNodes = 64,
    effort: Annotated[
        Literal["quick", "full"], typer.Option("--effort", help="How many whole steps and repeats.")
    ] = "full",
    backend: flags.Backend = "auto",
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    as_json: flags.AsJson = False,
    force: flags.Force = False,
) -> None:
    """Measure what passes and steps cost here; of a pair, writes a runtime table."""
    names = _probed_names(target, draft, shapes)
    if weights != "bf16":
        names = (_in_fp8(names[0], weights, shapes), names[1])
    from stree_autotune.store import PairRequest, Working

    with Working(LOADING):
        from stree_autotune.probe import ProbeConfig, run_model_probe, run_probe
        from stree_core.drafting import Runtime
    config = ProbeConfig(
        gpu=gpu,
        context=context,
        batch_sizes=tuple(sorted(set(batch_size))),
        max_nodes=max_nodes,
        effort=effort,
        few_steps=effort == "quick",
    )
    runtime = Runtime(device, dtype, backend)
    request = PairRequest(*names, tuple(data), runtime, shapes=bool(shapes))
    if request.draft:
        run_probe(request, config, as_json=as_json, force=force)
    else:
        run_model_probe(request, config, as_json=as_json)


def _in_fp8(target: str, weights: str, shapes: str) -> str:
    """Return the name of a shape with weights in FP8."""
    if not shapes:
        raise ConfigError(
            f"--weights {weights} draws random weights and needs --shapes; a checkpoint in FP8 "
            "is a --target without it"
        )
    return f"{target}-{'fp8-block' if weights == 'fp8' else weights}"


def _probed_names(target: str, draft: str, shapes: str) -> tuple[str, str]:
    """Return the names of the target and the draft, the latter empty for the target alone."""
    if not shapes:
        if draft and not target:
            raise ConfigError(f"--draft {draft} needs its target; pass --target as well")
        return (target, draft) if target else (flags.DEFAULT_TARGET, flags.DEFAULT_DRAFT)
    from stree_core.models import MTP

    if target or draft not in ("", MTP):
        raise ConfigError(
            f"--shapes stands in place of --target and --draft, except --draft {MTP}; pass one or "
            "the other"
        )
    names = [*shapes.split(","), *([draft] if draft else [])]
    if len(names) > 2 or not all(names):
        raise ConfigError(f"--shapes names a target, or a target and a draft, got {shapes!r}")
    return names[0], names[1] if len(names) == 2 else ""


def trace(
    dataset: flags.Dataset,
    prompts: flags.Prompts = "",
    target: flags.Target = "",
    draft: flags.Draft = "",
    num_children: Annotated[
        int,
        typer.Option(
            "--num-children", metavar="N", min=1, max=64, help="Children recorded per position."
        ),
    ] = 16,
    depths: Annotated[
        int,
        typer.Option(
            "--depths", metavar="N", min=2, max=64, help="Levels recorded of a draft such as mtp."
        ),
    ] = 8,
    max_new_tokens: flags.MaxNewTokens = 256,
    limit: flags.Limit = 0,
    rows: Annotated[
        str,
        typer.Option("--rows", metavar="A:B", help="Rows A up to before B, counted from 0."),
    ] = "",
    batch_size: flags.BatchSize = 16,
    rule: flags.Rule = "",
    temperature: flags.Temperature = 0.0,
    top_k: flags.TopK = 0,
    top_p: flags.TopP = 1.0,
    min_p: flags.MinP = 0.0,
    repetition_penalty: flags.RepetitionPenalty = 1.0,
    chat: flags.Chat = False,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    backend: flags.Backend = "auto",
    seed: flags.Seed = 0,
    as_json: flags.AsJson = False,
    force: flags.Force = False,
) -> None:
    """Record which of the draft's children the target takes, position by position."""
    from stree_autotune.store import PairRequest, Working, open_prompts, parse_rows

    with Working(LOADING):
        from stree_autotune.cli.trace import run_trace
        from stree_autotune.trace import RecordConfig
        from stree_core.drafting import Runtime
    target, draft = flags.pair_names(target, draft)
    which = parse_rows(rows) if rows else slice(None)
    chosen = open_prompts(dataset, prompts, tuple(data), rows=which, limit=limit or None)
    config = RecordConfig(
        dataset=dataset,
        sampling=flags.sampling(rule, temperature, top_p, top_k, min_p, repetition_penalty),
        num_children=num_children,
        max_new_tokens=max_new_tokens,
        num_slots=batch_size,
        seed=seed,
        chat=chat,
        depths=depths,
    )
    request = PairRequest(target, draft, tuple(data), Runtime(device, dtype, backend))
    run_trace(request, config, prompts=chosen, as_json=as_json, force=force)


def validate(
    profile: flags.ProfilePath = flags.DEFAULT_PROFILE,
    target: flags.ProfileTarget = "",
    draft: flags.ProfileDraft = "",
    prompts: flags.Prompts = "",
    dataset: flags.Dataset = "demo",
    chat: flags.Chat = False,
    batch_size: flags.BatchSize = 1,
    limit: flags.Limit = 32,
    max_new_tokens: flags.MaxNewTokens = 128,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    library: flags.Libraries = flags.NO_LIBRARIES,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    backend: flags.Backend = "auto",
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Also write the rows as JSON.")
    ] = "",
    as_json: flags.AsJson = False,
    write: Annotated[
        bool, typer.Option("--write", help="Record the live rows in the profile.")
    ] = False,
) -> None:
    """Run off, chains and trees live and print predicted against measured."""
    from stree_autotune.store import Library, PairRequest, Working

    with Working(LOADING):
        from stree_autotune.live import ValidateRequest, run_validate
        from stree_core.drafting import Runtime
    if write and not profile.is_file():
        raise ConfigError(
            f"--write changes a profile's file, got the name {profile}; pass its path"
        )
    searched = flags.search_path(data, library)
    request = ValidateRequest(
        profile_path=Library.open(searched, missing_ok=True).find_profile(str(profile)),
        dataset=dataset,
        prompts=prompts,
        chat=chat,
        batch_size=batch_size,
        limit=limit or None,
        max_new_tokens=max_new_tokens,
        output=Path(output) if output else None,
        write=write,
    )
    models = PairRequest(target, draft, searched, Runtime(device, dtype, backend))
    run_validate(request, models, as_json=as_json)


def decode(
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="Text to continue or to answer.")
    ],
    profile: flags.ProfilePath = flags.DEFAULT_PROFILE,
    target: flags.ProfileTarget = "",
    draft: flags.ProfileDraft = "",
    chat: flags.Chat = False,
    max_new_tokens: flags.MaxNewTokens = 128,
    mode: Annotated[
        Literal["auto", "off"],
        typer.Option("--mode", help="auto follows the profile, off never speculates."),
    ] = "auto",
    rule: flags.Rule = "",
    temperature: flags.Temperature = 0.0,
    top_k: flags.TopK = 0,
    top_p: flags.TopP = 1.0,
    min_p: flags.MinP = 0.0,
    repetition_penalty: flags.RepetitionPenalty = 1.0,
    seed: flags.Seed = 0,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    backend: flags.Backend = "auto",
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    library: flags.Libraries = flags.NO_LIBRARIES,
    as_json: flags.AsJson = False,
) -> None:
    """Continue a prompt the way a profile says."""
    from stree_autotune.store import Library, PairRequest, Working

    with Working(LOADING):
        from stree_autotune.cli.decode import DecodeRequest, run_decode
        from stree_core.drafting import Runtime
        from stree_core.engine import SamplingParams
    # top-p means nothing to a greedy request, so the flag alone is no contradiction
    setting = flags.sampling(rule, temperature, top_p if temperature else 1.0)
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    searched = flags.search_path(data, library)
    models = PairRequest(target, draft, searched, Runtime(device, dtype, backend))
    request = DecodeRequest(
        profile_path=Library.open(searched, missing_ok=True).find_profile(str(profile)),
        prompt=prompt,
        chat=chat,
        max_new_tokens=max_new_tokens,
        mode=mode,
        rule=setting.rule,
        sampling=params,
    )
    run_decode(models, request, as_json=as_json)
