"""Datasets as plans see them: their length tables and parts by the rules of a run. Imports no torch."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionloom.data.config import DataConfig, DatasetConfig, MediaConfig
from visionloom.data.encode import chat, geometry
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.lengths import Lengths, lengths_hash, load_lengths
from visionloom.data.plan.over_length import PartsCache, make_parts
from visionloom.data.plan.parts import Parts
from visionloom.data.plan.resumable import NO_HELP, CountingHelp
from visionloom.data.plan.stretches import PackLimits
from visionloom.data.shards.dataset import Dataset


class DatasetWithLengths:
    """An open dataset with its lengths by the rules of the run.

    Args:
        section: option below which its configuration stands, such as `data.datasets`.
        name: below the section.
        config: of the dataset.
        data: the input of the run.
        tokenizer: of the run.
        helpers: that count lengths where no table is kept yet.

    Raises:
        UserError: for a dataset that is not there.
    """

    def __init__(
        self,
        section: str,
        name: str,
        config: DatasetConfig,
        data: DataConfig,
        tokenizer: Tokenizer,
        helpers: CountingHelp = NO_HELP,
    ) -> None:
        self.name, self.section, self.config = name, section, config
        self.tokenizer, self.rules = tokenizer, data.media
        self.helpers = helpers
        self.shards = Dataset.open(config.path, name, section, data.store)
        self.cache = cache_folder(data, config.path)
        self.lengths: Lengths = load_lengths(
            self.shards, tokenizer, data.media, self.cache, helpers.named(name)
        )
        self.identity = lengths_hash(self.shards.fingerprint, tokenizer, data.media)

    @property
    def unreadable(self) -> NDArray[np.int64]:
        """Return the samples that could not be read or rendered when they were counted: int64 indices, ascending."""
        return np.flatnonzero(self.lengths["tokens"] == 0)

    def parts(self, tokens: int, patches: int, tokens_option: str) -> Parts:
        """Return what is trained on of each sample, by the dataset's over-length policy.

        Args:
            tokens: that a pack holds.
            patches: that a pack holds.
            tokens_option: the option that says how many tokens, for messages.

        Raises:
            UserError: for a sample that is longer, if that is the policy, and if nothing is left.
        """
        option = f"{self.section}.{self.name}.over_length"
        limits = PackLimits(tokens, patches, tokens_option, self.config.over_length, option)
        helpers = self.helpers.named(f"{self.name}, over-long")
        cache = PartsCache(self.cache, self.identity, helpers)
        return make_parts(self.shards, self.lengths, limits, self.tokenizer, self.rules, cache)


def cache_folder(data: DataConfig, path: str) -> Path:
    """Return where tables of a dataset are kept: data.cache, or `cache` inside the dataset; for a URL the user's cache."""
    if data.cache:
        return Path(data.cache)
    if "://" in path:
        return Path.home() / ".cache" / "visionloom"
    return Path(path) / "cache"


def media_hash(rules: MediaConfig, chat_format: str) -> str:
    """Return eight hexadecimal digits over what decides how media and chats become tokens, besides the tokenizer."""
    version = chat.TEMPLATE_VERSIONS[chat_format]
    facts = [version, geometry.VERSION, sorted(dataclasses.asdict(rules).items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
