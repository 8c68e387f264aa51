"""The plain twins with their gradients, fp32, against torch's F.rms_norm, F.layer_norm and F.silu and transformers' rotary functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

from visionloom.model.kernels.activation import swiglu
from visionloom.model.kernels.norm import branch_rms_norm, layer_norm, rms_norm
from visionloom.model.kernels.rotary import rotate_heads

T = 7
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def compare(
    ours: Callable[..., Any], reference: Callable[..., Any], *shapes: tuple[int, ...]
) -> None:
    """Compare results and gradients of all inputs, drawn by their shapes."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    own = [x.clone().requires_grad_() for x in drawn]
    other = [x.clone().requires_grad_() for x in drawn]
    results, expected = outputs(ours(*own)), outputs(reference(*other))
    gradients = [torch.randn(x.shape, generator=generator) for x in expected]
    torch.autograd.backward(results, gradients)
    torch.autograd.backward(expected, gradients)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, **CLOSE)
    for x, y in zip(own, other, strict=True):
        torch.testing.assert_close(x.grad, y.grad, **CLOSE)


def reference_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


@pytest.mark.parametrize("shape", [(T, 1, 96), (T, 3, 8)])
def test_norms(shape: tuple[int, ...]) -> None:
    weight = shape[-1:]
    compare(lambda x, w: rms_norm(x, w, 1e-6), reference_norm, shape, weight)
    compare(
        lambda x, w: branch_rms_norm(x, w, 1e-6),
        lambda x, w: (reference_norm(x, w), x.clone()),
        shape,
        weight,
    )


@pytest.mark.parametrize("shape", [(T, 72), (T, 3, 8)])
def test_layer_norm(shape: tuple[int, ...]) -> None:
    width = shape[-1:]
    compare(
        lambda x, weight, bias: layer_norm(x, weight, bias, 1e-6),
        lambda x, weight, bias: F.layer_norm(x, width, weight, bias, 1e-6),
        shape,
        width,
        width,
    )


def test_heads_of_the_language_model() -> None:
    """Reference: F.rms_norm of each head and apply_rotary_pos_emb, whose tensors are [batch, heads, T, D]."""
    groups, queries, dim = 2, 4, 24
    angles = torch.randn(T, dim // 2)
    rotation = torch.cat((angles.cos(), angles.sin()), dim=-1)
    both = torch.cat((angles, angles), dim=-1)[None]

    def ours(joined: Tensor, *weights: Tensor) -> Any:
        return rotate_heads(joined, rotation, 1, weights, 1e-6)

    def reference(joined: Tensor, *weights: Tensor) -> Any:
        parts = [part.flatten(1, 2) for part in joined.split((queries, 1, 1), dim=2)]
        for number, weight in enumerate(weights):
            parts[number] = reference_norm(parts[number], weight)
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        query, key = apply_rotary_pos_emb(query, key, both.cos(), both.sin())
        return tuple(part[0].transpose(0, 1) for part in (query, key, value))

    joined = (T, groups, queries + 2, dim)
    compare(ours, reference, joined, (dim,), (dim,))
    compare(ours, reference, joined)


def test_heads_of_the_vision_tower() -> None:
    heads, dim = 3, 24
    angles = torch.randn(T, dim // 2)
    rotation = torch.cat((angles.cos(), angles.sin()), dim=-1)
    both = torch.cat((angles, angles), dim=-1)

    def reference(joined: Tensor) -> Any:
        query, key, value = joined[:, 0].split(heads, dim=1)
        return (*apply_rotary_pos_emb_vision(query, key, both.cos(), both.sin()), value)

    compare(
        lambda joined: rotate_heads(joined, rotation, heads, (), 0.0),
        reference,
        (T, 1, 3 * heads, dim),
    )


def test_swiglu() -> None:
    def reference(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        output = F.silu(gate) * up
        return output if weights is None else output * weights.unsqueeze(-1)

    compare(swiglu, reference, (T, 1, 50))
    compare(swiglu, reference, (T, 50), (T,))


def test_a_kernel_is_one_operation_with_its_inputs_and_results() -> None:
    """Nothing that it is made of is seen by torch's dispatch modes, nor kept for the backward pass."""
    kept: list[Tensor] = []
    x, weight = torch.randn(T, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
        swiglu(x)
    assert [tuple(t.shape) for t in kept] == [(T, 8), (T, 1), (8,), (T, 8)]
