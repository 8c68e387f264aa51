"""A small student that learns from a teacher ends closer to it on held-out texts than one that learns from the data alone.

The texts are digits drawn from a chain of order two. What comes next has a distribution, of which a text shows one draw, and which a
teacher that has read much knows; students read far less. All of it are real runs, the measurement too: one step at
learning rate 0 on held-out texts, whose `distillation_loss` is the mean KL(teacher || student).
Reference: the same student, steps and samples without the teacher. Steps, rates and widths were chosen on the split `tuning`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from visionloom.data.shards.sample import Sample, Text
from visionloom.data.shards.write import write_shards
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import DATASETS, configured, metrics
from visionloom.train.config import RunConfig
from visionloom.train.run import pretrain

DIGITS, LENGTH = 10, 120
TEXTS = {"many": 2000, "few": 64, "tuning": 32, "held_out": 64}
"""Texts of the teacher, of the students, and of two measurements."""
PHASES = ("language", "towers", "align", "multimodal", "long", "ultra", "sft", "reasoning", "rl")
TEACHER = ["model.text.layers=3"]
STUDENT = ["model.text.layers=3", "model.text.hidden_size=96", "model.text.ffn_hidden_size=192"]
LESSONS, STEPS = 200, 100
"""Steps of the teacher, and of a student."""
SEEDS = (1, 2, 3)
Phase = Mapping[str, object]
TRAINED: Phase = {
    "sequence_length": 256,
    "global_batch": 4,
    "micro_batch": 4,
    "trainable": "[language]",
    "lr_min_ratio": 0.1,
    "warmup_steps": 5,
}


def draw(chain: NDArray[np.float64], seed: int) -> str:
    """A text of the chain."""
    draws = np.random.default_rng(seed)
    digits = draws.integers(0, DIGITS, 2).tolist()
    while len(digits) < LENGTH:
        digits.append(int(draws.choice(DIGITS, p=chain[digits[-2], digits[-1]])))
    return "".join(map(str, digits))


def write_texts(folder: Path) -> None:
    """Write the datasets of TEXTS; no text is in two."""
    chain = np.random.default_rng(0).dirichlet(np.full(DIGITS, 0.5), (DIGITS, DIGITS))
    seed = 0
    for name, count in TEXTS.items():
        samples = []
        for _ in range(count):
            seed += 1
            sample = Sample(f"{name}:{seed}", "doc", content=(Text(draw(chain, seed)),))
            samples.append((sample, dict[str, bytes]()))
        write_shards(folder / name, name, samples)


def train(config: RunConfig) -> None:
    pretrain(config)


@dataclass
class School:
    """Runs of one phase over one of the datasets."""

    pool: RankPool
    tokenizer: Path
    folder: Path

    def run(self, name: str, data: str, phase: Phase, *more: str) -> Path:
        """Train from random weights, or from those that `more` names; returns the last checkpoint."""
        fields = ", ".join(f"{option}: {value}" for option, value in {**TRAINED, **phase}.items())
        words = [
            "+recipe=demo",
            f"run.folder={self.folder}/{name}",
            f"data.tokenizer={self.tokenizer}",
            "run.evaluate_at_end=false",
            "evaluation.phase_samples=0",
            *(f"~data.datasets.{dataset}" for dataset in DATASETS),
            *(f"~data.validation.{dataset}" for dataset in DATASETS),
            f"+data.datasets.{data}.path={self.folder}/{data}",
            *(f"~phases.{each}" for each in PHASES),
            f"+phases.study={{{fields}}}",
        ]
        self.pool.run(1, train, configured([*words, *more], 1))
        return self.folder / name / f"checkpoints/study/step-{phase['steps']:08d}"

    def distance(self, name: str, data: str, student: Path, teacher: Path) -> float:
        """The mean KL(teacher || student) over a dataset, in nats a token."""
        # Two texts fit a pack: all of them in one step.
        packs = TEXTS[data] // 2
        phase = {"steps": 1, "lr": 0, "warmup_steps": 0, "global_batch": packs} | taught_by(teacher)
        self.run(f"{name}-{data}", data, phase, *STUDENT, f"init.checkpoint={student}")
        return float(metrics(self.folder / f"{name}-{data}")[0]["distillation_loss"])


def taught_by(teacher: Path) -> dict[str, object]:
    return {"distillation": f"{{teacher: {{checkpoint: {teacher}}}}}"}


@pytest.mark.long  # thirteen runs, two minutes of one core
def test_a_student_ends_closer_to_its_teacher_than_by_the_data_alone(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    write_texts(tmp_path)
    school = School(pool, demo_data / "tokenizer", tmp_path)
    teacher = school.run("teacher", "many", {"steps": LESSONS, "lr": 3e-3}, *TEACHER)
    found: dict[str, list[float]] = {}
    for kind, lesson in {"data alone": {}, "data and teacher": taught_by(teacher)}.items():
        for seed in SEEDS:
            name = f"{kind}-{seed}".replace(" ", "-")
            phase = {"steps": STEPS, "lr": 4e-3} | lesson
            student = school.run(name, "few", phase, *STUDENT, f"run.seed={seed}")
            distance = school.distance(name, "held_out", student, teacher)
            found.setdefault(kind, []).append(distance)
    print({kind: [round(distance, 4) for distance in row] for kind, row in found.items()})
    # Worst against best: no student without the teacher is near one with it.
    assert max(found["data and teacher"]) < 0.7 * min(found["data alone"])
