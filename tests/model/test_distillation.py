"""The divergence from a teacher: equal to the plain formula in value and gradient, whatever the block and the vocabulary's split.

Reference: torch.nn.functional.kl_div on whole matrices of logits in fp64, with autograd's gradient; for kept tokens the same on
their masses and that of all others.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from visionloom.model.distillation import (
    DistillationLoss,
    HiddenTeacher,
    RowTeacher,
    TopKTeacher,
    top_k,
)
from visionloom.model.distillation_config import DistillationConfig
from visionloom.model.loss import linear_loss
from visionloom.tests.ranks import RankPool

ROWS, HIDDEN, TEACHER_HIDDEN, VOCABULARY = 23, 24, 40, 50
BLOCK = 7 * VOCABULARY * 4 * 14
"""Bytes in which seven rows fit."""
CASES = [
    DistillationConfig(),
    DistillationConfig(temperature=2.5, direction="reverse", cross_entropy_weight=0.5, weight=3.0),
    DistillationConfig(temperature=0.7, cross_entropy_weight=0.0),
    DistillationConfig(direction="reverse", weight=0.3),
]


class Problem:
    """Hidden states and output matrices of student and teacher, targets and weights, some of them zero."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden, self.weight = drawn(ROWS, HIDDEN), drawn(VOCABULARY, HIDDEN) * 0.5
        self.teacher_hidden = drawn(ROWS, TEACHER_HIDDEN)
        self.teacher_weight = drawn(VOCABULARY, TEACHER_HIDDEN) * 0.5
        self.targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
        self.weights = torch.rand(ROWS, generator=generator) * (torch.arange(ROWS) % 4 > 0)


def buckets(log_probabilities: Tensor, ids: Tensor | None) -> Tensor:
    """Log-masses [R, k + 1] of some tokens and of all others together; of each token if `ids` is None."""
    if ids is None:
        return log_probabilities
    others = log_probabilities.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_probabilities.gather(1, ids), others], dim=1)


def reference(options: DistillationConfig, k: int = 0) -> tuple[Tensor, ...]:
    """Both losses of each row, and the gradients of twice the weighted sum, in fp64; of the teacher's best `k` tokens if given."""
    problem = Problem()
    hidden, weight = problem.hidden.double(), problem.weight.double()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight.t()
    theirs = (problem.teacher_hidden.double() @ problem.teacher_weight.double().t()).div(
        options.temperature
    )
    ids = theirs.topk(k, dim=1).indices if k else None
    ours = buckets((logits / options.temperature).log_softmax(1), ids)
    theirs = buckets(theirs.log_softmax(1), ids)
    one, other = (ours, theirs) if options.direction == "forward" else (theirs, ours)
    divergences = F.kl_div(one, other, reduction="none", log_target=True).sum(1)
    divergences = divergences * options.temperature**2
    cross_entropies = F.cross_entropy(logits, problem.targets, reduction="none")
    total = options.cross_entropy_weight * cross_entropies + options.weight * divergences
    total = (total * problem.weights).sum()
    gradients = torch.autograd.grad(2 * total, leaves)
    return total.detach(), torch.stack([cross_entropies, divergences]).detach(), *gradients


def teacher_of(problem: Problem, kind: str, temperature: float) -> RowTeacher:
    """A live teacher, or its best tokens: all of them, or as many as `kind` says."""
    rank, size = dist.get_rank(), dist.get_world_size()
    weight = problem.teacher_weight.chunk(size)[rank].clone()
    if kind == "live":
        return HiddenTeacher(problem.teacher_hidden, weight)
    return top_k(problem.teacher_hidden, weight, int(kind), temperature, dist.group.WORLD)


def computed(options: DistillationConfig, kind: str) -> tuple[Tensor, ...]:
    """The same with this rank's rows of the output matrices. Runs on every rank of the pool."""
    problem = Problem()
    hidden = problem.hidden.requires_grad_()
    part = problem.weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    teacher = teacher_of(problem, kind, options.temperature)
    group = dist.group.WORLD
    loss = DistillationLoss(options, teacher, problem.targets, problem.weights, group)
    total, losses = linear_loss(hidden, part, loss, BLOCK)
    hidden_grad, weight_grad = torch.autograd.grad(2 * total, (hidden, part))
    dist.all_reduce(hidden_grad)
    return total.detach(), losses, hidden_grad, weight_grad


@pytest.mark.parametrize("kind", ["live", str(VOCABULARY), "5"])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradients(
    ranks: int, options: DistillationConfig, kind: str, pool: RankPool
) -> None:
    kept = 0 if kind == "live" else int(kind) % VOCABULARY
    expected = [x.float() for x in reference(options, kept)]
    found = pool.run(ranks, computed, options, kind)
    for ours in found:
        for mine, right in zip(ours[:3], expected[:3], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([ours[3] for ours in found]), expected[3], rtol=1e-5, atol=1e-5
    )


def computed_against_itself(direction: str, kind: str) -> tuple[Tensor, Tensor]:
    """Divergences and gradient of a student that is its own teacher. Runs on every rank of the pool."""
    problem = Problem()
    problem.teacher_hidden, problem.teacher_weight = problem.hidden.clone(), problem.weight
    options = DistillationConfig(temperature=1.5, direction=direction, cross_entropy_weight=0.0)
    teacher = teacher_of(problem, kind, options.temperature)
    weight = problem.weight.chunk(dist.get_world_size())[dist.get_rank()].clone()
    hidden, group = problem.hidden.requires_grad_(), dist.group.WORLD
    loss = DistillationLoss(options, teacher, problem.targets, problem.weights, group)
    total, losses = linear_loss(hidden, weight, loss, BLOCK)
    return losses[1], torch.autograd.grad(total, hidden)[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    direction: str, ranks: int, pool: RankPool
) -> None:
    """Exactly with a live teacher; with stored tokens as exact as their logarithms are."""
    for divergences, gradient in pool.run(ranks, computed_against_itself, direction, "live"):
        assert divergences.abs().max() == 0.0 and gradient.abs().max() == 0.0
    for divergences, gradient in pool.run(ranks, computed_against_itself, direction, "5"):
        assert divergences.abs().max() <= 1e-5 and gradient.abs().max() <= 1e-5


def test_probabilities_rounded_to_half_still_add_up() -> None:
    """Of a row rounded to fp16 the masses are scaled to 1, or the gradient would pull all logits one way."""
    problem = Problem()
    log_probabilities = (problem.teacher_hidden @ problem.teacher_weight.t()).log_softmax(1)
    values, ids = log_probabilities.topk(5)
    rest = log_probabilities.scatter(1, ids, -torch.inf).logsumexp(1)
    half = TopKTeacher(ids.int(), values.half(), rest)
    kept, others = half._of(slice(0, ROWS))
    total = kept.exp().sum(1) + others.exp()
    torch.testing.assert_close(total, torch.ones(ROWS), rtol=0, atol=1e-6)
    assert float((values.half().float().exp().sum(1) + rest.exp() - 1).abs().max()) > 1e-5
