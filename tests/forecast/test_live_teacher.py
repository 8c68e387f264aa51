"""What a live teacher takes of an imagined rank. References: parameters counted by formula; the same rank with a stored teacher."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from visionloom.forecast.live_teacher import HeldTeacher
from visionloom.forecast.machine import machine
from visionloom.forecast.packs import PackChoice
from visionloom.forecast.request import PlanRequest
from visionloom.forecast.run import ImaginedPhase, TraceOrder, trace_one
from visionloom.forecast.trace.events import Category, RankTrace
from visionloom.launch.configure import compose
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import write_config
from visionloom.model.huggingface.shapes import parameter_count
from visionloom.tests.ranks import RankPool

HERE = "phases.sft.distillation"
WORDS = [
    "+recipe=demo",
    "model=tiny",
    "run.precision=bf16",
    "run.phases=[sft]",
    "phases.sft.global_batch=8",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of which only the architecture is there: wider than the demo's model, and untied."""
    made = tmp_path_factory.mktemp("teacher")
    config = compose([*WORDS, "model.text.hidden_size=256", "model.text.tie_embeddings=false"], 4)
    assert config is not None
    (made / "config.json").write_text(json.dumps(write_config(config.model, "bfloat16", {}, None)))
    return made


def phase_of(*words: str) -> ImaginedPhase:
    config = compose([*WORDS, *words], 4)
    assert config is not None
    request = PlanRequest(config, 4, "h100", machine("h100"), 1.0, ("sft",))
    return ImaginedPhase.of(request, "sft", (PackChoice.MEAN,))


def measured(
    order: TraceOrder, words: list[str]
) -> tuple[list[HeldTeacher | None], RankTrace, RankTrace]:
    """Teachers of a rank, by the words, and its traces without and with one; runs on a rank of the pool, which leaves its world."""
    dist.destroy_process_group()
    held = []
    for word in words:
        config = phase_of(*word.split()).request.config
        held.append(HeldTeacher.of(config, "sft", 4, order.rank))
    live = phase_of(*words[0].split()).request.config
    return held, trace_one(order), trace_one(replace(order, config=live))


def test_a_live_teacher_is_counted(folder: Path, pool: RankPool) -> None:
    live = f"{HERE}.teacher.huggingface={folder}"
    own = f"{live} {HERE}.teacher.parallel"
    words = [live, f"{own}.recompute=full", f"{own}.pipeline=2", f"{HERE}.stored=nowhere"]
    stored = phase_of(f"{HERE}.stored=nowhere")
    ((held, without, with_teacher),) = pool.run(1, measured, next(stored.orders()), words)

    shared, whole, half, none = held
    assert none is None and shared is not None and whole is not None and half is not None
    model: ModelConfig = shared.model
    assert shared.bytes == whole.bytes == 2 * parameter_count(model)
    # The second stage has half of the layers and the output matrix, the first the tower and the embedding.
    assert shared.bytes / 2 < half.bytes < 0.8 * shared.bytes
    assert shared.micro_batches == 2

    difference = {
        category: with_teacher.at_rest.get(category, 0) - without.at_rest.get(category, 0)
        for category in Category
    }
    states = difference.pop(Category.ACTIVATIONS)
    supervised = stored.packs[PackChoice.MEAN].counts.supervised_tokens
    assert states == 2 * shared.micro_batches * supervised * model.text.hidden_size
    assert difference.pop(Category.WEIGHTS) == pytest.approx(shared.bytes, abs=1024)
    assert set(difference.values()) == {0}


@pytest.mark.parametrize(
    ("there", "words"), [(True, "times the student's operations"), (False, "is not here")]
)
def test_what_a_forecast_leaves_out_is_said(there: bool, words: str, folder: Path) -> None:
    teacher = folder if there else folder / "nowhere"
    phase = phase_of(f"{HERE}.teacher.huggingface={teacher}")
    assert words in phase.not_covered and "NOT in" in phase.not_covered
    assert phase_of(f"{HERE}.stored=nowhere").not_covered == ""
