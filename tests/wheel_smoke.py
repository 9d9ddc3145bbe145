"""Build sdist and wheel, install in a clean environment without torch, tune and report there.

Run as a script (`make wheel`); needs a package index for the dependencies of the tuning path. With
`--sdist` the sdist is installed and tried as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TUNE_DEPENDENCIES = (
    "numpy",
    "scipy",
    "optuna",
    "pyyaml",
    "pydantic",
    "typer",
    "rich",
    "safetensors",
    "jinja2",
)
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "stree-data", "stree-profile.yaml"
)


def main() -> None:
    """Build, install, compare contents, run; exit with a sentence when a step fails."""
    if not list((ROOT / "profiles" / "tuned").glob("*.yaml")):
        sys.exit("wheel: profiles/tuned holds no profile, so there is nothing to ship; tune first")
    with tempfile.TemporaryDirectory(prefix="stree-wheel-") as folder:
        scratch = Path(folder)
        sdist, wheel = build(scratch)
        check_sdist(sdist)
        check_contents(wheel)
        binaries = install(wheel, scratch)
        try_out(binaries, scratch / "of-wheel")
        if "--sdist" in sys.argv[1:]:
            # pip builds it in an environment of its own, as a user's pip does
            reinstall = ("--no-deps", "--force-reinstall", "--no-cache-dir", sdist)
            run(binaries / "python", "-m", "pip", "install", "--quiet", *reinstall)
            try_out(binaries, scratch / "of-sdist")
    sys.stdout.write("wheel ok\n")


def build(scratch: Path) -> tuple[Path, Path]:
    """Build the sdist from a copy without leftovers of earlier builds, the wheel from the sdist."""
    source, out = scratch / "source", scratch / "dist"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def check_sdist(sdist: Path) -> None:
    """Compare the sdist with the checkout: what is tracked, but for dot files, is in it."""
    listed = run("git", "-C", ROOT, "ls-files", "-z").split("\0")
    tracked = {name for name in listed if name and not name.startswith(".")}
    with tarfile.open(sdist) as archive:
        members = (member.name.partition("/")[2] for member in archive if member.isfile())
        packed = set(members)
    made = {"PKG-INFO", "setup.cfg"}
    extra = {name for name in packed - tracked - made if ".egg-info/" not in name}
    if tracked - packed or extra:
        sys.exit(f"sdist: it lacks {sorted(tracked - packed)} and adds {sorted(extra)}")


def check_contents(wheel: Path) -> None:
    """Compare the wheel with the package folders: the same modules and data files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    expected = {
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for name, folder in project["tool"]["setuptools"]["package-dir"].items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    if packed != expected:
        sys.exit(f"wheel: these differ from the checkout: {sorted(packed ^ expected)}")


def install(wheel: Path, scratch: Path) -> Path:
    """Install the wheel and what tuning needs into a new environment; return its bin folder."""
    venv.create(scratch / "venv", with_pip=True)
    binaries = scratch / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = (binaries / "python", "-m", "pip", "install", "--quiet")
    run(*pip, "--constraint", ROOT / "constraints.txt", *TUNE_DEPENDENCIES)
    run(*pip, "--no-deps", wheel)
    return binaries


def try_out(binaries: Path, folder: Path) -> None:
    """Show every shipped profile and tune, in a new folder and without torch."""
    folder.mkdir()
    absent = "import importlib.util as u; assert u.find_spec('torch') is None, 'torch is there'"
    run(binaries / "python", "-c", absent, folder=folder)
    named = "import importlib.metadata as m; print(m.version('stree-tune'))"
    run(binaries / "python", "-c", named, folder=folder)
    shown = run(binaries / "stree-tune", "show", folder=folder)
    tuned = run(binaries / "stree-tune", "--gpu", "h100", "--dataset", "gsm8k", folder=folder)
    sys.stdout.write(tuned)
    run(binaries / "stree-tune", "report", "stree-profile.yaml", folder=folder)
    if "<svg" not in (folder / "report.html").read_text():
        sys.exit("wheel: the report must have figures, it has none")
    title = tuned.splitlines()[0]
    if "h100 (estimated from h200)" not in title or not (folder / "stree-profile.yaml").is_file():
        sys.exit(f"wheel: tuning must print an estimate and write a profile, its title is {title}")
    num_profiles = len(list((ROOT / "profiles" / "tuned").glob("*.yaml")))
    if shown.count("gain over off") != num_profiles:
        sys.exit(f"wheel: show must print {num_profiles} profiles, it printed:\n{shown}")


def run(*command: str | Path, folder: Path | None = None) -> str:
    """Run a command without this checkout on its path; return stdout, exit when it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(part) for part in command]
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"wheel: {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
