"""Datasets as plans see them: their length tables and parts by the rules of a run. Imports no torch."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionloom.common.progress import ProgressOf
from visionloom.data.config import DataConfig, DatasetConfig, MediaConfig
from visionloom.data.encode import chat, geometry
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.lengths import Lengths, lengths_hash, load_lengths
from visionloom.data.plan.over_length import PackLimits, make_parts
from visionloom.data.plan.parts import Parts
from visionloom.data.shards.dataset import Dataset


class Corpus:
    """An open dataset with its lengths by the rules of the run.

    `processes` count lengths beside this one where no table is kept yet. Raises UserError for a dataset that is not there.
    """

    def __init__(
        self,
        section: str,
        name: str,
        config: DatasetConfig,
        data: DataConfig,
        tokenizer: Tokenizer,
        processes: int = 0,
        report: ProgressOf | None = None,
    ) -> None:
        self.name, self.section, self.config = name, section, config
        self.tokenizer, self.rules = tokenizer, data.media
        self.processes, self.report = processes, report
        self.dataset = Dataset.open(config.path, name, section, data.store)
        self.cache = cache_folder(data, config.path)
        told = report(name) if report else None
        self.lengths: Lengths = load_lengths(
            self.dataset, tokenizer, data.media, self.cache, processes, told
        )
        self.identity = lengths_hash(self.dataset.fingerprint, tokenizer, data.media)

    @property
    def unreadable(self) -> NDArray[np.int64]:
        """Samples that could not be read or rendered when they were counted."""
        return np.flatnonzero(self.lengths["tokens"] == 0)

    def parts(self, tokens: int, patches: int, tokens_option: str) -> Parts:
        """What is trained on of each sample in packs of so many tokens and patches, by the dataset's over-length policy."""
        option = f"{self.section}.{self.name}.over_length"
        limits = PackLimits(tokens, patches, tokens_option, self.config.over_length, option)
        told = self.report(f"{self.name}, over-long") if self.report else None
        return make_parts(
            self.dataset,
            self.lengths,
            limits,
            self.tokenizer,
            self.rules,
            self.cache,
            self.identity,
            self.processes,
            told,
        )


def cache_folder(data: DataConfig, path: str) -> Path:
    """Where tables of a dataset are kept: data.cache, or `cache` inside the dataset; for a URL in the user's cache."""
    if data.cache:
        return Path(data.cache)
    if "://" in path:
        return Path.home() / ".cache" / "visionloom"
    return Path(path) / "cache"


def media_hash(rules: MediaConfig) -> str:
    """Eight hexadecimal digits over what decides how pictures, videos and chats become tokens, besides the tokenizer."""
    facts = [chat.TEMPLATE_VERSION, geometry.VERSION, sorted(dataclasses.asdict(rules).items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
