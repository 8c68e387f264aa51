"""Short runs with rewards, for tests: a model that knows nothing learns to answer briefly."""

import json
from pathlib import Path
from typing import Any

from visionloom.tests.train.runs import DATASETS
from visionloom.train.reinforcement.groups import Group
from visionloom.train.reinforcement.store import ROLLOUTS, read_shard

OWN = "visionloom.tests.train.reinforcement.own_rewards"
ROLLOUT = "rollout:{n:4,batch_prompts:4,max_new_tokens:8,part_prompts:1}"


def rl_words(data: Path, folder: Path, steps: int, *more: str, rl: str = "") -> list[str]:
    """Command-line words of a run with one phase `rl` of `steps` steps; `rl`: more of its section."""
    gone = ("language", "towers", "align", "multimodal", "long", "ultra", "sft", "reasoning", "rl")
    return [
        "+recipe=demo",
        "model=tiny",
        "optim=adamw",
        f"run.folder={folder}",
        "run.evaluate_at_end=false",
        "evaluation.phase_samples=0",
        "evaluation.phase_answers=0",
        *(f"data.datasets.{name}.path={data}/train/{name}" for name in DATASETS),
        *(f"data.validation.{name}.path={data}/test/{name}" for name in DATASETS),
        f"data.tokenizer={data}/tokenizer",
        *(f"~phases.{name}" for name in gone),
        f"+phases.rl={{sequence_length:256,steps:{steps},lr:1e-3}}",
        "+phases.rl.mixture.sums=1",
        "+phases.rl.mixture.vqa=1",
        f"phases.rl.rl={{{ROLLOUT},right:0.0,most_right:1.0{rl}}}",
        "+phases.rl.rl.reward.short=1",
        f"+phases.rl.rl.functions.short={OWN}:short",
        *more,
    ]


def groups(folder: Path) -> list[Group]:
    """All groups of a run's phase `rl`, in the order of rollouts and draws."""
    read = []
    for shard in sorted((folder / ROLLOUTS / "rl").glob("*/*.tar")):
        read += read_shard(shard)
    return sorted(read, key=lambda group: (group.policy_step, group.draw))


def drawn(folder: Path) -> list[list[list[int]]]:
    """The token ids of all answers, by group."""
    return [[answer.token_ids for answer in group.answers] for group in groups(folder)]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """A run's events of one kind."""
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]
