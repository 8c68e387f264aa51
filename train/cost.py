"""The cost of a pack in the model's operations, by which packs are dealt to ranks evenly. Imports no torch."""

from visionloom.data.plan.deal import CostModel
from visionloom.model.config import ModelConfig
from visionloom.model.flops import StepWork, step_flops
from visionloom.model.lora_config import LoraConfig


def cost_model(
    model: ModelConfig, trainable: set[str], lora: LoraConfig | None = None
) -> CostModel:
    """Count the operations of forward and backward for a token, a pair of tokens, a patch and a pair of patches.

    The unit is a token's operations.

    Frozen parts cost less, as in the metrics. The output layer is left out: it sees supervised tokens only.
    """
    merged = model.vision.spatial_merge_size**2
    # Patches come in squares of 2 x 2, each of which the merger turns into one token.
    works = [
        StepWork(1, 0, 0, 0, 0),
        StepWork(0, 0, 1, 0, 0),
        StepWork(0, 0, 0, merged, 0),
        StepWork(0, 0, 0, 0, 1),
    ]
    flops = [sum(step_flops(model, work, trainable, lora).values()) for work in works]
    token, token_pair, patches, patch_pair = flops
    return CostModel(1.0, token_pair / token, patches / merged / token, patch_pair / token)
