"""How hard the code is to enter: sizes, fragments, circles, and the way from a flag to a file.

    python benchmarks/structure.py

Prints one line of JSON. `files` counts the modules of the fullest folder, `p90_lines` is of all
modules, `single_importer` counts modules that exactly one other module imports, `long_functions`
those of 50 lines and more, `circles` the groups of modules that import each other in a circle,
imports inside functions included. `path` runs the main job and counts the modules that take part,
and the distinct calls (caller's module, function called) that cross from one of ours to another.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "stree_kernels": ROOT / "kernels" / "stree_kernels",
    "stree_core": ROOT / "stree_core",
    "stree_autotune": ROOT / "autotune" / "stree_autotune",
}
MAIN_JOB = ["--gpu", "h100", "--dataset", "gsm8k", "-o", "out.yaml"]
LONG_LINES = 50

_FOLLOW = """
import json, sys
import stree_autotune, stree_core, stree_kernels
folders = [p.__path__[0] for p in (stree_autotune, stree_core, stree_kernels)]
calls, modules = set(), set()
def ours(frame):
    while frame is not None:
        path = frame.f_code.co_filename
        if any(path.startswith(folder) for folder in folders):
            return path
        frame = frame.f_back
def follow(frame, event, _):
    path = frame.f_code.co_filename
    if event != "call" or not any(path.startswith(folder) for folder in folders):
        return
    name = frame.f_code.co_qualname
    if name == "<module>" or path.endswith(("__init__.py", "lazy.py")):
        return
    modules.add(path)
    caller = ours(frame.f_back)
    if caller is not None and caller != path:
        calls.add((caller, path, name))
sys.argv[0] = "stree-tune"
try:
    from stree_autotune.cli.commands import main
except ImportError:
    from stree_autotune.cli import main
sys.setprofile(follow)
try:
    main()
except SystemExit:
    pass
sys.setprofile(None)
print(json.dumps([len(modules), len(calls)]))
"""


def main() -> None:
    """Measure this checkout and print the result."""
    names, homes = {}, {}
    for package, folder in FOLDERS.items():
        homes.update(_homes(package, folder))
        paths = [path for path in folder.rglob("*.py") if path.name != "__init__.py"]
        names.update({_dotted(package, folder, path): path for path in paths})
    graph = {name: _imports(path, names, homes) - {name} for name, path in names.items()}
    result = {package: _package(package, names, graph) for package in FOLDERS}
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-c", _FOLLOW, *MAIN_JOB],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    modules, calls = json.loads(run.stdout.splitlines()[-1])
    print(json.dumps({**result, "path": {"modules": modules, "cross_module_calls": calls}}))


def _package(package: str, names: dict[str, Path], graph: dict[str, set[str]]) -> dict[str, int]:
    own = [name for name in names if name.startswith(f"{package}.")]
    paths = [names[name] for name in own]
    per_folder = Counter(path.parent for path in paths)
    lines = sorted(path.read_text().count("\n") for path in paths)
    importers = Counter(target for targets in graph.values() for target in targets)
    return {
        "modules": len(own),
        "files": max(per_folder.values()),
        "p90_lines": lines[int(0.9 * len(lines))],
        "single_importer": sum(importers[name] == 1 for name in own),
        "long_functions": sum(_long_functions(path) for path in paths),
        "circles": _circles({name: graph[name] for name in own}),
    }


def _dotted(package: str, folder: Path, path: Path) -> str:
    return ".".join([package, *path.relative_to(folder).with_suffix("").parts])


def _homes(package: str, folder: Path) -> dict[tuple[str, str], str]:
    """Return the module behind every name that a room exports, by room and name."""
    homes = {}
    for init in folder.glob("*/__init__.py"):
        room = f"{package}.{init.parent.name}"
        for node in ast.walk(ast.parse(init.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(room):
                homes.update({(room, alias.name): node.module or "" for alias in node.names})
    return homes


def _imports(path: Path, names: dict[str, Path], homes: dict[tuple[str, str], str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                home = homes.get((node.module, alias.name), node.module)
                found.add(inside if inside in names else home)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found & set(names)


def _long_functions(path: Path) -> int:
    """Count long functions; a Triton kernel is one by nature."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    return sum(
        (function.end_lineno or 0) - function.lineno + 1 >= LONG_LINES
        and not any("jit" in ast.unparse(mark) for mark in function.decorator_list)
        for function in functions
    )


def _circles(graph: dict[str, set[str]]) -> int:
    """Count the strongly connected components of more than one module."""
    reach = {name: _reach(graph, name) for name in graph}
    groups = {
        frozenset(o for o in reach[n] if n in reach.get(o, ())) for n in graph if n in reach[n]
    }
    return len(groups)


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph.get(name, ())
    return seen


if __name__ == "__main__":
    main()
