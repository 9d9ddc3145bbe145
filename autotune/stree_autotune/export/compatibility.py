"""Which servers run which pairs, as far as it is known, each with its source.

docs/serve-it.md holds the table, and an export prints the rows that its profile may meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

ANY = "any"


class Known(NamedTuple):
    """One row: what happens, and who says so; `names` are parts of names that tell a family."""

    server: Literal["vllm", "sglang"]
    version: str
    target: str
    draft: str
    result: Literal["works", "fails", "unverified"]
    what: str
    source: str
    names: tuple[str, ...] = ()
    is_draft: bool = False


MAMBA2 = ("mamba2", "mamba-2", "mamba_2")
HYBRIDS = ("falcon-h1", "falcon_h1", "granite-4.0-h", "granite-4-h", "zamba2")

KNOWN: tuple[Known, ...] = (
    Known(
        "vllm",
        "0.32.0, CPU",
        "Llama",
        "draft model",
        "works",
        "greedy; K from the table is honoured",
        "run: `make server-test`",
    ),
    Known(
        "vllm",
        "0.32.0, CPU",
        "Llama",
        "draft model, temperature 1",
        "unverified",
        "positions after the first never accepted in one run where greedy accepted 28 %",
        "run once",
    ),
    Known(
        "vllm",
        "0.32.0, CPU",
        "Mamba hybrids",
        ANY,
        "fails",
        "wrong text: the convolution's state ignores how many drafts were accepted",
        "run",
    ),
    Known(
        "vllm",
        "0.33.0, runner V1",
        ANY,
        "Mamba2",
        "fails",
        "a Mamba2 draft crashes at its first proposal (is_prefilling is None)",
        "run",
        MAMBA2,
        True,
    ),
    Known(
        "vllm",
        "0.33.0, runner V2",
        ANY,
        "Mamba2",
        "unverified",
        "a Mamba2 draft starts, but no code rolls its state back after a rejection",
        "source read",
        MAMBA2,
        True,
    ),
    Known(
        "vllm",
        "0.33.0",
        "Falcon-H1, Granite hybrids, Zamba2",
        ANY,
        "fails",
        "may not start with any speculation: its state's size leaves out the drafts",
        "vllm-project/vllm#47635, #57721",
        HYBRIDS,
    ),
    Known(
        "vllm",
        "0.23 and later",
        "Bamba",
        ANY,
        "fails",
        "BambaForCausalLM was removed",
        "release notes of 0.23",
        ("bamba",),
    ),
    Known(
        "vllm",
        "0.33.0",
        ANY,
        "table by batch size",
        "works",
        "dropped under data parallelism; CUDA graphs become piecewise with runner V1",
        "vllm/config/vllm.py",
    ),
    Known(
        "sglang",
        "0.5.23",
        ANY,
        ANY,
        "works",
        "max_running_requests is 48 with speculation unless it is set: rows above are unreachable",
        "source read",
    ),
    Known(
        "sglang",
        "0.5.23",
        ANY,
        "table by batch size",
        "works",
        "batches are padded to a CUDA graph's size before the lookup: with keys 1 and 6, batch 5 "
        "takes row 6",
        "source read",
    ),
    Known(
        "sglang",
        "0.5.23",
        "Mamba hybrids",
        "top-k above 1",
        "fails",
        "not with trtllm_mha; page size 1 unless flashinfer, fa3 or triton attends; for the state "
        "see --mamba-radix-cache-strategy",
        "source read",
    ),
)
DEFAULT_REQUESTS = 48


def model_notes(server: str, target: str, draft: str) -> Iterator[str]:
    """Yield what is known to go wrong for a pair on a server, told by the models' names."""
    for known in KNOWN:
        name = (draft if known.is_draft else target).lower()
        if known.server == server and any(part in name for part in known.names):
            yield f"{known.result} on {server} {known.version}: {known.what} ({known.source})"


def limit_notes(server: str, largest: int) -> Iterator[str]:
    """Yield SGLang's limit where a profile goes beyond it."""
    if server == "sglang" and largest > DEFAULT_REQUESTS:
        yield (
            f"SGLang runs at most {DEFAULT_REQUESTS} requests at once when it speculates; pass "
            f"--max-running-requests {largest} to reach the profile's rows above that"
        )
    if server == "sglang":
        yield (
            "SGLang pads a batch to the size of a CUDA graph before it looks its row up; give rows "
            "the sizes of --cuda-graph-bs"
        )


def markdown_table() -> str:
    """Return the table for docs/serve-it.md."""
    lines = [
        "| server | version | target | draft | result | what happens | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for known in KNOWN:
        cells = (*known[:5], known.what, known.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
