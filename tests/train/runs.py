"""Short real runs for the tests: the demo recipe's model and data, a few steps."""

import json
from pathlib import Path
from typing import Any

from visionloom.launch.configure import compose
from visionloom.train.config import RunConfig


def run_words(data: Path, folder: Path, steps: int, *more: str) -> list[str]:
    """Command-line words of a run with one phase of `steps` steps over all parameter groups."""
    return [
        "+recipe=demo",
        "model=tiny",
        "optim=adamw",
        f"run.folder={folder}",
        "run.evaluate_at_end=false",
        "evaluation.phase_samples=0",
        *(f"data.datasets.{name}.path={data}/train/{name}" for name in DATASETS),
        *(f"data.validation.{name}.path={data}/test/{name}" for name in DATASETS),
        f"data.tokenizer={data}/tokenizer",
        *(
            f"~phases.{name}"
            for name in ("language", "towers", "align", "long", "ultra", "sft", "reasoning", "rl")
        ),
        f"phases.multimodal.steps={steps}",
        "phases.multimodal.sequence_length=256",
        "phases.multimodal.warmup_steps=3",
        *more,
    ]


DATASETS = (
    "captions",
    "text",
    "lists",
    "moments",
    "vqa",
    "grounding",
    "interleaved",
    "video",
    "documents",
    "sums",
)


def run_config(data: Path, folder: Path, steps: int, world_size: int, *more: str) -> RunConfig:
    """The checked configuration of such a run."""
    return configured(run_words(data, folder, steps, *more), world_size)


def configured(words: list[str], world_size: int) -> RunConfig:
    """The checked configuration of these words."""
    config = compose(words, world_size)
    assert config is not None
    return config


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
