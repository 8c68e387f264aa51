"""The training loop of one phase: next packs, one step, one line of metrics, a checkpoint now and then."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np

from visionloom.common.errors import UserError
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.workers import iterate
from visionloom.model.flops import StepWork, step_flops
from visionloom.train.build import Stage
from visionloom.train.checkpoint.state_file import CHECKPOINTS
from visionloom.train.checkpoint.write import Saver, first_fault
from visionloom.train.metrics import RunLog, memory_gib, peak_flops
from visionloom.train.optimizer import learning_rates
from visionloom.train.step import StepResult, encoder_of, reduce_counts, train_step

Report = Callable[[dict[str, Any]], None]


def fit(
    stage: Stage,
    saver: Saver,
    log: RunLog | None,
    report: Report,
    done: int,
    step: int,
    workers: int,
) -> int:
    """Train a phase from its step `done` to its end and save it.

    Args:
        stage: what trains.
        saver: saves it now and then.
        log: the main rank's log; None on other ranks.
        report: shows a metrics line to the user.
        done: optimizer steps of the phase already done.
        step: optimizer steps of the run already done.
        workers: processes that decode ahead.

    Returns:
        optimizer steps of the run now done.

    Raises:
        UserError: if a checkpoint that must be cannot be saved, or the run's log cannot be written.
    """
    total = stage.phase.total_steps
    with closing(_packs(stage, done, total - done, workers)) as packs:
        for phase_step in range(done + 1, total + 1):
            started = time.perf_counter()
            batches = next(packs)
            waited = time.perf_counter() - started
            if stage.has_dropout:
                stage.topology.reseed(step)
            result = train_step(stage, batches)
            step += 1
            line = metrics_line(stage, batches, result, step, phase_step, time.perf_counter() - started, waited)
            if log is not None:
                log.metric(line)
            report(line)
            if stage.topology.any_rank(log is not None and bool(log.fault)):
                _save_and_stop(stage, saver, log, step, phase_step)
            saver.poll(stage.topology)
            if phase_step == total or saver.is_due(phase_step):
                saver.save(stage, step, phase_step, last=phase_step == total)
    return step


def _save_and_stop(stage: Stage, saver: Saver, log: RunLog | None, step: int, phase_step: int) -> NoReturn:
    """End a run whose log cannot be written, saved if that is possible; all ranks call it."""
    fault = first_fault(log.fault if log is not None else "")
    try:
        saver.save(stage, step, phase_step, last=True)
        if log is not None:
            log.leave_waiting(saver.run_folder / CHECKPOINTS)
    except (UserError, OSError) as error:
        raise UserError(f"{fault}: the run's log cannot be written; {error}") from error
    raise log_error(fault, step)


def log_error(fault: str, step: int) -> UserError:
    """What ends a run that is saved after `step`, but whose log cannot be written."""
    return UserError(
        f"{fault}: the run's log cannot be written; the run is saved after step {step}: make room, and start the same command again"
    )


def _packs(stage: Stage, done: int, steps: int, workers: int) -> Generator[list[PackedBatch]]:
    topology = stage.topology
    return iterate(
        stage.stream,
        done,
        steps,
        topology.data_rank,
        topology.data_size,
        stage.phase.micro_batch,
        workers,
        *encoder_of(topology),
    )


def work_of(batches: list[PackedBatch]) -> StepWork:
    """What the model has to process of these micro-batches, padding left out."""
    pairs = frames = 0
    for batch in batches:
        lengths = np.add.reduceat(~batch.padding_mask.numpy(), batch.cu_seqlens.numpy()[:-1], dtype=np.int64)
        grids = batch.grid_thw.numpy().astype(np.int64)
        pairs += int((lengths**2).sum())
        frames += int((grids[:, 0] * (grids[:, 1] * grids[:, 2]) ** 2).sum())
    return StepWork(
        tokens=sum(b.real_tokens for b in batches),
        supervised_tokens=sum(b.supervised_tokens for b in batches),
        token_pairs=pairs,
        patches=sum(b.patch_count for b in batches),
        patch_pairs=frames,
    )


def metrics_line(
    stage: Stage, batches: list[PackedBatch], result: StepResult, step: int, phase_step: int, seconds: float, waited: float
) -> dict[str, Any]:
    """One line of metrics.jsonl; `tokens` and every rate count real tokens, padding left out."""
    topology, counts = stage.topology, result.counts
    own, trainable, lora = work_of(batches), set(stage.phase.trainable), stage.chunks[0].lora
    work = StepWork(**reduce_counts(asdict(own), topology))
    flops = sum(step_flops(stage.model_config, work, trainable, lora).values())
    most = topology.most_over_data(sum(step_flops(stage.model_config, own, trainable, lora).values()))
    per_device = flops / seconds / topology.world_size
    peak = peak_flops(topology.device)
    return {
        "step": step,
        "phase": stage.name,
        "phase_step": phase_step,
        "loss": result.loss,
        "loss_by_source": result.loss_by_source,
        "grad_norm": result.grad_norm if not result.skipped else None,
        "lr": learning_rates(stage.scheduler, stage.phase),
        "tokens": counts["tokens"],
        "supervised_tokens": counts["supervised_tokens"],
        "padding_fraction": counts["padding_tokens"] / (counts["tokens"] + counts["padding_tokens"]),
        "visual_tokens": counts["visual_tokens"],
        "patches": counts["patches"],
        "samples": counts["samples"],
        "packs": counts["packs"],
        "step_seconds": seconds,
        "data_wait_seconds": waited,
        "tokens_per_second": counts["tokens"] / seconds,
        "tokens_per_second_per_device": counts["tokens"] / seconds / topology.world_size,
        "model_flops_per_second_per_device": per_device,
        "load_imbalance": most * topology.data_size / flops if flops else 1.0,
        "mfu": None if peak is None else per_device / peak,
        "memory_gib": memory_gib(topology.device),
        "skipped": result.skipped,
        "data_cursor": phase_step,
        **({"router": result.router} if result.router else {}),
    }
