"""Cost of packs: the operations of the model's FLOPs count, which is tested against torch's counter."""

import numpy as np
import pytest

from visionloom.launch.configure import compose
from visionloom.model.config import ModelConfig
from visionloom.model.flops import StepWork, output_flops, step_flops
from visionloom.train.cost import cost_model


@pytest.mark.parametrize("trainable", [{"vision", "merger", "language"}, {"merger"}, {"language"}])
@pytest.mark.parametrize("name", ["tiny", "qwen3vl_8b", "qwen3vl_30b_a3b"])
def test_costs_are_the_operations_of_a_step(name: str, trainable: set[str]) -> None:
    config = compose(["+recipe=demo", f"model={name}"], 1)
    assert config is not None
    model: ModelConfig = config.model
    cost = cost_model(model, trainable)
    flops = []
    packs = np.array(
        [
            [4096, 4096 * 900, 0, 0],
            [8000, 8000**2, 12_000, 12_000 * 1024],
            [500, 500**2, 1600, 1600**2],
        ]
    )
    for tokens, pairs, patches, patch_pairs in packs.tolist():
        flops.append(
            sum(
                step_flops(
                    model, StepWork(tokens, 0, pairs, patches, patch_pairs), trainable
                ).values()
            )
        )
    assert output_flops(model.text, StepWork(1, 0, 0, 0, 0)) == 0
    np.testing.assert_allclose(
        cost.of(packs) / cost.of(packs)[0], np.array(flops) / flops[0], rtol=1e-6
    )
