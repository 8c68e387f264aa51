"""What autograd keeps: ways to make norms, rotations and activations again, and tensors in host memory; gradients are the same bits.

Reference: the same computation with everything kept.
"""

import gc
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from visionloom.model import kept as kept_module
from visionloom.model.kept import Keeper, Made, Moved, kept
from visionloom.model.kernels import attention
from visionloom.model.kernels.activation import gelu, swiglu
from visionloom.model.kernels.norm import branch_rms_norm, layer_norm, rms_norm
from visionloom.model.kernels.permute import count_rows, permute_rows, sort_rows
from visionloom.model.kernels.rotary import rotate_heads
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Layout, backward, packs_of, trainable

WAYS = {
    "cheap again": {"cheap_again": True, "in_host_memory": False},
    "in host memory": {"cheap_again": False, "in_host_memory": True},
    "both": {"cheap_again": True, "in_host_memory": True},
}


def bits_and_calls(recompute: str) -> tuple[dict[str, Tensor], int]:
    """All gradients of a step of two micro-batches, and the calls of attention's kernel; on a rank of the pool."""
    with patch.object(attention, "FORWARD", wraps=attention.FORWARD) as kernel:
        stage, _ = backward(Layout(1, {"recompute": recompute}), packs_of("images"))
    gradients = {name: weight.main_grad.clone() for name, weight in trainable(stage).items()}
    return gradients, kernel.call_count


def test_attention_is_computed_once_where_all_else_is_made_again(pool: RankPool) -> None:
    """The same bits; the control is `full`, which calls it twice in each layer of the language model and of the tower."""
    expected, once = pool.run(1, bits_and_calls, "none")[0]
    gradients, calls = pool.run(1, bits_and_calls, "all_but_attention")[0]
    _, twice = pool.run(1, bits_and_calls, "full")[0]
    assert calls == once > 0
    assert twice == 2 * once
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


def twice(tokens: Tensor) -> Tensor:
    """Each token in two rows, those of one half after those of the other: [T, 64] to [2 T, 64]."""
    keys = torch.tensor([[0, 1]], dtype=torch.int32).repeat(len(tokens), 1)
    order, places, *_ = sort_rows(keys, count_rows(keys, 2))
    return permute_rows(tokens, order, places)


class Layers(nn.Module):
    """Every operation that leaves a remaking, each before something that keeps its result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joined = nn.Linear(64, 2 * 4 * 32)
        self.out = nn.Linear(2 * 2 * 32, 64)
        self.gate_up, self.down = nn.Linear(64, 256), nn.Linear(128, 64)
        self.weights = nn.ParameterList([torch.rand(64) for _ in range(4)])
        self.heads = nn.ParameterList([torch.rand(32) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """Map [T, 64] to [T, 64]."""
        joined = self.joined(rms_norm(x, self.weights[0], 1e-6)).view(-1, 2, 4, 32)
        rotation = torch.linspace(0, 3, len(x) * 32).view(len(x), 32)
        query, key, value = rotate_heads(joined, rotation, 1, tuple(self.heads), 1e-6)
        # The product keeps the keys; their repetition alone would not.
        key = (key * self.heads[1]).repeat_interleave(2, 1)
        scores = torch.einsum("thd,shd->hts", query, key)
        attended = torch.einsum("hts,shd->thd", scores.softmax(-1), value.repeat_interleave(2, 1))
        inner, x = branch_rms_norm(x + self.out(attended.flatten(1)), self.weights[1], 1e-6)
        x = x + self.down(swiglu(self.gate_up(twice(inner)).unflatten(0, (2, -1)).sum(0)))
        return gelu(layer_norm(x, self.weights[2], self.weights[3], 1e-6)).square()


def gradients(**way: bool) -> tuple[list[Tensor], list[Any]]:
    """The gradients of the layers' input and weights, and what was packed."""
    layers, packed = Layers(), []
    tokens = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    pack = Keeper.pack

    def noted(keeper: Keeper, tensor: Tensor) -> Any:
        packed.append(pack(keeper, tensor))
        return packed[-1]

    with patch.object(Keeper, "pack", noted), patch.object(kept_module, "LEAST_BYTES", 0):
        with kept(**{"cheap_again": False, "in_host_memory": False} | way):
            output = layers(tokens)
        output.sum().backward()
    results = [tokens.grad, *(parameter.grad for parameter in layers.parameters())]
    return [each for each in results if each is not None], packed


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_same_bits(way: str) -> None:
    (plain, nothing), (ours, packed) = gradients(), gradients(**WAYS[way])
    assert len(plain) == len(ours) > 8 and not nothing
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    made = sum(isinstance(each, Made) for each in packed)
    moved = sum(isinstance(each, Moved) for each in packed)
    # Two RMSNorms, the second below permuted rows, queries, keys, SwiGLU, GELU and LayerNorm, the last one for GELU's gradient
    # and for its remaking.
    assert made == (9 if WAYS[way]["cheap_again"] else 0)
    assert (moved > 5) == WAYS[way]["in_host_memory"]


@pytest.mark.parametrize("cheap_again", [False, True])
def test_what_has_a_remaking_is_let_go(cheap_again: bool) -> None:
    """The memory of a result goes as soon as its user has run; without remakings autograd keeps it."""
    weight, linear = nn.Parameter(torch.ones(64)), nn.Linear(64, 64)
    x = torch.randn(8, 64, requires_grad=True)
    with kept(cheap_again=cheap_again, in_host_memory=False):
        normalised = rms_norm(x, weight, 1e-6)
        alive = weakref.ref(normalised.untyped_storage())
        output = linear(normalised)
        del normalised
    gc.collect()
    assert (alive() is None) == cheap_again
    output.sum().backward()


@pytest.mark.parametrize("way", ["cheap again", "both"])
def test_what_a_chain_of_remakings_starts_with_is_kept_alone(way: str) -> None:
    """Permuted rows of a norm: neither stays on the device, nor does the norm's input where that is moved to the host."""
    weight, linear = nn.Parameter(torch.ones(64)), nn.Linear(64, 64)
    x = torch.randn(8, 64, requires_grad=True)
    with patch.object(kept_module, "LEAST_BYTES", 0), kept(**WAYS[way]):
        first = x * 2
        normalised = rms_norm(first, weight, 1e-6)
        rows = twice(normalised)
        alive = [weakref.ref(each.untyped_storage()) for each in (first, normalised, rows)]
        output = linear(rows)
        del first, normalised, rows
    gc.collect()
    assert [each() is None for each in alive] == [WAYS[way]["in_host_memory"], True, True]
    output.sum().backward()


def test_a_tensor_that_two_have_saved_is_moved_once() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with (
        patch.object(kept_module, "LEAST_BYTES", 0),
        patch.object(kept_module, "Moved", wraps=Moved) as moved,
        kept(cheap_again=False, in_host_memory=True),
    ):
        hidden = x * 1.0
        output = hidden.sin() + hidden.cos()
    output.sum().backward()
    assert moved.call_count == 1
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.detach().cos() - x.detach().sin())


def test_what_is_needed_next_is_fetched_before() -> None:
    """At the backward pass of a tensor, those that were saved before it are on their way, up to a limit."""
    keeper = Keeper(in_host_memory=True)
    with patch.object(kept_module, "LEAST_BYTES", 0):
        packed = [keeper.pack(torch.full((4,), float(number))) for number in range(6)]
    # Four numbers of four bytes each: two tensors are 32 bytes.
    with patch.object(kept_module, "AHEAD_BYTES", 32):
        assert torch.equal(keeper.unpack(packed[5]), torch.full((4,), 5.0))
    on_their_way = [each.fetched is not None for each in packed if isinstance(each, Moved)]
    assert on_their_way == [False, False, False, True, True, False]


@pytest.mark.parametrize(
    ("tensor", "moves"),
    [
        (nn.Parameter(torch.zeros(512, 512)), False),
        (nn.Parameter(torch.zeros(512, 512)).t(), False),
        (torch.zeros(512, 512), True),
        (torch.zeros(8), False),
    ],
    ids=["parameter", "view of a parameter", "activation", "small"],
)
def test_what_is_moved(tensor: Tensor, moves: bool) -> None:
    keeper = Keeper(in_host_memory=True)
    packed = keeper.pack(tensor)
    assert isinstance(packed, Moved) is moves
    assert torch.equal(keeper.unpack(packed), tensor)
