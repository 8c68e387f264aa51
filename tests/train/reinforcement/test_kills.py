"""Ranks killed at random moments, while answers are written and while they are trained on.

Reference: the same run without interruption; weights, optimizer and answers must be equal bit for bit.
"""

from pathlib import Path

import pytest
import torch

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.reinforcement.runs import drawn, rl_words
from visionloom.tests.train.runs import metrics
from visionloom.tests.train.test_faults import killed_runs
from visionloom.tests.train.test_resume import checkpoint_tensors
from visionloom.train.reinforcement.store import ROLLOUTS

pytestmark = pytest.mark.long
STEPS, KILLS = 12, 10


def test_kills_change_nothing(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    rl = ",updates:2,policy:{kl:0.05}"
    words = rl_words(demo_data, tmp_path, STEPS, "checkpoint.every_steps=4", rl=rl)
    attempts = killed_runs("forked", KILLS, words, tmp_path)
    assert sum(attempt["killed"] for attempt in attempts) >= KILLS

    folders = [Path(folder) for folder in dict.fromkeys(each["folder"] for each in attempts)]
    expected, *others = (pool.run(1, checkpoint_tensors, folder)[0] for folder in folders)
    for folder, tensors in zip(folders[1:], others, strict=True):
        assert drawn(folder) == drawn(folders[0])
        losses = [[line["loss"] for line in metrics(each)] for each in (folder, folders[0])]
        assert losses[0] == losses[1]
        assert tensors.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(expected[name], tensors[name])] == []
        # Half of a rollout is finished, and none is written twice.
        assert not list((folder / ROLLOUTS).glob("*/*.aside-*"))
