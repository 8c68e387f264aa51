"""Rewards with weights, and what a user's own may do. Reference: by hand."""

import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.train.rewards.judge import Judge, UsersReward
from visionloom.train.rewards.rewards import Judged

ANSWER = Judged("The answer is 7.", "7", "What is 3 + 4?", 5, 100)
OWN = """
import os, sys, threading, time
calls = 0
def length(judged): return len(judged.text)
def raises(judged): raise KeyError("text")
def exits(judged): sys.exit(3)
def dies(judged): os._exit(1)
def sleeps(judged): time.sleep(60)
def is_not_a_number(judged): return float("nan")
def is_none(judged): return None
def dies_later(judged):
    threading.Timer(0.05, os._exit, [1]).start()
    return 0.5
def once(judged):
    if judged.tokens == 1: time.sleep(60)
    return 0.5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"own_rewards_{os.getpid()}_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(OWN)
    # Processes take the path of the one that starts them.
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_weights(own: str) -> None:
    weights = {"number": 1.0, "repetition": 0.5, "letters": 0.01}
    judge = Judge(weights, {"letters": f"{own}:length"}, 5.0)
    judgement = judge.judge(ANSWER)
    assert judgement.rewards == {"number": 1.0, "repetition": 0.0, "letters": 16.0}
    assert judge.total(judgement.rewards) == pytest.approx(1.16) and not judgement.faults
    judge.close()


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("raises", "raised KeyError: 'text'"),
        ("exits", "raised SystemExit: 3"),
        ("dies", "ended its process"),
        ("sleeps", "took more than 0.3 s"),
        ("is_not_a_number", "returned nan"),
        ("is_none", "raised TypeError: float() argument must be"),
    ],
)
def test_a_bad_reward_is_named_and_counted(function: str, fault: str, own: str) -> None:
    judge = Judge({"own": 1.0, "number": 1.0}, {"own": f"{own}:{function}"}, 0.3)
    for _ in range(2):
        judgement = judge.judge(ANSWER)
        assert math.fsum(judgement.rewards.values()) == 1.0
        assert list(judgement.faults) == ["own"]
        assert judgement.faults["own"].startswith(fault)
    judge.close()


def test_datasets_have_rewards_of_their_own() -> None:
    judge = Judge({"right": 1.0, "repetition": 1.0}, {}, 1.0, {"sums": "number"})
    assert judge.judge(ANSWER, "sums").rewards == {"right": 1.0, "repetition": 0.0}
    assert judge.judge(ANSWER, "texts").rewards["right"] == 0.0, "it is not 7 word for word"
    judge.close()


def test_after_a_slow_one_the_next_is_judged(own: str) -> None:
    judge = Judge({"own": 1.0}, {"own": f"{own}:once"}, 0.5)
    slow = Judged("", "", "", 1, 100)
    rewards = [judge.judge(each).rewards["own"] for each in (slow, ANSWER, ANSWER)]
    assert rewards == [0.0, 0.5, 0.5]
    judge.close()


def test_a_process_that_ends_between_two_answers_is_started_again(own: str) -> None:
    judge = Judge({"own": 1.0}, {"own": f"{own}:dies_later"}, 30.0)
    reward = judge._rewards["own"]
    assert isinstance(reward, UsersReward)
    for _ in range(2):
        judgement = judge.judge(ANSWER)
        assert judgement.rewards == {"own": 0.5} and not judgement.faults
        reward._process.join()
    judge.close()


def test_a_module_beside_the_command_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_command.py").write_text("def half(judged): return 0.5")
    monkeypatch.chdir(tmp_path)
    judge = Judge({"own": 1.0}, {"own": "beside_the_command:half"}, 30.0)
    assert judge.judge(ANSWER).rewards == {"own": 0.5}
    judge.close()


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        (
            {"own": "no_such_module:f"},
            "functions.own=.* cannot be used: raised ModuleNotFoundError",
        ),
        ({"own": "math:no_such_function"}, "cannot be used: raised AttributeError"),
    ],
)
def test_what_is_no_reward_is_refused(functions: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Judge({"own": 1.0}, functions, 1.0)
