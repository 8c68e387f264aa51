"""How often the host waits for the device in a step, with the project's own loop and step, counted on no device at all.

Reference: the recorder of forecast/trace, which sees every read of a device tensor and every copy that blocks.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from visionloom.forecast.trace.axes import Axes
from visionloom.forecast.trace.step import recording
from visionloom.parallel import topology as topologies
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Layout, build, packs_of
from visionloom.train import loop
from visionloom.train.checkpoint.write import Saver
from visionloom.train.config import CheckpointConfig
from visionloom.train.observe.logging_config import LoggingConfig
from visionloom.train.observe.observer import Observer

META = torch.device("meta")
STEPS, MEASURED = 3, 2
NORM = "item: megatron/core/optimizer/clip_grads.py get_grad_norm_fp32"
SUMS = "copy to the host: train/step_sums.py totals"
MISTAKEN = "item: tests/train/test_waits.py mistaken"


def mistaken(trainer: Any, batches: Any, signals: Any) -> Any:
    """A step whose host looks at a weight first, as a log line easily does."""
    next(trainer.model_parts[0].parameters()).sum().item()
    return TRAIN_STEP(trainer, batches, signals)


TRAIN_STEP = loop.train_step


def measured(ranks: int, with_mistake: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Waits and collectives of a whole turn of the loop, its line of metrics included. Runs on a rank of the pool."""
    dist.destroy_process_group()
    topology = topologies.imagine(Layout(ranks, {}).config, ranks, 0, META)
    packs = packs_of("everything")[:2]
    with recording(META) as recorder, tempfile.TemporaryDirectory() as folder:
        trainer = build(Layout(ranks, {}), True, topology, torch.bfloat16)
        recorder.axes = Axes(topology)

        def steps(*_: Any) -> Iterator[Any]:
            for step in range(1, STEPS + 1):
                if step == MEASURED:
                    recorder.start()
                if step == MEASURED + 1:
                    recorder.finish()
                yield packs

        observer = Observer(Path(folder), LoggingConfig(), True, "test", {})
        saver = Saver(Path(folder), CheckpointConfig(every_steps=0), observer.saved)
        trainer.phase.steps = STEPS
        step = mistaken if with_mistake else TRAIN_STEP
        with (
            mock.patch.object(loop, "step_batches", steps),
            mock.patch.object(loop, "train_step", step),
            # What is read of no device is ones, the wish to stop among them.
            mock.patch.object(loop, "stop_early"),
        ):
            loop.fit(trainer, saver, observer, 0)
    topologies.stop()

    waits: Counter[str] = Counter()
    for wait in recorder.take_waits():
        file, _, function = wait.place.partition(" ")
        waits[f"{wait.kind}: {file.partition(':')[0]} {function}"] += wait.count
    calls: Counter[str] = Counter()
    for slot in recorder.slots:
        for collective, number in slot.collectives:
            calls[collective.name] += number
    return dict(waits), dict(calls)


def test_a_dense_step_waits_for_the_norm_and_for_its_sums(pool: RankPool) -> None:
    """One of eight data-parallel ranks."""
    ((waits, calls),) = pool.run(1, measured, 8, False)
    assert waits == {NORM: 1, SUMS: 1}
    assert calls["all_reduce"] == 2, "of the norm, and of the sums"


@pytest.mark.parametrize("ranks", [1, 8])
def test_a_wait_in_the_loop_is_noticed(ranks: int, pool: RankPool) -> None:
    ((waits, _),) = pool.run(1, measured, ranks, True)
    assert waits == {NORM: 1, SUMS: 1, MISTAKEN: 1}
