"""What is measured of a phase's weights on held-out data: before it, between its steps, and after it."""

from typing import Any

from visionloom.train.config import RunConfig
from visionloom.train.evaluate import HeldOut, held_out_losses, task_accuracies
from visionloom.train.observe.observer import Observer
from visionloom.train.phase.trainer import PhaseTrainer


def held_out(config: RunConfig) -> HeldOut:
    """Return the held-out data of the run, packed to the longest phase's length, weighted and sampled as in the last."""
    last = list(config.phases)[-1]
    longest = max(phase.sequence_length for phase in config.phases.values())
    data, loss = config.phase_data(last), config.phases[last].loss
    return HeldOut(data, config.evaluation, longest, loss)


def validate_start(config: RunConfig, trainer: PhaseTrainer, observer: Observer) -> None:
    """Measure held-out losses before a phase; weights that it does not draw anew have those of the last phase's end."""
    if not (config.evaluation.phase_samples and config.data.validation):
        return
    # The first phase has no last measurement, and a resumed run has lost it.
    losses = observer.held_out_losses
    if trainer.phase.fresh or not losses:
        losses = phase_losses(config, trainer, observer)
    observer.validation(trainer, losses, {})


def validate_between(config: RunConfig, trainer: PhaseTrainer, observer: Observer) -> None:
    """Measure what is measured after a phase, where evaluation.every_steps asks for it at this step."""
    every = config.evaluation.every_steps
    if every and trainer.phase_step % every == 0:
        with observer.evaluating():
            validate_end(config, trainer, observer)


def validate_end(config: RunConfig, trainer: PhaseTrainer, observer: Observer) -> None:
    """Measure held-out losses and the accuracy of tasks after a phase, each if the settings ask for it."""
    settings, losses, tasks = config.evaluation, dict[str, float](), dict[str, Any]()
    if not config.data.validation:
        return
    if settings.phase_samples:
        losses = phase_losses(config, trainer, observer)
    if settings.phase_answers:
        # Not only where losses were measured: either may be off.
        data, parts = held_out(config), trainer.model_parts
        with trainer.engine.whole_weights():
            tasks = task_accuracies(data, parts, trainer.topology, settings.phase_answers)
    if losses or tasks:
        observer.validation(trainer, losses, tasks)


def phase_losses(config: RunConfig, trainer: PhaseTrainer, observer: Observer) -> dict[str, float]:
    """Measure the held-out losses of the weights as they are now."""
    data, samples = held_out(config), config.evaluation.phase_samples
    with trainer.engine.whole_weights():
        return held_out_losses(
            data, trainer.model_parts, trainer.topology, samples, observer.screen
        )
