"""Mixtures of experts: grouped matrices, routing, and the load-balancing loss.

References: a loop over the experts; transformers' load_balancing_loss_func; a brute-force sum over all tokens.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from visionloom.model import experts
from visionloom.model.experts import (
    Matrix,
    Router,
    WeightGradient,
    grouped_linear,
    routers_of,
    update_router_loads,
)
from visionloom.model.kernels.routing import ENTROPY_UNIT
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import TestPack, tiny_config
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Case, Layout, backward, build, packs_of, trainable, weigh

EXPERTS = 8


def loop_over_experts(tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    groups = tokens.tensor_split(ends[:-1].tolist())
    return torch.cat([group @ weight.T for group, weight in zip(groups, weights, strict=True)])


def at_once(tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return grouped_linear(tokens, Matrix(weights), ends)


def late(tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return grouped_linear(tokens, Matrix.taken(weights), ends)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0], [7, 1, 1, 7]])
def test_grouped_matrices_equal_a_loop(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    results = []
    for multiply in (at_once, late, loop_over_experts):
        generator.manual_seed(0)
        tokens = torch.randn(sum(counts), 16, generator=generator).requires_grad_()
        weights = torch.randn(len(counts), 24, 16, generator=generator).requires_grad_()
        output = multiply(tokens, weights, torch.tensor(counts).cumsum(0).int())
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        results.append((output.detach(), tokens.grad, weights.grad))
    *both, expected = results
    for ours in both:
        for value, theirs in zip(ours, expected, strict=True):
            assert theirs is not None and value is not None
            torch.testing.assert_close(value, theirs)


def summed_gradient(
    multiply: Callable[[Any, Tensor], list[Tensor]], parameter: Any, passes: list[Tensor]
) -> Tensor:
    """The gradient of a parameter after backward passes of all outputs' squares, each of which has two outputs."""
    for tokens in passes:
        outputs = multiply(parameter, tokens)
        torch.autograd.backward(outputs, [2 * output.detach() for output in outputs])
    gradient = getattr(parameter, "main_grad", None)
    return parameter.grad if gradient is None else gradient


@pytest.mark.parametrize("take", [Matrix.of, Matrix.taken])
@pytest.mark.parametrize("in_main_grad", [True, False])
def test_all_products_with_a_matrix_are_in_its_gradient(
    take: Callable[[Tensor], Matrix], in_main_grad: bool
) -> None:
    """As in Megatron-core's DDP: the flag says that what autograd gets has no content, so that nothing is added twice."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([3, 3, 8, 9]).int()
    drawn = torch.randn(4, 2, 12, 16, generator=generator)
    passes = [torch.randn(2 * 9, 16, generator=generator) for _ in range(2)]

    def grouped(parameter: Any, tokens: Tensor) -> list[Tensor]:
        matrix = take(parameter)
        return [grouped_linear(part, matrix, ends) for part in tokens.split(9)]

    def looped(parameter: Any, tokens: Tensor) -> list[Tensor]:
        weights = parameter.flatten(1, -2)
        return [loop_over_experts(part, weights, ends) for part in tokens.split(9)]

    ours, theirs = (drawn.clone().requires_grad_() for _ in range(2))
    own: Any = ours
    if in_main_grad:
        own.main_grad = torch.zeros_like(drawn)
    made = summed_gradient(grouped, own, passes)
    torch.testing.assert_close(made, summed_gradient(looped, theirs, passes))
    assert getattr(own, "grad_added_to_main_grad", False) is in_main_grad
    assert own.grad is not None and own.grad.shape == own.shape


def gradients_of_experts(layout: Layout, packs: list[TestPack], in_product: bool) -> list[Tensor]:
    """`main_grad` of the experts' matrices; runs on a rank of the pool. Else Megatron-core's DDP adds what autograd hands it."""
    made = mock.patch.object(WeightGradient, "make", WeightGradient._sum)
    with nullcontext() if in_product else made:
        stage, _ = backward(layout, packs)
    named = trainable(stage).items()
    return [weight.main_grad.clone() for name, weight in named if ".experts." in name]


@pytest.mark.parametrize("at_once", [False, True])
def test_gradients_are_those_that_ddp_adds(at_once: bool, pool: RankPool) -> None:
    """Of two micro-batches a rank, on expert ranks, where matrices are taken before rows travel, and without."""
    layout = Layout(2, {"expert": 1 if at_once else 2}, Case(experts=EXPERTS))
    packs = packs_of("text")
    both = [pool.run(2, gradients_of_experts, layout, packs, made) for made in (True, False)]
    for own, theirs in zip(*both, strict=True):
        assert len(own) == len(theirs) > 0
        for gradient, expected in zip(own, theirs, strict=True):
            assert float(expected.abs().max()) > 0
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.fixture
def model(topology: Topology) -> Qwen3VL:
    found = Qwen3VL(tiny_config(experts=EXPERTS), topology).to(topology.device)
    weigh(found, topology)
    return found


def routed(router: Router, logits: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and experts, [n, k] each, on the router's device."""
    device = router.weight.device
    return router.routing(logits.to(device).unsqueeze(1), padding.to(device).unsqueeze(1))


def test_padding_is_kept_out_of_the_statistics(model: Qwen3VL, topology: Topology) -> None:
    router = routers_of([model])[0]
    logits = torch.randn(10, EXPERTS, generator=torch.Generator().manual_seed(1))
    padding = torch.arange(10) >= 6
    _, chosen = routed(router, logits, padding)
    counts = torch.bincount(chosen[:6].flatten().cpu(), minlength=EXPERTS)
    assert router.tally[:EXPERTS].tolist() == counts.tolist()
    probabilities = logits[:6].softmax(1)
    assert float(router.tally[EXPERTS]) * ENTROPY_UNIT == pytest.approx(
        float(-(probabilities * probabilities.log()).sum()), rel=1e-5
    )
    for other in routers_of([model])[1:]:
        routed(other, logits, padding)
    _, _, layers, largest = update_router_loads([model], topology).tolist()
    share = counts / counts.sum()
    torch.testing.assert_close(router.load.cpu(), share.float())
    assert layers == len(routers_of([model]))
    assert largest == pytest.approx(float(share.max()) * EXPERTS)
    assert float(router.tally.abs().sum()) == 0


def test_nothing_is_counted_without_gradient(model: Qwen3VL) -> None:
    """Recomputation runs the forward pass twice, and evaluation must leave no trace."""
    router = routers_of([model])[0]
    logits, padding = torch.randn(4, EXPERTS), torch.zeros(4, dtype=torch.bool)
    with torch.no_grad():
        routed(router, logits, padding)
    router.eval()
    routed(router, logits, padding)
    assert float(router.tally.abs().sum()) == 0


def balance_gradient(router: Router, logits: Tensor) -> Tensor:
    """Gradient of the balance loss alone, on the host: the router's weights get no gradient."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=router.weight.device))
    leaf = logits.clone().requires_grad_()
    weights, _ = routed(router, leaf, torch.zeros(len(leaf), dtype=torch.bool))
    (weights * 0.0).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_the_loss_is_transformers(model: Qwen3VL, topology: Topology) -> None:
    """With the loads of the same tokens, our per-token loss summed is transformers' mean, times tokens over top-k.

    transformers counts each of the k choices, so its even value is k where ours is 1.
    """
    router = routers_of([model])[0]
    logits = torch.randn(32, EXPERTS, generator=torch.Generator().manual_seed(2))
    balance_gradient(router, logits)  # counts the loads
    for other in routers_of([model])[1:]:
        balance_gradient(other, logits)
    update_router_loads([model], topology)
    ours = balance_gradient(router, logits)

    leaf = logits.clone().requires_grad_()
    theirs: Any = load_balancing_loss_func((leaf,), EXPERTS, router.topk)
    theirs.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(
        ours, leaf.grad * router.coefficient * len(logits) / router.topk, rtol=1e-4, atol=1e-7
    )


def router_gradients(packs: list[TestPack], balance: float) -> dict[str, Tensor]:
    """Gradients of a mixture's routers; runs on a rank of the pool."""
    stage, _ = backward(Layout(1, {}, Case(experts=EXPERTS, balance=balance)), packs)
    return {
        name: parameter.main_grad.clone()
        for name, parameter in trainable(stage).items()
        if name.endswith("router.weight")
    }


def mean_balance_gradient(packs: list[TestPack]) -> dict[str, Tensor]:
    """Brute force: gradient of coefficient * E * sum_i f_i P_i with P_i the plain mean over all real tokens, by autograd.

    Runs on a rank of the pool. f_i is taken from the loads that the step before has counted.
    """
    stage = build(Layout(1, {}, Case(experts=EXPERTS)), sharded=False)
    (model,) = stage.model_parts
    for router in routers_of([model]):
        router.coefficient = 0.0
        # Autograd is to return the gradient, which the router would add there.
        del router.weight.main_grad
    probabilities: dict[int, list[Tensor]] = {}
    for number, router in enumerate(routers_of([model])):
        router.register_forward_pre_hook(_record(probabilities, number), with_kwargs=False)
    for pack in packs:
        model(model.prepare(pack))
    loads = [
        router.tally[:EXPERTS] / router.tally[:EXPERTS].sum() for router in routers_of([model])
    ]
    loss = sum(
        0.01 * EXPERTS * (torch.cat(probabilities[number]).mean(0) * load.float()).sum()
        for number, load in enumerate(loads)
    )
    names = [name for name in trainable(stage) if name.endswith("router.weight")]
    found = torch.autograd.grad(loss, [trainable(stage)[name] for name in names])  # type: ignore[arg-type]
    return dict(zip(names, found, strict=True))


def _record(found: dict[int, list[Tensor]], number: int) -> Any:
    def hook(router: Router, arguments: tuple[Tensor, Tensor]) -> None:
        hidden, padding = arguments
        logits = F.linear(hidden, router.weight).view(-1, EXPERTS)
        found.setdefault(number, []).append(logits.softmax(1)[~padding.reshape(-1)])

    return hook


def test_the_scale_is_that_of_a_mean_over_all_tokens(pool: RankPool) -> None:
    """Under the sqrt loss, whose denominator is no number of tokens, the balance is still a mean over the real tokens."""
    packs = packs_of("everything")
    ((on,), (off,), (expected,)) = (
        pool.run(1, router_gradients, packs, 0.01),
        pool.run(1, router_gradients, packs, 0.0),
        pool.run(1, mean_balance_gradient, packs),
    )
    assert expected.keys() == on.keys()
    for name, gradient in expected.items():
        difference = on[name] - off[name]
        assert float((difference - gradient).norm() / gradient.norm()) < 1e-3, name


def bits(layout: Layout, packs: list[TestPack]) -> tuple[dict[str, Tensor], int]:
    """All gradients of this rank, and how often its layers have sorted rows; runs on a rank of the pool."""
    with mock.patch.object(experts, "Dispatch", wraps=experts.Dispatch) as dispatch:
        stage, _ = backward(layout, packs)
    gradients = {name: weight.main_grad.clone() for name, weight in trainable(stage).items()}
    return gradients, dispatch.call_count


@pytest.mark.parametrize("mode", ["full", "mlp"])
def test_recomputation_keeps_the_routing_and_gives_the_same_bits(mode: str, pool: RankPool) -> None:
    """Two micro-batches a rank: each takes its own plan again."""
    packs = packs_of("text")
    parallel = {"expert": 2}
    plain, again = (
        pool.run(2, bits, Layout(2, settings, Case(experts=EXPERTS)), packs)
        for settings in (parallel, parallel | {"recompute": mode})
    )
    for (expected, sorts), (gradients, sorts_again) in zip(plain, again, strict=True):
        assert sorts_again == sorts > 0
        assert expected.keys() == gradients.keys()
        for name, gradient in expected.items():
            assert torch.equal(gradients[name], gradient), name
