"""The verbs of stree-tune that run models; torch is imported inside them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stree_autotune import cli_flags as flags


def register_live_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to `app`."""
    app.command(epilog="Example: stree-tune probe --gpu cpu --effort quick")(probe)
    app.command(epilog="Example: stree-tune trace --dataset demo --limit 64")(trace)
    app.command(epilog="Example: stree-tune validate --limit 16")(validate)
    app.command(epilog='Example: stree-tune decode --prompt "Tom has 3 apples."')(decode)


def probe(
    gpu: Annotated[
        str, typer.Option("--gpu", show_default="from the device", help="Name to record under.")
    ] = "",
    target: flags.Target = flags.DEFAULT_TARGET,
    draft: flags.Draft = flags.DEFAULT_DRAFT,
    context: flags.Context = 1024,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    batch_size: flags.BatchSizes = flags.DEFAULT_BATCH_SIZES,
    max_nodes: flags.MaxNodes = 64,
    effort: Annotated[
        Literal["quick", "full"], typer.Option("--effort", help="How many sizes and repeats.")
    ] = "full",
    backend: flags.Backend = "auto",
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Shapes from config.json alone, no trained weights."),
    ] = False,
    as_json: flags.AsJson = False,
    force: flags.Force = False,
) -> None:
    """Measure on this machine what passes and steps cost; writes a runtime table."""
    from stree_autotune.live import PairRequest, run_probe
    from stree_autotune.probe import ProbeConfig
    from stree_core.pair import Runtime

    runtime = Runtime(device, dtype, backend)
    config = ProbeConfig(
        gpu=gpu,
        context=context,
        batch_sizes=tuple(sorted(set(batch_size))),
        max_nodes=max_nodes,
        effort=effort,
        random_weights=random_weights,
    )
    request = PairRequest(target, draft, tuple(data), runtime, random_weights)
    run_probe(request, config, as_json=as_json, force=force)


def trace(
    dataset: flags.Dataset,
    prompts: flags.Prompts = "",
    target: flags.Target = flags.DEFAULT_TARGET,
    draft: flags.Draft = flags.DEFAULT_DRAFT,
    num_children: Annotated[
        int, typer.Option("--num-children", min=1, max=64, help="Children recorded per position.")
    ] = 16,
    max_new_tokens: flags.MaxNewTokens = 256,
    limit: flags.Limit = 0,
    rows: Annotated[
        str, typer.Option("--rows", metavar="A:B", help="Rows of the file, from A up to before B.")
    ] = "",
    batch_size: flags.BatchSize = 16,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    backend: flags.Backend = "auto",
    seed: flags.Seed = 0,
    as_json: flags.AsJson = False,
    force: flags.Force = False,
) -> None:
    """Record which of the draft's children the target takes, position by position."""
    from stree_autotune.live import PairRequest, open_prompts, run_trace
    from stree_autotune.prompts import parse_rows
    from stree_autotune.record import RecordConfig
    from stree_core.pair import Runtime

    chosen = parse_rows(rows) if rows else slice(None)
    texts = open_prompts(dataset, Path(prompts) if prompts else None, tuple(data))[chosen]
    config = RecordConfig(
        dataset=dataset,
        num_children=num_children,
        max_new_tokens=max_new_tokens,
        num_slots=batch_size,
        seed=seed,
    )
    request = PairRequest(target, draft, tuple(data), Runtime(device, dtype, backend))
    run_trace(request, config, prompts=texts[: limit or None], as_json=as_json, force=force)


def validate(
    profile: flags.ProfilePath = flags.DEFAULT_PROFILE,
    target: flags.ProfileTarget = "",
    draft: flags.ProfileDraft = "",
    prompts: flags.Prompts = "",
    dataset: flags.Dataset = "demo",
    batch_size: flags.BatchSize = 1,
    limit: flags.Limit = 32,
    max_new_tokens: flags.MaxNewTokens = 128,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
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
    from stree_autotune.live import PairRequest
    from stree_autotune.validate import ValidateRequest, run_validate
    from stree_core.pair import Runtime

    request = ValidateRequest(
        profile_path=profile,
        dataset=dataset,
        prompts_file=Path(prompts) if prompts else None,
        batch_size=batch_size,
        limit=limit or None,
        max_new_tokens=max_new_tokens,
        output=Path(output) if output else None,
        write=write,
    )
    models = PairRequest(target, draft, tuple(data), Runtime(device, dtype, backend))
    run_validate(request, models, as_json=as_json)


def decode(
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="Text to continue.")],
    profile: flags.ProfilePath = flags.DEFAULT_PROFILE,
    target: flags.ProfileTarget = "",
    draft: flags.ProfileDraft = "",
    max_new_tokens: flags.MaxNewTokens = 128,
    mode: Annotated[
        Literal["auto", "off"],
        typer.Option("--mode", help="auto follows the profile, off never speculates."),
    ] = "auto",
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    backend: flags.Backend = "auto",
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    as_json: flags.AsJson = False,
) -> None:
    """Continue a prompt the way a profile says."""
    from stree_autotune.live import PairRequest, run_decode
    from stree_core.pair import Runtime

    request = PairRequest(target, draft, tuple(data), Runtime(device, dtype, backend))
    run_decode(
        request,
        profile_path=profile,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        mode=mode,
        as_json=as_json,
    )
