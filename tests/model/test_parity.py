"""Our model against transformers' own: logits, loss and every parameter's gradient, fp32, dense and mixtures of experts.

Reference: transformers' Qwen3VLForConditionalGeneration and Qwen3VLMoeForConditionalGeneration (each sample alone) and torch's cross_entropy.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from visionloom.model.huggingface.names import from_huggingface, to_huggingface
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import (
    build_pair,
    make_example,
    make_pack,
    reference_run,
    tiny_config,
)

TOLERANCE = 1e-5

CASES: dict[str, list[list[Any]]] = {
    "text": [[17]],
    "one image": [[5, (4, 6), 9]],
    "images of different sizes": [[3, (2, 2), 4, (6, 4), 1, (2, 10), 12]],
    "video": [[4, (3, 4, 4), 8]],
    "image and video": [[4, (4, 4), 2, (2, 2, 6), 8]],
    "three packed samples": [[5, (4, 6), 9], [21], [2, (2, 4, 4), 3, (2, 2), 11]],
}


def error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference relative to the norm of the reference."""
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def worst_gradient_error(theirs: Any, ours: Any) -> tuple[float, str]:
    """Largest relative error over all parameters; a gradient missing on both sides counts as equal."""
    state = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in theirs.named_parameters()
    }
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    expected = from_huggingface(state, ours.model_config)
    errors = {}
    for name, parameter in ours.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        reference = expected[name]
        errors[name] = (
            error(gradient, reference) if reference.abs().max() > 0 else float(gradient.abs().max())
        )
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


KINDS = {
    "tied": (True, 0),
    "untied": (False, 0),
    "mixture": (True, 8),
    "untied mixture": (False, 8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(
    topology: Topology, case: str, seed: int, kind: str
) -> None:
    theirs, ours = build_pair(topology, seed, *KINDS[kind])
    ours.eval()  # without the load-balancing loss, which transformers leaves out too
    examples = [make_example(parts, seed * 10 + i) for i, parts in enumerate(CASES[case])]
    expected_logits, expected_loss = reference_run(theirs, examples)
    inputs = ours.prepare(make_pack(theirs, examples, length=96))
    logits = ours.logits(inputs)[: sum(len(e.ids) for e in examples)].detach().cpu()
    assert error(logits, torch.cat(expected_logits).detach()) <= TOLERANCE

    loss, _ = ours(inputs)
    loss.backward()
    expected_loss.backward()
    assert abs(float(loss) / float(expected_loss) - 1) <= TOLERANCE
    ours.cpu()
    worst, name = worst_gradient_error(theirs, ours)
    assert worst <= TOLERANCE, f"{name}: {worst:.2e}"
    ours.to(topology.device)


def test_dropping_deepstack_fails_the_comparison(topology: Topology) -> None:
    """The control: without DeepStack features the logits must differ by far more than the tolerance."""
    theirs, ours = build_pair(topology, 0)
    examples = [make_example(parts, i) for i, parts in enumerate(CASES["three packed samples"])]
    expected, _ = reference_run(theirs, examples)
    with torch.no_grad():
        for merger in ours.visual.deepstack_merger_list:
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
        logits = ours.logits(ours.prepare(make_pack(theirs, examples))).cpu()
    assert error(logits, torch.cat(expected).detach()) > 1e-2


@pytest.mark.parametrize("experts", [0, 8])
def test_neighbours_in_a_pack_are_independent(topology: Topology, experts: int) -> None:
    """Changing one sample's tokens and pixels leaves the logits of its neighbours bit for bit as they were.

    Experts multiply the tokens of all samples together, so there the order of sums may differ in the last bits.
    """
    theirs, ours = build_pair(topology, 1, experts=experts)
    first, second, third = (make_example([6, (2, 4), 7], seed) for seed in (0, 1, 2))
    other = make_example([6, (2, 4), 7], 99)
    with torch.no_grad():
        before = ours.logits(ours.prepare(make_pack(theirs, [first, second, third])))
        after = ours.logits(ours.prepare(make_pack(theirs, [first, other, third])))
    n = len(first.ids)
    off = max(error(after[:n], before[:n]), error(after[2 * n :], before[2 * n :]))
    assert off <= (1e-6 if experts else 0.0)
    assert not torch.allclose(before[n : 2 * n], after[n : 2 * n])


@pytest.mark.parametrize("kind", KINDS)
def test_huggingface_names_go_both_ways(topology: Topology, kind: str) -> None:
    tied, experts = KINDS[kind]
    theirs, _ = build_pair(topology, 0, tied, experts)
    state = {k: v for k, v in theirs.state_dict().items() if not (tied and k == "lm_head.weight")}
    config = tiny_config(tied, experts)
    back = to_huggingface(from_huggingface(state, config), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
