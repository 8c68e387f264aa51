"""A small student that learns from a teacher ends closer to it on held-out data than one that learns from the data alone.

The data are digits drawn from a chain of order two: what comes next has a distribution, of which a text shows one draw and a teacher
that has read much knows nearly all. Students read little. Everything goes through real runs, the measurement too: a step at
learning rate 0 on held-out texts, whose `distillation_loss` is the mean KL(teacher || student).
Reference: the same student without a teacher; the distributions that the texts were drawn from.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionloom.data.shards.sample import Sample, Text
from visionloom.data.shards.write import write_shards
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import DATASETS, configured, metrics
from visionloom.train.config import RunConfig
from visionloom.train.run import pretrain

DIGITS, LENGTH = 10, 120
TEXTS = {"many": 2000, os.environ.get("FEW", "few"): 16, "tuning": 32, "held_out": 64}
"""Of the teacher, of the students, and of the measurement while steps and rates were chosen and afterwards."""
PHASES = ("towers", "align", "multimodal", "long", "ultra", "sft", "reasoning")
TEACHER = ["model.text.layers=3"]
STUDENT = ["model.text.layers=3", "model.text.hidden_size=64", "model.text.ffn_hidden_size=192"]
LESSONS, STEPS = 200, 100
"""Of the teacher, and of a student."""


def draw(chain: NDArray[np.float64], seed: int) -> str:
    """A text of the chain's digits."""
    draws = np.random.default_rng(seed)
    digits = list(draws.integers(0, DIGITS, 2))
    while len(digits) < LENGTH:
        digits.append(draws.choice(DIGITS, p=chain[digits[-2], digits[-1]]))
    return "".join(map(str, digits))


def write_texts(folder: Path) -> None:
    """The datasets of TEXTS, none of which shares a text with another."""
    chain = np.random.default_rng(0).dirichlet(np.full(DIGITS, 0.5), (DIGITS, DIGITS))
    seed = 0
    for name, count in TEXTS.items():
        samples = []
        for _ in range(count):
            seed += 1
            content = (Text(draw(chain, seed)),)
            samples.append((Sample(f"{name}:{seed}", "doc", content=content), {}))
        write_shards(folder / name, name, samples)


@dataclass
class School:
    """A teacher, and runs of its students."""

    pool: RankPool
    demo: Path
    folder: Path

    def end_of(self, name: str, step: int) -> Path:
        return self.folder / name / f"checkpoints/study/step-{step:08d}"

    def run(self, name: str, data: str, phase: dict[str, object], *more: str) -> None:
        phase = {
            "sequence_length": 256,
            "trainable": "[language]",
            "lr": 2e-3,
            "lr_min_ratio": 0.1,
            "global_batch": 2,
            "micro_batch": 2,
        } | phase
        fields = ", ".join(f"{option}: {value}" for option, value in phase.items())
        words = [
            "+recipe=demo",
            f"run.folder={self.folder}/{name}",
            f"data.tokenizer={self.demo}/tokenizer",
            "run.evaluate_at_end=false",
            "evaluation.phase_samples=0",
            *(f"~data.datasets.{dataset}" for dataset in DATASETS),
            *(f"~data.validation.{dataset}" for dataset in DATASETS),
            f"+data.datasets.{data}.path={self.folder}/{data}",
            *(f"~phases.{phase}" for phase in PHASES),
            f"+phases.study={{{fields}}}",
            *more,
        ]
        self.pool.run(1, train, configured(words, 1))

    def teach(self) -> None:
        self.run(
            "teacher",
            "many",
            {"lr": 3e-3, "steps": LESSONS, "warmup_steps": 10, "global_batch": 4, "micro_batch": 4},
            *TEACHER,
        )

    def lesson(self, **more: object) -> dict[str, object]:
        words = ", ".join(f"{k}: {v}" for k, v in more.items())
        return {
            "distillation": f"{{teacher: {{checkpoint: {self.end_of('teacher', LESSONS)}}}, {words}}}"
        }

    def student(self, name: str, seed: int, phase: dict[str, object]) -> float:
        self.run(
            name,
            os.environ.get("FEW", "few"),
            {"steps": STEPS, "warmup_steps": 5} | phase,
            *STUDENT,
            f"run.seed={seed}",
        )
        return 0

    def distance(
        self, name: str, split: str, step: int = STEPS, model: list[str] = STUDENT
    ) -> float:
        """The mean KL(teacher || student) over a split, in nats a token."""
        packs = -(-TEXTS[split] // 2)
        phase = {"steps": 1, "lr": 0, "global_batch": packs, "micro_batch": packs} | self.lesson(
            weight=1
        )
        self.run(
            f"{name}-{split}", split, phase, *model, f"init.checkpoint={self.end_of(name, step)}"
        )
        return float(metrics(self.folder / f"{name}-{split}")[0]["distillation_loss"])


def train(config: RunConfig) -> None:
    pretrain(config)
