"""A trace file is whole, unchanged and consistent, or it is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from synthetic import latent_trace, meta, trace_of

from stree_autotune.trace.file import (
    MAX_FILE_BYTES,
    NO_RANK,
    Trace,
    TraceMeta,
    load_trace,
    save_trace,
)
from stree_core.errors import ConfigError, UnwritableFile

REMEDY = "record it again"
RANKS = np.array([0, 1, NO_RANK, 0, 2], np.uint8)
OFFSETS = np.array([0, 3, 3, 5], np.int64)


def write_raw(path: Path, arrays: dict[str, np.ndarray], text: str, **header: str) -> Path:
    """Write a trace file with a fitting digest around any content."""
    digest = hashlib.sha256(text.encode())
    for name in ("ranks", "offsets"):
        if name in arrays:
            digest.update(arrays[name].tobytes())
    strings = {"meta": text, "sha256": digest.hexdigest()} | header
    path.write_bytes(save(arrays, metadata=strings))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_trace(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(REMEDY)
    assert "\n" not in message
    return message


def test_ranks_by_depth_survive_their_file(tmp_path: Path) -> None:
    """A byte a rank; a trace of the other schema is another file."""
    trace = latent_trace(0, num_prompts=320, length=256, depths=8)
    save_trace(trace, tmp_path / "t")
    loaded = load_trace(tmp_path / "t")
    assert (loaded.meta, loaded.meta.depths, loaded.meta.schema_version) == (trace.meta, 8, 2)
    assert np.array_equal(loaded.ranks, trace.ranks)
    assert trace.ranks.size < (tmp_path / "t").stat().st_size < 1_000_000
    assert loaded.meta.max_depth == 8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ranks": RANKS}, "ranks must be a list of uint8 of 2 each, got uint8 [5]"),
        ({"ranks": np.zeros((5, 3), np.uint8)}, "of 2 each, got uint8 [5, 3]"),
        ({"ranks": np.zeros((5, 2), np.uint8)}, "a rank behind its prompt's end must be 255"),
        ({"ranks": np.full((5, 2), 7, np.uint8)}, "a rank must be below 3 or 255, got 7"),
    ],
)
def test_ranks_by_depth_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray], complaint: str
) -> None:
    arrays = {"ranks": np.full((5, 2), NO_RANK, np.uint8), "offsets": OFFSETS}
    text = meta(3, 3, 2).model_dump_json()
    load_trace(write_raw(tmp_path / "sound", arrays, text))
    assert complaint in refusal(write_raw(tmp_path / "t", arrays | change, text))


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    trace = trace_of([[0, 1, NO_RANK], [], [0, 2]], 3)
    save_trace(trace, tmp_path / "deep" / "t.safetensors")
    loaded = load_trace(tmp_path / "deep" / "t.safetensors")
    assert loaded.meta == trace.meta
    assert loaded.ranks.tolist() == [0, 1, 255, 0, 2]
    assert loaded.offsets.tolist() == [0, 3, 3, 5]
    assert (loaded.num_positions, loaded.num_prompts) == (5, 3)
    assert not loaded.ranks.flags.writeable


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    trace = latent_trace(0, num_prompts=8, length=20)
    save_trace(trace, tmp_path / "a")
    save_trace(load_trace(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_safetensors_reader_reads_a_trace(tmp_path: Path) -> None:
    save_trace(trace_of([[0, 1, NO_RANK], [], [0, 2]], 3), tmp_path / "t")
    arrays = load_file(tmp_path / "t")
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "ranks": [0, 1, 255, 0, 2],
        "offsets": [0, 3, 3, 5],
    }


def test_reliable_from_64_prompts() -> None:
    assert trace_of([[0]] * 64, 1).reliable
    assert not trace_of([[0]] * 63, 1).reliable


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_trace(trace_of([[0, 1], [0]], 2), path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "whole safetensors file" in refusal(path)


def test_every_changed_array_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_trace(trace_of([[0, 1, 0, NO_RANK], [0]], 2), path)
    whole = path.read_bytes()
    data_start = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - data_start == 5 + 3 * 8
    for place in range(data_start, len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert "digest" in refusal(path)


def test_changed_meta_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_trace(trace_of([[0]], 1), path)
    path.write_bytes(path.read_bytes().replace(b"synthetic", b"different"))
    assert "digest" in refusal(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ranks": np.array([0, 1, 3, 0, 2], np.uint8)}, "below 3 or 255, got 3"),
        ({"offsets": np.array([0, 4, 3, 5], np.int64)}, "rise from 0"),
        ({"offsets": np.array([1, 3, 3, 5], np.int64)}, "rise from 0"),
        ({"offsets": np.array([0, 3, 3, 4], np.int64)}, "rise from 0 to the 5 positions"),
        ({"offsets": np.array([0, 3, 3, 2**62], np.int64)}, "rise from 0"),
        ({"offsets": np.array([0, 5], np.int64)}, "3 prompts need one offset more, got 2"),
        ({"offsets": np.array([], np.int64)}, "3 prompts need one offset more, got 0"),
        ({"offsets": OFFSETS.astype(np.int32)}, "offsets as a list of I64, got I32 [4]"),
        ({"ranks": RANKS.astype(np.int64)}, "ranks as a list of U8, got I64 [5]"),
        ({"ranks": RANKS.reshape(1, 5)}, "ranks must be a list of uint8, got uint8 [1, 5]"),
        ({"text": np.zeros(3, np.uint8)}, "arrays ranks and offsets, got"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray], complaint: str
) -> None:
    arrays = {"ranks": RANKS, "offsets": OFFSETS}
    text = meta(3, 3).model_dump_json()
    load_trace(write_raw(tmp_path / "good", arrays, text))
    assert complaint in refusal(write_raw(tmp_path / "bad", arrays | change, text))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"colour": "blue"}, "wrong key colour (Extra inputs"),
        ({"schema_version": 3}, "wrong key schema_version"),
        ({"schema_version": 2}, "schema 1 has depths 1 and schema 2 more, got schema 2 and"),
        ({"kind": "stree-profile"}, "wrong key kind"),
        ({"num_prompts": 0}, "wrong key num_prompts"),
        ({"num_children": 0}, "wrong key num_children"),
        ({"num_children": 65}, "wrong key num_children"),
        ({"depths": 2}, "schema 1 has depths 1 and schema 2 more, got schema 1 and depths 2"),
        ({"depths": 65}, "wrong key depths"),
        ({"statistics": {"share": "high"}}, "wrong key statistics.share"),
        ({"statistics": {str(i): 0.5 for i in range(65)}}, "wrong key statistics"),
    ],
)
def test_meta_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    content = json.loads(meta(3, 3).model_dump_json()) | change
    arrays = {"ranks": RANKS, "offsets": OFFSETS}
    assert complaint in refusal(write_raw(tmp_path / "t", arrays, json.dumps(content)))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"seed": NaN}', "\\ud800"])
def test_meta_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    arrays = {"ranks": RANKS, "offsets": OFFSETS}
    assert "unreadable meta" in refusal(write_raw(tmp_path / "t", arrays, text))


def test_other_header_strings_are_refused(tmp_path: Path) -> None:
    arrays = {"ranks": RANKS, "offsets": OFFSETS}
    path = write_raw(tmp_path / "t", arrays, meta(3, 3).model_dump_json(), note="hello")
    assert "header strings meta and sha256" in refusal(path)
    path.write_bytes(save(arrays))
    assert "got []" in refusal(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a":"b"}',
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        b"\x80\x04\x95pickle",
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(data)
    assert "whole safetensors file" in refusal(path)


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"meta": "{}", "sha256": "0"},
        "ranks": {"dtype": "F8_E4M3", "shape": [5], "data_offsets": [0, 5]},
        "offsets": {"dtype": "I64", "shape": [1], "data_offsets": [5, 13]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "t").write_bytes(len(text).to_bytes(8, "little") + text + bytes(13))
    assert "got F8_E4M3 [5]" in refusal(tmp_path / "t")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match=f"at most {MAX_FILE_BYTES} bytes"):
        load_trace(path)


def test_a_missing_file_is_an_error_about_the_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_trace(tmp_path / "absent")


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    save_trace(trace_of([[0]], 1), path)
    before = path.read_bytes()

    def full_disk(handle: int) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("stree_core.files.os.fsync", full_disk)
    with pytest.raises(UnwritableFile, match="no space"):
        save_trace(latent_trace(0, num_prompts=8, length=20), path)
    assert [file.name for file in tmp_path.iterdir()] == ["t"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("ranks", "offsets", "complaint"),
    [
        (RANKS.astype(np.int64), OFFSETS, "list of uint8"),
        (RANKS, OFFSETS.astype(np.int32), "list of int64"),
        (RANKS, OFFSETS + 1, "rise from 0"),
        (RANKS + 1, OFFSETS, "below 3"),
    ],
)
def test_a_trace_in_memory_obeys_the_same_rules(
    ranks: np.ndarray, offsets: np.ndarray, complaint: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        Trace(ranks, offsets, meta(3, 3))


def test_meta_refuses_infinite_statistics() -> None:
    content = meta(1, 1).model_dump() | {"statistics": {"share": float("inf")}}
    with pytest.raises(ValueError, match="finite"):
        TraceMeta.model_validate(content)
