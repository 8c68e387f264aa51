"""Judge answers by rewards with weights: the project's own here, a user's in a process of its own, where they can do no harm."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.common.processes import end_with_parent, fork_server
from visionloom.common.text import first_line
from visionloom.train.rewards.rewards import DEFAULT, REWARDS, RIGHT, Judged

PATH: Final = ":"
"""Parts a user's module from its function, as in my_rewards:length_of_proof."""
START_SECONDS: Final = 60.0
"""In which a user's module must be imported."""


@dataclass(frozen=True)
class Judgement:
    """What an answer is worth."""

    rewards: dict[str, float]
    """By name, not weighted; 0 where one could not judge."""
    faults: dict[str, str]
    """What went wrong with those rewards, by name."""


def rewards_of(names: Iterable[str], judged_by: Mapping[str, str], dataset: str) -> list[str]:
    """Return the names of rewards with the one that RIGHT stands for in a dataset in its place."""
    return [judged_by.get(dataset, DEFAULT) if name == RIGHT else name for name in names]


class Judge:
    """Rewards with their weights."""

    def __init__(
        self,
        weights: Mapping[str, float],
        functions: Mapping[str, str],
        seconds: float,
        judged_by: Mapping[str, str] | None = None,
    ) -> None:
        """Start what the rewards need.

        Args:
            weights: by the name of a reward.
            functions: MODULE:FUNCTION of a user's own, by its name; it takes a Judged and returns a number.
            seconds: in which a user's reward must judge an answer.
            judged_by: of each dataset, the reward that RIGHT stands for; DEFAULT for others.

        Raises:
            UserError: if a user's reward cannot be imported.
        """
        self.weights, self.judged_by = dict(weights), judged_by or {}
        self._rewards: dict[str, Callable[[Judged], float]] = {}
        for name in dict.fromkeys([*weights, DEFAULT, *self.judged_by.values()]):
            if name == RIGHT:
                continue
            if name in functions:
                self._rewards[name] = UsersReward(name, functions[name], seconds)
            else:
                self._rewards[name] = REWARDS[name]

    def judge(self, judged: Judged, dataset: str = "") -> Judgement:
        """Return what an answer to a prompt of a dataset is worth by each reward."""
        rewards, faults = dict[str, float](), dict[str, str]()
        names = rewards_of(self.weights, self.judged_by, dataset)
        for name, meant in zip(self.weights, names, strict=True):
            reward = self._rewards[meant]
            try:
                value = float(reward(judged))
                fault = "" if math.isfinite(value) else f"returned {value}"
            except Exception as error:  # a user's own code, or what it has returned
                fault = first_line(error)
            if fault:
                faults[name] = fault
            rewards[name] = 0.0 if fault else value
        return Judgement(rewards, faults)

    def total(self, rewards: Mapping[str, float]) -> float:
        """Return the weighted sum of rewards."""
        return math.fsum(self.weights[name] * value for name, value in rewards.items())

    def close(self) -> None:
        """End the processes of a user's rewards."""
        for reward in self._rewards.values():
            if isinstance(reward, UsersReward):
                reward.close()


class UsersReward:
    """A user's function, called in a process of its own, which is ended when it takes too long."""

    def __init__(self, name: str, path: str, seconds: float) -> None:
        """Import the function; UserError if that fails."""
        self.name, self.path, self.seconds = name, path, seconds
        self._process: Any = None
        self._start()

    def _start(self) -> None:
        context = fork_server()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.path), daemon=True)
        self._process.start()
        theirs.close()
        fault = self._answer(START_SECONDS)
        if isinstance(fault, str):
            self.close()
            raise UserError(f"functions.{self.name}={self.path} cannot be used: {fault}")

    def __call__(self, judged: Judged) -> float:
        """Judge an answer; raises ValueError with what went wrong."""
        if self._process is None:
            self._start()
        answer = self._ask(judged)
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer

    def _ask(self, judged: Judged) -> float | str:
        """Send an answer to the process, and return what comes of it as `_answer`."""
        try:
            self._connection.send(judged)
        # It has ended after its last answer, as one that grew too large: another one judges.
        except OSError:
            self.close()
            self._start()
            self._connection.send(judged)
        return self._answer(self.seconds)

    def _answer(self, seconds: float) -> float | str:
        """Return the number that the process sends, or what went wrong."""
        try:
            if self._connection.poll(seconds):
                answer: float | str = self._connection.recv()
                return answer
            fault = f"took more than {seconds:g} s"
        except (EOFError, OSError):
            fault = "ended its process"
        self.close()
        return fault

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def serve(connection: Connection, path: str) -> None:
    """Import a user's function and call it for each answer that comes, in a process of its own."""
    end_with_parent()
    module, _, name = path.partition(PATH)
    # A module beside the command, as of `python -m`.
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
        connection.send(0.0)
    except BaseException as error:  # of any kind, by a user's own module
        connection.send(_named(error))
        return
    while True:
        try:
            judged = connection.recv()
        except EOFError:
            return
        try:
            connection.send(float(function(judged)))
        except BaseException as error:  # of any kind, by a user's own code
            connection.send(_named(error))


def _named(error: BaseException) -> str:
    return (
        f"raised {type(error).__name__}: {first_line(error)}"
        if str(error)
        else f"raised {type(error).__name__}"
    )
