"""A train step computes what its tokens need and nothing more, counted and not timed: a benchmark would be noise here.

Reference: step_flops, which counts the operations of real tokens by the architecture alone.
"""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionloom.launch.check_parts.training import TinyTraining, tiny_run
from visionloom.model.flops import step_flops
from visionloom.parallel.topology import Topology
from visionloom.train.step_sums import StepCounts


def added_product(total: list[int], rows: list[int], columns: list[int], **_: Any) -> int:
    """Operations of the product that `add_product_` adds to a sum, from the shapes of its tensors."""
    return 2 * rows[0] * rows[1] * columns[1]


def share_of_needed(topology: Topology, steps: int) -> float:
    """The products that steps compute, over those that the tokens of one need."""
    config = tiny_run("fp32", "cpu")
    training = TinyTraining.build(config, topology)
    own = {torch.ops.visionloom.add_product_: added_product}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        training.steps(steps)

    work = StepCounts.of(training.batches, 2).work
    text, vision = config.model.text, config.model.vision
    # Attention is an operation of our own, which the counter does not know.
    attention = 2 * text.layers * text.heads * text.head_dim * work.token_pairs
    attention += 4 * vision.depth * vision.hidden_size * work.patch_pairs
    trainable = {"vision", "merger", "language"}
    needed = sum(step_flops(config.model, work, trainable).values()) - 3 * attention
    return counter.get_total_flops() / needed


def test_a_step_computes_what_its_tokens_need(topology: Topology) -> None:
    if topology.device != torch.device("cpu"):
        pytest.skip("counts are of the CPU's operations")
    # Nothing is padded, and nothing is computed twice.
    assert 0.99 < share_of_needed(topology, steps=1) < 1.01


def test_a_step_that_computes_more_is_seen(topology: Topology) -> None:
    """The control of the count: two steps are twice the products of one."""
    if topology.device != torch.device("cpu"):
        pytest.skip("counts are of the CPU's operations")
    assert 1.98 < share_of_needed(topology, steps=2) < 2.02
