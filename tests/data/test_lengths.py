"""Length tables: equal to what encoding gives, kept by everything they depend on; over-long samples are named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from visionloom.data import lengths
from visionloom.data.config import DataConfig
from visionloom.data.encode import encode
from visionloom.data.lengths import LENGTHS, Limits, fitting, load_lengths
from visionloom.data.shards import Dataset
from visionloom.data.tokenizer import Tokenizer
from visionloom.parallel.errors import UserError
from visionloom.tests.data.samples import RULES, essay, film, picture_question


@pytest.fixture
def dataset(config: Callable[..., DataConfig]) -> Dataset:
    made = config(mixed=[*(picture_question(n, (32 * n, 96)) for n in (1, 2, 3)), essay(4), film(5)])
    return Dataset.open(made.datasets["mixed"].path, "mixed")


def test_lengths_are_those_of_the_encoded_samples(dataset: Dataset, tokenizer: Tokenizer, tmp_path: Path) -> None:
    table = load_lengths(dataset, tokenizer, RULES, tmp_path / "cache")
    assert table.dtype == LENGTHS
    for index, row in enumerate(table):
        sample = encode(dataset.sample(index), tokenizer, RULES)
        assert row["tokens"] == len(sample.input_ids)
        assert row["supervised"] == np.count_nonzero(sample.target_weights)
        assert row["patches"] == sum(t * h * w for t, h, w in sample.grids.tolist())
        assert row["patch_squares"] == sum(t * (h * w) ** 2 for t, h, w in sample.grids.tolist())
    assert table["patches"].tolist() == [12, 24, 36, 0, 8]


def test_tables_are_kept_and_made_anew(
    dataset: Dataset, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = load_lengths(dataset, tokenizer, RULES, cache)
    (path,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(lengths, "count_lengths", lambda *_: pytest.fail("counted although a table is there"))
        np.testing.assert_array_equal(load_lengths(dataset, tokenizer, RULES, cache), first)
    path.write_bytes(path.read_bytes()[:-8])
    np.testing.assert_array_equal(load_lengths(dataset, tokenizer, RULES, cache), first)
    wider = load_lengths(dataset, tokenizer, replace(RULES, image_min_pixels=65_536), cache)
    assert wider["patches"][0] > first["patches"][0]
    assert len(list(cache.iterdir())) == 2
    cache.chmod(0o500)
    (tmp_path / "file").write_text("")
    np.testing.assert_array_equal(load_lengths(dataset, tokenizer, RULES, tmp_path / "file" / "cache"), first)


def table(tokens: list[int], patches: list[int]) -> np.ndarray:
    rows = np.zeros(len(tokens), LENGTHS)
    rows["tokens"], rows["patches"] = tokens, patches
    return rows


LIMITS = Limits(100, 50, "phases.long.sequence_length", "error", "data.datasets.web.over_length")


def test_over_long_samples_are_named_or_dropped() -> None:
    rows = table([100, 101, 300, 10], [0, 0, 0, 50])
    with pytest.raises(UserError) as error:
        fitting(rows, LIMITS, "web", "id{}".format)
    for part in (
        "dataset web",
        "id2",
        "300 tokens",
        "100",
        "2 such samples",
        "phases.long.sequence_length",
        "over_length=drop",
    ):
        assert part in str(error.value)
    assert fitting(rows, replace(LIMITS, policy="drop"), "web", str).tolist() == [0, 3]


def test_too_many_patches_are_over_length_too() -> None:
    rows = table([10, 10], [51, 0])
    with pytest.raises(UserError, match=r"id0 has 51 patches, a pack holds 50 .*data\.patch_budget.*over_length=drop"):
        fitting(rows, LIMITS, "web", "id{}".format)
    assert fitting(rows, replace(LIMITS, policy="drop"), "web", str).tolist() == [1]
    with pytest.raises(UserError, match="none of its 1 samples fits"):
        fitting(rows[:1], replace(LIMITS, policy="drop"), "web", str)
    with pytest.raises(UserError, match=r"over_length=keep is unknown: use one of error, drop"):
        fitting(rows, replace(LIMITS, policy="keep"), "web", str)
