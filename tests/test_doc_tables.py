"""Tables and numbers in the docs, which results files say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from scripts import script

doc_tables = script("doc_tables")
report = script("report")
sources = script("sources")


def test_a_table_says_itself_that_its_code_is_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doc_tables, "RESULTS", tmp_path)
    path = tmp_path / "generation-h200.json"
    rows = [{"engine": name, "batch": 1, "token_ms": 2.0} for name in ("a", "b")]
    monkeypatch.setattr(sys, "argv", ["benchmarks/generation.py"])
    report.save(path, report.header(), rows)
    page = "before <!-- generated: generation -->\nold\n<!-- end --> after"
    text = doc_tables.filled(page)
    assert "| 1 | 2.00 | 2.00 |" in text
    assert text.startswith("before ")
    assert text.endswith("<!-- end --> after")
    assert doc_tables.filled(text) == text
    assert doc_tables.OLDER not in text
    document = report.read(path)
    path.write_text(json.dumps(document | {"command": document["command"] + " --batches 1"}))
    assert doc_tables.OTHERWISE in doc_tables.filled(page)
    document["source_hashes"]["benchmarks/generation.py"] = "another"
    path.write_text(json.dumps(document))
    assert doc_tables.OLDER in doc_tables.filled(page)
    del document["source_hashes"]
    path.write_text(json.dumps(document))
    assert doc_tables.UNKNOWN in doc_tables.filled(page)


def test_a_marked_number_is_one_row_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc_tables, "RESULTS", tmp_path)
    rows = [{"batch": batch, "ms": 1234.5 * batch} for batch in (1, 8)]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    assert doc_tables.filled("<!-- value: a batch=8 ms -->1<!-- end -->").endswith(
        "-->9,876<!-- end -->"
    )
    with pytest.raises(ValueError, match="2 rows of a fit"):
        doc_tables.value("a ms")
    with pytest.raises(ValueError, match="no table is called"):
        doc_tables.filled("<!-- generated: nothing --><!-- end -->")


@pytest.mark.parametrize("name", doc_tables.TABLES)
def test_every_table_is_made_of_a_results_file_of_the_set_or_of_profiles(name: str) -> None:
    if name not in doc_tables.OF_PROFILES:
        (measurement,) = (each for each in sources.MEASUREMENTS if each.name == name)
        if not (sources.RESULTS / measurement.file("h200")).exists():
            pytest.skip("not measured yet")
    text = doc_tables.filled(f"<!-- generated: {name} --><!-- end -->")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) > 2
    assert len({line.count("|") for line in lines}) == 1
