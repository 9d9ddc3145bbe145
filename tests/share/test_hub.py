"""Pulling from the hub: its own driver, talking to a server that answers as the hub does."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic_profile import NAME, PROFILE, TABLE, TRACE, write_profile

from stree_autotune.share.files import named_files
from stree_autotune.share.remote import push
from stree_autotune.store.library import Library

REPOSITORY = "datasets/me/trees"


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """The address of a hub whose only repository is a library with one profile."""
    data, shelf = tmp_path / "data", tmp_path / "shelf"
    write_profile(data)
    push(str(shelf), named_files([NAME], Library((data,))), force=False)

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path == f"api/{REPOSITORY}":
                self.answer(json.dumps({"id": "me/trees", "sha": "a" * 40}).encode())
            elif path.startswith(f"api/{REPOSITORY}/tree/main"):
                folder = shelf / path.partition("/tree/main")[2].strip("/")
                self.answer(json.dumps(entries(shelf, folder)).encode())
            elif path.startswith(f"{REPOSITORY}/resolve/main/"):
                self.answer((shelf / path.partition("/resolve/main/")[2]).read_bytes())
            else:
                self.answer(b"", 404)

        def answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def entries(root: Path, folder: Path) -> list[dict[str, object]]:
    """The hub's list of a folder."""
    return [
        {
            "type": "file" if path.is_file() else "directory",
            "path": path.relative_to(root).as_posix(),
            "size": path.stat().st_size,
            "oid": "b" * 40,
        }
        for path in sorted(folder.iterdir())
    ]


SCRIPT = """
import sys
from stree_autotune.cli.commands import main
urls = sys.argv[1:]
for url in urls:
    sys.argv = ["stree-tune", "pull", url]
    try:
        main()
    except SystemExit as left:
        print("code", left.code)
"""


def test_a_profile_comes_from_the_hub_with_its_sources(endpoint: str, tmp_path: Path) -> None:
    """In a process of its own, because the driver reads its settings when it is imported."""
    there = tmp_path / "there"
    there.mkdir()
    variables = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HOME": str(there)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"hf://{REPOSITORY}", "hf://datasets/me/nothing"],
        cwd=there,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    *pulled, first, second = run.stdout.splitlines()
    assert (first, second) == ("code 0", "code 2")
    assert set(pulled) == {f"stree-data/{path}" for path in (PROFILE, TABLE, TRACE)}
    for path in (PROFILE, TABLE, TRACE):
        assert (there / "stree-data" / path).read_bytes() == (tmp_path / "data" / path).read_bytes()
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: hf://datasets/me/nothing cannot be read")
