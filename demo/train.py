"""Train the demo pair: a hybrid target, then a Mamba2 draft distilled from it.

From the repository root: python demo/train.py --out DIR [--work DIR] [--jsonl FILE --rows 0:1000]
With --model demo-gdn: a target of Qwen3.5's kind and its head, with the pair's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint
import measure
import torch
from corpus import HELD_OUT_PROMPTS, CorpusSettings, read_jsonl
from head import head_agreement, head_loss, make_head
from modules import DemoModel, Scan, mamba_ssm_scan, ssd_scan
from optimise import Plan, draft_loss, optimise, target_loss
from polish import polish
from streams import PROMPT_BIT, TAIL_TOKENS, Stream, Streams, prepare
from torch import Tensor
from word_problems import demo_prompts

TARGETS = {"demo-target": checkpoint.TARGET, "demo-gdn": checkpoint.DELTA}
WITH_DRAFT = "demo-target"
MIXTURE = "problems=0.35,jsonl=0.20,code=0.30,prose=0.15"
GREEDY_PROMPTS = 48


def parse_arguments() -> argparse.Namespace:
    """Return the checked flags; a flag that breaks its rule ends the program at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder that receives demo-target and demo-draft")
    add("--model", choices=TARGETS, default=WITH_DRAFT, help="the target to train")
    add("--work", type=Path, default=Path("demo-work"), help="cache of the tokenised corpus")
    add("--jsonl", type=Path, help="rows with the keys prompt and answer")
    add("--rows", default="0:1000", help="first:end of the rows to use")
    add("--jsonl-epochs", type=float, default=12.0, help="how often those rows repeat at most")
    add("--mixture", default=MIXTURE, help="share of the rows by source")
    add("--prompt-weight", type=float, default=0.3, help="loss weight of prompt tokens")
    add("--minutes", type=float, default=5.0, help="training time of the target")
    add("--draft-minutes", type=float, default=2.0, help="training time of the draft")
    add("--head-minutes", type=float, default=2.0, help="training time of the target's MTP head")
    add("--polish-minutes", type=float, default=2.0, help="time to unlearn loops; 0 for none")
    add("--polish-blend", type=float, default=0.5, help="share of what that changed to keep")
    add("--polish-tokens", type=int, default=128, help="tokens written in a round of that")
    add("--start", type=Path, help="folder of a trained demo-target to go on from")
    add("--steps", type=int, default=0, help="train exactly so many steps instead")
    add("--batch", type=int, default=128, help="sequences in a step")
    add("--tokens", type=int, default=512, help="tokens in a sequence")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=16, help="processes for the corpus")
    add("--problems", type=int, default=300_000, help="word problems in the corpus")
    add("--max-files", type=int, default=24_000, help="installed files to read")
    add("--scan", choices=("torch", "mamba-ssm"), default="torch")
    add("--compile", action="store_true", help="torch.compile every layer")
    add("--only", choices=("tokenizer", "target", "draft", "head"), help="redo one piece")
    add("--tiny", action="store_true", help="tiny models, for a trial on a CPU")
    add("--check", action="store_true", help="compare --out with transformers, train nothing")
    add("--write-prompts", type=Path, help="write the held-out demo prompts here, then stop")
    add("--num-prompts", type=int, default=128)
    args = parser.parse_args()
    _check_arguments(parser, args)
    return args


def _check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.out is None and args.write_prompts is None:
        parser.error("--out is required; name a folder for the pair")
    if not 2 <= args.tokens < TAIL_TOKENS:
        parser.error(f"--tokens must be 2 to {TAIL_TOKENS - 1}, got {args.tokens}")
    for name in (
        "minutes",
        "draft_minutes",
        "head_minutes",
        "batch",
        "workers",
        "problems",
        "max_files",
    ):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    if not 1 <= args.num_prompts <= HELD_OUT_PROMPTS:
        parser.error(f"--num-prompts must be 1 to {HELD_OUT_PROMPTS}, got {args.num_prompts}")
    if args.scan == "mamba-ssm" and not torch.cuda.is_available():
        parser.error("--scan mamba-ssm needs a CUDA device; use --scan torch")
    if args.start and not (args.start / "config.json").exists():
        parser.error(f"--start must hold a trained target, got {args.start}; check the path")
    alone = args.only in ("draft", "head")
    if alone and not (args.out / args.model / "config.json").exists():
        parser.error(f"--only {args.only} needs {args.out}/{args.model}; train the target first")
    if args.model != WITH_DRAFT:
        if args.only == "draft":
            parser.error(f"--only draft is for --model {WITH_DRAFT}, got {args.model}; drop it")
        if args.out and not tokenizer_of(args).exists():
            parser.error(f"--model {args.model} needs {tokenizer_of(args)}; train the pair first")
    try:
        args.mixture = {k: float(v) for k, v in (p.split("=") for p in args.mixture.split(","))}
        args.rows = tuple(map(int, args.rows.split(":")))
        if set(args.mixture) != {"problems", "jsonl", "code", "prose"} or len(args.rows) != 2:
            raise ValueError("a part is missing")
        if args.jsonl:
            read_jsonl(args.jsonl, *args.rows)
    except (ValueError, KeyError, OSError) as err:
        parser.error(f"--mixture, --rows and --jsonl must look like their defaults: {err}")


def tokenizer_of(args: argparse.Namespace) -> Path:
    """Return where the tokenizer lies that all demo models share."""
    path: Path = args.out / WITH_DRAFT / "tokenizer.json"
    return path


def build(shape: checkpoint.Shape, args: argparse.Namespace, device: str) -> DemoModel:
    """Return a fresh model on the device."""
    scan: Scan = mamba_ssm_scan() if args.scan == "mamba-ssm" else ssd_scan
    torch.manual_seed(args.seed)
    model = DemoModel(checkpoint.tiny(shape) if args.tiny else shape, scan).to(device)
    if args.compile:
        model.compile_layers()
    return model


def train(
    name: str, args: argparse.Namespace, streams: Streams, target: DemoModel | None
) -> tuple[DemoModel, dict[str, Any]]:
    """Train the target, or the draft against a target; return it rounded to bf16, and a record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(checkpoint.DRAFT if target else TARGETS[args.model], args, device)
    training = {source: splits["train"] for source, splits in streams.items()}
    rows = measure.Rows(training, args.mixture, device, args.seed + (1 if target else 0))
    minutes = args.draft_minutes if target else args.minutes
    plan, start = Plan(60 * minutes, args.steps), time.perf_counter()

    def loss_of(batch: Tensor) -> Tensor:
        if target:
            return draft_loss(model, target, batch, args.prompt_weight)
        return target_loss(model, batch, args.prompt_weight)

    losses = optimise(model, name, loss_of, rows, plan, args)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    record = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
    record |= {"seconds": round(seconds, 1), "steps": plan.total, "seed": args.seed}
    record |= {"batch": args.batch, "tokens": args.tokens, "scan": args.scan}
    record |= {"weights": {n: round(w, 4) for n, w in rows.weights.items()}}
    record |= {"tokens_by_source": rows.num_tokens, "tokens_drawn": dict(rows.drawn)}
    if args.jsonl:
        record |= {"jsonl": args.jsonl.name, "rows": args.rows}
    return model.eval(), record | {"machine": machine(), "losses": losses}


def train_head(args: argparse.Namespace, streams: Streams) -> None:
    """Train an MTP head for the saved target, whose weights stay, and add it to its folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.out / args.model
    target = checkpoint.load(folder).to(device).requires_grad_(False)
    torch.manual_seed(args.seed)
    head = make_head(target.shape).to(device)
    training = {source: splits["train"] for source, splits in streams.items()}
    rows = measure.Rows(training, args.mixture, device, args.seed + 3)
    plan, start = Plan(60 * args.head_minutes, args.steps), time.perf_counter()

    def loss_of(batch: Tensor) -> Tensor:
        return head_loss(head, target, batch, args.prompt_weight)

    losses = optimise(head, "head", loss_of, rows, plan, args)
    seconds = round(time.perf_counter() - start, 1)
    held = {
        source: head_agreement(head, target, splits["held"], device, args.tokens, args.batch)
        for source, splits in streams.items()
    }
    record = {"model": "head", "parameters": sum(p.numel() for p in head.parameters())}
    record |= {"seconds": seconds, "steps": plan.total, "seed": args.seed, "batch": args.batch}
    record |= {"tokens": args.tokens, "weights": {n: round(w, 4) for n, w in rows.weights.items()}}
    record |= {"machine": machine(), "losses": losses, "held_out_agreement_by_depth": held}
    if args.jsonl:
        record |= {"jsonl": args.jsonl.name, "rows": args.rows}
    checkpoint.add_head(folder, head, record)
    print(json.dumps(held), flush=True)


def polish_target(target: DemoModel, args: argparse.Namespace, streams: Streams) -> dict[str, Any]:
    """Unlearn loops in place, round to bf16 again, and return a record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training = {source: splits["train"] for source, splits in streams.items()}
    rows = measure.Rows(training, args.mixture, device, args.seed + 2)
    rows.limit("jsonl", args.jsonl_epochs, 100 * args.batch * args.tokens)
    before = [weight.detach().clone() for weight in target.parameters()]
    done = polish(target, rows, training, args)
    # All of the change ends loops but hurts the text; a part of it keeps most of both.
    with torch.no_grad():
        for weight, old in zip(target.parameters(), before, strict=True):
            weight.copy_(torch.lerp(old, weight.bfloat16().float(), args.polish_blend).bfloat16())
    target.eval()
    return {**done, "blend": args.polish_blend, "machine": machine()}


def machine() -> dict[str, Any]:
    """Return versions, GPU and command line; paths are cut to their last part."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return versions | {"gpu": gpu, "command": " ".join(["python", "demo/train.py", *words])}


def report(
    target: DemoModel, draft: DemoModel, streams: Streams, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return each source's held-out losses and agreement, and what greedy decoding does."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {"target": target.to(device), "draft": draft.to(device)}
    results = {}
    for source, splits in streams.items():
        stream = splits["held"]
        found = measure.held_out(models, stream, device, args.tokens, args.batch)
        prompts = held_prompts(stream)
        count = 8 if args.tiny else measure.NEW_TOKENS
        found |= measure.free_run(target, draft, prompts, device, count)
        results[source] = found
        print(f"{source}: {json.dumps(found)}", flush=True)
    return results


def held_prompts(stream: Stream) -> list[list[int]]:
    """Return held-out prompts as a user passes them: the separator, then the prompt's ids."""
    prompts = []
    for start in stream.starts[:GREEDY_PROMPTS]:
        end = start + 1
        while stream.tokens[end] & PROMPT_BIT:
            end += 1
        prompts.append([int(token) & (PROMPT_BIT - 1) for token in stream.tokens[start:end]])
    return prompts


def run_check(out: Path) -> None:
    """Compare the saved folders with transformers and print the differences."""
    for name in (*TARGETS, "demo-draft"):
        if (out / name / "config.json").exists():
            print(f"{name}: relative difference {checkpoint.check(out / name):.1e}", flush=True)


def write_prompts(path: Path, count: int) -> None:
    """Write held-out problem texts as JSON lines with the key prompt."""
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in demo_prompts(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Run what the flags ask for."""
    args = parse_arguments()
    if args.write_prompts or args.check:
        if args.write_prompts:
            write_prompts(args.write_prompts, args.num_prompts)
        if args.check:
            run_check(args.out)
        return
    settings = CorpusSettings(
        seed=args.seed, problems=args.problems, max_files=args.max_files, workers=args.workers,
        jsonl=str(args.jsonl or ""), rows=args.rows if args.jsonl else (0, 0),
    )  # fmt: skip
    given = ""
    if args.only == "head" or args.model != WITH_DRAFT:
        given = tokenizer_of(args).read_text(encoding="utf-8")
    tokenizer, streams = prepare(settings, args.work, args.only == "tokenizer", given)
    if args.only == "tokenizer":
        return
    if args.only == "head":
        train_head(args, streams)
        return
    folders = args.out / args.model, args.out / "demo-draft"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.only == "draft":
        target = checkpoint.load(folders[0]).to(device)
        if args.compile:
            target.compile_layers()
    else:
        if args.start:
            target, record = checkpoint.load(args.start).to(device), checkpoint.record(args.start)
        else:
            target, record = train("target", args, streams, None)
        if args.polish_minutes:
            record["polish"] = polish_target(target, args, streams)
        if args.model != WITH_DRAFT:
            record["held_out"] = {
                source: measure.held_out(
                    {"target": target}, splits["held"], device, args.tokens, args.batch
                )
                for source, splits in streams.items()
            }
        checkpoint.save(folders[0], target, record, tokenizer)
    if args.model != WITH_DRAFT and args.only != "target":
        train_head(args, streams)
    elif args.only != "target":
        draft, record = train("draft", args, streams, target)
        checkpoint.save(folders[1], draft, record)
        record["held_out"] = report(*map(checkpoint.load, folders), streams, args)
        checkpoint.save(folders[1], draft, record)
        train_head(args, streams)
    # Another process, because this one may have loaded what a check on the CPU must not see.
    subprocess.run([sys.executable, __file__, "--check", "--out", str(args.out)], check=True)


if __name__ == "__main__":
    main()
