"""What a pack costs, from the model's operations: numbers that deal packs to ranks evenly. Imports no torch."""

from visionloom.data.plan.deal import CostModel
from visionloom.model.config import ModelConfig
from visionloom.model.flops import StepWork, step_flops
from visionloom.model.lora_config import LoraConfig


def cost_model(
    model: ModelConfig, trainable: set[str], lora: LoraConfig | None = None
) -> CostModel:
    """Operations of forward and backward for a token, a pair of tokens, a patch and a pair of patches, in units of a token's.

    Frozen parts cost less, as in the metrics. The output layer is left out: it sees supervised tokens only.
    """
    merged = model.vision.spatial_merge_size**2
    one = [
        StepWork(1, 0, 0, 0, 0),
        StepWork(0, 0, 1, 0, 0),
        StepWork(0, 0, 0, merged, 0),
        StepWork(0, 0, 0, 0, 1),
    ]
    token, token_pair, patches, patch_pair = (
        sum(step_flops(model, work, trainable, lora).values()) for work in one
    )
    return CostModel(1.0, token_pair / token, patches / merged / token, patch_pair / token)
