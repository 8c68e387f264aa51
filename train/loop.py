"""The training loop of one phase: next packs, one step, one line of metrics, a checkpoint now and then."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, NoReturn

from visionloom.common import pulse
from visionloom.common.errors import EarlyEnd, UserError
from visionloom.common.pulse import DATA, STEP
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.workers import iterate
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.state_file import CHECKPOINTS
from visionloom.train.checkpoint.write import Saver, first_fault
from visionloom.train.observe import status, stopping
from visionloom.train.observe.metrics import memory_gib, peak_flops
from visionloom.train.observe.observer import Observer
from visionloom.train.observe.slow_ranks import own_seconds
from visionloom.train.optim.bad_steps import GoBack
from visionloom.train.optimizer import learning_rates
from visionloom.train.phase.trainer import SAMPLE_COLUMNS, PhaseTrainer
from visionloom.train.step import StepResult, train_step
from visionloom.train.step_sums import Signals, StepTotals


def fit(
    trainer: PhaseTrainer,
    saver: Saver,
    observer: Observer,
    workers: int,
    measure: Callable[[], None] = lambda: None,
) -> None:
    """Train a phase from where it stands to its end; the last step is left to the caller to save.

    Args:
        trainer: what trains; its counts of steps go up.
        saver: saves it now and then.
        observer: gets a line of metrics for each step.
        workers: processes that decode ahead.
        measure: measures the weights between steps where that is due; called after each step but the last, by all ranks.

    Raises:
        UserError: if a checkpoint that must be cannot be saved, or the run's log cannot be written.
        EarlyEnd: if the run is stopped.
        GoBack: if optim.skip_limit steps in a row were skipped.
    """
    is_due = False
    total, topology = trainer.phase.total_steps, trainer.topology
    with pulse.current.during(STEP), closing(step_batches(trainer, workers)) as steps:
        while trainer.phase_step < total:
            try:
                result = take_step(trainer, steps, saver, observer)
            except stopping.StopAsked:
                stop_early(trainer, saver, observer)
            if result.totals.signals.log_failed:
                stop_without_log(trainer, saver, observer)
            saver.poll(topology, result.totals.signals.saving)
            report_bad(trainer, result, observer)
            if trainer.judge.has_enough:
                saver.finish(topology)
                raise GoBack(trainer.last_steps(trainer.judge.in_a_row))

            is_due = is_due or saver.is_due(trainer.phase_step)
            # Between skipped steps nothing is saved: a run may go back to before them, resumed or not.
            if result.verdict.skipped or trainer.phase_step == total or not trainer.can_be_saved:
                continue
            if result.totals.signals.stop:
                stop_early(trainer, saver, observer)
            if is_due:
                saver.save(trainer, trainer.step, trainer.phase_step, last=False)
                is_due = False
            measure()
    if topology.any_rank(bool(observer.log_fault)):
        stop_without_log(trainer, saver, observer)


def take_step(
    trainer: PhaseTrainer, steps: Iterator[list[PackedBatch]], saver: Saver, observer: Observer
) -> StepResult:
    """Train the next step of a phase and report it."""
    observer.profile.begin(trainer.step + 1)
    started = time.perf_counter()
    # Those of the step before, which is over: they ride with the sums of this one.
    own = own_seconds(pulse.current.next_step(trainer.step))
    with pulse.current.at(DATA):
        batches = next(steps)
    waited = time.perf_counter() - started
    if trainer.rollouts is not None:
        waited -= trainer.rollouts.seconds

    if trainer.has_dropout:
        trainer.topology.reseed(trainer.step)
    is_stopped = bool(stopping.current.reason)
    signals = Signals(bool(observer.log_fault), saver.is_writing, is_stopped, tuple(own))
    result = train_step(trainer, batches, signals)
    trainer.step += 1
    trainer.phase_step += 1
    line = metrics_line(trainer, result, time.perf_counter() - started, waited)
    observer.step(line)
    if trainer.rollouts is not None:
        rows = trainer.rollouts.take_samples()
        observer.samples("rollout/samples", SAMPLE_COLUMNS, rows, trainer.step)
    observer.slow(result.totals.own_seconds, line["step_seconds"])
    return result


def stop_early(trainer: PhaseTrainer, saver: Saver, observer: Observer) -> None:
    """Save a run and end it, as a rank wishes; all ranks call it.

    Raises:
        EarlyEnd: with the first rank's reason.
    """
    # While a phase's first answers are written, its weights are those of the last one's checkpoint.
    if trainer.phase_step:
        saver.save(trainer, trainer.step, trainer.phase_step, last=True)
    stop_saved(trainer, observer)


def stop_saved(trainer: PhaseTrainer, observer: Observer) -> None:
    """End a run that is saved, if any rank wishes so; all ranks call it.

    Raises:
        EarlyEnd: with the first rank's reason.
    """
    # The flag alone has travelled with the sums.
    if reason := first_fault(stopping.current.reason):
        # A phase that has made no step has nothing of its own to save.
        saved = (
            f"after step {trainer.step}, which is saved"
            if trainer.phase_step
            else "before its first step"
        )
        cause = f"{reason} {saved}"
        end_together(stopping.current.end(cause), trainer.topology, observer)


def end_together(end: EarlyEnd, topology: Topology, observer: Observer) -> NoReturn:
    """Raise `end` on all ranks, once the main rank has told of it: torchrun ends the others as soon as one is gone."""
    observer.event("early_end", step=status.current.step, cause=str(end), code=end.code)
    if topology.is_main:
        status.current.ended(end.state, end.code, str(end), end.hint)
    observer.say(f"{end}; {end.hint}")
    observer.report_time()
    topology.barrier()
    raise end


def stop_without_log(trainer: PhaseTrainer, saver: Saver, observer: Observer) -> None:
    """End a run whose log cannot be written, saved if that is possible; all ranks call it.

    A log that takes lines again by now has all of them, and ends nothing.

    Raises:
        UserError: naming the log, and the step that the run is saved after or why it is not.
    """
    fault = first_fault(observer.log_fault)
    if not fault:
        return
    try:
        saver.save(trainer, trainer.step, trainer.phase_step, last=True)
        if observer.log is not None:
            observer.log.leave_waiting(saver.run_folder / CHECKPOINTS)
    except (UserError, OSError) as error:
        raise UserError(f"{fault}: the run's log cannot be written; {error}") from error
    raise log_error(fault, trainer.step)


def log_error(fault: str, step: int) -> UserError:
    """Return what ends a run that is saved after `step`, but whose log cannot be written."""
    return UserError(
        f"{fault}: the run's log cannot be written; the run is saved after step {step}: make room, and start the same command again"
    )


def report_bad(trainer: PhaseTrainer, result: StepResult, observer: Observer) -> None:
    """Say of a step that it was skipped, or that it stands out."""
    verdict, step = result.verdict, trainer.step
    if not (verdict.skipped or verdict.spikes):
        return
    values = {"loss": result.loss, "grad_norm": result.grad_norm}
    facts = {**values, "spikes": dict(verdict.spikes), "skipped": verdict.skipped}
    observer.event("bad_step", step=step, **facts)
    observer.say(f"warning: step {step}: {verdict.describe(values)}")


def step_batches(trainer: PhaseTrainer, workers: int) -> Generator[list[PackedBatch]]:
    """Yield this rank's micro-batches of each step that is left, built ahead."""
    steps = range(trainer.phase_step, trainer.phase.total_steps)
    share, micro_batch = trainer.topology.share, trainer.phase.micro_batch
    if trainer.rollouts is not None:
        return trainer.rollouts.batches(trainer)
    if trainer.teacher is not None:
        share = trainer.teacher.share(share)
    return iterate(trainer.stream, steps, share, micro_batch, workers)


def metrics_line(
    trainer: PhaseTrainer, result: StepResult, seconds: float, waited: float
) -> dict[str, Any]:
    """Make one line of metrics.jsonl; `tokens` and every rate count real tokens, padding left out.

    Args:
        trainer: after the step.
        result: of the step.
        seconds: that the step took.
        waited: seconds of these for data.
    """
    topology, totals = trainer.topology, result.totals
    counts = totals.counts
    flops = trainer.flops(counts.work)
    # Of this rank's clock; all ranks end a step together, at its reductions.
    flops_per_device = flops / seconds / topology.world_size
    peak = peak_flops(topology.device)
    line = {
        "step": trainer.step,
        "time": round(time.time(), 3),
        "phase": trainer.phase_name,
        "phase_step": trainer.phase_step,
        "loss": totals.loss,
        "loss_by_source": totals.loss_by_source,
        "grad_norm": result.grad_norm if not result.verdict.skipped else None,
        "lr": learning_rates(trainer.scheduler, trainer.phase),
        "tokens": counts.tokens,
        "supervised_tokens": counts.supervised_tokens,
        "padding_fraction": counts.padding_tokens / (counts.tokens + counts.padding_tokens),
        "visual_tokens": counts.visual_tokens,
        "patches": counts.patches,
        "samples": counts.samples,
        "packs": counts.packs,
        "step_seconds": seconds,
        "data_wait_seconds": waited,
        "tokens_per_second": counts.tokens / seconds,
        "tokens_per_second_per_device": counts.tokens / seconds / topology.world_size,
        "model_flops_per_second_per_device": flops_per_device,
        # 1 if every copy of the model has the same work
        "load_imbalance": totals.largest_flops * topology.data_size / flops if flops else 1.0,
        "mfu": None if peak is None else flops_per_device / peak,
        "memory_gib": memory_gib(topology.device),
        "skipped": result.verdict.skipped,
        "data_cursor": trainer.stream.step_of_plan(trainer.phase_step),
    }
    return line | metrics_of_kind(trainer, totals)


def metrics_of_kind(trainer: PhaseTrainer, totals: StepTotals) -> dict[str, Any]:
    """Return what only some phases and models have: what a teacher measures, rollouts, the health of routers."""
    line: dict[str, Any] = {}
    if trainer.teacher is not None:
        # The sums have room for more kinds than most teachers measure.
        line |= zip(trainer.teacher.measures, totals.measured, strict=False)
    if trainer.rollouts is not None and (facts := trainer.rollouts.take_facts()):
        line["rollout"] = facts
    if totals.router:
        line["router"] = totals.router
    return line
