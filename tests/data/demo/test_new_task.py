"""The new task for the demo's model: right answers, no handwriting in both splits, the same bytes again.

Reference: scikit-learn's labels, by the numbers of the pictures in each sample's meta.
"""

from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from visionloom.common.errors import UserError
from visionloom.data.demo.drawing import NAMES
from visionloom.data.demo.new_task import NAME, make_task
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Text
from visionloom.launch.data import main


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task") / "made"
    assert make_task(folder, scale=0.02) and not make_task(folder, scale=0.02)
    return folder


def test_answers_are_right_and_splits_share_no_picture(task: Path) -> None:
    digits, seen = load_digits().target, {}
    for split in ("train", "test"):
        dataset = Dataset.open(task / split / NAME, NAME)
        samples = [dataset.sample(index) for index in range(len(dataset))]
        for sample in samples:
            (answer,) = sample.messages[1].content
            number = sample.meta["pictures"][sample.meta["asked"]]
            assert isinstance(answer, Text) and answer.text == NAMES[digits[number]]
        seen[split] = {number for sample in samples for number in sample.meta["pictures"]}
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]


def test_the_command_makes_the_same_bytes(task: Path, tmp_path: Path) -> None:
    assert main(["demo-task", str(tmp_path / "again"), "--scale", "0.02"]) == 0
    files = sorted(path.relative_to(task) for path in task.rglob("*") if path.is_file())
    assert files and all(
        (task / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files
    )


def test_a_folder_with_something_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="holds something else"):
        make_task(tmp_path / "mine")
