"""Whatever a result, a scrape or a table holds ends in a table or in one sentence."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from server_results import metrics_text, response, sglang_line, vllm_result
from synthetic_server import SyntheticServer

from stree_autotune.server.acceptance import from_server
from stree_autotune.server.choice import choose, options_by_size
from stree_autotune.server.fit import fit_steps
from stree_autotune.server.gather import Names, import_files
from stree_autotune.server.tables import load_server_acceptance, load_server_table, save
from stree_core.errors import StreeError

NAMES = Names(gpu="h100", target="t", draft="d", dataset="mine")
NASTY: tuple[Any, ...] = (
    None, math.nan, math.inf, -1, 0, 1e-320, 1e308, 10**400, True, "x", "1", "\x1b[2J", [], {},
    [math.nan], {"a": 1},
)  # fmt: skip


def variants(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the content with every value replaced by every nasty one, two levels deep."""
    found = []
    for key, value in content.items():
        for nasty in NASTY:
            found.append({**content, key: nasty})
        if isinstance(value, dict):
            for inner in variants(value):
                found.append({**content, key: inner})
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found += [{**content, key: [inner]} for inner in variants(value[0])]
        found.append({other: each for other, each in content.items() if other != key})
    return found


def require_sentence(err: StreeError) -> None:
    text = str(err)
    assert "\n" not in text
    assert len(text) < 600


def ends_well(path: Path, others: tuple[Path, ...] = ()) -> None:
    """Import and decide, or fail with one sentence."""
    try:
        found = import_files([path, *others], NAMES)
        if found.table is None or found.acceptance is None:
            return
        save(found.table, path.with_name("table.yaml"))
        rng = np.random.default_rng(0)
        tokens = from_server(found.acceptance, rng)
        for options in options_by_size(fit_steps(found.table), tokens, rng).values():
            choose(options)
    except StreeError as err:
        require_sentence(err)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_every_value_of_a_result(tmp_path: Path, server: str) -> None:
    off, chain = vllm_result(0), vllm_result(2)
    if server == "sglang":
        off, chain = sglang_line(0, 4), sglang_line(3, 4)
    other = tmp_path / "off.json"
    other.write_text(json.dumps(off))
    path = tmp_path / "result.json"
    for content in variants(chain):
        path.write_text(json.dumps(content))
        ends_well(path, (other,))


@pytest.mark.parametrize("kind", ["vllm", "aiperf", "sglang"])
def test_every_value_of_a_request_s_record(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "record.json"
    for content in variants(response(kind)):
        path.write_text(json.dumps(content))
        ends_well(path)


def test_every_cut_of_a_scrape(tmp_path: Path) -> None:
    text = metrics_text(1000, 2, (700, 400))
    path = tmp_path / "scrape.prom"
    for length in range(0, len(text), 7):
        path.write_text(text[:length])
        ends_well(path)
    for value in ("NaN", "-1", "+Inf", "1e400", "x", ""):
        path.write_text(text.replace("1000.0", value))
        ends_well(path)


@pytest.mark.parametrize("which", ["table", "acceptance"])
def test_every_value_of_a_table(tmp_path: Path, which: str) -> None:
    found = import_files(SyntheticServer(0).write(tmp_path), Names(gpu="g", dataset="d"))
    content = found.table if which == "table" else found.acceptance
    assert content is not None
    path = tmp_path / "table.yaml"
    whole = content.model_dump(mode="json")
    few = copy.deepcopy(whole)
    key = "cells" if which == "table" else "runs"
    few[key] = few[key][:1]
    load = load_server_table if which == "table" else load_server_acceptance
    for changed in variants(few):
        path.write_text(yaml.safe_dump(changed))
        try:
            load(path)
        except StreeError as err:
            require_sentence(err)
    save(content, path)
    assert load(path) == content
