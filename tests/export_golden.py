"""The golden files of tests/golden: one profile in every text format. Run it to write them anew."""

from __future__ import annotations

import tempfile
from pathlib import Path

from synthetic_profile import write_profile

from stree_autotune.export.deployment import Deployment
from stree_autotune.export.formats import FORMATS
from stree_autotune.store.library import Library

GOLDEN = Path(__file__).with_name("golden")


def golden_deployment(root: Path) -> Deployment:
    """A profile with a tree, a chain and off."""
    profile = write_profile(root)
    return Deployment(profile, Library((root,)), "org/target", "org/draft")


def golden_text(deployment: Deployment, name: str) -> str:
    """What the format says, then its notes; the digest of the trace file is left out."""
    exported = FORMATS[name].export(deployment)
    notes = "".join(f"note: {note}\n" for note in exported.notes)
    digest = deployment.profile.sources.trace.sha256
    return exported.content.decode().replace(digest, "DIGEST") + notes


def main() -> None:
    """Write every golden file."""
    for name, chosen in FORMATS.items():
        if chosen.is_text:
            with tempfile.TemporaryDirectory() as folder:
                text = golden_text(golden_deployment(Path(folder)), name)
            (GOLDEN / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    main()
