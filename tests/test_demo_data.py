"""The demo pair's generator, corpus, streams, scan and saved folders."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import random
import re
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stree_core import Engine, EngineConfig, Tree, find_source
from stree_core.drafting.pair import Runtime, load_with_head

DEMO = Path(__file__).resolve().parent.parent / "demo"
NAMES = (
    "word_problems", "corpus", "streams", "modules", "checkpoint", "measure", "optimise", "head",
    "delta_model",
)  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    """The demo scripts, which import each other as siblings, for this file's tests only."""
    sys.path.insert(0, str(DEMO))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(DEMO))
        for name in NAMES:
            sys.modules.pop(name, None)


def exact(expression: str) -> Fraction:
    """Python's own arithmetic, with every number of the text as a fraction."""
    assert re.fullmatch(r"[\d.+*/-]+", expression)
    fractions = re.sub(r"\d+(?:\.\d+)?", lambda match: f"Fraction('{match[0]}')", expression)
    return eval(fractions, {"Fraction": Fraction})


def test_every_step_is_right_and_the_last_is_the_answer(demo):
    kinds = set()
    for _, answer in itertools.islice(demo.word_problems.word_problems(5), 3000):
        steps = re.findall(r"(\S.*?)<<([^=]+)=([^>]+)>>(\S+)", answer)
        lines = answer.split("\n")
        assert lines[0] == ""
        assert len(steps) == len(lines) - 2
        for before, expression, value, shown in steps:
            assert exact(expression) == Fraction(value) > 0
            assert re.match(rf"{re.escape(value)}(?![\d])", shown)
            assert before.replace(" ", "").endswith(expression + "=")
        assert lines[-1] == f"#### {steps[-1][2]}"
        kinds.add(len(steps))
    assert kinds >= {2, 3, 4, 5}


def test_numbers_of_the_first_step_stand_in_the_problem(demo):
    spelled = {word: str(i) for i, word in enumerate(demo.word_problems.SPELLED)}
    for problem, answer in itertools.islice(demo.word_problems.word_problems(6), 500):
        text = " ".join(spelled.get(word, word) for word in re.findall(r"[a-z]+|\d+", problem))
        first = re.search(r"<<([^=]+)=", answer)[1]
        mentioned = set(text.split()) | {"2"}
        assert set(re.findall(r"\d+", first)) <= mentioned | {"100"}
        assert "{" not in problem + answer


def test_problems_follow_their_seed(demo):
    first, again, other = (
        list(itertools.islice(demo.word_problems.word_problems(seed), 50)) for seed in (1, 1, 2)
    )
    assert first == again
    assert not {p for p, _ in first} & {p for p, _ in other}


def test_demo_prompts_are_distinct_and_held_out(demo):
    prompts = demo.word_problems.demo_prompts(128)
    assert len(set(prompts)) == 128
    assert demo.word_problems.demo_prompts(128) == prompts
    # By chance, the generator gives training at least one of these.
    settings = demo.corpus.CorpusSettings(problems=5000, max_files=0, workers=1)
    drawn = {p for p, _ in itertools.islice(demo.word_problems.word_problems(0), 5000)}
    trained = [p for p, _ in demo.corpus.collect(settings)["problems"]]
    assert drawn & set(prompts)
    assert set(trained) == drawn - set(demo.word_problems.demo_prompts(512))
    assert len(trained) == len(set(trained))


@pytest.mark.parametrize("text", ["2**3", "x+1", "f(2)", "-1"])
def test_evaluate_refuses_other_syntax(demo, text):
    with pytest.raises(ValueError, match="numbers and"):
        demo.word_problems.evaluate(text)


SOURCE = '''
class Holder:
    """Keeps a few values for later."""

    def total(self, first, second):
        """Return the sum of both arguments and the kept value.

        Nothing is changed by this call.
        """
        # Order does not matter.
        return first + second + self.kept
'''


def test_a_method_becomes_a_function_prompt_and_its_body(demo):
    code, prose = demo.corpus.python_pairs(SOURCE, ast.parse(SOURCE), random.Random(0))
    (prompt, body), *others = code
    assert others == []
    assert prompt.startswith("def total(self")
    assert prompt.endswith('call.\n    """\n')
    assert body == ("    # Order does not matter.\n    return first + second + self.kept\n")
    ast.parse(prompt + body)
    answers = [answer for _, answer in prose]
    assert "\nReturn the sum of both arguments and the kept value." in answers
    assert "\nNothing is changed by this call." in answers


def test_documents_give_headings_and_plain_paragraphs_only(demo):
    text = "# Quick start\n\nThe tool reads a folder and prints its files.\n\n    $ run::x\n"
    ((prompt, completion),) = demo.corpus.document_pairs(text, random.Random(0))
    assert "Quick start" in prompt
    assert completion == "\nThe tool reads a folder and prints its files."


def test_repetitive_marks_loops(demo):
    assert demo.corpus.repetitive("a b c d " * 5)
    assert not demo.corpus.repetitive("one two three four five six seven eight nine ten")


def test_jsonl_rows_must_exist(demo, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' * 3, encoding="utf-8")
    assert demo.corpus.read_jsonl(path, 1, 3) == [("a", "\nb")] * 2
    with pytest.raises(ValueError, match="--rows"):
        demo.corpus.read_jsonl(path, 1, 4)


def test_tokenizer_and_streams_round_trip(demo):
    streams = demo.streams
    pairs = list(itertools.islice(demo.word_problems.word_problems(3), 40))
    text = streams.train_tokenizer((["".join(pair) for pair in pairs], 400))
    tokenizer = streams.Tokenizer.from_str(text)
    assert tokenizer.encode("12 é").ids[0] == streams.EOS_ID
    assert tokenizer.encode("123", add_special_tokens=False).tokens == ["1", "2", "3"]
    documents = streams.encode((text, pairs))
    stream = streams.stream_of(documents)
    ids, bit = stream.tokens, streams.PROMPT_BIT
    for (prompt, completion), start, document in zip(pairs, stream.starts, documents, strict=True):
        part = ids[start + 1 : start + 1 + len(document)]
        assert ids[start] == streams.EOS_ID == part[-1]
        marked = part & bit > 0
        assert tokenizer.decode((part[marked] & (bit - 1)).tolist()) == prompt
        assert tokenizer.decode(part[~marked].tolist()) == completion
    assert len(ids) == sum(map(len, documents)) + 1 + streams.TAIL_TOKENS


def test_rows_cover_all_documents_before_repeating(demo):
    stream = demo.streams.Stream(np.arange(30, dtype=np.uint16), np.arange(10))
    rows = demo.measure.Rows({"jsonl": stream}, {"jsonl": 0.2}, "cpu", 0)
    drawn = torch.cat([rows.draw(5, 3) for _ in range(2)])
    assert sorted(drawn[:, 0].tolist()) == list(range(10))
    assert torch.equal(drawn - drawn[:, :1], torch.arange(4).expand(10, 4))


def test_limit_lowers_a_share_to_its_epochs(demo):
    stream = demo.streams.Stream(np.zeros(200, dtype=np.uint16), np.array([0, 100]))
    rows = demo.measure.Rows({"a": stream, "b": stream}, {"a": 0.5, "b": 0.5}, "cpu", 0)
    rows.limit("b", 2.0, 10_000)
    assert rows.weights["b"] == pytest.approx(0.02 / 0.52)
    rows.limit("b", 2.0, 10)
    assert rows.weights["b"] == 0.5


def test_split_rows_weighs_prompt_labels(demo):
    bit = demo.streams.PROMPT_BIT
    inputs, labels, weight = demo.measure.split_rows(torch.tensor([[0, 5 | bit, 6, 0]]), 0.3)
    assert inputs.tolist() == [[0, 5, 6]]
    assert labels.tolist() == [[5, 6, 0]]
    assert weight.tolist() == [[pytest.approx(0.3), 1.0, 1.0]]


def test_in_loop_marks_repeated_grams(demo):
    once = list(range(10))
    assert demo.measure.in_loop(once) == [False] * 10
    assert demo.measure.in_loop(once + once) == [False] * 10 + [True] * 10
    assert demo.measure.in_loop(once + once[:7]) == [False] * 17


def test_plan_warms_up_and_reaches_zero(demo):
    plan = demo.optimise.Plan(seconds=0.0, steps=50)
    assert plan.update(0)
    rates = [plan.rate(step) for step in range(plan.total)]
    assert rates[0] == pytest.approx(1 / 5)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)


def recurrence(x, dt, A, B, C, D, bias) -> Tensor:
    """One token after the other: S <- exp(d A) S + d x B, y = S C + D x."""
    state, outputs = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]), []
    for t in range(x.shape[1]):
        d = F.softplus(dt[:, t] + bias)
        step = torch.einsum("bh,bhp,bn->bhpn", d, x[:, t], B[:, t])
        state = state * (d * A).exp()[..., None, None] + step
        outputs.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("tokens", [1, 63, 64, 130])
def test_chunked_scan_equals_the_recurrence(demo, tokens):
    torch.manual_seed(tokens)
    shapes = [(2, tokens, 3, 4), (2, tokens, 3), (3,), (2, tokens, 5), (2, tokens, 5), (3,), (3,)]
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[2] = -inputs[2].exp()
    inputs = [tensor.requires_grad_() for tensor in inputs]
    ours, theirs = demo.modules.ssd_scan(*inputs), recurrence(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(ours)
    found = torch.autograd.grad((ours * direction).sum(), inputs)
    expected = torch.autograd.grad((theirs * direction).sum(), inputs)
    for ours_grad, theirs_grad in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-3, atol=1e-3)


def delta_recurrence(q, k, v, g, beta) -> Tensor:
    """One token after the other, in the words of the paper."""
    state, outputs = v.new_zeros(*v[:, 0].shape, k.shape[-1]), []
    for t in range(v.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        told = torch.einsum("bhpn,bhn->bhp", state, k[:, t])
        change = beta[:, t, :, None] * (v[:, t] - told)
        state = state + change[..., None] * k[:, t, :, None]
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("tokens", [1, 31, 32, 70])
def test_chunked_delta_rule_equals_the_recurrence(demo, tokens):
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, tokens, 3, size) for size in (5, 5, 4))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g, beta = -torch.rand(2, tokens, 3), torch.rand(2, tokens, 3)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v, g, beta)]
    ours, theirs = demo.delta_model.delta_rule(*inputs), delta_recurrence(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(ours)
    found = torch.autograd.grad((ours * direction).sum(), inputs)
    expected = torch.autograd.grad((theirs * direction).sum(), inputs)
    for ours_grad, theirs_grad in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-3, atol=1e-3)


def trained_for_two_steps(demo, shape, loss_of):
    torch.manual_seed(0)
    model = demo.modules.DemoModel(demo.checkpoint.tiny(shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        rows = torch.randint(0, 4096, (2, 70), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss_of(model, rows.int()).backward()
        optimizer.step()
    return model.eval()


def test_trained_pair_loads_in_transformers_with_equal_logits(demo, tmp_path):
    optimise, checkpoint = demo.optimise, demo.checkpoint
    target = trained_for_two_steps(
        demo, checkpoint.TARGET, lambda model, rows: optimise.target_loss(model, rows, 0.3)
    )
    draft = trained_for_two_steps(
        demo, checkpoint.DRAFT, lambda model, rows: optimise.draft_loss(model, target, rows, 0.3)
    )
    delta = trained_for_two_steps(
        demo, checkpoint.DELTA, lambda model, rows: optimise.target_loss(model, rows, 0.3)
    )
    models = (("demo-target", target), ("demo-draft", draft), ("demo-gdn", delta))
    for name, model in models:
        checkpoint.save(tmp_path / name, model, {"seed": 0})
        with warnings.catch_warnings():
            # transformers' own imports, nothing of ours.
            warnings.simplefilter("ignore")
            difference = checkpoint.check(tmp_path / name)
        assert difference < 1e-5
        config = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)
        assert checkpoint.shape_of(config) == model.shape
        for key, weight in checkpoint.load(tmp_path / name).state_dict().items():
            assert torch.equal(weight, model.state_dict()[key].bfloat16().float())


def test_check_notices_a_wrong_weight(demo, tmp_path, monkeypatch):
    checkpoint = demo.checkpoint
    model = demo.modules.DemoModel(checkpoint.tiny(checkpoint.DRAFT))
    checkpoint.save(tmp_path / "draft", model, {})
    load = checkpoint.load

    def spoilt(folder):
        model = load(folder)
        model.backbone.layers[0].mixer.D.data += 0.5
        return model

    monkeypatch.setattr(checkpoint, "load", spoilt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="differ from transformers"):
            checkpoint.check(tmp_path / "draft")


def test_a_model_above_the_limit_is_refused(demo, tmp_path, monkeypatch):
    model = demo.modules.DemoModel(demo.checkpoint.tiny(demo.checkpoint.DRAFT))
    monkeypatch.setattr(demo.checkpoint, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="may have 1000 bytes"):
        demo.checkpoint.save(tmp_path / "draft", model, {})
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("name", "smallest", "largest"),
    [("TARGET", 6e6, 7e6), ("DELTA", 6e6, 6.3e6), ("DRAFT", 8e5, 1e6)],
)
def test_sizes(demo, name, smallest, largest):
    model = demo.modules.DemoModel(getattr(demo.checkpoint, name))
    assert smallest < sum(weight.numel() for weight in model.parameters()) < largest


def test_a_head_of_the_delta_model_is_the_products_own(demo, tmp_path):
    """What is trained and saved proposes the same tokens as the product's head."""
    checkpoint = demo.checkpoint
    torch.manual_seed(0)
    model = demo.modules.DemoModel(checkpoint.tiny(checkpoint.DELTA))
    head = demo.head.make_head(model.shape)
    checkpoint.save(tmp_path / "demo-gdn", model.eval(), {})
    checkpoint.add_head(tmp_path / "demo-gdn", head, {"seed": 0})
    assert not (tmp_path / "demo-gdn" / "mtp_config.json").exists()
    pair = load_with_head(find_source(tmp_path / "demo-gdn"), Runtime("cpu", "float32"))
    engine = Engine(pair.target, pair.draft, Tree.chain(1), EngineConfig(1, 32))
    engine.prefill(0, [0, 5, 9, 1])
    (speculator,) = engine._speculators
    with torch.inference_mode():
        speculator.propose()
    root, drafted = speculator.tokens_TB[:, 0].tolist()
    model, ids = checkpoint.load(tmp_path / "demo-gdn"), torch.tensor([[0, 5, 9, 1, root]])
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(weight.bfloat16())
        first, *_ = demo.head.drafts(head, model, ids, model.hidden(ids))
    assert drafted == first[0, -1].argmax()
