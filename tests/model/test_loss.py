"""The loss: equal to the plain formula in value and gradient, whatever the block and however the vocabulary is cut.

References: torch.nn.functional.cross_entropy on the whole matrix of logits; the weighting formula
sum_s n_s^-alpha sum_t w_t l_t / sum_s n_s^-alpha sum_t w_t, written out by hand.
"""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visionloom.data.encode.encode import EncodedSample, positions
from visionloom.data.stream.batch import PackLayout, pack
from visionloom.model import loss as losses_module
from visionloom.model.loss import linear_cross_entropy
from visionloom.parallel.topology import Topology
from visionloom.tests.ranks import RankPool

ROWS, HIDDEN, VOCABULARY = 37, 24, 50
ROW_BYTES = VOCABULARY * 4
HOST = torch.device("cpu")
BLOCKS = (1, 5, 16, 36, 37, 1024)


def problem(device: torch.device = HOST) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output matrix, targets and weights, some of them zero."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator) * (torch.arange(ROWS) % 4 > 0)
    leaves = (x.to(device).requires_grad_() for x in (hidden, weight))
    return *leaves, targets.to(device), weights.to(device)


def reference() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, loss of each row, and the gradients of three times the sum."""
    hidden, weight, targets, weights = problem()
    losses = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    total = (losses * weights).sum()
    hidden_grad, weight_grad = torch.autograd.grad(3 * total, (hidden, weight))
    return total.detach(), losses.detach(), hidden_grad, weight_grad


def on_part(block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by linear_cross_entropy with this rank's rows of the output matrix; runs on every rank of the pool."""
    hidden, weight, targets, weights = problem()
    part = weight.detach().chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    size = block * len(part) * 4
    total, losses = linear_cross_entropy(hidden, part, targets, weights, dist.group.WORLD, size)
    hidden_grad, weight_grad = torch.autograd.grad(3 * total, (hidden, part))
    dist.all_reduce(hidden_grad)
    return total.detach(), losses, hidden_grad, weight_grad


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradients(ranks: int, block: int, pool: RankPool) -> None:
    found = pool.run(ranks, on_part, block)
    expected = reference()
    for ours in found:
        for mine, right in zip(ours[:3], expected[:3], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([ours[3] for ours in found]), expected[3], rtol=1e-5, atol=1e-5
    )


def test_large_logits_stay_finite(topology: Topology) -> None:
    hidden, weight, targets, weights = problem(topology.device)
    total, losses = linear_cross_entropy(
        hidden * 1e4, weight, targets, weights, topology.groups.tp, 8 * ROW_BYTES
    )
    expected = F.cross_entropy(hidden * 1e4 @ weight.t(), targets, reduction="none")
    assert torch.isfinite(total)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-2)


class LargestLogits(TorchDispatchMode):
    """Watches every tensor that is made for the most rows next to a vocabulary's width."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        made = operation(*arguments, **(options or {}))
        if operation.is_view:  # the output matrix, transposed
            return made
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == VOCABULARY:
                self.rows = max(self.rows, tensor.shape[0])
        return made


@pytest.mark.parametrize("block", [1, 5, 16])
def test_never_more_logits_than_a_block(block: int, topology: Topology) -> None:
    hidden, weight, targets, weights = problem(topology.device)
    with LargestLogits() as watched:
        size = block * ROW_BYTES
        total, _ = linear_cross_entropy(hidden, weight, targets, weights, topology.groups.tp, size)
        total.backward()
    # 37 rows in blocks of nearly the same size: three of 12 or 13, not of 16 and 5.
    assert watched.rows == -(-ROWS // -(-ROWS // block))
    with LargestLogits() as control:
        F.cross_entropy(hidden @ weight.t(), targets)
    assert control.rows == ROWS


def test_frozen_parts_get_no_gradient(topology: Topology) -> None:
    """With a frozen output matrix only the hidden states have a gradient, and without gradients none is made."""
    hidden, weight, targets, weights = problem(topology.device)
    total, _ = linear_cross_entropy(
        hidden, weight.detach(), targets, weights, topology.groups.tp, 8 * ROW_BYTES
    )
    total.backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.cpu(), reference()[2] / 3, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), patch.object(losses_module.torch, "mm") as product:
        linear_cross_entropy(hidden, weight, targets, weights, topology.groups.tp, 8 * ROW_BYTES)
    assert product.call_count == 0


def sample(number: int, length: int, target_weights: list[float]) -> EncodedSample:
    """A text sample with the given weights of its tokens."""
    return EncodedSample(
        sample_id=f"s:{number}", dataset="text", task=None,
        input_ids=np.random.default_rng(number).integers(0, VOCABULARY, length).astype(np.int32),
        target_weights=np.array(target_weights, np.float32), position_ids=positions(length, []),
        visual_positions=np.empty(0, np.int64), grids=np.empty((0, 3), np.int32), media=(), answer=None,
        prompt_length=length, patches=np.empty((0, 768), np.uint8),
    )  # fmt: skip


SAMPLES = [
    sample(0, 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]),
    sample(1, 4, [0, 0, 0, 1]),
    sample(2, 6, [0, 0, 0.5, 2, 0, 1]),
    sample(3, 3, [0, 0, 0]),
]


@pytest.mark.parametrize(("kind", "alpha"), [("token", 0.0), ("sqrt", 0.5), ("sample", 1.0)])
def test_weights_are_those_of_the_formula(kind: str, alpha: float, topology: Topology) -> None:
    """Over two packs with padding; n_s counts the supervised tokens, whatever their own weights."""
    generator = torch.Generator().manual_seed(1)
    table, weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) for _ in range(2))
    batch = pack([SAMPLES[:2], SAMPLES[2:]], PackLayout(16, kind, ("text",), pad_id=0))
    rows = (batch.loss_weights > 0).nonzero()[:, 0]
    hidden = table[batch.input_ids[rows]]
    inputs = hidden, weight, batch.labels[rows], batch.loss_weights[rows]
    moved = [x.to(topology.device) for x in inputs]
    total, _ = linear_cross_entropy(*moved, topology.groups.tp, 4 * ROW_BYTES)

    numerator = denominator = 0.0
    for one in SAMPLES:
        ids, own = torch.from_numpy(one.input_ids).long(), one.target_weights
        count = sum(w > 0 for w in own)
        for place in range(1, len(ids)):
            if own[place] > 0:
                loss = F.cross_entropy(weight @ table[ids[place - 1]], ids[place])
                numerator += count**-alpha * own[place] * float(loss)
                denominator += count**-alpha * own[place]
    assert float(total) == pytest.approx(numerator, rel=1e-5)
    assert float(batch.loss_weights.sum()) == pytest.approx(denominator, rel=1e-6)
