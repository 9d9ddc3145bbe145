"""Where files are found by name, and what is said when they are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from synthetic_data import make_profile, make_table, make_trace, model_ref, write_library

from stree_autotune.store.library import (
    DEFAULT_DATA,
    Library,
    check_name,
    data_folder,
    require_same_model,
    require_same_shape,
    shipped_root,
)
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.files import sha256_of
from stree_core.profile import save_profile

PAIR = ("demo-target", "demo-draft")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with specs, one table of the pair, one trace, two models, one profile."""
    shutil.copytree(shipped_root() / "gpus", tmp_path / "gpus")
    for name in PAIR:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        shutil.copy(shipped_root() / "models" / name / "config.json", folder)
    (tmp_path / "models" / "demo-target" / "tokenizer.json").write_text("{}")
    (tmp_path / "shapes").mkdir()
    shutil.copy(shipped_root() / "shapes" / "mamba2-130m.yaml", tmp_path / "shapes")
    save_profile(make_profile(), tmp_path / "tuned" / "mine.yaml")
    return write_library(tmp_path, make_table(), make_trace())


@pytest.fixture
def library(root: Path) -> Library:
    """A library over that folder alone."""
    return Library((root,))


def test_exact_table_is_found(library: Library, root: Path) -> None:
    found = library.find_runtime("h200", *PAIR)
    assert found.path == root / "runtime" / "h200--demo-target--demo-draft.yaml"
    assert found.is_exact


@pytest.mark.parametrize("gpu", ["h100", "l40s"])
def test_another_gpus_table_is_estimated_from(library: Library, root: Path, gpu: str) -> None:
    found = library.find_runtime(gpu, *PAIR)
    assert not found.is_exact
    assert found.measured is not None
    assert found.wanted is not None
    assert (found.measured.name, found.wanted.name) == ("h200", gpu)
    assert {path.name.split("--")[0] for path in library.runtime_paths("h200")} == {"h200"}
    write_library(root, make_table(gpu="a100-80g"))
    nearest = library.find_runtime(gpu, *PAIR).measured
    assert nearest is not None
    assert nearest.name == {"h100": "h200", "l40s": "a100-80g"}[gpu]


def test_an_exact_table_goes_before_an_estimate(library: Library, root: Path) -> None:
    write_library(root, make_table(gpu="h100"))
    assert library.find_runtime("h100", *PAIR).is_exact


def test_without_a_sheet_nothing_is_estimated(library: Library) -> None:
    command = "stree-tune probe --gpu cpu --target demo-target --draft demo-draft --device cpu"
    with pytest.raises(MissingMeasurement, match=command):
        library.find_runtime("cpu", *PAIR)


@pytest.mark.parametrize(("gpu", "offered"), [("h10", "h100"), ("H200", "h200"), ("cpus", "cpu")])
def test_unknown_gpu_offers_the_nearest(library: Library, gpu: str, offered: str) -> None:
    with pytest.raises(ConfigError, match=f"no known GPU; did you mean .*{offered}"):
        library.find_runtime(gpu, *PAIR)


def test_a_measured_gpu_without_sheet_is_known(library: Library, root: Path) -> None:
    write_library(root, make_table(gpu="rtx-4090"))
    assert library.find_runtime("rtx-4090", *PAIR).is_exact


def test_trace_is_found(library: Library, root: Path) -> None:
    path = library.find_trace(*PAIR, "gsm8k")
    assert path == root / "traces" / "demo-target--demo-draft--gsm8k--greedy.safetensors"
    assert library.label(path) == "traces/demo-target--demo-draft--gsm8k--greedy.safetensors"


def test_missing_and_unknown_datasets_differ(library: Library) -> None:
    with pytest.raises(
        MissingMeasurement,
        match="trace --dataset mt_bench --target demo-target --draft demo-draft`",
    ):
        library.find_trace(*PAIR, "mt_bench")
    with pytest.raises(
        ConfigError, match=r"did you mean gsm8k\?.* trace --dataset gsm8 --prompts FILE"
    ):
        library.find_trace(*PAIR, "gsm8")


def test_borrowed_trace_by_name_and_by_path(library: Library, root: Path, tmp_path: Path) -> None:
    name = "demo-target--demo-draft--gsm8k--greedy"
    shipped = root / "traces" / f"{name}.safetensors"
    assert library.find_trace_file(name) == shipped
    assert library.find_trace_file(f"{name}.safetensors") == shipped
    own = tmp_path / "own.safetensors"
    own.write_bytes(shipped.read_bytes())
    assert library.find_trace_file(str(own)) == own
    assert library.label(Path("/elsewhere/own.safetensors")) == "own.safetensors"
    with pytest.raises(ConfigError, match="did you mean demo-target--demo-draft--gsm8k--greedy"):
        library.find_trace_file("demo-target--demo-draft--gsm8k")


def test_models_by_name_and_by_folder(library: Library, root: Path) -> None:
    folder = root / "models" / "demo-target"
    assert library.find_model("demo-target") == folder
    assert library.find_model(str(folder)) == folder
    assert library.model_name(str(folder)) == "demo-target"
    source = library.find_source("demo-target")
    assert source is not None
    assert source.name == "demo-target"
    assert source.ref.config_sha256 == sha256_of(folder / "config.json")
    assert source.ref.tokenizer_sha256 == sha256_of(folder / "tokenizer.json")
    assert source.ref.shape_sha256 == source.shape.digest
    draft = library.find_source("demo-draft")
    assert draft is not None
    assert draft.ref.tokenizer_sha256 is None


def test_models_known_by_a_table_alone(library: Library, root: Path) -> None:
    write_library(root, make_table(target="mamba2-2.7b", draft="mamba2-130m"))
    assert library.model_name("mamba2-2.7b") == "mamba2-2.7b"
    assert library.find_source("mamba2-2.7b") is None
    with pytest.raises(ConfigError, match=r"a folder with config\.json"):
        library.find_model("mamba2-2.7b")


def test_shapes_by_name(library: Library, root: Path) -> None:
    assert library.find_shape("mamba2-130m") == root / "shapes" / "mamba2-130m.yaml"
    with pytest.raises(ConfigError, match="did you mean mamba2-130m"):
        library.find_shape("mamba2-130")


def test_a_hub_id_goes_by_its_last_part(library: Library) -> None:
    assert library.model_name("state-spaces/mamba2-2.7b") == "mamba2-2.7b"


@pytest.mark.parametrize(
    "name", ["demo-targt", "./nowhere", "..", "no/where/model", "a--b", "", "a b"]
)
def test_unknown_models(library: Library, name: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean demo-target|config\.json|name has"):
        library.model_name(name)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a..b", ".hidden", "a--b", "x" * 101, "a\0"])
def test_names_cannot_leave_their_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        check_name(name, "GPU")


def test_own_folders_go_before_what_ships(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert Library.open().roots == (shipped_root(),)
    assert Library.open([root]).roots == (root, shipped_root())
    (empty / DEFAULT_DATA).mkdir()
    assert Library.open().roots == (DEFAULT_DATA, shipped_root())
    assert Library.open([root]).find_runtime("h200", *PAIR).path.is_relative_to(root)
    with pytest.raises(ConfigError, match="--data names an existing folder"):
        Library.open([Path("absent")])
    assert Library.open([Path("absent")], missing_ok=True).roots[0] == Path("absent")
    assert data_folder([]) == DEFAULT_DATA
    assert data_folder([root, empty]) == root


def test_profiles_by_name_and_by_path(library: Library, root: Path) -> None:
    path = root / "tuned" / "mine.yaml"
    assert library.profile_paths() == [path]
    assert library.find_profile("mine") == path
    assert library.find_profile("mine.yaml") == path
    assert library.find_profile(str(path)) == path
    with pytest.raises(ConfigError, match="did you mean mine"):
        library.find_profile("min")


def test_stray_files_are_no_names(library: Library, root: Path) -> None:
    (root / "runtime" / "notes.yaml").write_text("x")
    (root / "traces" / "a--b.safetensors").write_text("x")
    specs = {path.stem for path in (root / "gpus").iterdir()}
    assert library.gpu_names() == {"cpu", *specs}
    assert library.dataset_names() == {"demo", "gsm8k", "human_eval", "mt_bench"}
    shapes = {path.stem for path in (root / "shapes").iterdir()}
    assert library.model_names() == set(PAIR) | shapes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "other"}, "got name demo-target and other"),
        ({"config_sha256": "e" * 64}, "got config 64656d6f2d74 and eeeeeeeeeeee"),
        ({"tokenizer_sha256": "e" * 64}, "got tokenizer aaaaaaaaaaaa and eeeeeeeeeeee"),
    ],
)
def test_files_of_different_models_do_not_mix(changed: dict[str, str], message: str) -> None:
    ref = model_ref("demo-target")
    with pytest.raises(ConfigError, match=f"{message}; mend"):
        require_same_model(ref, ref.model_copy(update=changed), "table", "trace", "mend")


def test_an_unknown_tokenizer_is_no_difference() -> None:
    ref = model_ref("demo-target")
    unknown = ref.model_copy(update={"tokenizer_sha256": None})
    require_same_model(ref, unknown, "table", "trace", "mend")
    require_same_model(unknown, ref, "table", "trace", "mend")


def test_times_hold_for_every_model_of_a_shape() -> None:
    """A config may say more than the spec that was timed."""
    timed = model_ref("demo-target").model_copy(update={"shape_sha256": "1" * 64})
    other = timed.model_copy(update={"config_sha256": "e" * 64})
    require_same_shape(timed, other, "table", "folder", "mend")
    with pytest.raises(ConfigError, match="and eeeeeeeeeeee"):
        require_same_model(timed, other, "table", "folder", "mend")
    reshaped = other.model_copy(update={"shape_sha256": "2" * 64})
    with pytest.raises(ConfigError, match="got shape 111111111111 and 222222222222; mend"):
        require_same_shape(timed, reshaped, "table", "folder", "mend")
    # A file that knows no shape is compared by its config.
    unknown = other.model_copy(update={"shape_sha256": None})
    with pytest.raises(ConfigError, match="got config"):
        require_same_shape(timed, unknown, "table", "folder", "mend")
