"""Every rule emits the target's distribution exactly: sums over all random outcomes, in float64.

No probability of a test comes from the formula under test. What a rule does for a uniform number is
measured on the rule itself, by bisection for the points where its answer changes.

Shape letters: T tree tokens, B slots, V vocabulary, C children, N rows (one context and children
each).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor

from stree_core.drafting.tree_plan import ModelRows, make_plan
from stree_core.tree import Tree
from stree_kernels.launch.rows import Pending
from stree_kernels.sampling import children as sampling
from stree_kernels.sampling.children_ref import choose_by_mss, race_scores, sample_from
from stree_kernels.sampling.commit_path_ref import COUNT, FIRST_TOKEN, PathMemory, commit_path
from stree_kernels.sampling.top_tokens_ref import top_tokens

Tokens = tuple[int, ...]
Outcomes = list[tuple[Tokens, float, list[float]]]
"""Children of a node, their probability, and the distribution of the token after the node given
them."""

LAST = {torch.float32: 1 - 2.0**-24, torch.float64: 1 - 2.0**-53}
"""The largest number below 1."""
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Total variation. The float32 points lie on a grid of 2^-24; float64 leaves rounding errors."""

RULES = ("mss", "naive", "greedy")
TREES = {
    "chain": Tree.chain(2),
    "star": Tree.from_paths([[0], [1], [2]]),
    "fork": Tree.from_paths([[0], [1], [0, 0], [0, 1]]),
    "branch": Tree.from_paths([[0], [1], [1, 0], [1, 0, 0]]),
}
SIZES = [(v, c) for v in range(2, 6) for c in range(1, 5) if c <= v]


def share(holds: Callable[[Tensor], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the share of [0, 1) where `holds` is true, which it is from 0 up to some point."""
    low, high = torch.zeros(*shape, dtype=dtype), torch.ones(*shape, dtype=dtype)
    for _ in range(48):
        middle = ((low + high) / 2).clamp(max=LAST[dtype])
        true = holds(middle)
        low, high = torch.where(true, middle, low), torch.where(true, high, middle)
    return high.double()


def law_of(choose: Callable[[Tensor], Tensor], num_rows: int, like_V: Tensor) -> Tensor:
    """Return the distribution [N, V] of a choice that never falls as its number [N, V] grows."""
    id_V = torch.arange(len(like_V))
    cdf_NV = share(lambda u_NV: choose(u_NV) <= id_V, (num_rows, len(id_V)), like_V.dtype)
    return cdf_NV.diff(prepend=torch.zeros(num_rows, 1), dim=-1)


def sampled_laws(p_NV: Tensor) -> Tensor:
    """Return the distributions [N, V] of `sample_from`."""
    num_rows, num_tokens = p_NV.shape
    p_NVV = p_NV[:, None].expand(-1, num_tokens, -1)
    return law_of(lambda u_NV: sample_from(p_NVV, u_NV), num_rows, p_NV[0])


def kernel_mss(
    p_NBV: Tensor, q_NBV: Tensor, children_NBC: Tensor, uniform_NBC: Tensor, uniform_NB: Tensor
) -> Tensor:
    """Return what `choose_by_mss` does, by the kernel on a GPU."""
    num_rows, batch, num_children = children_NBC.shape
    # A tree with a node for every child, of which the first ones have children.
    p_TBV = torch.zeros(num_rows * num_children, batch, p_NBV.shape[-1])
    p_TBV[:num_rows] = p_NBV.log()
    uniform_TB = torch.zeros(len(p_TBV), batch)
    uniform_TB[:num_rows] = uniform_NB
    child_NC = torch.arange(len(p_TBV)).view(num_rows, num_children)
    chosen_TB = torch.full((len(p_TBV), batch), -1, device="cuda")
    arguments = (
        p_TBV, q_NBV.log(), torch.ones(batch), torch.arange(num_rows), child_NC,
        children_NBC.transpose(1, 2).flatten(0, 1), uniform_NBC, uniform_TB,
    )  # fmt: skip
    sampling.try_children(*(tensor.cuda().contiguous() for tensor in arguments), chosen_TB)
    return chosen_TB[:num_rows].cpu()


def mss_laws(
    p_NV: Tensor, q_NV: Tensor, children_NC: Tensor,
    choose_by_mss: Callable[..., Tensor] = choose_by_mss,
) -> Tensor:  # fmt: skip
    """Return the distributions [N, V] of the token that `choose_by_mss` returns for given children.

    A try is rejected by the largest number; where even that takes the child, nothing is left.
    """
    num_rows, num_children = children_NC.shape
    last = LAST[p_NV.dtype]

    def choose(tries_NBC: Tensor, final_NB: Tensor) -> Tensor:
        p, q, children = (
            x[:, None].expand(-1, final_NB.shape[1], -1) for x in (p_NV, q_NV, children_NC)
        )
        return choose_by_mss(p, q, children, tries_NBC, final_NB)

    def takes(u_NC: Tensor) -> Tensor:
        """Return whether number i takes child i after i rejections, whatever the final draw is."""
        tries_NCC = u_NC.new_full((*u_NC.shape, num_children), last)
        tries_NCC.diagonal(dim1=1, dim2=2).copy_(u_NC)
        final_NB = torch.cat((torch.zeros_like(u_NC), torch.full_like(u_NC, last)), 1)
        first_NC, other_NC = choose(torch.cat((tries_NCC, tries_NCC), 1), final_NB).chunk(2, 1)
        return (first_NC == children_NC) & (other_NC == children_NC)

    take_NC = share(takes, children_NC.shape, p_NV.dtype)
    rejected = p_NV.new_full((*p_NV.shape, num_children), last)
    final_NV = law_of(lambda u_NV: choose(rejected, u_NV), num_rows, p_NV[0])
    reach_NC = torch.cat((torch.ones(num_rows, 1), (1 - take_NC).cumprod(-1)), -1)
    laws_NV = reach_NC[:, -1:] * final_NV
    return laws_NV.scatter_add(1, children_NC, reach_NC[:, :-1] * take_NC)


def draw_children(q_WBV: Tensor, uniform_WBV: Tensor, num_children: int) -> Tensor:
    """Return children [W, B, C] in the order of drawing."""
    return top_tokens(race_scores(q_WBV.log(), uniform_WBV), num_children)


def draws(q_V: Tensor, num_children: int) -> dict[Tokens, float]:
    """Return the probability of every ordered draw without replacement.

    Behind the tokens that q allows stand those of probability 0, the lowest first.
    """
    q = q_V.tolist()
    weights = {}
    for children in itertools.permutations(range(len(q)), num_children):
        weight = 1.0
        for rank, child in enumerate(children):
            others = [token for token in range(len(q)) if token not in children[:rank]]
            total = math.fsum(q[token] for token in others)
            weight *= q[child] / total if total else child == others[0]
        if weight:
            weights[children] = weight
    assert math.isclose(sum(weights.values()), 1)
    return weights


def distance(a: Tensor, b: Tensor) -> float:
    """Return the total variation of two distributions."""
    return (a - b).abs().sum().item() / 2


def normalised(mass: Tensor) -> Tensor:
    return mass / mass.sum(-1, keepdim=True)


def pairs_of_laws(num_tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return distributions (p, q) of many kinds, in float64."""
    generator = torch.Generator().manual_seed(num_tokens)
    normal_4V = torch.randn(4, num_tokens, generator=generator, dtype=torch.float64)
    p, q = normal_4V[:2].softmax(-1)
    steep_p, steep_q = (8 * normal_4V[2:]).softmax(-1)
    id_V = torch.arange(num_tokens)
    first, last, even = (x.double() for x in (id_V == 0, id_V == num_tokens - 1, id_V % 2 == 0))
    return {
        "random": (p, q),
        "peaked": (steep_p, steep_q),
        "peaked p": (steep_p, q),
        "peaked q": (p, steep_q),
        "equal": (p, p),
        "nearly equal": (normalised(p * (1 + 1e-9 * normal_4V[3])), p),
        "one-hot p": (last, q),
        "one-hot q": (p, last),
        "one-hot, equal": (last, last),
        "one-hot, different": (first, last),
        "q misses a token": (p, normalised(q * (1 - first))),
        "q of few tokens": (p, normalised(q * (1 - even))),
        "p with zeros": (normalised(p * even), q),
        "both with zeros": (normalised(p * even), normalised(q * (1 - first))),
        "disjoint": (normalised(p * even), normalised(q * (1 - even))),
    }


def mss_outcomes(
    p_NV: Tensor, q_NV: Tensor, num_children: int,
    reorder: Callable[[Tokens], Tokens] = lambda children: children,
    choose: Callable[..., Tensor] = choose_by_mss,
) -> list[Outcomes]:  # fmt: skip
    """Return what may happen at nodes with these distributions, over all children and random
    numbers."""
    drawn_N = [draws(q_V, num_children) for q_V in normalised(q_NV.double())]
    row = torch.tensor([n for n, drawn in enumerate(drawn_N) for _ in drawn])
    children = torch.tensor([reorder(children) for drawn in drawn_N for children in drawn])
    distributions = iter(mss_laws(p_NV[row], q_NV[row], children, choose).tolist())
    return [
        [(children, w, next(distributions)) for children, w in drawn.items()] for drawn in drawn_N
    ]


def mean_law(outcomes: Outcomes) -> Tensor:
    """Return the distribution [V] of the token after a node, whatever its children are."""
    weighted = [[draw * p for p in distribution] for _, draw, distribution in outcomes]
    return torch.tensor(weighted, dtype=torch.float64).sum(0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_children"), SIZES)
def test_mss_returns_the_targets_law(
    num_tokens: int, num_children: int, dtype: torch.dtype
) -> None:
    pairs = pairs_of_laws(num_tokens)
    p_NV, q_NV = (
        torch.stack(distributions).to(dtype) for distributions in zip(*pairs.values(), strict=True)
    )
    outcomes = mss_outcomes(p_NV, q_NV, num_children)
    errors = {
        name: distance(mean_law(outcomes[n]), normalised(p_NV[n].double()))
        for n, name in enumerate(pairs)
    }
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "num_children"), [(2, 2), (4, 3), (5, 4)])
def test_the_kernel_returns_the_targets_law(num_tokens: int, num_children: int) -> None:
    pairs = pairs_of_laws(num_tokens)
    p_NV, q_NV = (
        torch.stack(distributions).float() for distributions in zip(*pairs.values(), strict=True)
    )
    outcomes = mss_outcomes(p_NV, q_NV, num_children, choose=kernel_mss)
    errors = {
        name: distance(mean_law(outcomes[n]), normalised(p_NV[n].double()))
        for n, name in enumerate(pairs)
    }
    # Exponentials and sums are of another order than the reference's, of 2^-22 each.
    assert max(errors.values()) < 4e-6, errors


def test_mss_needs_the_order_of_drawing() -> None:
    p_NV = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    q_NV = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    (drawn,) = mss_outcomes(p_NV, q_NV, 2)
    assert distance(mean_law(drawn), p_NV[0]) < TOLERANCE[torch.float64]
    (likeliest_first,) = mss_outcomes(p_NV, q_NV, 2, lambda children: (0, 1))
    law_V = mean_law(likeliest_first)
    assert law_V.tolist() == pytest.approx([5 / 9, 4 / 9], abs=1e-12)
    assert distance(law_V, p_NV[0]) > 1e-3


@pytest.mark.parametrize("num_children", [2, 3, 4])
def test_children_sorted_by_q_change_the_law(num_children: int) -> None:
    p_V, q_V = pairs_of_laws(4)["random"]
    by_q = q_V.argsort(descending=True).tolist()
    (outcomes,) = mss_outcomes(
        p_V[None], q_V[None], num_children, lambda children: tuple(sorted(children, key=by_q.index))
    )
    assert distance(mean_law(outcomes), p_V) > 1e-3


def test_a_repeated_child_is_no_child() -> None:
    p_V, q_V = pairs_of_laws(5)["random"]
    rows = ((2, 0, 2, 0), (2, 0, 0, 2), (2, 0, 2, 2))
    repeated_NV = mss_laws(p_V.expand(3, -1), q_V.expand(3, -1), torch.tensor(rows))
    once_NV = mss_laws(p_V[None], q_V[None], torch.tensor([[2, 0]]))
    assert max(distance(law_V, once_NV[0]) for law_V in repeated_NV) < 1e-12


@pytest.mark.parametrize("dtype", LAST, ids=str)
def test_mss_never_returns_a_token_of_probability_zero(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0, 2.0**-24, 0.5, LAST[dtype]], dtype=dtype)
    uniform_B4 = torch.cartesian_prod(*[numbers] * 4)
    children_NC = torch.tensor(list(itertools.permutations(range(4), 3)))[:, None]
    size = (len(children_NC), len(uniform_B4), -1)
    tries_NBC, final_NB = uniform_B4[:, :3].expand(size), uniform_B4[:, 3].expand(size[:2])
    for name, (p_V, q_V) in pairs_of_laws(4).items():
        p_NBV, q_NBV = p_V.to(dtype).expand(size), q_V.to(dtype).expand(size)
        chosen_NB = choose_by_mss(p_NBV, q_NBV, children_NC.expand(size), tries_NBC, final_NB)
        assert p_V[chosen_NB].min() > 0, name


def node_outcomes(rule: str, p_NV: Tensor, q_NV: Tensor, num_children: int) -> list[Outcomes]:
    """Return what a rule may do at nodes with these distributions."""
    if rule == "mss" and num_children:
        return mss_outcomes(p_NV, q_NV, num_children)
    top_NC = top_tokens(q_NV.float(), num_children) if num_children else torch.empty(len(q_NV), 0)
    rows = zip(top_NC.tolist(), sampled_laws(p_NV).tolist(), strict=True)
    return [[(tuple(children), 1.0, distribution)] for children, distribution in rows]


def tree_outcomes(
    tree: Tree, outcomes_at: Callable[[Tokens, int], Outcomes]
) -> list[tuple[Tokens, Tokens, float]]:
    """Return all tokens of the tree with the chosen tokens, and the probability of both."""
    # The root's token never counts.
    partial: list[tuple[Tokens, Tokens, float]] = [((0,), (), 1.0)]
    for node in range(tree.num_tokens):
        longer = []
        for tokens, chosen, weight in partial:
            context = tuple(tokens[n] for n in tree.node_paths[node][1:])
            for children, draw, distribution in outcomes_at(context, len(tree.children[node])):
                # Breadth-first order: the next free nodes are this one's children.
                longer += [
                    ((*tokens, *children), (*chosen, token), weight * draw * p)
                    for token, p in enumerate(distribution)
                    if p > 0
                ]
        partial = longer
    return partial


def emitted_blocks(
    tree: Tree, outcomes: list[tuple[Tokens, Tokens, float]]
) -> defaultdict[Tokens, float]:
    """Return the probability of every block of tokens that one step emits."""
    tokens_RB = torch.tensor([(-1, *tokens) for tokens, _, _ in outcomes]).t().contiguous()
    chosen_TB = torch.tensor([chosen for _, chosen, _ in outcomes]).t().contiguous()
    plan = make_plan(tree, frozenset(), ModelRows(frozenset()), torch.device("cpu"))
    active_B, *counts = torch.ones(4, len(outcomes), dtype=torch.int32)
    path_BL = torch.zeros(len(outcomes), tree.depth + 1, dtype=torch.int32)
    memory = PathMemory(plan.target_path_TL, Pending(path_BL, *counts[:2]), counts[2])
    result_XB = torch.zeros(FIRST_TOKEN + tree.depth + 1, len(outcomes), dtype=torch.int64)
    logits_TBV = torch.zeros(*chosen_TB.shape, 3)
    commit_path(
        tokens_RB, chosen_TB, logits_TBV, plan.tables, active_B, result_XB, [memory]
    )  # fmt: skip
    blocks: defaultdict[Tokens, float] = defaultdict(float)
    for column, (_, _, weight) in zip(result_XB.t().tolist(), outcomes, strict=True):
        blocks[tuple(column[FIRST_TOKEN:][: column[COUNT]])] += weight
    return blocks


def emission_error(tree: Tree, rule: str, seed: int) -> tuple[float, int]:
    """Return how far emitted tokens are from the target's distribution, and the longest block.

    What a step emits, continued by the target alone, must have the target's distribution. Every
    context has distributions of its own.
    """
    contexts = [c for n in range(tree.depth + 1) for c in itertools.product(range(3), repeat=n)]
    generator = torch.Generator().manual_seed(seed)
    normal_2NV = torch.randn(2, len(contexts), 3, generator=generator, dtype=torch.float64)
    p_NV, q_NV = normal_2NV.softmax(-1)
    if rule == "greedy":
        p_NV = torch.zeros_like(p_NV).scatter(1, top_tokens(p_NV.float(), 1), 1.0)
    index = {context: row for row, context in enumerate(contexts)}
    table = {
        num_children: node_outcomes(rule, p_NV, q_NV, num_children)
        for num_children in {len(children) for children in tree.children}
    }
    outcomes = tree_outcomes(tree, lambda context, c: table[c][index[context]])
    blocks = emitted_blocks(tree, outcomes)

    p = dict(zip(contexts, p_NV.tolist(), strict=True))

    def target(sequence: Tokens, start: int) -> float:
        factors: list[float] = [p[sequence[:i]][sequence[i]] for i in range(start, len(sequence))]
        return math.prod(factors)

    error = 0.0
    for s in itertools.product(range(3), repeat=tree.depth + 1):
        emitted = sum(blocks[s[:n]] * target(s, n) for n in range(1, len(s) + 1))
        error += abs(emitted - target(s, 0)) / 2
    return error, max(map(len, blocks))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", TREES)
def test_a_tree_emits_the_targets_law(shape: str, rule: str) -> None:
    # Greedy decoding of a table is one outcome, so that it takes many tables.
    num_tables = 40 if rule == "greedy" else 2
    results = [emission_error(TREES[shape], rule, seed) for seed in range(num_tables)]
    assert max(error for error, _ in results) < TOLERANCE[torch.float64]
    assert max(longest for _, longest in results) == TREES[shape].depth + 1, "whole paths count"


@pytest.mark.parametrize("dtype", LAST, ids=str)
@pytest.mark.parametrize("num_tokens", [3, 1000])
def test_a_token_of_probability_zero_is_never_sampled(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    p_NBV = torch.rand(64, 40, num_tokens, generator=generator, dtype=dtype)
    p_NBV *= torch.rand(p_NBV.shape, generator=generator) < 0.4
    p_NBV[::2, :, 0] = p_NBV[1::2, :, -1] = 0
    p_NBV[..., 1] += 0.1
    # Rows need not sum to 1; in float32 the first ones are subnormal.
    p_NBV *= 10.0 ** torch.linspace(-44, 20, 64, dtype=dtype)[:, None, None]
    uniform_NB = (torch.rand(64, 40, generator=generator) * 2**24).floor().to(dtype) * 2.0**-24
    uniform_NB[:, :3] = torch.tensor([0, 1 - 2.0**-24, LAST[dtype]], dtype=dtype)
    token_NB1 = sample_from(p_NBV, uniform_NB)[..., None]
    assert p_NBV.gather(-1, token_NB1).min() > 0


def test_samples_follow_the_law() -> None:
    generator = torch.Generator().manual_seed(4)
    p_NV = torch.rand(20, 6, generator=generator, dtype=torch.float64)
    p_NV[:15] *= torch.rand(15, 6, generator=generator) < 0.5
    p_NV[:, 2] += 0.1
    scale_N1 = 10.0 ** torch.arange(-10, 10, dtype=torch.float64)[:, None]
    for law_V, p_V in zip(sampled_laws(p_NV * scale_N1), normalised(p_NV), strict=True):
        assert distance(law_V, p_V) < TOLERANCE[torch.float64]


def test_children_follow_the_law_of_draws_without_replacement() -> None:
    generator = torch.Generator().manual_seed(5)
    q_V, num_draws = torch.tensor([0.05, 0.5, 0.15, 0.3]), 200_000
    uniform_WBV = torch.rand(num_draws, 1, 4, generator=generator)
    children_WC = draw_children(q_V.expand(num_draws, 1, 4), uniform_WBV, 3)[:, 0]
    expected = draws(q_V.double(), 3)
    code_C = torch.tensor([16, 4, 1])
    counts = (children_WC @ code_C).bincount(minlength=64)
    observed_N = counts[(torch.tensor(list(expected)) * code_C).sum(-1)]
    assert observed_N.sum() == num_draws
    expected_N = torch.tensor(list(expected.values()), dtype=torch.float64) * num_draws
    assert stats.chisquare(observed_N.numpy(), expected_N.numpy()).pvalue > 1e-3


def test_fewer_children_are_the_first_of_more() -> None:
    generator = torch.Generator().manual_seed(6)
    q_WBV = (4 * torch.randn(50, 3, 40, generator=generator)).softmax(-1)
    q_WBV *= torch.rand(q_WBV.shape, generator=generator) < 0.5
    uniform_WBV = torch.rand(q_WBV.shape, generator=generator)
    all_drawn = draw_children(q_WBV, uniform_WBV, 40)
    for c in range(1, 40):
        assert torch.equal(draw_children(q_WBV, uniform_WBV, c), all_drawn[..., :c]), c


@pytest.mark.parametrize("dtype", LAST, ids=str)
def test_children_of_probability_zero_come_last(dtype: torch.dtype) -> None:
    q_V = torch.tensor([0, 0.7, 0, 0.3], dtype=dtype)
    numbers = torch.tensor([0, 2.0**-24, 0.5, 1 - 2.0**-24], dtype=dtype)
    uniform_WBV = torch.cartesian_prod(*[numbers] * 4)[:, None]
    q_WBV = q_V.expand(len(uniform_WBV), 1, 4)
    assert q_V[draw_children(q_WBV, uniform_WBV, 1)].min() > 0
    drawn_WC = draw_children(q_WBV, uniform_WBV, 4)[:, 0]
    assert q_V[drawn_WC[:, :2]].min() > 0
    assert torch.equal(drawn_WC[:, 2:], torch.tensor([0, 2]).expand(len(drawn_WC), 2))


@pytest.mark.parametrize("dtype", LAST, ids=str)
def test_no_number_alone_makes_a_token_the_first_child(dtype: torch.dtype) -> None:
    """A number has probability 2^-24, much more than an unlikely token of a large vocabulary."""
    q_V = torch.tensor([1, 1e-12], dtype=dtype)
    numbers = torch.tensor([0, 2.0**-24, 0.5, 1 - 2.0**-24], dtype=dtype)
    uniform_WBV = torch.stack((torch.full_like(numbers, 0.5), numbers), -1)[:, None]
    for num_children in (1, 2):
        first_WB = draw_children(q_V.expand(4, 1, 2), uniform_WBV, num_children)[..., 0]
        assert first_WB.eq(0).all()
