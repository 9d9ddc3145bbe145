"""Every loader of files with what follows it; each takes one file's bytes and raises StreeError.

A loader is a row of LOADERS: its name, its seeds, the form in which content is mutated, and the
function that reads one input. `Bench` holds what all of them share and is made once.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from fuzz_mutations import JSON, LINES, TENSORS, TRACE, YAML, Form
from rich.console import Console
from synthetic_data import make_table, make_trace
from synthetic_profile import PROFILE, TABLE, TRACE as TRACE_FILE, write_profile
from tiny_models import FAMILIES, tiny_mamba2, word_tokenizer

from stree_autotune.cli.listing import list_rows, print_rows
from stree_autotune.cost.table_cost import read_runtime, runtime_cost
from stree_autotune.export.deployment import Deployment
from stree_autotune.export.formats import FORMATS
from stree_autotune.report.page import make_section, render
from stree_autotune.search.certificate import (
    Certificate,
    DepthBound,
    Line,
    load_certificate,
    save_certificate,
)
from stree_autotune.share.files import own_files
from stree_autotune.share.index import INDEX
from stree_autotune.share.remote import pull, push
from stree_autotune.store.gpu_spec import load_gpu_spec
from stree_autotune.store.library import Library, RuntimeSource, shipped_root
from stree_autotune.store.origin import provenance
from stree_autotune.store.prompts import load_prompts
from stree_autotune.store.show import print_profile, print_profile_json
from stree_autotune.trace.file import load_trace, save_trace
from stree_autotune.trace.tree_walk import conditional_rates, marginal_rates, walk
from stree_core.drafting.checkpoint import load_model, random_model
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig, needed_positions
from stree_core.engine.stop import StopRule
from stree_core.errors import StreeError
from stree_core.files import dump_yaml, sha256_of
from stree_core.models.backend import load_backend
from stree_core.models.model import Model
from stree_core.models.source import ModelSource, folder_source, spec_source
from stree_core.models.text import load_text_codec
from stree_core.profile import Profile, Sampling, load_profile
from stree_core.tree import Tree

CPU = torch.device("cpu")
SMALL_BYTES = 4 << 20
REPORTED = 8
TEXTS = ["w1 w2 w3", "", "Tom has 3 apples.", "\x1b[2J é \U0001f333"]
CHAINS = tuple(Tree.chain(length) for length in (0, 1, 4))
PAIR = ("toy-target", "toy-draft")


class Loader(NamedTuple):
    """One kind of file; `read` raises StreeError for what it refuses, and nothing else."""

    name: str
    seeds: Callable[[Bench], Sequence[bytes]]
    form: Form | None
    read: Callable[[Bench, bytes], None]


@dataclass(frozen=True)
class Bench:
    """Folders to put inputs into, and the models that accepted ones are decoded with."""

    root: Path

    @cached_property
    def data(self) -> Path:
        """A data folder with a profile, its table, its trace and a certificate."""
        folder = self.root / "data"
        write_profile(folder)
        trace = folder / TRACE_FILE
        bound = DepthBound(lines=(Line(900.0, 2.5), Line(700.0, 1.0)))
        certificate = Certificate(
            trace_sha256=sha256_of(trace),
            num_positions=3840,
            chains=(2400, 1900, 1700),
            stars=(2400, 2300),
            bounds=(DepthBound(max_depth=4, lines=bound.lines), bound),
            provenance=provenance(0),
        )
        save_certificate(certificate, trace)
        shutil.copytree(shipped_root() / "gpus", folder / "gpus")
        return folder

    @cached_property
    def library(self) -> Library:
        """The data folder alone."""
        return Library((self.data,))

    @cached_property
    def model_folder(self) -> Path:
        """A tiny model's folder with a tokenizer."""
        folder = self.root / "model"
        tiny_mamba2(layers=1).save_pretrained(folder)
        word_tokenizer().save(str(folder / "tokenizer.json"))
        return folder

    @cached_property
    def model(self) -> Model:
        """That model, loaded."""
        return load(folder_source(self.model_folder))

    @cached_property
    def shelf(self) -> Path:
        """A library to pull from."""
        folder = self.root / "shelf"
        push(str(folder), own_files([self.data], self.library), force=False)
        return folder

    @cached_property
    def configs(self) -> tuple[bytes, ...]:
        """The config.json of every family."""
        found = []
        for name, make in FAMILIES.items():
            folder = self.root / "configs" / name
            make().config.save_pretrained(folder)
            found.append((folder / "config.json").read_bytes())
        return tuple(found)

    def place(self, name: str, data: bytes) -> Path:
        """Write an input into a folder of its own."""
        path = self.root / "input" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    @contextmanager
    def in_model(self, name: str, data: bytes) -> Iterator[Path]:
        """Have an input as one file of the model's folder."""
        path = self.model_folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(data)
        try:
            yield self.model_folder
        finally:
            if before is None:
                path.unlink()
            else:
                path.write_bytes(before)


def load(source: ModelSource) -> Model:
    """Load a model's own weights on the CPU."""
    return load_model(source, load_backend("torch", CPU), torch.float32, CPU)


def decode_step(model: Model, tree: Tree) -> None:
    """Decode a step of a tree, the model being its own draft."""
    stop = StopRule(2, model.shape.eos_token_ids)
    positions = needed_positions(3, 2, [tree])
    engine = Engine(model, model, tree, EngineConfig(1, positions))
    generate(engine, [[1, 2, 3]], stop)


def read_profile(bench: Bench, data: bytes) -> None:
    """Load, show, export to every format, report and decode a step."""
    profile = load_profile(bench.place("profile.yaml", data))
    _show(profile)
    for chosen in FORMATS.values():
        with suppress(StreeError):
            chosen.export(Deployment(profile, bench.library, *PAIR))
    # with its sources now and then: searching for every input would take most of the time
    searched = zlib.crc32(data) % REPORTED == 0
    library = bench.library if searched else Library((bench.root / "none",))
    render([make_section(profile, "profile.yaml", "one", library)])
    decode_step(bench.model, profile.row_for(1).tree.build())


def _show(profile: Profile) -> None:
    text = io.StringIO()
    print_profile(profile, Console(file=text, width=200, markup=False))
    assert not set(text.getvalue()) & set("\x1b\x07\x9b"), "a control character is shown"
    with redirect_stdout(io.StringIO()):
        print_profile_json(profile)


def read_table(bench: Bench, data: bytes) -> None:
    """Load, take costs by every rule and on another GPU, and list."""
    path = bench.place(f"runtime/{Path(TABLE).name}", data)
    for gpu, sampling in (("h200", Sampling()), ("h100", Sampling(rule="mss", temperature=1.0))):
        with suppress(StreeError):
            inputs = read_runtime(bench.library, RuntimeSource(path), gpu)
            cost, _ = runtime_cost(inputs, sampling, 1024)
            for tree in CHAINS:
                with suppress(StreeError):
                    cost.step_ms(inputs.table.batch_sizes[0], tree, 1.5)
    runtime_cost(read_runtime(bench.library, RuntimeSource(path), "h200"), Sampling(), 1024)
    _list(bench)


def _list(bench: Bench) -> None:
    text = io.StringIO()
    print_rows(list_rows(Library((bench.root / "input",))), Console(file=text, markup=False))
    assert not set(text.getvalue()) & set("\x1b\x07\x9b"), "a control character is listed"


def read_trace(bench: Bench, data: bytes) -> None:
    """Load, walk trees and take rates."""
    trace = load_trace(bench.place("t.safetensors", data))
    for tree in CHAINS:
        walk(trace, tree)
    conditional_rates(marginal_rates(trace, 8))


def read_certificate(bench: Bench, data: bytes) -> None:
    """Load beside its trace, and bound tokens per step."""
    trace = bench.place("certified.safetensors", (bench.data / TRACE_FILE).read_bytes())
    bench.place("certified.certificate.yaml", data)
    certificate = load_certificate(trace)
    assert certificate is not None
    for num_nodes, depth in ((1, 1), (4, 2), (8, 8), (255, 3)):
        certificate.least_starts(num_nodes, depth)
    certificate.most_tokens_per_s(_Cost(), 4, 8)
    certificate.most_tokens_per_step  # noqa: B018 - computed when asked for


class _Cost:
    def least_ms(self, batch_size: int, num_nodes: int, depth: int, _: float) -> float:
        return 1.0 + 0.1 * num_nodes + 0.3 * depth + 0.01 * batch_size


def read_gpu_spec(bench: Bench, data: bytes) -> None:
    """Load, and estimate a table for the GPU."""
    spec = load_gpu_spec(bench.place("gpus/new.yaml", data))
    spec.likeness(load_gpu_spec(bench.data / "gpus" / "h200.yaml"))
    library = Library((bench.root / "input", bench.data))
    with suppress(StreeError):
        inputs = read_runtime(library, RuntimeSource(bench.data / TABLE), "new")
        runtime_cost(inputs, Sampling(), 1024)


def read_shape(bench: Bench, data: bytes) -> None:
    """Load, and count what a model of the shape takes."""
    source = spec_source(bench.place("shape.yaml", data))
    _build(source)


def _build(source: ModelSource) -> None:
    """Draw random weights for a small shape, and decode a step."""
    if source.shape.weight_bytes(4) < SMALL_BYTES:
        backend = load_backend("torch", CPU)
        decode_step(random_model(source.shape, backend, torch.float32, CPU), Tree.chain(2))


def read_index(bench: Bench, data: bytes) -> None:
    """Pull from a library that has this index."""
    shelf = bench.root / "fuzzed-shelf"
    if not shelf.exists():
        shutil.copytree(bench.shelf, shelf)
    (shelf / INDEX).write_bytes(data)
    target = bench.root / "pulled"
    shutil.rmtree(target, ignore_errors=True)
    pull(str(shelf), target, [], force=True)


def read_config(bench: Bench, data: bytes) -> None:
    """Read a model's shape, and decode a step of a small one."""
    _build(folder_source(bench.place("family/config.json", data).parent))


def read_generation_config(bench: Bench, data: bytes) -> None:
    """Read a model's end tokens, and decode a step with them."""
    with bench.in_model("generation_config.json", data) as folder:
        decode_step(load(folder_source(folder)), CHAINS[1])


def read_weight_index(bench: Bench, data: bytes) -> None:
    """Load weights by an index of shards."""
    with bench.in_model("model.safetensors.index.json", data) as folder:
        load(folder_source(folder))


def read_weights(bench: Bench, data: bytes) -> None:
    """Load weights, and decode a step."""
    with bench.in_model("model.safetensors", data) as folder:
        decode_step(load(folder_source(folder)), CHAINS[1])


def read_tokenizer(bench: Bench, data: bytes) -> None:
    """Encode texts and decode tokens."""
    path = bench.place("tokenizer/tokenizer.json", data)
    codec = load_text_codec(path.parent)
    for tokens in codec.encode(TEXTS):
        codec.decode(tokens)
    codec.decode([0, 1, 95, 10**6])


def read_prompts(bench: Bench, data: bytes) -> None:
    """Read prompts, and encode them."""
    texts = load_prompts("x", str(bench.place("prompts.jsonl", data)))
    load_text_codec(bench.model_folder).encode(texts.texts)


def _weight_index(bench: Bench) -> list[bytes]:
    names = json.loads(_header(bench))
    shards = {name: "model.safetensors" for name in names if name != "__metadata__"}
    return [json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}).encode()]


def _header(bench: Bench) -> bytes:
    data = (bench.model_folder / "model.safetensors").read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _table_seed(bench: Bench) -> list[bytes]:
    table = make_table(target=PAIR[0], draft=PAIR[1], batch_sizes=(1, 4))
    return [dump_yaml(table), (bench.data / TABLE).read_bytes()]


def _trace_seed(bench: Bench) -> list[bytes]:
    path = bench.root / "seed.safetensors"
    save_trace(make_trace(*PAIR, num_prompts=4, length=12), path)
    return [path.read_bytes()]


def _shipped(folder: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((shipped_root() / folder).glob("*.yaml"))]


PROMPTS = b"""{"prompt": "w1 w2"}
{"prompt": "w3", "answer": "w4"}
"""
CONVERSATIONS = b"""{"messages": [{"role": "user", "content": "w5"}]}
{"messages": [{"role": "system", "content": "w7"}, {"role": "user", "content": "w8"}]}
"""

LOADERS = (
    Loader(
        "profile", lambda b: [(b.data / PROFILE).read_bytes(), *_shipped("tuned")], YAML,
        read_profile,
    ),
    Loader("runtime table", _table_seed, YAML, read_table),
    Loader("trace", _trace_seed, TRACE, read_trace),
    Loader(
        "certificate",
        lambda b: [(b.data / TRACE_FILE).with_suffix(".certificate.yaml").read_bytes()],
        YAML, read_certificate,
    ),
    Loader("GPU spec", lambda _: _shipped("gpus"), YAML, read_gpu_spec),
    Loader("shape spec", lambda _: _shipped("shapes"), YAML, read_shape),
    Loader("library index", lambda b: [(b.shelf / INDEX).read_bytes()], JSON, read_index),
    Loader("config.json", lambda b: b.configs, JSON, read_config),
    Loader(
        "generation_config.json",
        lambda _: [b'{"eos_token_id": [0, 5], "bos_token_id": 0}', b'{"eos_token_id": 3}'],
        JSON, read_generation_config,
    ),
    Loader("weight index", _weight_index, JSON, read_weight_index),
    Loader(
        "safetensors weights",
        lambda b: [(b.model_folder / "model.safetensors").read_bytes()], TENSORS, read_weights,
    ),
    Loader(
        "tokenizer.json",
        lambda b: [(b.model_folder / "tokenizer.json").read_bytes(), *TOKENIZERS], JSON,
        read_tokenizer,
    ),
    Loader("prompts", lambda _: [PROMPTS, CONVERSATIONS], LINES, read_prompts),
)  # fmt: skip


def _tokenizer(model: dict[str, object], **parts: object) -> bytes:
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    added = {"id": 9, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    content = {"version": "1.0", "added_tokens": [added], **empty, **parts, "model": model}
    return json.dumps(content).encode()


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZERS: tuple[bytes, ...] = (
    _tokenizer(
        {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": {"a": 0, "b": 1, "ab": 2, "w": 3, "1": 4},
            "merges": [["a", "b"]],
        },
        pre_tokenizer=_BYTES, decoder=_BYTES,
    ),
    _tokenizer(
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["▁w", -2.0]],
         "byte_fallback": False},
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                       "split": True},
    ),
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the loaders' log lines and the libraries' warnings off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
