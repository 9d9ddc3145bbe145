"""The verb probe: a pair's runtime table, or the passes of one model alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.table import Table

from stree_autotune.cost import off_disagreements, siblings_of
from stree_autotune.probe.ahead import compile_ahead
from stree_autotune.probe.plan import ProbeConfig, missing_stages
from stree_autotune.probe.run import attending, extends, probe
from stree_autotune.probe.single import PassTime, probe_model
from stree_autotune.store import (
    Library,
    PairRequest,
    RuntimeTable,
    Working,
    check_name,
    data_folder,
    digits,
    load_runtime_table,
    make_table,
    open_pair,
    open_source,
    report,
    result_console,
    runtime_file_name,
    save_runtime_table,
    say,
    show_table,
)
from stree_core.drafting import Pair, device_name, load_single, short_gpu_name
from stree_core.errors import ConfigError
from stree_core.files import require_place

logger = logging.getLogger(__name__)

MEASURING = "measuring"


def run_probe(request: PairRequest, config: ProbeConfig, *, as_json: bool, force: bool) -> None:
    """Measure a runtime table and write it where tuning looks first."""
    folder = data_folder(request.data) / "runtime"
    require_place(folder / "table.yaml")
    with Working("loading the models"):
        pair = open_pair(request)
    if not config.gpu:
        gpu = short_gpu_name(device_name(pair.device), pair.device)
        config = replace(config, gpu=gpu)
    check_name(config.gpu, "GPU")
    names = (pair.target_ref.name, pair.draft_ref.name)
    path = folder / runtime_file_name(config.gpu, *names)
    known = _known_table(path, pair, config, force=force)
    logger.info("probing %s + %s on %s", *names, device_name(pair.device))
    # Saved after every stage: a probe that is stopped keeps what it has measured.
    with Working(MEASURING) as spinner:
        compile_ahead(pair, config, known, partial(_said, spinner))
        spinner.say(MEASURING)
        for table in probe(pair, config, partial(_stage_line, spinner), known):
            save_runtime_table(table, path)
    summary = {
        "path": str(path),
        "gpu": table.gpu,
        "gpu_name": table.gpu_name,
        "points": len(table.points),
        "steps": len(table.steps),
    }
    others = siblings_of(Library.open(request.data, missing_ok=True), path, table)
    for sentence in off_disagreements([table, *others]):
        logger.warning(sentence)
    text = f"wrote {path}: {len(table.points)} points, {len(table.steps)} whole steps"
    report(text, summary, as_json)


def run_model_probe(request: PairRequest, config: ProbeConfig, *, as_json: bool) -> None:
    """Measure the passes of one model and print them; a table for tuning needs a draft."""
    source = open_source(request, request.target)
    with Working("loading the model"):
        model = load_single(source, request.runtime)
    weights = "random weights" if source.folder is None else "its own weights"
    gpu_name = device_name(model.device)
    logger.info("probing %s, %s, on %s", source.name, weights, gpu_name)
    with Working(MEASURING) as spinner:
        said = partial(_stage_line, spinner)
        rows = [row for rows in probe_model(model, config, said) for row in rows]
    console = result_console()
    say(console, f"{source.ref.label}, {weights}, context {config.context}: ms on {gpu_name}")
    show_table(console, _pass_table(rows))
    summary: dict[str, object] = {
        "model": source.name,
        "weights": "random" if source.folder is None else "real",
        "gpu_name": gpu_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "stored": source.ref.weights or str(model.dtype).removeprefix("torch."),
        "context": config.context,
        "weight_bytes": model.shape.weight_bytes(model.dtype.itemsize),
        "rows": [row._asdict() for row in rows],
    }
    text = "a runtime table, which tuning reads, needs a draft as well: pass --draft"
    report(text, summary, as_json)


def _said(spinner: Working, line: str) -> None:
    """Log a line, and show it on a terminal until something else is said."""
    logger.info(line)
    spinner.say(line)


def _stage_line(spinner: Working, line: str) -> None:
    """Log what was measured; what it says of the time left stays on a terminal."""
    logger.info(line)
    _, _, left = line.partition("; ")
    spinner.say(f"{MEASURING}; {left}" if left else MEASURING)


def _pass_table(rows: list[PassTime]) -> Table:
    """Return a table with a row for each batch size and a column for each number of tokens."""
    sizes = sorted({row.num_tokens for row in rows})
    table = make_table(("batch", "one-token step", *(f"pass of {size}" for size in sizes)))
    for batch_size in sorted({row.batch_size for row in rows}):
        times = {row.num_tokens: row for row in rows if row.batch_size == batch_size}
        steps = [row.step_ms for row in times.values() if row.step_ms is not None]
        cells = [digits(times[size].ms) for size in sizes]
        table.add_row(str(batch_size), digits(steps[0]), *cells)
    return table


def _known_table(
    path: Path, pair: Pair, config: ProbeConfig, *, force: bool
) -> RuntimeTable | None:
    """Return the table at `path` when this probe only adds to it, None when it is new.

    Raises ConfigError when the probe would change what is there, unless `force`.
    """
    if force or not path.exists():
        return None
    try:
        known = load_runtime_table(path)
    except ConfigError as err:
        raise ConfigError(f"{err}, or pass --force to measure all of it again") from err
    missing = missing_stages(config, attending(pair), known)
    if not extends(known, pair, config) or not missing:
        raise ConfigError(f"{path} exists already; pass --force to measure all of it again")
    return known
