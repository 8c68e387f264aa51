"""Steps whose gradient is not finite, and those that stand out: row 34 of the fault matrix.

References: scipy's median absolute deviation, a brute force over the steps of a plan, and a run that never had the bad data.
"""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import median_abs_deviation

from visionloom.common.errors import EarlyEnd
from visionloom.data.plan.passed_over import joined_ranges, step_of_plan
from visionloom.data.stream.train_stream import PackStream
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.faulty import pretrain_with
from visionloom.tests.train.runs import metrics, run_config
from visionloom.tests.train.test_resume import checkpoint_tensors
from visionloom.train.config import RunConfig
from visionloom.train.optim.bad_steps import StepJudge, robust_score
from visionloom.train.optim.config import OptimConfig

STEPS = 8
OPTIONS = ("checkpoint.every_steps=3", "checkpoint.keep=9", "optim.skip_limit=2")


def judged(values: list[tuple[float, float]], **options: Any) -> tuple[StepJudge, list[Any]]:
    judge = StepJudge(OptimConfig(**options))
    return judge, [judge.judge(*each) for each in values]


def steps(count: int) -> list[tuple[float, float]]:
    chance = random.Random(5)
    return [(2 + chance.gauss(0, 0.1), 1 + chance.gauss(0, 0.05)) for _ in range(count)]


def test_the_score_is_robust() -> None:
    values = [loss for loss, _ in steps(128)]
    spread = median_abs_deviation(values, scale="normal")
    expected = (9.0 - sorted(values)[63] / 2 - sorted(values)[64] / 2) / spread
    assert robust_score(9.0, values) == pytest.approx(expected, rel=1e-4)
    assert robust_score(2.1, [2.0] * 128) == pytest.approx(5.0), "a hundredth of the median"


def test_a_gradient_a_million_times_too_large_gets_a_word() -> None:
    judge, verdicts = judged(steps(40))
    assert not any(verdict.spikes or verdict.skipped for verdict in verdicts)
    verdict = judge.judge(2.0, 1e6)
    assert set(verdict.spikes) == {"grad_norm"} and not verdict.skipped
    assert verdict.describe({"loss": 2.0, "grad_norm": 1e6}) == "grad_norm 1e+06: a spike"
    assert not judged([*steps(10), (2.0, 1e6)])[1][-1].spikes, "too few to compare with"


def test_spikes_are_skipped_if_asked_and_do_not_count() -> None:
    judge, _ = judged(steps(40), skip_spikes=True, skip_limit=3)
    again = StepJudge(judge.options)
    again.load_state(json.loads(json.dumps(judge.state())))
    for each in ((2.0, 50.0), (math.nan, 1.0), (2.0, math.inf)):
        verdict = judge.judge(*each)
        assert verdict.skipped and verdict == again.judge(*each)
    assert judge.has_enough and again.has_enough and judge.state() == again.state()
    assert not judge.judge(2.0, 1.0).skipped and not judge.has_enough


def test_a_steps_place_in_its_plan() -> None:
    chance = random.Random(3)
    for _ in range(200):
        left_out = {chance.randrange(20) for _ in range(chance.randrange(8))}
        ranges = joined_ranges((step, step + 1) for step in left_out)
        trained = [step for step in range(40) if step not in left_out]
        assert [step_of_plan(step, ranges) for step in range(20)] == trained[:20]
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges))


def poisoned(config: RunConfig, first: int, last: int, stop: int = 0) -> tuple[str, int]:
    """Train with NaN in the loss weights of rank 0; how it ended (runs in the pool). `stop`: a step to stop after."""
    from visionloom.tests.train.test_early_end import asked_to_stop

    try:
        with asked_to_stop([0], stop):
            pretrain_with(config, "nan", first, last, 0)
    except EarlyEnd as end:
        return str(end), end.code
    return "done", 0


def without(config: RunConfig, first: int, end: int) -> None:
    """Train without some of the plan's steps from the beginning (runs in the pool)."""
    from visionloom.train import run

    build = run.build_stream

    def built(*arguments: Any) -> PackStream:
        stream = build(*arguments)
        stream.pass_over([(first, end)])
        return stream

    run.build_stream = built  # type: ignore[assignment]
    try:
        run.pretrain(config)
    finally:
        run.build_stream = build


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_bad_data_is_passed_over(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """Also over a stop, a resume on the same ranks to the bit, and one on another number of ranks."""
    whole, same, other = (tmp_path / name for name in ("whole", "same", "other"))
    pool.run(2, without, run_config(demo_data, whole, STEPS, 2, *OPTIONS), 4, 6)
    for folder, ranks in ((same, 2), (other, 1)):
        config = run_config(demo_data, folder, STEPS, 2, *OPTIONS)
        # Asked in the second bad step: nothing is saved there, but after the first good one.
        said = pool.run(2, poisoned, config, 5, 6, 6)
        assert said == [("stopped by SIGTERM after step 4, which is saved", 75)] * 2
        assert [(event["step"], event["passed_over"]) for event in events(folder, "back")] == [
            (3, [4, 5])
        ]
        assert [event["step"] for event in events(folder, "bad_step")] == [5, 6]
        config = run_config(demo_data, folder, STEPS, ranks, *OPTIONS)
        assert pool.run(ranks, poisoned, config, 5, 6) == [("done", 0)] * ranks
        assert [line["data_cursor"] for line in metrics(folder)] == [1, 2, 3, 6, 7, 8, 9, 10]
    lines = {folder: metrics(folder) for folder in (whole, same, other)}
    assert [line["loss"] for line in lines[same]] == [line["loss"] for line in lines[whole]]
    assert [line["samples"] for line in lines[other]] == [line["samples"] for line in lines[whole]]
    losses = [line["loss"] for line in lines[whole]]
    assert [line["loss"] for line in lines[other]] == pytest.approx(losses, rel=1e-5)
    ours, expected = (pool.run(1, checkpoint_tensors, each)[0] for each in (same, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_nan_for_good_is_given_up(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """After going back twice; what is saved stays, and the code says not to start it again."""
    config = run_config(demo_data, tmp_path, STEPS, 2, *OPTIONS)
    ((cause, code), other) = pool.run(2, poisoned, config, 5, 0)
    assert (cause, code) == other and code == 93
    assert cause.startswith(
        "2 steps in a row were skipped, also after going back to step 3 2 times"
    )
    backs = [(event["step"], event["passed_over"]) for event in events(tmp_path, "back")]
    assert backs == [(3, [4, 5]), (3, [6, 7])]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [each.name for each in (tmp_path / "checkpoints" / "multimodal").iterdir()] == [
        "step-00000003"
    ]
