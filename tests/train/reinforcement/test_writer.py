"""Which prompts a rollout asks, and what becomes of their groups. Reference: by hand, with answers from a script."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.stream.prompt_stream import PromptStream
from visionloom.parallel.topology import Topology
from visionloom.tests.train.reinforcement.runs import rl_words
from visionloom.tests.train.runs import configured
from visionloom.train.generation.generator import Answer
from visionloom.train.generation.sampling import Sampling
from visionloom.train.reinforcement.config import ReinforcementConfig, RolloutConfig
from visionloom.train.reinforcement.groups import Group
from visionloom.train.reinforcement.rollouts import SURPLUS, left_out
from visionloom.train.reinforcement.store import PassRate, RolloutStore
from visionloom.train.reinforcement.writer import Rollout, RolloutWriter, prompts_to_ask
from visionloom.train.stream_options import stream_options

N = 4
RightOf = Callable[[str], int]
"""How many of the N answers to a sample are right."""


@dataclasses.dataclass
class Script:
    """Answers prompts as a script says."""

    topology: Topology
    tokenizer: Tokenizer
    right_of: RightOf
    asked: list[str] = dataclasses.field(default_factory=list)
    """Ids of samples, in order."""

    def generate(self, prompts: Iterator[EncodedSample], sampling: Sampling) -> list[list[Answer]]:
        answered = []
        for prompt in prompts:
            assert prompt.patches is not None and prompt.answer is not None
            self.asked.append(prompt.sample_id)
            right = self.right_of(prompt.sample_id)
            texts = [prompt.answer.rpartition(">")[2]] * right + ["none"] * (N - right)
            answered.append([self._answer(text) for text in texts])
        return answered

    def _answer(self, text: str) -> Answer:
        ids = [*self.tokenizer.encode([text])[0].tolist(), self.tokenizer.stop_ids[0]]
        return Answer(ids, [-1.0] * len(ids), [-1.0] * len(ids), True)


class Setup:
    """A writer of its own for each start of a run."""

    def __init__(self, topology: Topology, data: Path, folder: Path) -> None:
        self.topology, self.folder = topology, folder
        words = rl_words(data, folder, 2)
        self.options = stream_options(configured(words, 1), "rl")

    def start(
        self, right_of: RightOf, part_prompts: int = 3, max_new_tokens: int = 16
    ) -> tuple[RolloutWriter, Script]:
        stream = PromptStream(self.options)
        script = Script(self.topology, stream.tokenizer, right_of)
        rollout = RolloutConfig(
            n=N, batch_prompts=6, max_new_tokens=max_new_tokens, part_prompts=part_prompts
        )
        options = ReinforcementConfig(rollout, {"number": 1.0})
        store = RolloutStore(self.folder, "rl", {})
        writer = RolloutWriter(options, "rl", stream, store, script, seed=1)
        writer.begin(0)
        return writer, script


@pytest.fixture
def setup(topology: Topology, demo_data: Path, tmp_path: Path) -> Setup:
    return Setup(topology, demo_data, tmp_path)


def group_of(draw: int, is_useful: bool) -> Group:
    """One that there is something to learn from, or nothing."""
    left = "" if is_useful else "all wrong"
    return Group(draw, 0, "sums", str(draw), "", (0, 0, 0), 1, 0, 0, "", "", [], left)


def by_id(sample_id: str) -> int:
    """A fifth each has 0 to 4 right answers."""
    return sum(map(ord, sample_id)) % (N + 1)


def written(writer: RolloutWriter, number: int = 0) -> Rollout:
    *_, rollout = writer.write(number, 0)
    writer.finish(rollout)
    return rollout


def test_groups_that_teach_nothing_are_replaced(setup: Setup) -> None:
    writer, script = setup.start(by_id)
    rollout = written(writer)
    assert len(rollout.taught) == 6 and rollout.taught == rollout.useful[:6]
    reasons = {0: "all wrong", 4: "too easy"}
    for group, sample_id in zip(rollout.groups, script.asked, strict=True):
        assert group.left_out == reasons.get(by_id(sample_id), "")
        assert group.pass_rate(0.5) == by_id(sample_id) / N
    assert [group.draw for group in rollout.groups] == list(range(len(script.asked)))


@pytest.mark.parametrize(
    ("useful", "asked"),
    [
        ("", 6),
        # Before a wave is whole nothing is known.
        ("10", 6),
        ("111111", 6),
        # 3 of 6 are useful: 6 more should bring the other 3, and have brought 2 of them; 5 of 12, so 1 takes 3 more (2.4).
        ("101010", 12),
        ("101010100", 12),
        ("101010110000", 15),
        ("101010110000010", 15),
        # None: as many as may be asked.
        ("000000", 24),
        ("000000" + 18 * "0", 24),
        # More than are lacking.
        ("101010111110", 12),
    ],
)
def test_as_many_are_asked_as_should_be_needed(useful: str, asked: int) -> None:
    groups = [group_of(number, mark == "1") for number, mark in enumerate(useful)]
    assert prompts_to_ask(groups, RolloutConfig(n=N, batch_prompts=6)) == asked


def test_what_is_more_than_lacking_is_counted(setup: Setup) -> None:
    writer, script = setup.start(lambda sample_id: 1 if script.asked.index(sample_id) >= 3 else 0)
    rollout = written(writer)
    assert [bool(group.left_out) for group in rollout.groups] == 3 * [True] + 9 * [False]
    assert rollout.taught == rollout.groups[3:9]
    assert left_out(rollout) == {"all wrong": 3, SURPLUS: 3}


def test_what_is_asked_depends_on_no_division_into_rounds(setup: Setup, tmp_path: Path) -> None:
    asked = []
    for part_prompts in (1, 3, 100):
        setup.folder = tmp_path / str(part_prompts)
        writer, script = setup.start(by_id, part_prompts)
        for number in range(3):
            written(writer, number)
        asked.append(script.asked)
    assert asked[0] == asked[1] == asked[2]


def test_half_a_rollout_is_finished_and_not_repeated(setup: Setup, tmp_path: Path) -> None:
    setup.folder = tmp_path / "whole"
    whole = written(setup.start(by_id)[0])
    setup.folder = tmp_path / "cut"
    writer, first = setup.start(by_id)
    rounds = writer.write(0, 0)
    for _ in range(2):
        next(rounds)
    writer, second = setup.start(by_id, part_prompts=2)
    assert written(writer) == whole
    assert first.asked and not set(first.asked) & set(second.asked)


def test_prompts_that_were_too_easy_are_not_asked_again(setup: Setup) -> None:
    writer, script = setup.start(by_id)
    size = sum(len(dataset.shards) for dataset in writer.stream.datasets)
    number = 0
    while len(script.asked) < 2 * size:
        written(writer, number)
        number += 1
    asked = [sample_id for sample_id in script.asked if by_id(sample_id) == N]
    assert len(asked) > 10 and len(set(asked)) == len(asked)
    # After a restart the table says the same.
    again, _ = setup.start(by_id)
    again.begin(number)
    assert again.rates == writer.rates


def test_what_no_answer_can_be_learned_from_ends_after_most_prompts(setup: Setup) -> None:
    writer, script = setup.start(lambda sample_id: 0)
    rollout = written(writer)
    assert len(script.asked) == 24 and not rollout.taught


def test_nothing_left_to_ask(setup: Setup) -> None:
    writer, _ = setup.start(by_id)
    for number, dataset in enumerate(writer.stream.datasets):
        for index in range(len(dataset.shards)):
            key = writer.stream.key((number, index, 0))
            writer.rates[dataset.name, key] = PassRate(0, dataset.name, key, 1.0)
    with pytest.raises(UserError, match=r"phases\.rl: more than 90% of the answers to every"):
        written(writer)


def test_prompts_without_room_for_an_answer_are_counted(setup: Setup) -> None:
    writer, script = setup.start(by_id, max_new_tokens=236)
    rollout = written(writer)
    unusable = [group for group in rollout.groups if group.left_out.startswith("unusable")]
    assert len(unusable) + len(script.asked) == len(rollout.groups) and unusable
    assert "its prompt has" in unusable[0].left_out
