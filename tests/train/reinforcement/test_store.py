"""Rollouts on disk. Reference for the shards: the webdataset package."""

import json
from pathlib import Path
from typing import Any

import pytest
import webdataset

from visionloom.common.errors import UserError
from visionloom.train.reinforcement.groups import Group, WrittenAnswer
from visionloom.train.reinforcement.store import TABLE, PassRate, RolloutStore

SETTINGS = {"phases.rl.lr": 1e-3}


def group(draw: int, rewards: tuple[float, ...] = (0.0, 1.0)) -> Group:
    answers = [
        WrittenAnswer([5, 6], [-0.5, -1.25], [-0.25, -1.0], True, "7", {"number": each}, {}, each)
        for each in rewards
    ]
    return Group(
        draw, 12, "sums", f"{draw:09d}", "sum", (0, draw, 0), 9, 4, 16, "1 + 6?", "7", answers, ""
    )


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    return RolloutStore(tmp_path, "rl", SETTINGS)


def test_rounds_are_read_in_the_order_of_their_draws(store: RolloutStore) -> None:
    store.add(0, 12, [group(4), group(5)])
    store.add(0, 12, [group(7)])
    assert store.read(0, 12) == [group(4), group(5), group(7)]
    assert store.read(1, 12) == []


def test_they_are_webdataset_shards(store: RolloutStore) -> None:
    store.add(3, 12, [group(4), group(5)])
    shard = str(store.folder / "00000003" / "00000.tar")
    read: list[dict[str, Any]] = list(webdataset.WebDataset(shard, shardshuffle=False).decode())
    assert [each["__key__"] for each in read] == ["000000004", "000000005"]
    assert read[0]["json"]["answers"][1]["rewards"] == {"number": 1.0}


@pytest.mark.parametrize("what", ["policy", "settings"])
def test_what_another_has_written_is_put_aside(what: str, store: RolloutStore) -> None:
    for number in range(2):
        store.add(0, 12, [group(number)])
        if what == "policy":
            assert store.read(0, 13) == []
        else:
            other = RolloutStore(store.folder.parents[1], "rl", {"phases.rl.lr": 2e-3})
            assert other.read(0, 12) == []
        assert (store.folder / f"00000000.aside-{number}" / "00000.tar").exists()
        assert store.read(0, 12) == []


def test_what_is_put_aside_keeps_its_name(store: RolloutStore) -> None:
    """Also where an older one has been removed, or named by hand."""
    for name in ("aside-1", "aside-of-mine"):
        (store.folder / f"00000000.{name}").mkdir(parents=True)
    store.add(0, 12, [group(4)])
    store.put_aside(0)
    assert (store.folder / "00000000.aside-2" / "00000.tar").exists()


def test_draws_begin_behind_the_rollout_before(store: RolloutStore) -> None:
    store.add(0, 12, [group(4), group(6)])
    store.add(0, 12, [group(5)])
    assert [store.first_draw(number) for number in range(3)] == [0, 7, 0]
    # Of another plan of the data the numbers mean other samples.
    other = RolloutStore(store.folder.parents[1], "rl", {"plan": "another"})
    assert other.first_draw(1) == 0


def test_a_folder_that_takes_no_files_is_one_line(store: RolloutStore) -> None:
    store.folder.parent.write_text("a file")
    for work in (lambda: store.add(0, 12, []), lambda: store.write_pass_rates([])):
        with pytest.raises(UserError, match=r"rl.*: a rollout cannot be kept: Not a directory"):
            work()


@pytest.mark.parametrize("place", [0, 5, 515, 1550, 1600])
def test_a_damaged_shard_is_named(place: int, store: RolloutStore) -> None:
    """In a header, the checksum, a key of the JSON, and a number."""
    store.add(0, 12, [group(4)])
    shard = store.folder / "00000000" / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"00000\.tar is damaged .* remove its folder"):
        store.read(0, 12)


def test_the_table_of_pass_rates_forgets_what_is_written_again(store: RolloutStore) -> None:
    rows = [PassRate(number, "sums", "000000001", number / 4) for number in range(4)]
    store.write_pass_rates(rows)
    with (store.folder / TABLE).open("a") as file:
        file.write(json.dumps(vars(rows[0]))[:20])
    assert store.pass_rates(3) == rows[:3]
    assert store.pass_rates(0) == []


def test_advantages_go_to_all_tokens_of_an_answer() -> None:
    wrong, right = group(4).learnable()
    assert wrong.tokens == 11 and wrong.token_ids.tolist() == [5, 6]
    assert right.advantages.tolist() == pytest.approx([0.7070068, 0.7070068])
    assert wrong.advantages.tolist() == pytest.approx([-0.7070068, -0.7070068])
