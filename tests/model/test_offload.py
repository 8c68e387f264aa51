"""Activations in host memory: what autograd saves is really moved, parameters are not, and gradients are the same bits.

Reference: the same computation without offloading.
"""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from visionloom.model import offload
from visionloom.model.offload import in_host_memory


def run(wanted: bool) -> tuple[list[Tensor], int]:
    """Gradients of two layers, and how many tensors were moved."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 4))
    tokens = torch.randn(128, 256, requires_grad=True)
    moved = 0

    def counted(tensor: Tensor) -> Tensor | offload.Packed:
        nonlocal moved
        packed = original(tensor)
        moved += isinstance(packed, tuple)
        return packed

    original = offload._to_host
    with patch.object(offload, "_to_host", counted), in_host_memory(wanted):
        output = layers(tokens)
    output.square().sum().backward()
    return [tokens.grad, *(parameter.grad for parameter in layers.parameters())], moved  # type: ignore[list-item]


def test_gradients_are_the_same_bits() -> None:
    (plain, none), (offloaded, moved) = run(False), run(True)
    assert none == 0 and moved >= 3  # the inputs of two linear layers and of the activation between
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))


@pytest.mark.parametrize(
    ("tensor", "moves"),
    [
        (nn.Parameter(torch.zeros(512, 512)), False),
        (torch.zeros(512, 512), True),
        (torch.zeros(8), False),
    ],
    ids=["parameter", "activation", "small"],
)
def test_what_is_moved(tensor: Tensor, moves: bool) -> None:
    assert isinstance(offload._to_host(tensor), tuple) is moves
    restored = offload._from_host(offload._to_host(tensor))
    assert torch.equal(restored, tensor)


def test_a_view_of_a_parameter_stays() -> None:
    weight = nn.Parameter(torch.zeros(512, 512))
    assert not isinstance(offload._to_host(weight.t()), tuple)
