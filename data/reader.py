"""Datasets as the stream reads them: samples by place, encoded and decoded, with unreadable ones kept out of the loss."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.config import DataConfig, DatasetConfig
from visionloom.data.encode import EncodedSample
from visionloom.data.lengths import Lengths, Limits, fitting, lengths_hash, load_lengths
from visionloom.data.pack import decode_patches, encode_all
from visionloom.data.quarantine import Quarantine, masked, stand_in
from visionloom.data.sample import Sample, SampleError
from visionloom.data.shards import Dataset
from visionloom.data.tokenizer import Tokenizer
from visionloom.parallel.errors import UserError

CACHED_TOKENS: Final = 1 << 20
"""Tokens of encoded samples that a process keeps (20 bytes each): a small dataset is tokenised once."""

Place = tuple[int, int]
"""Number of the dataset, index of the sample."""


class Corpus:
    """An open dataset with its lengths by the rules of the run."""

    def __init__(self, section: str, name: str, config: DatasetConfig, data: DataConfig, tokenizer: Tokenizer) -> None:
        self.name, self.section, self.config = name, section, config
        self.dataset = Dataset.open(config.path, name, section)
        cache = Path(data.cache) if data.cache else Path(config.path) / "cache"
        try:
            self.lengths: Lengths = load_lengths(self.dataset, tokenizer, data.media, cache)
        except SampleError as error:
            raise UserError(f"dataset {name}: {error}") from None
        self.identity = lengths_hash(self.dataset.fingerprint, tokenizer, data.media)

    def fitting(self, tokens: int, patches: int, tokens_option: str) -> NDArray[np.int64]:
        """Samples that fit a pack, by the dataset's over-length policy."""
        option = f"{self.section}.{self.name}.over_length"
        limits = Limits(tokens, patches, tokens_option, self.config.over_length, option)
        return fitting(self.lengths, limits, self.name, lambda index: self.dataset.sample(index).id)


class Reader:
    """Reads samples of several datasets; an unreadable one is quarantined and keeps its place without a loss."""

    def __init__(self, corpora: Sequence[Corpus], data: DataConfig, tokenizer: Tokenizer, quarantine: Quarantine) -> None:
        self.corpora, self.rules, self.tokenizer, self.quarantine = corpora, data.media, tokenizer, quarantine
        self._encoded: dict[Place, EncodedSample] = {}
        self._cached_tokens = 0
        self._lock = threading.Lock()

    def read(self, places: Sequence[Place]) -> list[EncodedSample]:
        """The samples at these places, with their patches."""
        self.quarantine.passed(len(places))
        with self._lock:
            encoded = self._encode(places)
        return [self._decode(place, encoded[place]) for place in places]

    def _encode(self, places: Sequence[Place]) -> dict[Place, EncodedSample]:
        encoded = {place: self._encoded[place] for place in places if place in self._encoded}
        samples: dict[Place, Sample] = {}
        for place in dict.fromkeys(place for place in places if place not in encoded):
            corpus = self.corpora[place[0]]
            try:
                samples[place] = corpus.dataset.sample(place[1])
            except SampleError as error:
                self._report(place, error)
                tokens = int(corpus.lengths["tokens"][place[1]])
                encoded[place] = stand_in(error.sample_id, corpus.name, tokens, self.tokenizer.pad_id)
        sources = [self.corpora[number].name for number, _ in samples]
        found = dict(zip(samples, encode_all(list(samples.values()), self.tokenizer, self.rules, sources), strict=True))
        self._keep(found)
        return encoded | found

    def _keep(self, found: Mapping[Place, EncodedSample]) -> None:
        self._encoded.update(found)
        self._cached_tokens += sum(len(sample.input_ids) for sample in found.values())
        while self._cached_tokens > CACHED_TOKENS:
            oldest = self._encoded.pop(next(iter(self._encoded)))
            self._cached_tokens -= len(oldest.input_ids)

    def _decode(self, place: Place, sample: EncodedSample) -> EncodedSample:
        if sample.patches is not None:
            return sample
        try:
            return self.decoded(place, sample)
        except SampleError as error:
            self._report(place, error)
            return masked(sample)

    def decoded(self, place: Place, sample: EncodedSample) -> EncodedSample:
        """The sample with its patches; raises SampleError."""
        dataset = self.corpora[place[0]].dataset
        return replace(sample, patches=decode_patches(sample, lambda ref: dataset.member(place[1], ref), self.rules))

    def _report(self, place: Place, error: SampleError) -> None:
        corpus = self.corpora[place[0]]
        location = corpus.dataset.location(place[1])
        self.quarantine.report(corpus.name, {"shard": location.shard, "key": location.key, "offset": location.offset}, error)
