"""On a GPU (`--device cuda`): the comparisons that launch/check.py makes, of every kernel with its twin and its definition."""

import pytest
import torch

from visionloom.launch.check_parts.operations import check_operations


def test_kernels_are_their_twins(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    assert [result.line for result in check_operations(device) if not result.passed] == []
