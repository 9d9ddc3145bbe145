"""The set of measurements: each results file, its command, and the sources its numbers depend on.

A source is what changes a number when it changes: kernels, the passes and steps that are timed, the
benchmark itself, tables and traces that it reads. What only opens models, writes files or prints is
none. References are sources of what runs on a CPU alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fingerprint

RESULTS = Path(__file__).resolve().parent / "results"
MINUTES = 1.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One results file: `NAME-GPU.json`, or `NAME.json` where no GPU is needed.

    `minutes` is an estimate, used until the file itself says how long its run took. `peers` are
    flags that take a file or folder of other projects, each with its glob in a folder of unpacked
    wheels.
    """

    name: str
    script: str
    sources: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    minutes: float = MINUTES
    gpu: bool = True
    peers: tuple[tuple[str, str], ...] = ()

    def file(self, gpu: str) -> str:
        """Return the name of the results file on a GPU."""
        return f"{self.name}-{gpu}.json" if self.gpu else f"{self.name}.json"

    def makes(self, file: str) -> bool:
        """Say whether a results file is this measurement's, on any GPU."""
        pattern = f"{re.escape(self.name)}-[a-z0-9]+" if self.gpu else re.escape(self.name)
        return re.fullmatch(pattern + r"\.json", file) is not None

    def hashes(self, root: Path = fingerprint.ROOT) -> fingerprint.Hashes:
        """Return the hashes of the sources in a checkout."""
        return fingerprint.hashes(self.sources, root)


def bench(*names: str) -> tuple[str, ...]:
    """Return modules beside this one."""
    return tuple(f"benchmarks/{name}.py" for name in names)


def _kernels(*rooms: str) -> tuple[str, ...]:
    return (*(f"kernels/stree_kernels/{room}/*.py" for room in rooms), "-kernels/**/*_ref.py")


def _core(room: str, *names: str) -> tuple[str, ...]:
    return tuple(f"stree_core/{room}/{name}.py" for name in names)


def _tuner(room: str, *names: str) -> tuple[str, ...]:
    return tuple(f"autotune/stree_autotune/{room}/{name}.py" for name in names)


def _tables(*pairs: str) -> tuple[str, ...]:
    return tuple(f"profiles/runtime/h200--{pair}.yaml" for pair in pairs)


TIMING = (*bench("timing"), *_tuner("probe", "timing"))
STEPPER = _tuner("probe", "plan", "stepper", "timing")
SCAN = (
    *_kernels("launch"),
    *(
        f"kernels/stree_kernels/ssm/{name}.py"
        for name in ("device_functions", "token_scan_kernel", "tree_scan", "tree_scan_kernel")
    ),
)
CORE_PASS = (
    *_core("models", "cache", "cuda_graph", "model", "row_block", "state_flush", "weights"),
    *_core("families", "model_shape"),
)
PASS = (
    *_kernels("launch", "linear", "routing", "ssm", "attention"),
    "-kernels/stree_kernels/*/prompt_*.py",
    *CORE_PASS,
)
"""A forward pass but for delta layers and FP8, without what hands tensors on to kernels."""
CORE_STEP = (
    *CORE_PASS,
    *_core("drafting", "draft", "mtp_draft", "tree_plan"),
    *_core("engine", "decode", "engine", "rules", "sampling", "session", "step", "step_result"),
)
STEP = (*PASS, *_kernels("sampling"), *CORE_STEP)
"""A whole step of an engine."""
CORE_PROMPT = (
    *_core("models", "prompt_pass"),
    *_core("drafting", "prefill"),
    *_core("engine", "prompt_queue"),
)
PROMPT = (
    *(f"kernels/stree_kernels/{path}.py" for path in ("ssm/prompt_*", "attention/prompt_*")),
    "-kernels/**/*_ref.py",
    *CORE_PROMPT,
)
DELTA = (*_kernels("launch"), *_kernels("delta"))
FP8 = _kernels("fp8")
STEP_COST = (
    *_tuner("cost", "layout", "overhead", "step_cost", "terms", "tree_shape"),
    *_tuner("store", "step_rule"),
)
"""Steps predicted from a table as it is."""
COST = (*STEP_COST, *_tuner("cost", "table_cost"))
WALK = _tuner("trace", "tree_walk")
SEARCH = _tuner("search", "path_counts", "study", "tree_solver", "tree_space")
VERDICT = _tuner("search", "bootstrap", "cross_fit", "verdict")
LIVE = _tuner("live", "measure")
MTP = (
    *bench("mtp", "traced_pair"),
    *STEP,
    *DELTA,
    *COST,
    *WALK,
    *LIVE,
    *_tuner("live", "speed"),
    *_tuner("trace", "record", "depth_ranks"),
    *_tuner("probe", "plan", "run"),
)
PROBE = ("autotune/stree_autotune/probe/*.py", "-autotune/stree_autotune/probe/report.py")
ON_CPU = (
    "kernels/stree_kernels/**/*_ref.py", "kernels/stree_kernels/**/rows.py",
    "kernels/stree_kernels/linear/deferred_norm.py", *CORE_STEP, *CORE_PROMPT,
)  # fmt: skip
"""Decoding by the references: no kernel takes part."""
DEMO, DEMO_MTP = "demo-target--demo-draft", "demo-target--mtp"
SMALL, LARGE = "mamba2-2.7b--mamba2-130m", "mamba-in-llama-8b--mamba2-distilled-small"
GSM8K = f"profiles/traces/{DEMO}--gsm8k--greedy.safetensors"
DEMO_MODELS = ("profiles/models/demo-*/*.safetensors",)
SHIPPED_SHAPES = (*SMALL.split("--"), *LARGE.split("--"))
HEADED_SHAPES = ("nemotron-3-nano-mtp", "qwen3.5-27b")
FITTING_SHAPES = (
    "mamba2-130m", "mamba2-1.3b", "mamba2-2.7b", "granite-4-h-1b", "mamba-in-llama-3b",
    "mamba-in-llama-8b", "nemotron-h-8b", "bamba-9b-v2", "falcon-h1-7b", "zamba2-7b",
    "qwen3.5-4b", "qwen3.5-27b",
)  # fmt: skip

# In order of worth: what comes first is run first.
MEASUREMENTS = (
    Measurement(
        "tables", "shipped", minutes=4, arguments=("tables",),
        sources=(
            *bench("shipped"), *PROBE, *STEP, *DELTA, *FP8, *DEMO_MODELS,
            *(
                f"profiles/shapes/{name}.yaml"
                for name in (*SHIPPED_SHAPES, *HEADED_SHAPES, "qwen3.5-4b")
            ),
        ),
    ),
    Measurement(
        "live", "live", minutes=3, arguments=("--write",),
        sources=(
            *bench("live", "prediction", "traced_pair"), *STEP, *COST, *WALK, *LIVE,
            *_tuner("live", "speed"), *_tables("demo-*", "mamba*"), "profiles/tuned/h200--*.yaml",
            "profiles/traces/*--greedy.safetensors", *DEMO_MODELS,
        ),
    ),
    Measurement(
        "kernels", "kernels", minutes=2.5,
        peers=(("--sglang", "**/mamba_ssm.py"), ("--flashinfer", "fi_libs")),
        sources=(
            *bench("kernels", "candidates", "layer_data", "bench_shapes", "peers"),
            *bench("flashinfer_peer"), *TIMING, *SCAN,
        ),
    ),
    Measurement(
        "forward", "forward", minutes=2.5,
        arguments=(
            "--models", "mamba2-2.7b", "mamba-in-llama-8b", "qwen3.5-27b",
            "--tokens", "1", "2", "4", "8", "16", "64", "--contexts", "1024",
        ),
        sources=(*bench("forward", "bench_shapes"), *TIMING, *PASS, *DELTA),
    ),
    Measurement(
        "prediction", "prediction", minutes=4,
        arguments=("--rounds", "2"),
        sources=(
            *bench("prediction", "traced_pair"), *STEP, *COST, *WALK, *LIVE,
            *_tuner("live", "speed"), *_tables(DEMO, SMALL, LARGE), GSM8K, *DEMO_MODELS,
            f"profiles/traces/{DEMO}--demo--greedy.safetensors",
        ),
    ),
    Measurement(
        "regret", "regret", minutes=4,
        sources=(
            *bench("regret"), *STEP, *COST, *WALK, *SEARCH, *VERDICT, *LIVE,
            *_tuner("live", "corrected_cost", "search", "tuning"), *STEPPER,
            *_tuner("search", "tuning"),
            *_tables(DEMO, SMALL), GSM8K, *DEMO_MODELS,
            f"profiles/traces/{DEMO}--demo--greedy.safetensors",
        ),
    ),
    Measurement(
        "delta", "delta", minutes=2, peers=(("--peers", "."),),
        sources=(
            *bench("delta", "delta_candidates", "delta_data", "delta_peers"),
            *bench("candidates", "layer_data", "bench_shapes"), *TIMING, *DELTA,
        ),
    ),
    Measurement(
        "mtp", "mtp", minutes=3,
        arguments=("--pairs", "demo", "demo-gdn", "--rules", "greedy", "mss"),
        sources=(
            *MTP, *_tables(DEMO, DEMO_MTP), *DEMO_MODELS,
        ),
    ),
    Measurement(
        "mtp-shapes", "mtp", minutes=3,
        arguments=("--pairs", "nemotron-3-nano-mtp", "qwen3.5-27b", "--tokens", "64"),
        sources=(
            *MTP, *(f"profiles/shapes/{name}.yaml" for name in HEADED_SHAPES),
        ),
    ),
    Measurement(
        "decode", "decode", minutes=2,
        sources=(
            *bench("decode", "traced_pair"), *TIMING, *STEPPER, *STEP, *LIVE, GSM8K, *DEMO_MODELS,
        ),
    ),
    Measurement(
        "lossless", "lossless", minutes=1.5,
        arguments=(
            "--device", "cuda", "--dtype", "bfloat16", "--prompts", "128", "--tokens", "256",
        ),
        sources=(*bench("lossless"), "tests/margin.py", *STEP, *PROMPT, *DEMO_MODELS),
    ),
    Measurement(
        "draft", "draft",
        sources=(
            *bench("draft"), *STEPPER, *PASS, *_kernels("sampling"),
            "kernels/stree_kernels/fp8/experts.py",
            *_core("drafting", "draft", "mtp_draft", "tree_plan"), *_core("engine", "step"),
        ),
    ),
    Measurement(
        "prefill", "prefill", minutes=1.5,
        sources=(*bench("prefill", "bench_shapes"), *TIMING, *PASS, *PROMPT),
    ),
    Measurement(
        "generation", "generation", minutes=1.5,
        sources=(*bench("generation", "peers"), *TIMING, *STEP, *PROMPT),
    ),
    Measurement(
        "shapes", "forward", minutes=2.5,
        arguments=(
            "--models", *FITTING_SHAPES,
            "--batches", "1", "8", "32", "--tokens", "1", "4", "16", "64", "--contexts", "1024",
        ),
        sources=(
            *bench("forward", "bench_shapes"), *TIMING, *PASS, *DELTA,
            *(f"profiles/shapes/{name}.yaml" for name in FITTING_SHAPES),
        ),
    ),
    Measurement(
        "fp8", "fp8", minutes=2,
        sources=(*bench("fp8", "forward", "bench_shapes"), *TIMING, *PASS, *FP8, *DELTA),
    ),
    Measurement(
        "delta-prompts", "delta_prompts", peers=(("--peers", "."),),
        sources=(
            *bench("delta_prompts", "delta_data", "delta_peers", "layer_data", "bench_shapes"),
            *TIMING, *DELTA,
        ),
    ),
    Measurement(
        "shared-memory", "shared_memory", minutes=1.5,
        sources=(
            *bench("shared_memory", "traced_pair", "candidates", "layer_data", "bench_shapes"),
            *TIMING, *STEPPER, *STEP, *LIVE,
        ),
    ),
    Measurement(
        "two-speeds", "two_speeds", minutes=1.5,
        sources=(*bench("two_speeds", "traced_pair"), *STEPPER, *STEP, *PROMPT, *LIVE),
    ),
    Measurement(
        "sampled", "sampled", minutes=2,
        sources=(*bench("sampled"), *STEP, *PROMPT, *DEMO_MODELS),
    ),
    Measurement(
        "sampled-walk", "sampled_walk", minutes=1.5,
        sources=(
            *bench("sampled_walk"), *STEP, *WALK, *_tuner("trace", "record"), *DEMO_MODELS,
        ),
    ),
    Measurement(
        "profiles", "shipped", gpu=False, minutes=2, arguments=("profiles",),
        sources=(
            *bench("shipped"), "profiles/gpus/*.yaml", "autotune/stree_autotune/search/*.py",
            "autotune/stree_autotune/cost/*.py", *WALK, *_tables("*"), "profiles/traces/*",
        ),
    ),
    Measurement(
        "tables-cpu", "shipped", gpu=False, minutes=6, arguments=("tables", "--device", "cpu"),
        sources=(
            *bench("shipped"), *PROBE, *ON_CPU, *DEMO_MODELS,
        ),
    ),
    Measurement(
        "lossless-cpu", "lossless", gpu=False, minutes=25,
        arguments=("--device", "cpu", "--prompts", "128", "--tokens", "140", "--processes", "16"),
        sources=(*bench("lossless"), "tests/margin.py", *ON_CPU, *DEMO_MODELS),
    ),
    Measurement(
        "lossless-mtp-cpu", "lossless", gpu=False, minutes=4,
        arguments=(
            "--draft", "mtp", "--device", "cpu", "--dtype", "float64", "--prompts", "16",
        ),
        sources=(*bench("lossless"), "tests/margin.py", *ON_CPU, *DEMO_MODELS),
    ),
    Measurement(
        "lossless-gdn-cpu", "lossless", gpu=False, minutes=6,
        arguments=(
            "--target", "demo-gdn", "--draft", "mtp", "--device", "cpu", "--dtype", "float64",
            "--prompts", "16",
        ),
        sources=(*bench("lossless"), "tests/margin.py", *ON_CPU, *DEMO_MODELS),
    ),
    Measurement(
        "search", "search", gpu=False, minutes=10,
        sources=(
            *bench("search", "search_baselines"), "tests/synthetic.py", *WALK, *SEARCH,
            *_tuner("search", "certificate", "dual_bound"), *STEP_COST, *_tables(DEMO, SMALL),
            f"profiles/traces/{DEMO}--*--greedy.safetensors",
        ),
    ),
    Measurement(
        "coverage", "coverage", gpu=False, minutes=7,
        arguments=("--workers", "20", "--repeats", "1000", "--seconds", "330"),
        sources=(
            *bench("coverage"), "tests/synthetic.py", *WALK, *SEARCH, *VERDICT, *STEP_COST,
            *_tables(DEMO, DEMO_MTP, SMALL, LARGE), GSM8K,
            f"profiles/traces/{DEMO}--mt_bench--greedy.safetensors",
            f"profiles/traces/{DEMO_MTP}--gsm8k--greedy.safetensors",
        ),
    ),
    Measurement(
        "server", "server", gpu=False, minutes=3,
        arguments=("--first", "1000"),
        sources=(
            *bench("server"), "tests/synthetic_server.py", "autotune/stree_autotune/server/*.py",
        ),
    ),
    Measurement(
        "fuzz", "fuzz", gpu=False, minutes=12,
        sources=(
            *bench("fuzz", "fuzz_loaders", "fuzz_mutations"), "stree_core/families/*.py",
            *(f"stree_core/{name}.py" for name in ("files", "limits", "profile", "strict_yaml")),
            *_core("models", "source", "text", "scaled_files", "weight_*"),
            *_tuner("store", "gpu_spec", "library", "prompts", "prompt_rows", "runtime_table"),
            *_tuner("share", "files", "index", "remote"), *_tuner("trace", "file"),
            *_tuner("search", "certificate"),
        ),
    ),
)  # fmt: skip


def measurement_of(file: str) -> Measurement | None:
    """Return the measurement that a results file is of; None for a file of no measurement."""
    # The longest name that fits: `lossless-cpu` is also a `lossless` of a GPU called cpu.
    fitting = [each for each in MEASUREMENTS if each.makes(file)]
    return max(fitting, key=lambda each: len(each.name), default=None)


def values(words: Sequence[str], flag: str) -> list[str]:
    """Return the values of an option that takes several."""
    if flag not in words:
        return []
    rest = list(words[words.index(flag) + 1 :])
    ends = (index for index, word in enumerate(rest) if word.startswith("--"))
    return rest[: next(ends, len(rest))]


def without(words: Sequence[str], flag: str) -> list[str]:
    """Return options without one that takes several values."""
    if flag not in words:
        return list(words)
    at = words.index(flag)
    return [*words[:at], *words[at + 1 + len(values(words, flag)) :]]
