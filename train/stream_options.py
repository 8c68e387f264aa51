"""From the configuration of a run to what the stream of a phase is made from. Imports no torch."""

from visionloom.data.plan.open import StreamOptions
from visionloom.train.config import RunConfig
from visionloom.train.cost import cost_model


def stream_options(config: RunConfig, name: str) -> StreamOptions:
    """Return what the stream of a phase is made from, with the cost of a pack for what the phase trains."""
    phase = config.phases[name]
    lora = config.lora if config.lora.rank else None
    loss = phase.loss
    if phase.rl is not None:
        # Of the tokens of an answer, all answers then weighing alike, or of all tokens.
        loss = {"sequence": "sample", "token": "token"}[phase.rl.policy.mean]
    return StreamOptions(
        data=config.phase_data(name),
        phase_name=name,
        sequence_length=phase.sequence_length,
        global_batch=phase.global_batch,
        mixture=phase.mixture,
        loss=loss,
        seed=config.run.seed,
        cost=cost_model(config.model, set(phase.trainable), lora),
        teacher=phase.distillation.stored if phase.distillation else "",
    )
