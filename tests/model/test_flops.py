"""Counted floating-point operations of a step against torch's own count.

Reference: torch.utils.flop_counter.FlopCounterMode on the running model, with torch's own count for FlashAttention over
variable lengths for our operation: in full, causal or not, and its backward as five products for the forward's two, the
recomputed scores among them. We count half of a causal score matrix and never recomputation, so the reference for
attention is its forward count, halved in the language model, and twice that for the backward. All else is compared exactly.
"""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from visionloom.model.config import GROUPS
from visionloom.model.flops import StepWork, step_flops
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.trainable import set_trainable
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import TestPack, build_pair, make_example, make_pack

SAMPLES = [[5, (4, 6), 9], [21], [2, (2, 4, 4), 3, (2, 2), 11]]
TRAINABLE = [set(groups) for size in (1, 2, 3) for groups in combinations(GROUPS, size)]


def forward_flops(*arguments: Any, **_: Any) -> int:
    """torch's count of attention in segments."""
    query, key, value, cu_seqlens_q, cu_seqlens_k, *_bounds, max_q, max_k, _causal, _scale = (
        arguments
    )
    count: int = flop_counter._flash_attention_forward_flop(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k
    )
    return count


def backward_flops(*arguments: Any, **_: Any) -> int:
    """torch's count of its backward pass."""
    *inputs, cu_seqlens_q, cu_seqlens_k, _bounds_q, _bounds_k, max_q, max_k, _causal, _scale = (
        arguments
    )
    count: int = flop_counter._flash_attention_backward_flop(
        *inputs, cu_seqlens_q, cu_seqlens_k, max_q, max_k
    )
    return count


def product_flops(total: Tensor, rows: Tensor, columns: Tensor, **_: Any) -> int:
    """torch's count of the product that is added to a sum."""
    count: int = flop_counter.mm_flop(rows.t().shape, columns.shape)
    return count


COUNTS = {
    torch.ops.visionloom.add_product_: product_flops,
    torch.ops.visionloom.attention: forward_flops,
    torch.ops.visionloom.attention_backward: backward_flops,
}
for counted in COUNTS.values():
    # The counter gives such a function tensors, not their shapes.
    counted._get_raw = True  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def case(topology: Topology, request: pytest.FixtureRequest) -> tuple[Qwen3VL, TestPack, StepWork]:
    """A model, a pack without padding, and what the pack holds."""
    if topology.device.type != "cpu":
        pytest.skip("the counter sees other attention kernels on a GPU")
    theirs, ours = build_pair(topology, 0, request.param)
    examples = [make_example(parts, i) for i, parts in enumerate(SAMPLES)]
    pack = make_pack(theirs, examples)
    work = StepWork(
        tokens=sum(len(e.ids) for e in examples),
        supervised_tokens=int((pack.loss_weights > 0).sum()),
        token_pairs=sum(len(e.ids) ** 2 for e in examples),
        patches=sum(t * h * w for e in examples for t, h, w in e.grids),
        patch_pairs=sum(t * (h * w) ** 2 for e in examples for t, h, w in e.grids),
    )
    return ours, pack, work


def count(counter: FlopCounterMode, module: str = "Global", attention: bool = False) -> int:
    """Operations counted in a module, by attention kernels or by all else."""
    counts = counter.get_flop_counts().get(module, {})
    return sum(n for kernel, n in counts.items() if ("attention" in str(kernel)) == attention)


@pytest.mark.parametrize("trainable", TRAINABLE, ids=lambda groups: "+".join(sorted(groups)))
def test_step_flops_equal_torchs_count(
    case: tuple[Qwen3VL, TestPack, StepWork], trainable: set[str]
) -> None:
    model, pack, work = case
    set_trainable(model, trainable)
    inputs = model.prepare(pack)
    with FlopCounterMode(display=False, custom_mapping=COUNTS) as forward:
        loss, _ = model(inputs)
    with FlopCounterMode(display=False, custom_mapping=COUNTS) as backward:
        loss.backward()
    model.zero_grad(set_to_none=True)

    ours = sum(step_flops(model.model_config, work, trainable).values())
    products = sum(
        step_flops(
            model.model_config, replace(work, token_pairs=0, patch_pairs=0), trainable
        ).values()
    )
    assert products == count(forward) + count(backward)

    vision = count(forward, "Qwen3VL.visual", attention=True)
    language = count(forward, "Qwen3VL.language_model", attention=True)
    assert min(vision, language) > 0 and vision + language == count(forward, attention=True)
    backwards = language + (vision if "vision" in trainable else 0)
    assert count(backward, attention=True) == 2.5 * backwards
    halved = language / 2 * 3 + vision * (3 if "vision" in trainable else 1)
    assert ours - products == halved


def test_padding_counts_nothing(case: tuple[Qwen3VL, TestPack, StepWork]) -> None:
    """A step without tokens costs nothing: padding is not in Work, and no constant is added."""
    model, _, _ = case
    assert sum(step_flops(model.model_config, StepWork(0, 0, 0, 0, 0), set(GROUPS)).values()) == 0
