"""A phase's model, wrapper and optimizer are gone before the next one is built. Reference: weak references."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.topology import Topology
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import run_config
from visionloom.train.config import RunConfig
from visionloom.train.phase.trainer import PhaseTrainer


def left_of_phases(config: RunConfig, freed: bool) -> list[list[str]]:
    """Name what is alive of the phases before, as each phase begins and as the run ends; runs on every rank of the pool."""
    from visionloom.train import run

    built: list[tuple[str, Any]] = []
    left: list[list[str]] = []
    build_trainer, phase_topology = run.build_trainer, run.phase_topology

    def build(*arguments: Any) -> PhaseTrainer:
        trainer = build_trainer(*arguments)
        named = {
            "trainer": trainer,
            "optimizer": trainer.engine.optimizer,
            "model": trainer.model_parts[0],
        }
        named["wrapper"] = trainer.engine.parts[0]
        named["weight"] = next(trainer.model_parts[0].parameters())
        built.extend((name, weakref.ref(each)) for name, each in named.items())
        return trainer

    def count() -> None:
        left.append([name for name, reference in built if reference() is not None])

    def topology_of(*arguments: Any) -> Topology:
        count()
        return phase_topology(*arguments)

    gc.disable()  # it would come by chance
    keep = run.free_memory if freed else lambda _: None
    try:
        with (
            patch.object(run, "build_trainer", build),
            patch.object(run, "phase_topology", topology_of),
            patch.object(run, "free_memory", keep),
            patch.object(run.topologies, "stop", count),
        ):
            run.pretrain(config)
    finally:
        gc.enable()
        run.topologies.stop()
    return left


@pytest.mark.long
@pytest.mark.parametrize("model", ["tiny", "tiny_moe"], ids=["dense", "mixture"])
def test_nothing_of_a_phase_is_left_when_the_next_begins(
    model: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """With another layout and other parameters that train; and the control, without the step that frees."""
    for freed in (True, False):
        words = ("phases.multimodal.warmup_steps=0", f"model={model}")
        config = run_config(demo_data, tmp_path / str(freed), 1, 2, *words)
        config.phases["later"] = replace(
            config.phases["multimodal"], trainable=["merger"], parallel=ParallelConfig(tensor=2)
        )
        for at_start, between, at_end in pool.run(2, left_of_phases, config, freed):
            assert at_start == []
            assert (between == at_end == []) == freed
            assert freed or "weight" in between, "the control"
