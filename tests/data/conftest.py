"""What the tests of data share: a small tokenizer with Qwen's special tokens, and datasets on disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from visionloom.data.config import DataConfig, DatasetConfig
from visionloom.data.demo.tokenizer import train_tokenizer
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards.write import write_shards
from visionloom.tests.data.conversion import Run
from visionloom.tests.data.samples import RULES, Pair, essay, film, picture_question


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, [picture_question(1)[0], film(1)[0], essay(1)[0]])
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    """The tokenizer as the data code reads it."""
    return Tokenizer(str(tokenizer_folder))


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., DataConfig]:
    """Writes datasets, each from its samples, and returns the configuration that reads them."""

    def make(**datasets: list[Pair]) -> DataConfig:
        for name, samples in datasets.items():
            write_shards(tmp_path / name, name, samples, samples_per_shard=40)
        found = {name: DatasetConfig(path=str(tmp_path / name)) for name in datasets}
        return DataConfig(
            str(tokenizer_folder),
            found,
            dict(found),
            media=replace(RULES),
            packing_window_samples=64,
        )

    return make


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Converts sources in a folder of the test's own."""
    return Run(tmp_path)
