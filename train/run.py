"""A run: its phases in order, each built, restored or started, trained and saved."""

import gc
import shlex
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from visionloom.common import pulse
from visionloom.common.errors import EarlyEnd, UserError
from visionloom.common.pulse import EVALUATION, PROGRAM
from visionloom.data.config import DataConfig
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.open import dataset_weights, open_datasets
from visionloom.data.stream.train_stream import PackStream
from visionloom.data.stream.workers import chosen_workers
from visionloom.model.kernels import flash
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel import topology as topologies
from visionloom.parallel.topology import Topology
from visionloom.train.build import (
    as_the_engine_wants,
    build_rollouts,
    build_stream,
    build_teacher,
    build_trainer,
    draw_fresh_groups,
    model_to_load,
    newest_weights,
    open_topology,
    phase_topology,
    run_folder,
)
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.checkpoint.read import Checkpoint
from visionloom.train.checkpoint.write import Saver, check_room, first_fault
from visionloom.train.compatibility import check_same_adapters, check_same_model, data_differences
from visionloom.train.config import COMMAND, RunConfig
from visionloom.train.evaluate import Evaluation, evaluate_model, print_numbers
from visionloom.train.exchange.companions import carry_into_run
from visionloom.train.exchange.evaluation_command import EvaluationCommand, export_for_command
from visionloom.train.loop import end_together, fit, log_error, stop_saved
from visionloom.train.observe import status, stopping
from visionloom.train.observe.memory import record_memory
from visionloom.train.observe.observer import Observer
from visionloom.train.observe.screen import Screen
from visionloom.train.optim.bad_steps import GoBack
from visionloom.train.phase.trainer import PhaseTrainer
from visionloom.train.phase.validation import (
    held_out,
    validate_between,
    validate_end,
    validate_start,
)
from visionloom.train.resume import resume

MOST_TIMES_BACK: Final = 2
"""Times that a phase goes back to the same checkpoint."""
BAD_STEPS: Final = (
    "look at the bad_step lines of events.jsonl, and lower the learning rate, mend the data or raise optim.skip_limit before you"
    " start it again"
)


def pretrain(config: RunConfig, topology: Topology | None = None) -> None:
    """Run all phases of a recipe, from where an earlier start left off; `topology`: of the run, if it is open already.

    Raises:
        UserError: for anything that the user can mend.
    """
    started = time.perf_counter()
    folder = run_folder(config)
    topology = topology or open_topology(config)
    observer = Observer(folder, config.logging, topology.is_main, config.run.name, asdict(config))
    if topology.device.type == "cuda":
        observer.say(f"attention by the kernels of {flash.chosen()}")
        if config.logging.memory_history:
            record_memory()
    if config.data.workers is None and (workers := chosen_workers(None)):
        observer.say(f"data.workers={workers}, chosen by the cores of this machine")
    newest = resume(config, folder, topology, observer)
    check_data(config, newest)

    # Each begins from the last one's checkpoint, as a resumed run does: there is one path.
    try:
        for name in phases_to_train(config, newest):
            topology = phase_topology(config, name, topology)
            newest = train_to_end(config, name, topology, newest, observer)
            free_memory(topology.device)
    except EarlyEnd:
        # With the last lines, as at a run's own end.
        observer.trackers.close()
        raise

    step = newest.run_state.step if newest is not None else 0
    observer.event("done", step=step)
    observer.say(f"done in {time.perf_counter() - started:.0f} s: {folder}")
    try:
        with observer.evaluating() if config.run.evaluate_at_end else nullcontext():
            end_run(config, newest, topology, observer)
        observer.report_time()
    finally:
        observer.trackers.close()


def train_to_end(
    config: RunConfig, name: str, topology: Topology, newest: Checkpoint | None, observer: Observer
) -> Checkpoint:
    """Train one phase, going back to its newest checkpoint where too many steps in a row were skipped.

    Raises:
        EarlyEnd: if they still are after going back to the same step MOST_TIMES_BACK times.
    """
    passed_over: list[int] = []
    times, last = 0, -1
    while True:
        try:
            return train_phase(config, name, topology, newest, observer, passed_over)
        except GoBack as error:
            # Not the exception, whose traceback holds the model.
            skipped, cause = error.steps, str(error)
        free_memory(topology.device)
        newest, _ = checkpoint.newest(run_folder(config), topology)
        step = newest.run_state.step if newest is not None else 0
        times, last = (times + 1 if step == last else 1), step
        if times > MOST_TIMES_BACK:
            cause += f", also after going back to step {step} {MOST_TIMES_BACK} times and passing over their data"
            end_together(EarlyEnd(cause, status.GAVE_UP, BAD_STEPS), topology, observer)
        passed_over += skipped
        report_back(step, cause, skipped, observer)


def report_back(step: int, cause: str, skipped: Sequence[int], observer: Observer) -> None:
    """Report that the run stands after `step` again, and that steps of the plan are passed over."""
    observer.event("back", step=step, cause=cause, passed_over=list(skipped))
    observer.say(f"warning: {cause}: going back to step {step}, and passing over their data")
    status.current.at(step)
    observer.rewind(step)


def train_phase(
    config: RunConfig,
    name: str,
    topology: Topology,
    newest: Checkpoint | None,
    observer: Observer,
    passed_over: Sequence[int] = (),
) -> Checkpoint:
    """Train one phase, or the rest of it, without some steps of its plan; returns the checkpoint of its end."""
    folder = run_folder(config)
    stream = open_stream(config, name, topology, newest, observer)
    stream.pass_over((step, step + 1) for step in passed_over)
    parts = phase_model(config, name, topology, newest)
    trainer = build_trainer(config, name, topology, parts, stream)
    trainer.teacher = build_teacher(config, name, topology)
    restore(trainer, newest)
    build_rollouts(config, trainer, lambda: start_of_phase(config, name, topology, newest))
    report_left_out(trainer, config.data, observer)
    # Only now: a start that is refused must not replace the files of checkpoints that are there.
    if topology.is_main:
        carry_into_run(config.init, config.data.tokenizer, folder)
    check_room(folder, trainer)

    observer.phase_start(trainer)
    # Not when resumed: the loss at the phase's beginning is in the log already.
    if not trainer.phase_step:
        with observer.evaluating():
            validate_start(config, trainer, observer)
    saver = Saver(folder, config.checkpoint, observer.saved)
    # Also where the phase goes back: rewards of a user's own run in processes.
    answers = closing(trainer.rollouts) if trainer.rollouts is not None else nullcontext()
    with stopping.current.at_steps(), observer.live(trainer), answers:
        measure = partial(validate_between, config, trainer, observer)
        fit(trainer, saver, observer, chosen_workers(config.data.workers), measure)
        saver.save(trainer, trainer.step, trainer.phase_step, last=True)
    # What is measured after a phase may take longer than whoever sent a signal waits. Only now: one that came while this was
    # being saved was told to wait.
    stop_saved(trainer, observer)
    with observer.evaluating():
        validate_end(config, trainer, observer)
    observer.phase_end(trainer)
    trainer.close()
    return checkpoint.read(checkpoint.folder_of(folder, name, trainer.step))


def free_memory(device: torch.device) -> None:
    """Free what a phase has left: its model, wrapper and optimizer refer to each other, and would wait for Python's collector.

    For 8B without tensor parallelism that is 49 GiB (estimated) beside the next phase's model.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def evaluate(config: RunConfig, checkpoint_folder: str = "") -> dict[str, Any]:
    """Evaluate a checkpoint on data.validation and write eval.json and the report into the run's folder.

    Args:
        config: of the run; its layout may differ from the one that trained.
        checkpoint_folder: of the one to evaluate; empty: the newest whole one of the run.

    Returns:
        the results, as of `evaluate_model`.

    Raises:
        UserError: if there is no whole checkpoint, or it does not fit the configuration.
    """
    topology = open_topology(config)
    folder = run_folder(config)
    screen = Screen(topology.is_main, config.logging.every_steps)
    trained = trained_checkpoint(config, checkpoint_folder, topology, screen)
    if topology.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    evaluation = evaluate_weights(config, trained, topology, screen)
    finish_evaluation(config, trained, evaluation, topology, screen)
    return evaluation.results


# ---- the parts of a training run


def steps_done(config: RunConfig, name: str, newest: Checkpoint | None) -> int:
    """Count the optimizer steps of a phase that the newest checkpoint has: all, of a phase before its own."""
    if newest is None:
        return 0
    order = list(config.phases)
    here = order.index(name)
    there = order.index(newest.run_state.phase)
    if here == there:
        return newest.run_state.phase_step
    return config.phases[name].total_steps if here < there else 0


def phases_left(config: RunConfig, newest: Checkpoint | None) -> list[str]:
    """Name the phases that are not trained to their end."""
    names = []
    for name, phase in config.phases.items():
        if steps_done(config, name, newest) < phase.total_steps:
            names.append(name)
    return names


def phases_to_train(config: RunConfig, newest: Checkpoint | None) -> list[str]:
    """Name the phases that this start trains: those that are left, or the one of them that run.phase names.

    Raises:
        UserError: if a phase before it is not trained to its end.
    """
    left, only = phases_left(config, newest), config.run.phase
    if not only:
        return left
    if only not in left:
        return []
    if left[0] != only:
        raise UserError(
            f"run.phase={only}: phase {left[0]} before it is not trained to its end: train it first, run.phase={left[0]}"
        )
    return [only]


def check_data(config: RunConfig, newest: Checkpoint | None) -> None:
    """Open the datasets of all phases that this start trains: one that cannot be trained on is an error before the first step."""
    opened: dict[str, list[str]] = {}
    for name in phases_to_train(config, newest):
        data = config.phase_data(name)
        # Once for all phases that sample videos alike: lengths depend on it.
        names = opened.setdefault(str(data.media), [])
        weights = dataset_weights(data, config.phases[name].mixture)
        new = [each for each in weights if each not in names]
        names += new
        open_datasets(data, new, Tokenizer.of(data))


def open_stream(
    config: RunConfig, name: str, topology: Topology, newest: Checkpoint | None, observer: Observer
) -> PackStream:
    """Open a phase's data at the newest checkpoint's state, or at its beginning, after the phase before."""
    folder = run_folder(config)
    if newest is not None and steps_done(config, name, newest):
        stream = build_stream(config, name, folder, topology)
        for change in stream.load_state(newest.run_state.data):
            observer.event("data_changed", phase=name, step=newest.run_state.step, detail=change)
            observer.say(f"{name}: goes on with other data: {change}")
        return stream
    stream = build_stream(
        config, name, folder, topology, newest.run_state.data if newest is not None else None
    )
    if topology.is_main:
        stream.report_unreadable()
    return stream


def phase_model(
    config: RunConfig, name: str, topology: Topology, newest: Checkpoint | None
) -> list[Qwen3VL]:
    """Build a phase's model: with the newest weights and its fresh groups drawn, or for `restore` to load into."""
    with as_the_engine_wants(config, name, topology):
        if steps_done(config, name, newest):
            return model_to_load(config, topology)
        parts = newest_weights(config, topology, newest)
        draw_fresh_groups(parts, config, name, topology)
        return parts


def start_of_phase(
    config: RunConfig, name: str, topology: Topology, newest: Checkpoint | None
) -> list[Qwen3VL]:
    """Build the model with the weights that a phase began with: those of the last phase's end.

    Raises:
        UserError: if their checkpoint is gone, or its phase is not in the recipe any more.
    """
    if newest is not None and (done := steps_done(config, name, newest)):
        order = list(config.phases)
        before = order[: order.index(name)][-1:]
        last = [
            checkpoint.folder_of(run_folder(config), each, newest.run_state.step - done)
            for each in before
        ]
        if not last and newest.run_state.step > done:
            raise UserError(
                f"phases.{name}.rl.policy.kl needs the weights at the end of the phase before, and the recipe has none:"
                f" keep that phase in the recipe"
            )
        newest = (
            checkpoint.whole(last[0], f"phases.{name}.rl.policy.kl", topology) if last else None
        )
    parts = newest_weights(config, topology, newest)
    draw_fresh_groups(parts, config, name, topology)
    return parts


def restore(trainer: PhaseTrainer, newest: Checkpoint | None) -> None:
    """Bring a trainer to where the run stands: its counts of steps and, within the phase, weights and optimizer."""
    if newest is None:
        return
    trainer.step = newest.run_state.step
    if newest.run_state.phase == trainer.phase_name and newest.run_state.phase_step:
        trainer.phase_step = newest.run_state.phase_step
        checkpoint.load_trainer(newest, trainer)
        trainer.judge.load_state(newest.run_state.recent)


def report_left_out(trainer: PhaseTrainer, data: DataConfig, observer: Observer) -> None:
    """Report the samples of a phase that are not trained on, and those without a loss."""
    report_dropped(trainer, data, observer)
    report_unsupervised(trainer, observer)


def report_dropped(trainer: PhaseTrainer, data: DataConfig, observer: Observer) -> None:
    """Report unreadable samples, and those that over_length leaves out."""
    name, stream = trainer.phase_name, trainer.stream
    for dataset, (samples, tokens) in stream.dropped.items():
        if not samples and not tokens:
            continue
        observer.event("dropped", phase=name, dataset=dataset, samples=samples, tokens=tokens)
        policy = data.datasets[dataset].over_length
        observer.say(
            f"{name}: {samples} samples and in all {tokens} tokens of {dataset} are left out"
            f" (unreadable, or longer than a pack with over_length={policy})"
        )


def report_unsupervised(trainer: PhaseTrainer, observer: Observer) -> None:
    """Warn of samples that are trained on without a supervised token."""
    name = trainer.phase_name
    for dataset, (samples, size) in trainer.stream.unsupervised.items():
        if not samples:
            continue
        observer.event("unsupervised", phase=name, dataset=dataset, samples=samples)
        observer.say(
            f"warning: {name}: {samples} of the {size} samples of {dataset} have no supervised token"
            " (every loss or the weight is 0): they cost time and teach nothing;"
            " leave them out of the dataset"
        )


def end_run(
    config: RunConfig, newest: Checkpoint | None, topology: Topology, observer: Observer
) -> None:
    """Evaluate the run's last checkpoint if it asks for that, and close the process groups."""
    evaluation: Evaluation | None = None
    if config.run.evaluate_at_end and newest is not None and not phases_left(config, newest):
        evaluation = evaluate_weights(config, newest, topology, observer.screen)
        observer.trackers.evaluation(evaluation.results)
    # The run is whole, but its log lacks lines: exit code 2, so that nobody misses it.
    if fault := first_fault(observer.log_fault):
        raise log_error(fault, newest.run_state.step if newest is not None else 0)
    if evaluation is None or newest is None:
        topologies.stop()
        return
    finish_evaluation(config, newest, evaluation, topology, observer.screen)
    if numbers := evaluation.results.get("command"):
        observer.trackers.command(numbers, newest.run_state.step)


def evaluate_weights(
    config: RunConfig, trained: Checkpoint, topology: Topology, screen: Screen
) -> Evaluation:
    """Evaluate a checkpoint's weights on the held-out data of the run; its model is freed then."""
    parts = newest_weights(config, topology, trained)
    folder, step = run_folder(config), trained.run_state.step
    with pulse.current.during(EVALUATION):
        return evaluate_model(held_out(config), parts, topology, folder, step, screen)


def finish_evaluation(
    config: RunConfig,
    trained: Checkpoint,
    evaluation: Evaluation,
    topology: Topology,
    screen: Screen,
) -> None:
    """Close the process groups, and have evaluation.command evaluate the checkpoint too; all ranks call it.

    Raises:
        UserError: if the command fails; all that was measured before is written, and the checkpoint is as it was.
    """
    free_memory(topology.device)
    command: EvaluationCommand | None = None
    if config.evaluation.command:
        command = export_for_command(config, trained, run_folder(config), topology, screen.say)
    topology.barrier()
    # Before the command, which may take hours: the other ranks end, and leave their devices to it.
    topologies.stop()
    if command is None or not topology.is_main:
        return
    screen.say(f"running {COMMAND}: {shlex.join(command.words)}; its output: {command.log}")
    with pulse.current.during(PROGRAM):
        numbers = command.run(config.evaluation.command_minutes * 60)
    evaluation.results["command"] = numbers
    evaluation.write()
    print_numbers(numbers, screen)


def trained_checkpoint(
    config: RunConfig, folder: str, topology: Topology, screen: Screen
) -> Checkpoint:
    """Return the checkpoint to evaluate: that of `folder`, or the newest whole one of the run if it is empty.

    Raises:
        UserError: if there is none, or it does not fit the configuration.
    """
    if folder:
        trained = checkpoint.whole(Path(folder), "checkpoint", topology)
    else:
        trained = newest_checkpoint(run_folder(config), topology)
    check_same_model(trained, config.model)
    check_same_adapters(trained, config.lora.rank)
    status.current.at(trained.run_state.step)
    screen.say(f"checkpoint {trained.folder}")
    # Allowed, since smaller pictures may be what is evaluated, but never silent.
    if differences := data_differences(trained, held_out(config).data):
        screen.say(f"samples are prepared otherwise than in training: {', '.join(differences)}")
    return trained


def newest_checkpoint(folder: Path, topology: Topology) -> Checkpoint:
    """Return the newest whole checkpoint of a run's folder; UserError if there is none."""
    newest, damaged = checkpoint.newest(folder, topology)
    if newest is None:
        content = f"only damaged checkpoints, {damaged[0]}" if damaged else "no checkpoint"
        raise UserError(
            f"{folder} holds {content}: train the run first, or name one with checkpoint=FOLDER"
        )
    return newest
