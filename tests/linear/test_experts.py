"""Mixture-of-experts MLPs: the reference against a loop, the kernels against the reference.

Shape letters: M rows, E experts, C chosen experts of a row, D columns in and out, F expert inner.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.linear import experts as kernel, experts_ref as reference
from stree_kernels.linear.gemv_kernel import GemvConfig
from stree_kernels.testing import TOLERANCES, assert_close, poisoned

ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "geglu", "relu2")
NARROW = (torch.bfloat16, torch.float16)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


@dataclasses.dataclass(frozen=True)
class Case:
    """The tensors of one layer, in float64 until moved."""

    inputs: Tensor
    choice: Tensor
    share: Tensor
    up: Tensor
    down: Tensor
    activation: Activation

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in another dtype; shares stay in fp32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        return dataclasses.replace(
            self,
            inputs=self.inputs.to(device, dtype),
            choice=self.choice.to(device),
            share=self.share.to(device, wide),
            up=self.up.to(device, dtype),
            down=self.down.to(device, dtype),
        )

    def run(self, ops: Any, out_dtype: torch.dtype | None = None) -> Tensor:
        """Return what the op writes into a poisoned buffer."""
        dtype, device = out_dtype or self.inputs.dtype, self.inputs.device
        out = poisoned(*self.inputs.shape, dtype=dtype, device=device)
        ops.expert_mlps(
            self.inputs, self.choice, self.share, self.up, self.down, out,
            activation=self.activation,
        )  # fmt: skip
        return out


def make_case(
    num_rows: int, num_chosen: int, columns: int, inner: int, activation: Activation, *,
    num_experts: int = 5, choice: list[list[int]] | None = None,
) -> Case:  # fmt: skip
    """Build a case in float64 whose rows choose distinct random experts, or those of `choice`."""
    random = torch.Generator().manual_seed(num_rows + columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    num_products = 2 * inner if activation in GATED else inner
    picked = torch.rand(num_rows, num_experts, generator=random).argsort(1)[:, :num_chosen]
    return Case(
        inputs=normal(num_rows, columns),
        choice=picked.contiguous() if choice is None else torch.tensor(choice),
        share=torch.rand(num_rows, num_chosen, generator=random, dtype=torch.float64),
        up=normal(num_experts, num_products, columns) / columns**0.5,
        down=normal(num_experts, columns, inner) / inner**0.5,
        activation=activation,
    )


def by_loop(case: Case) -> Tensor:
    """Return the sums of each row's experts, one MLP after the other."""
    out = torch.zeros_like(case.inputs)
    for row, experts in enumerate(case.choice.tolist()):
        for place, expert in enumerate(experts):
            product = case.up[expert] @ case.inputs[row]
            if case.activation == "relu2":
                inner = product.clamp(min=0) ** 2
            else:
                gate, up = product.chunk(2)
                act = functional.silu if case.activation == "swiglu" else functional.gelu
                inner = act(gate) * up
            out[row] += case.share[row, place] * (case.down[expert] @ inner)
    return out


CASES = {
    "one row": make_case(1, 3, 32, 16, "swiglu"),
    "one expert": make_case(2, 1, 16, 48, "relu2"),
    "gelu": make_case(2, 2, 48, 32, "geglu"),
    "rows that share experts": make_case(3, 2, 32, 80, "relu2", choice=[[4, 0], [0, 4], [4, 1]]),
    "an expert twice": make_case(2, 3, 16, 32, "swiglu", choice=[[2, 2, 0], [1, 1, 1]]),
    "all experts": make_case(1, 5, 32, 64, "swiglu"),
}


def check_kernel(
    case: Case, dtype: torch.dtype, device: str = "cpu", out_dtype: torch.dtype | None = None
) -> None:
    """Compare the kernels with the reference in float64 on the values that the kernels see."""
    ours = case.to(dtype, device)
    truth = ours.to(torch.float64, device).run(reference)
    # The inner values are rounded.
    tolerance = TOLERANCES[dtype] if dtype in NARROW else None
    assert_close("out", ours.run(kernel, out_dtype), truth, tolerance=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_the_loop(name: str) -> None:
    assert_close("out", CASES[name].run(reference), by_loop(CASES[name]))


def test_reference_rounds_once() -> None:
    case = CASES["one row"].to(torch.bfloat16)
    assert torch.equal(case.run(reference), case.run(reference, torch.float32).bfloat16())


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_the_reference(name: str) -> None:
    check_kernel(CASES[name], torch.float32)


@interpreted
def test_interpreted_kernels_take_more_steps_than_are_loaded_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "UP_CONFIG", GemvConfig(8, 1, 1, depth=1))
    monkeypatch.setattr(kernel, "DOWN_CONFIG", GemvConfig(4, 1, 1, depth=4))
    # Two steps for a row's first product; three for each of two experts in its second.
    check_kernel(make_case(1, 2, 144, 272, "relu2", num_experts=3), torch.float32)


@pytest.mark.parametrize(
    ("num_steps", "depth"), [(1, 1), (4, 4), (5, 3), (6, 3), (9, 3), (11, 4), (24, 4)]
)
def test_few_steps_of_a_program_are_empty(num_steps: int, depth: int) -> None:
    assert kernel.steps_ahead(4, num_steps) == depth


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
def test_kernels_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    check_kernel(CASES[name], dtype, "cuda")


SIZES: dict[str, tuple[int, int, int, Activation]] = {
    "nemotron 3 nano": (6, 2688, 1856, "relu2"),
    "nemotron 3 super": (22, 1024, 2688, "relu2"),
    "granite 4 tiny": (6, 1536, 512, "swiglu"),
    "granite 4 small": (10, 4096, 768, "swiglu"),
    "qwen3.5-35b-a3b": (9, 2048, 512, "swiglu"),
    "gelu": (4, 1040, 528, "geglu"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("num_rows", [1, 5, 64])
def test_kernels_on_sizes_of_models(name: str, num_rows: int) -> None:
    num_chosen, columns, inner, activation = SIZES[name]
    num_experts = num_chosen + 2
    case = make_case(num_rows, num_chosen, columns, inner, activation, num_experts=num_experts)
    for dtype in NARROW:
        check_kernel(case, dtype, "cuda")
    check_kernel(case, torch.bfloat16, "cuda", out_dtype=torch.float32)


@pytest.mark.gpu
def test_experts_beyond_32_bit_offsets() -> None:
    case = make_case(2, 2, 64, 32, "relu2", num_experts=2).to(torch.bfloat16, "cuda")
    truth = case.to(torch.float64, "cuda").run(reference)
    # Experts 0 and 1 become the first and the last of a stack of more than 2^31 values.
    num_experts = (1 << 31) // case.up[0].numel() + 2
    stacks = []
    for few in (case.up, case.down):
        stack = few.new_empty(num_experts, *few.shape[1:])
        stack[0], stack[-1] = few[0], few[1]
        stacks.append(stack)
    far = dataclasses.replace(
        case, up=stacks[0], down=stacks[1], choice=case.choice * (num_experts - 1)
    )
    assert_close("out", far.run(kernel), truth, tolerance=TOLERANCES[torch.bfloat16])


@pytest.mark.gpu
def test_kernels_in_a_graph_give_the_same_bits_for_another_choice() -> None:
    case = make_case(4, 6, 2688, 1856, "relu2", num_experts=8).to(torch.bfloat16, "cuda")
    first = case.run(kernel)
    out = poisoned(*case.inputs.shape, dtype=torch.bfloat16, device="cuda")
    other = case.choice.flip(0).contiguous()
    choice = other.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.expert_mlps(
            case.inputs, choice, case.share, case.up, case.down, out, activation="relu2"
        )
    for wanted in (other, case.choice, other):
        choice.copy_(wanted)
        graph.replay()
        assert torch.equal(out, dataclasses.replace(case, choice=wanted).run(kernel))
    assert all(torch.equal(case.run(kernel), first) for _ in range(20)), "not deterministic"


def test_what_does_not_fit_is_refused() -> None:
    case = CASES["one row"].to(torch.float32)
    with pytest.raises(ValueError, match=r"5 experts are 16 x 32, as .* relu2 say, got \(5, 32"):
        dataclasses.replace(case, activation="relu2").run(kernel)
    with pytest.raises(ValueError, match=r"columns are multiples of 16, got 16 and 24; use"):
        make_case(2, 2, 16, 24, "swiglu").to(torch.float32).run(kernel)
    with pytest.raises(ValueError, match=r"rows and output have 32 columns, .* \(1, 3\), \(1, 2\)"):
        dataclasses.replace(case, share=case.share[:, :2].contiguous()).run(kernel)
    with pytest.raises(ValueError, match=r"the chosen experts: one dtype of torch.int64, got"):
        dataclasses.replace(case, choice=case.choice.int()).run(kernel)
    with pytest.raises(ValueError, match=r"the output: one dtype of torch.float32.*, got"):
        case.run(kernel, torch.float64)
