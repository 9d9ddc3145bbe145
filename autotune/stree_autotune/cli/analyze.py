"""The verb analyze of stree-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stree_autotune.cli import flags


def register_analyze(app: typer.Typer) -> None:
    """Add the verb to `app`."""
    app.command(epilog="Example: stree-tune analyze --gpu h200 --dataset gsm8k --plot tree.html")(
        analyze
    )


def analyze(
    ctx: typer.Context,
    gpu: flags.Gpu = "",
    dataset: flags.Dataset = "",
    target: flags.Target = "",
    draft: flags.Draft = "",
    context: flags.Context = 1024,
    batch_size: flags.BatchSizes = flags.ANALYZED_BATCH_SIZES,
    max_nodes: flags.MeasuredNodes = 64,
    data: flags.Data = flags.DEFAULT_DATA_PATHS,
    library: flags.Libraries = flags.NO_LIBRARIES,
    acceptance_from: flags.AcceptanceFrom = "",
    plot: Annotated[
        str,
        typer.Option("--plot", metavar="FILE", help="Also draw it: .html or .svg."),
    ] = "",
    as_json: flags.AsJson = False,
) -> None:
    """Say what each further node of a tree brings and costs, and up to which size it pays."""
    if not gpu or not (dataset or acceptance_from):
        raise flags.needs_gpu_and_dataset("an analysis", gpu, dataset or acceptance_from)
    target, draft = flags.pair_names(target, draft)
    from stree_autotune.report import run_analyze
    from stree_autotune.search import TuneRequest

    request = TuneRequest(
        gpu=gpu,
        dataset=dataset,
        target=target,
        draft=draft,
        sampling=flags.sampling("", 0.0, 1.0),
        context=context,
        batch_sizes=tuple(sorted(set(batch_size))),
        max_nodes=max_nodes,
        data=flags.search_path(data, library),
        own_data=tuple(data),
        left_open=flags.left_open(ctx, batch_sizes="batch_size", max_nodes="max_nodes"),
        acceptance_from=acceptance_from,
        seed=0,
    )
    run_analyze(request, Path(plot) if plot else None, as_json=as_json)
