"""The router's operations. References: torch's autograd through plain formulas; the plain twins for the kernels."""

import pytest
import torch
from torch import Tensor

from visionloom.model.kernels import routing
from visionloom.model.kernels.routing import ENTROPY_UNIT, choose_experts, weigh_experts
from visionloom.tests.model.kernels.triton_process import compiling, interpreted, stack_bytes

SIZES = [(37, 8, 2), (5, 7, 3), (70, 128, 8), (1, 16, 1)]
"""Tokens, experts, experts of a token."""


def inputs(tokens: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, padding and the experts' load."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, experts, generator=generator)
    padding = torch.rand(tokens, generator=generator) > 0.7
    return logits, padding, torch.rand(experts, generator=generator)


@pytest.mark.parametrize(("tokens", "experts", "each"), SIZES)
def test_weights_are_the_renormalised_softmax(tokens: int, experts: int, each: int) -> None:
    logits, padding, _ = inputs(tokens, experts)
    chosen = choose_experts(logits, each)
    tally = torch.zeros(experts + 2, dtype=torch.int64)
    weights = weigh_experts(logits, chosen, padding, tally)

    probabilities = logits.softmax(1)
    largest, places = probabilities.topk(each, dim=1)
    torch.testing.assert_close(weights, largest / largest.sum(1, keepdim=True))
    assert chosen.dtype == torch.int32
    assert torch.equal(chosen.long(), places)
    real = ~padding
    assert tally[:experts].tolist() == places[real].flatten().bincount(minlength=experts).tolist()
    entropy = -(probabilities * probabilities.log())[real].sum()
    assert float(tally[experts]) * ENTROPY_UNIT == pytest.approx(float(entropy), rel=1e-5)
    assert int(tally[experts + 1]) == int(real.sum())


@pytest.mark.parametrize("balanced", [False, True])
def test_gradients_are_autograds(balanced: bool) -> None:
    logits, padding, load = inputs(37, 8)
    chosen = choose_experts(logits, 2)
    gradient = torch.arange(74.0).view(37, 2)
    own, plain = (logits.clone().requires_grad_() for _ in range(2))
    weigh_experts(own, chosen, padding, None, (load, 0.3) if balanced else None).backward(gradient)

    weights = plain.softmax(1).gather(1, chosen.long())
    total = (weights / weights.sum(1, keepdim=True) * gradient).sum()
    if balanced:
        total += 0.3 * (plain.softmax(1)[~padding] @ load).sum()
    total.backward()
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-4, atol=1e-5)


def kernels_equal_their_twins() -> None:
    """In a process where Triton is interpreted."""
    from visionloom.model.kernels import routing_triton

    for tokens, experts, each in SIZES:
        logits, some, load = inputs(tokens, experts)
        chosen = routing_triton.choose(logits, each)
        assert torch.equal(chosen, routing._choose(logits, each))
        for padding in (None, some):
            tallies = torch.zeros(2, experts + 2, dtype=torch.int64)
            weights = routing_triton.weigh(logits, chosen, padding, tallies[0])
            torch.testing.assert_close(weights, routing._weigh(logits, chosen, padding, tallies[1]))
            torch.testing.assert_close(tallies[0], tallies[1], rtol=1e-6, atol=1)
            gradient = torch.randn(weights.shape)
            shared = gradient, logits, chosen, weights, padding
            for balance in ((None, None), (load, torch.full((1,), 0.3))):
                torch.testing.assert_close(
                    routing_triton.weigh_backward(*shared, *balance),
                    routing._weigh_backward(*shared, *balance),
                )
    nothing = torch.full((4, 7), float("nan"))
    assert int(routing_triton.choose(nothing, 3).min()) >= 0
    assert int(routing_triton.choose(nothing, 3).max()) < 7


def test_kernels_equal_their_twins() -> None:
    interpreted(kernels_equal_their_twins)


def kernels_fit_into_registers() -> None:
    """In a process where Triton compiles; sizes of the published mixtures."""
    from visionloom.model.kernels import routing_triton

    names = ("logits", "weights", "gradient", "load", "scale", "result")
    types = dict.fromkeys(names, "*fp32") | {"experts": "*i32", "padding": "*i1", "tally": "*i64"}
    types["tokens"] = "i32"
    rows, columns = routing_triton._tile(128)
    sizes = {"COUNT": 128, "EACH": 8, "ROWS": rows, "COLUMNS": columns}
    weighs = sizes | {"SLOTS": 8, "PADDED": True, "TALLIED": True}
    balances = sizes | {"PADDED": True, "BALANCED": True}
    for gpu in (80, 90, 100):
        assert stack_bytes(routing_triton._choose, types, sizes, gpu) == 0
        assert stack_bytes(routing_triton._weigh, types, weighs, gpu) == 0
        assert stack_bytes(routing_triton._weigh_backward, types, balances, gpu) == 0


def test_kernels_fit_into_registers() -> None:
    compiling(kernels_fit_into_registers)
