"""Write the pages of docs that the code itself says, and the tables that results files say.

Commands, flags and public names are whole pages; tables and numbers stand between marks in README
and docs (benchmarks/doc_tables.py says how). Run as a script (`make docs`) after changing code or
results; a test compares the pages with both, so that no flag, no signature and no number changes
unseen.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import stree_core
from stree_autotune.cli.commands import app

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from doc_tables import filled
from prediction_figure import draw, rows_of_figure
from report import RESULTS, read

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
WHOLE = ("commands.md", "api.md")
KERNELS, AUTOTUNE, CORE = (
    ROOT / folder for folder in ("kernels/stree_kernels", "autotune/stree_autotune", "stree_core")
)
AUTOTUNE_MODULES = (
    "store/library",
    "store/runtime_table",
    "trace/file",
    "trace/tree_walk",
    "cost/step_cost",
    "search/tuning",
    "report/page",
)
KERNEL_MODULES = (
    "launch/rows",
    "launch/settings",
    "linear/deferred_norm",
    "delta/rows",
    "testing",
)
"""Public modules of kernels without a reference; every op with one is public."""

COMMANDS_HEAD = """# Commands

Every verb of `stree-tune` and every flag, as `--help` prints them. Written by `make docs`.

Results go to stdout, logs and progress to stderr; colours appear on a terminal only, and not with
`NO_COLOR`. `--json` makes the last line of stdout one JSON document. Exit codes: 0 done, 1 no
result (one line says why), 2 bad input (one line says which rule, which value, what to do);
anything else is a defect and prints a traceback. `stree-tune --install-completion` teaches your
shell the verbs, the flags and the names that the library knows.
"""
API_HEAD = """# Python interface

The public names; everything else may change without notice. Written by `make docs`.
[Serve it](serve-it.md#embed-the-engine) shows how they work together.
"""


def main() -> None:
    """Write the pages, and print which changed."""
    for path, text in (pages() | marked_pages()).items():
        if path.read_text() != text:
            path.write_text(text)
            sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    for path in outdated_figures():
        document = read(path.with_suffix(".json"))
        draw(document["rows"], document["gpu"], path)
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")


def outdated_figures() -> list[Path]:
    """Return the figures in benchmarks/results that show other rows than their results file has."""
    return [
        path
        for path in sorted(RESULTS.glob("*.svg"))
        if rows_of_figure(read(path.with_suffix(".json"))["rows"]) not in path.read_text()
    ]


def pages() -> dict[Path, str]:
    """Return the text of every page that is generated as a whole."""
    return {DOCS / "commands.md": commands_page(), DOCS / "api.md": api_page()}


def marked_pages() -> dict[Path, str]:
    """Return the text of every other page, what stands between marks as results files say it."""
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    return {page: filled(page.read_text()) for page in pages if page.name not in WHOLE}


def commands_page() -> str:
    """Return the page of commands and flags."""
    group: Any = typer.main.get_command(app)
    parts = [COMMANDS_HEAD, _command("stree-tune", group)]
    parts += [_command(f"stree-tune {name}", group.commands[name]) for name in group.commands]
    return "\n".join(parts)


def _command(title: str, command: Any) -> str:
    epilog = command.epilog.removeprefix("Example: ")
    lines = [f"## {title}", "", " ".join(command.help.split()), "", f"    {epilog}", ""]
    lines += ["| flag | default | meaning |", "| --- | --- | --- |"]
    for parameter in command.params:
        is_flag = parameter.opts[0].startswith("-")
        name = ", ".join(parameter.opts) if is_flag else parameter.metavar
        meaning = (parameter.help or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_default(parameter)} | {meaning} |")
    return "\n".join([*lines, ""])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    shown = getattr(parameter, "show_default", None)
    if isinstance(shown, str):
        return shown
    value = parameter.default
    if value is None or getattr(parameter, "is_flag", False):
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def api_page() -> str:
    """Return the page of public names and signatures."""
    parts = [API_HEAD, f"## stree_core\n\n{_first_line(CORE / '__init__.py')}\n"]
    for name in dir(stree_core):
        path, node = _home(name)
        home = ".".join(path.relative_to(CORE).with_suffix("").parts)
        parts += _entry(node) if node is not None else [f"- `{name}`: a constant of `{home}`."]
    parts.append(f"\n## stree_autotune\n\n{_first_line(AUTOTUNE / '__init__.py')}")
    for module in AUTOTUNE_MODULES:
        parts += _module(AUTOTUNE / f"{module}.py")
    parts.append(f"\n## stree_kernels\n\n{_first_line(KERNELS / '__init__.py')}")
    # a reference has the signatures of its kernel
    ops = {
        path.with_name(path.name.replace("_ref.py", ".py")) for path in KERNELS.rglob("*_ref.py")
    }
    for path in sorted(ops | {KERNELS / f"{module}.py" for module in KERNEL_MODULES}):
        parts += _module(path)
    return "\n".join(parts) + "\n"


def _home(name: str) -> tuple[Path, ast.FunctionDef | ast.ClassDef | None]:
    """Return the module that a public name of stree_core comes from, and its definition there."""
    for node in ast.walk(ast.parse((CORE / "__init__.py").read_text())):
        if isinstance(node, ast.Dict):
            modules: dict[str, list[str]] = ast.literal_eval(node)
            (home,) = (module for module, names in modules.items() if name in names)
            path = CORE / f"{home.replace('.', '/')}.py"
            return path, _definition(path, name)
    raise AssertionError(name)


def _module(path: Path) -> Iterator[str]:
    """Describe the public functions and classes of a module; of a kernel's the ops alone."""
    reference = path.with_name(f"{path.stem}_ref.py")
    package = next(folder for folder in (KERNELS, AUTOTUNE) if folder in path.parents)
    name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
    yield f"\n### {name}\n\n{_first_line(path)}\n"
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not reference.exists() or _definition(reference, node.name) is not None:
            yield from _entry(node)


def _entry(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """Describe a function, or a class with its fields and methods."""
    if isinstance(node, ast.FunctionDef):
        yield f"- `{_signature(node)}`: {_summary(node)}"
        return
    fields = [ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign)]
    yield f"- `class {node.name}`: {_summary(node)}"
    if fields:
        yield f"  - fields: {', '.join(f'`{field}`' for field in fields)}"
    for method in node.body:
        if not isinstance(method, ast.FunctionDef):
            continue
        if method.name == "__init__":
            yield f"  - `{_signature(method).replace('__init__', node.name, 1)}`"
        elif not method.name.startswith("_"):
            yield f"  - `{_signature(method)}`: {_summary(method)}"


def _signature(node: ast.FunctionDef) -> str:
    marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
    returns = ast.unparse(node.returns) if node.returns is not None else "None"
    if marks & {"property", "cached_property"}:
        return f"{node.name}: {returns}"
    return f"{node.name}({ast.unparse(node.args)}) -> {returns}"


def _summary(node: ast.FunctionDef | ast.ClassDef | ast.Module) -> str:
    return (ast.get_docstring(node) or "").split("\n", maxsplit=1)[0]


def _first_line(path: Path) -> str:
    return _summary(ast.parse(path.read_text()))


def _definition(path: Path, name: str) -> ast.FunctionDef | ast.ClassDef | None:
    """Return where a module defines a name, None for a constant."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
    return None


if __name__ == "__main__":
    main()
