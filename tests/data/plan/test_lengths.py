"""Length tables: equal to what encoding gives, kept by everything they depend on, counted alike by any number of processes."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.recfunctions import rename_fields

from visionloom.data.config import DataConfig
from visionloom.data.encode.encode import encode
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan import lengths
from visionloom.data.plan.lengths import LENGTHS, Counting, load_lengths
from visionloom.data.plan.resumable import CountingHelp
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import SampleError
from visionloom.tests.data.counting import count_elsewhere
from visionloom.tests.data.samples import RULES, essay, film, picture_question


@pytest.fixture
def dataset(config: Callable[..., DataConfig]) -> Dataset:
    made = config(
        mixed=[*(picture_question(n, (32 * n, 96)) for n in (1, 2, 3)), essay(4), film(5)]
    )
    return Dataset.open(made.datasets["mixed"].path, "mixed")


@pytest.fixture
def essays(config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A dataset of five blocks."""
    monkeypatch.setattr(lengths, "BLOCK", 16)
    made = config(texts=[essay(number, number % 9) for number in range(70)])
    return Dataset.open(made.datasets["texts"].path, "texts")


def test_lengths_are_those_of_the_encoded_samples(
    dataset: Dataset, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    table = load_lengths(dataset, tokenizer, RULES, tmp_path / "cache")
    assert table.dtype == LENGTHS
    for index, row in enumerate(table):
        sample = encode(dataset.sample(index), tokenizer, RULES)
        assert row["tokens"] == len(sample.input_ids)
        assert row["supervised"] == np.count_nonzero(sample.target_weights)
        assert row["patches"] == sum(t * h * w for t, h, w in sample.grids.tolist())
        assert row["patch_pairs"] == sum(t * (h * w) ** 2 for t, h, w in sample.grids.tolist())
    assert table["patches"].tolist() == [12, 24, 36, 0, 8]


def test_tables_are_kept_and_made_anew(
    dataset: Dataset, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = np.array(load_lengths(dataset, tokenizer, RULES, cache))
    (path,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(
            Counting, "__call__", lambda *_: pytest.fail("counted although a table is there")
        )
        np.testing.assert_array_equal(load_lengths(dataset, tokenizer, RULES, cache), first)
    path.write_bytes(path.read_bytes()[:-8])
    np.testing.assert_array_equal(load_lengths(dataset, tokenizer, RULES, cache), first)
    wider = load_lengths(dataset, tokenizer, replace(RULES, image_min_pixels=65_536), cache)
    assert wider["patches"][0] > first["patches"][0]
    assert len(list(cache.iterdir())) == 2
    (tmp_path / "file").write_text("")
    np.testing.assert_array_equal(
        load_lengths(dataset, tokenizer, RULES, tmp_path / "file" / "cache"), first
    )


def test_a_table_with_other_columns_is_counted_anew(
    dataset: Dataset, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A cache may have tables of a version that called a column otherwise."""
    cache = tmp_path / "cache"
    first = np.array(load_lengths(dataset, tokenizer, RULES, cache))
    (path,) = cache.iterdir()
    np.save(path, rename_fields(first, {"patch_pairs": "patch_squares"}))
    again = load_lengths(dataset, tokenizer, RULES, cache)
    np.testing.assert_array_equal(again, first)
    assert np.load(path).dtype == LENGTHS


def test_a_count_goes_on_where_it_was_cut_off(
    essays: Dataset, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.asarray(Counting(essays, tokenizer, RULES)(0, len(essays)))
    counted, count = list[int](), Counting.__call__

    def cut_off(self: Counting, start: int, stop: int) -> np.ndarray:
        if len(counted) == 3:
            raise KeyboardInterrupt
        counted.append(start)
        return count(self, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Counting, "__call__", cut_off)
        with pytest.raises(KeyboardInterrupt):
            load_lengths(essays, tokenizer, RULES, tmp_path / "cache")
        done = set(counted)
        counted.clear()
        np.testing.assert_array_equal(
            load_lengths(essays, tokenizer, RULES, tmp_path / "cache"), expected
        )
    assert set(counted) == {0, 16, 32, 48, 64} - done
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"], (
        "the blocks are joined and gone"
    )


def test_processes_count_alike(essays: Dataset, tokenizer: Tokenizer, tmp_path: Path) -> None:
    told = list[tuple[int, int]]()
    table = load_lengths(
        essays,
        tokenizer,
        RULES,
        tmp_path / "cache",
        CountingHelp(2, lambda name: lambda done, total: told.append((done, total))),
    )
    np.testing.assert_array_equal(table, Counting(essays, tokenizer, RULES)(0, len(essays)))
    assert told[-1] == (70, 70)
    assert len(told) == 5


def test_what_cannot_be_read_has_no_length(
    essays: Dataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Counting(essays, tokenizer, RULES)(0, 70)
    read = Dataset.sample

    def broken(self: Dataset, index: int) -> object:
        if index in (3, 40):
            raise SampleError(f"essay:{index}", "", "not valid JSON")
        return read(self, index)

    monkeypatch.setattr(Dataset, "sample", broken)
    table = Counting(essays, tokenizer, RULES)(0, 70)
    assert np.flatnonzero(table["tokens"] == 0).tolist() == [3, 40]
    rest = np.delete(np.arange(70), [3, 40])
    np.testing.assert_array_equal(table[rest], expected[rest])


def test_ranks_that_count_at_once_share_the_work(
    essays: Dataset, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    expected = Counting(essays, tokenizer, RULES)(0, 70)
    with ProcessPoolExecutor(2, get_context("forkserver")) as pool:
        ranks = [pool.submit(count_elsewhere, tmp_path, essays, tokenizer) for _ in range(2)]
        counts, tables = zip(*(rank.result() for rank in ranks), strict=True)
    for table in tables:
        np.testing.assert_array_equal(table, expected)
    assert 35 <= sum(counts) < 2 * 35, "no rank counts everything while another does too"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("table")] == [
        "table.npy"
    ]
