"""The layout and the style that no tool checks: packages, shipped files, sizes, forbidden forms."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import stree_core

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
MAX_MODULE_LINES = 450
MAX_TRITON_LINES = 450
MAX_FUNCTION_LINES = 50
# a verb of the command line spells out every flag
MAX_COMMAND_LINES = 70


def product_modules() -> list[Path]:
    return sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions and methods, without those inside functions."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    return (node for body in bodies for node in body if isinstance(node, ast.FunctionDef))


def is_kernel(function: ast.FunctionDef) -> bool:
    """Triton kernels are one function by nature."""
    return any("jit" in ast.unparse(mark) for mark in function.decorator_list)


@pytest.mark.parametrize("folder", ["kernels", "autotune"])
def test_folders_that_are_no_packages(folder: str) -> None:
    # `kernels` and `autotune` are names of other distributions, which must stay importable
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_package_is_listed_and_typed() -> None:
    rooms = {name: _folder(name) for name in SETUPTOOLS["packages"]}
    for name, folder in FOLDERS.items():
        assert (folder / "__init__.py").is_file(), name
        assert (folder / "py.typed").is_file(), name
    roots = [ROOT / "kernels", ROOT / "autotune", ROOT / "stree_core", ROOT / "profiles"]
    with_code = {path.parent for root in roots for path in root.rglob("*.py")}
    assert with_code == set(rooms.values())


def _folder(package: str) -> Path:
    root, *rooms = package.split(".")
    return FOLDERS[root].joinpath(*rooms)


ROOMS = [name for name in SETUPTOOLS["packages"] if "." in name]


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_are_small_and_export_what_they_declare(name: str) -> None:
    folder = _folder(name)
    assert len(list(folder.glob("*.py"))) <= 1 + 15
    tree = ast.parse((folder / "__init__.py").read_text())
    assert len((ast.get_docstring(tree) or "").splitlines()) == 1
    declared = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        if (node.module or "").startswith(name)
        for alias in node.names
    ]
    room = importlib.import_module(name)
    if declared:
        assert dir(room) == sorted(declared)
    for exported in declared:
        assert getattr(room, exported) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = room.nothing


def test_every_shipped_file_is_package_data() -> None:
    patterns = SETUPTOOLS["package-data"]["stree_profiles"]
    folder = FOLDERS["stree_profiles"]
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = [path.relative_to(folder).as_posix() for path in files if path.suffix != ".py"]
    missing = [n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
    assert not missing
    too_large = [relative(path) for path in files if path.stat().st_size > 16_000_000]
    assert not too_large


def test_importing_a_package_is_cheap() -> None:
    heavy = ("torch", "triton", "numpy", "scipy", "optuna", "pydantic", "typer", "transformers")
    code = f"import sys, {', '.join(FOLDERS)}; print([n for n in {heavy} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_public_names_are_there() -> None:
    names = dir(stree_core)
    assert names == sorted(names)
    assert {"Engine", "Profile", "Session", "generate", "load_pair"} <= set(names)
    for name in names:
        assert getattr(stree_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stree_core.nothing


@pytest.mark.parametrize("path", product_modules(), ids=relative)
def test_module_style(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    limit = MAX_TRITON_LINES if "import triton" in text else MAX_MODULE_LINES
    assert text.count("\n") <= limit
    assert ast.get_docstring(tree)
    assert "TODO" not in text
    for function in functions(tree):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        names = [argument.annotation for argument in function.args.args if argument.annotation]
        is_command = any("flags." in ast.unparse(name) for name in names)
        allowed = MAX_COMMAND_LINES if is_command else MAX_FUNCTION_LINES
        assert is_kernel(function) or length <= allowed, function.name
    lines = text.splitlines()
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)):
        is_broad = handler.type is None or ast.unparse(handler.type) == "Exception"
        # a library that raises the bare class leaves no choice; the line above has to say so
        assert not is_broad or lines[handler.lineno - 2].lstrip().startswith("#")
