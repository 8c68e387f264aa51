"""What can go wrong in a phase with rewards, and phases with a teacher. Reference: undisturbed runs, and torch for divergences."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visionloom.common.errors import EarlyEnd, UserError
from visionloom.data.shards.sample import SampleError
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.reinforcement.runs import OWN, drawn, events, groups, rl_words
from visionloom.tests.train.runs import configured, metrics
from visionloom.tests.train.test_bad_steps import poisoned
from visionloom.tests.train.test_layouts import train
from visionloom.tests.train.test_resume import checkpoint_tensors
from visionloom.train.config import RunConfig

STEPS = 4


@pytest.fixture(scope="module")
def undisturbed(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    pool.run(1, train, configured(rl_words(demo_data, folder, STEPS), 1))
    return folder


def outcome(config: RunConfig) -> str:
    """What a run ends with (runs in the pool)."""
    try:
        train(config)
    except (UserError, EarlyEnd) as end:
        return str(end)
    return "done"


@contextlib.contextmanager
def replaced(where: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def with_wrong_pictures(config: RunConfig) -> str:
    """Train on other pictures than answers were written to (runs in the pool)."""
    from visionloom.data.stream.reader import Reader

    right = Reader.batch_of_answers

    def wrong(self: Reader, *words: Any, **options: Any) -> Any:
        batch = right(self, *words, **options)
        batch.patches.copy_(255 - batch.patches)
        return batch

    with replaced(Reader, "batch_of_answers", wrong):
        return outcome(config)


def test_a_wrong_picture_is_caught_by_the_gate(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    gate = ",gate:{mean:1e-5,largest:1e-4}"
    config = configured(rl_words(demo_data, tmp_path / "right", 1, rl=gate), 1)
    assert pool.run(1, outcome, config) == ["done"]
    config = configured(rl_words(demo_data, tmp_path / "wrong", 1, rl=gate), 1)
    (said,) = pool.run(1, with_wrong_pictures, config)
    assert "the trainer's log-probabilities of answers and those that they were written" in said
    assert "phases.rl.rl.gate.mean allows 1e-05" in said
    assert not (tmp_path / "wrong" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("reward", "fault"),
    [
        ("raises", "raised ZeroDivisionError: division by zero"),
        ("is_no_number", "returned nan"),
        ("sleeps", "took more than 0.2 s"),
    ],
)
def test_bad_rewards_are_named_and_counted(
    reward: str, fault: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    more = ["+phases.rl.rl.reward.bad=1", f"+phases.rl.rl.functions.bad={OWN}:{reward}"]
    options = ",reward_seconds:0.2"
    pool.run(1, train, configured(rl_words(demo_data, tmp_path, 1, *more, rl=options), 1))
    (line,) = metrics(tmp_path)
    written = groups(tmp_path)
    counted = {f"bad {fault.partition(':')[0]}": sum(len(group.answers) for group in written)}
    assert line["rollout"]["reward_faults"] == counted
    assert {answer.rewards["bad"] for group in written for answer in group.answers} == {0.0}


def with_storage_that_fails_on_one_rank(config: RunConfig) -> str:
    """Train where rank 1 cannot read the first prompt (runs in the pool)."""
    from visionloom.data.stream.prompt_stream import PromptStream

    right = PromptStream.prompt

    def failing(self: PromptStream, place: Any, most_tokens: int) -> Any:
        if torch.distributed.get_rank() == 1 and place == self.place(0)[0]:
            raise SampleError("first", "img0.png", "cannot be read")
        return right(self, place, most_tokens)

    with replaced(PromptStream, "prompt", failing):
        return outcome(config)


def test_a_prompt_that_one_rank_cannot_read_is_left_out_by_all(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    config = configured(rl_words(demo_data, tmp_path, 1, "parallel.tensor=2"), 2)
    assert pool.run(2, with_storage_that_fails_on_one_rank, config) == ["done", "done"]
    faults = [group.left_out for group in groups(tmp_path)]
    assert faults[0] == "unusable: img0.png cannot be read" and not any(faults[1:])


def stopped_while_writing(config: RunConfig, rounds: int) -> str:
    """Train, and ask for an end once so many rounds are written (runs in the pool)."""
    from visionloom.train.observe import stopping
    from visionloom.train.observe.stopping import StopRequest
    from visionloom.train.reinforcement.store import RolloutStore

    add, left = RolloutStore.add, [rounds]

    def counted(self: RolloutStore, *words: Any) -> None:
        add(self, *words)
        left[0] -= 1
        if not left[0]:
            stopping.current.ask("stopped by SIGTERM")

    with (
        replaced(stopping, "current", StopRequest()),
        replaced(RolloutStore, "add", counted),
    ):
        return outcome(config)


@pytest.mark.parametrize(
    ("rounds", "when"), [(2, "before its first step"), (6, "after step 1, which is saved")]
)
def test_a_wish_to_end_is_heard_while_answers_are_written(
    rounds: int, when: str, undisturbed: Path, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    config = configured(rl_words(demo_data, tmp_path, STEPS), 1)
    (said,) = pool.run(1, stopped_while_writing, config, rounds)
    assert said == f"stopped by SIGTERM {when}"
    assert len(groups(tmp_path)) == rounds
    assert pool.run(1, outcome, config) == ["done"]
    assert drawn(tmp_path) == drawn(undisturbed)
    ours, expected = (pool.run(1, checkpoint_tensors, each)[0] for each in (tmp_path, undisturbed))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.long
def test_half_a_rollout_is_finished_in_another_layout(
    undisturbed: Path, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    words = rl_words(demo_data, tmp_path, STEPS)
    pool.run(1, stopped_while_writing, configured(words, 1), 6)
    pool.run(2, train, configured([*words, "parallel.tensor=2"], 2))
    assert drawn(tmp_path) == drawn(undisturbed)
    losses = [[line["loss"] for line in metrics(each)] for each in (tmp_path, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)


def test_nothing_to_learn_is_a_sentence(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    words = rl_words(demo_data, tmp_path, STEPS, rl=",right:2.0")
    (said,) = pool.run(
        1, outcome, configured([each.replace("right:0.0,", "") for each in words], 1)
    )
    assert "phases.rl: nothing can be learned from rollout 0 of 16 prompts: 16 all wrong" in said
    # Put aside: with a mended reward the same command answers anew.
    assert (tmp_path / "rollouts/rl/00000000.aside-0").exists()
    assert pool.run(1, outcome, configured(rl_words(demo_data, tmp_path, 1), 1)) == ["done"]


@pytest.mark.parametrize("policy", ["algorithm:sapo", "algorithm:grpo,mean:token"])
def test_losses_of_a_step_by_hand(
    policy: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """Before the first update ratios are 1: what is learned from is the advantages alone, by the groups as they were written."""
    options = f",policy:{{{policy},temperature_positive:0.8}}"
    # Long enough that some of a model that knows nothing end by chance.
    words = ["phases.rl.rl.rollout.max_new_tokens=100"]
    pool.run(1, train, configured(rl_words(demo_data, tmp_path, 1, *words, rl=options), 1))
    (line,) = metrics(tmp_path)
    terms, weights = list[float](), list[float]()
    for group in groups(tmp_path):
        totals = np.array(group.totals)
        excess = (totals - totals.mean()) / (totals.std(ddof=1) + 1e-4)
        for answer, advantage in zip(group.answers, excess.tolist(), strict=True):
            length = len(answer.token_ids)
            temperature = 0.8 if advantage > 0 else 1.05
            terms.append(-advantage * (2 / temperature if "sapo" in policy else 1.0))
            weights.append(length if "token" in policy else 1.0)
    assert len({len(answer) for some in drawn(tmp_path) for answer in some}) > 1
    assert line["loss"] == pytest.approx(np.average(terms, weights=weights), abs=1e-6)
    assert line["gradient_share"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+phases.rl.rl.reward.nmber=1"], "rl.reward.nmber: no reward is called nmber: choose"),
        (["+phases.rl.rl.judged_by.sums=right"], "judged_by.sums=right: no reward is called"),
        (["+phases.rl.rl.functions.right=math:own"], "functions.right: that name stands for"),
        (["+phases.rl.rl.functions.own=math:own"], "functions.own has no weight"),
        (
            ["+phases.rl.rl.reward.own=1", "+phases.rl.rl.functions.own=my_rewards.digits:own"],
            "functions.own=my_rewards.digits:own: there is no module my_rewards in PYTHONPATH or in this folder",
        ),
    ],
)
def test_rewards_that_are_none_are_refused_at_once(
    words: list[str], said: str, demo_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        configured(rl_words(demo_data, tmp_path, 1, *words), 1)


def test_a_function_may_judge_a_dataset(demo_data: Path, tmp_path: Path) -> None:
    words = ["+phases.rl.rl.functions.own=math:own", "+phases.rl.rl.judged_by.sums=own"]
    words += ["+phases.rl.rl.reward.right=1"]
    configured(rl_words(demo_data, tmp_path, 1, *words), 1)


def test_what_is_passed_over_is_not_asked_again(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    words = ["checkpoint.every_steps=1", "checkpoint.keep=9", "optim.skip_limit=2"]
    config = configured(rl_words(demo_data, tmp_path, STEPS + 1, *words), 1)
    assert pool.run(1, poisoned, config, 3, 4) == [("done", 0)]
    assert [(event["step"], event["passed_over"]) for event in events(tmp_path, "back")] == [
        (2, [2, 3])
    ]
    draws = sorted(group.draw for group in groups(tmp_path))
    # Seven rollouts: two before, two that were passed over, three after.
    assert draws == list(range(len(draws)))
    assert len(list((tmp_path / "rollouts" / "rl").glob("[0-9]*"))) == 7


def taught_by(
    pool: RankPool, demo_data: Path, folder: Path, *more: str, rl: str = ""
) -> dict[str, Any]:
    """The first step of a run without other rewards than a teacher, which is the model of a run of one step."""
    teacher = folder / "teacher"
    pool.run(1, train, configured(rl_words(demo_data, teacher, 1), 1))
    checkpoint = next((teacher / "checkpoints" / "rl").iterdir())
    own = ["phases.rl.distillation.cross_entropy_weight=0"]
    own += [f"phases.rl.distillation.teacher.checkpoint={checkpoint}"]
    own += [word.replace("TEACHER", str(checkpoint)) for word in more]
    words = rl_words(demo_data, folder / "student", 2, *own, rl=rl)
    words = [
        word for word in words if not word.startswith(("+phases.rl.rl.reward", "+phases.rl.rl.f"))
    ]
    pool.run(1, train, configured(words, 1))
    assert len(groups(folder / "student")) == 8, "none is left out"
    return metrics(folder / "student")[0]


@pytest.mark.parametrize("kind", ["divergence", "reward"])
def test_a_teacher_of_the_students_own_answers(
    kind: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """Of a teacher that is the student itself: nothing apart, and nothing to learn, before the first update."""
    options = ",teacher_reward:1.0" if kind == "reward" else ""
    first = taught_by(pool, demo_data, tmp_path, "init.checkpoint=TEACHER", rl=options)
    if kind == "reward":
        assert first["rollout"]["teacher_divergence"] == pytest.approx(0.0, abs=1e-6)
        assert first["grad_norm"] == pytest.approx(0.0, abs=1e-5)
    else:
        assert first["distillation_loss"] == pytest.approx(0.0, abs=1e-6)
        assert "log_probability_apart" not in first["rollout"]


def test_a_teacher_s_reward_is_minus_the_reverse_divergence(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """Of another model, before the first update: grpo's loss is minus the mean advantage of all tokens."""
    options = ",teacher_reward:0.5,policy:{algorithm:grpo,mean:token}"
    first = taught_by(pool, demo_data, tmp_path, rl=options)
    divergence = first["rollout"]["teacher_divergence"]
    assert divergence > 1e-3
    assert first["loss"] == pytest.approx(0.5 * divergence, rel=1e-4) and first["grad_norm"] > 0


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 3])
def test_zero_learns_from_rewards_too(
    stage: int, undisturbed: Path, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    words = ["parallel.engine=deepspeed", f"parallel.zero.stage={stage}"]
    pool.run(2, train, configured(rl_words(demo_data, tmp_path, STEPS, *words), 2))
    assert drawn(tmp_path) == drawn(undisturbed)
    losses = [[line["loss"] for line in metrics(each)] for each in (tmp_path, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)
