"""Tokens and patches of every sample, counted without decoding a picture and kept beside the dataset.

Plans are made from these tables alone. A table is named by a hash of everything it depends on: the dataset's content, the
tokenizer, the template and the pixel and frame limits. It knows nothing of packs; what becomes of a sample that is longer
than a pack is decided in parts.py.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.config import MediaConfig
from visionloom.data.encode import chat
from visionloom.data.encode.encode import EncodedSample, encode_each
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.resumable import NO_HELP, CountingHelp, in_blocks, load_rows
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Sample, SampleError

TABLE_VERSION: Final = 2
LENGTHS: Final = np.dtype(
    [("tokens", "<i4"), ("patches", "<i4"), ("supervised", "<i4"), ("patch_pairs", "<i8")],
)
"""One row a sample; `patch_pairs` is the sum over frames of (patches of the frame) squared, the cost of vision attention.

A sample that cannot be read or rendered has 0 tokens; it is never drawn.
"""
BLOCK: Final = 4096
"""Samples of a file while a table is counted: a second of work."""
_BATCH: Final = 512

Lengths = NDArray[Any]


def lengths_hash(fingerprint: str, tokenizer: Tokenizer, rules: MediaConfig) -> str:
    """Return the name of the table of a dataset under these rules: 32 hexadecimal digits."""
    facts = [
        TABLE_VERSION,
        chat.TEMPLATE_VERSIONS[tokenizer.chat_format],
        fingerprint,
        tokenizer.fingerprint,
        sorted(dataclasses.asdict(rules).items()),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def load_lengths(
    dataset: Dataset,
    tokenizer: Tokenizer,
    rules: MediaConfig,
    cache: Path,
    helpers: CountingHelp = NO_HELP,
) -> Lengths:
    """Return the table of a dataset (dtype LENGTHS, a row a sample), from `cache` or counted now and put there.

    Several ranks that count at once share the work through the folder; one that cannot be written is no fault.
    """
    table = kept_lengths(dataset, tokenizer, rules, cache)
    if table is not None:
        return table
    work = Counting(dataset, tokenizer, rules)
    path = _table_path(dataset, tokenizer, rules, cache)
    return in_blocks(path, len(dataset), BLOCK, work, LENGTHS, helpers)


def kept_lengths(
    dataset: Dataset, tokenizer: Tokenizer, rules: MediaConfig, cache: Path
) -> Lengths | None:
    """Return the table of a dataset (dtype LENGTHS, a row a sample) that is in `cache`; None if there is none."""
    # also a table whose columns had other names is none of ours
    table = load_rows(_table_path(dataset, tokenizer, rules, cache), LENGTHS)
    return table if table is not None and len(table) == len(dataset) else None


def _table_path(dataset: Dataset, tokenizer: Tokenizer, rules: MediaConfig, cache: Path) -> Path:
    return cache / f"lengths-{lengths_hash(dataset.fingerprint, tokenizer, rules)}.npy"


@dataclass(frozen=True)
class Counting:
    """Counts stretches of a dataset; goes to other processes."""

    dataset: Dataset
    tokenizer: Tokenizer
    rules: MediaConfig

    def __call__(self, start: int, stop: int) -> Lengths:
        """Return the rows of the samples start .. stop (dtype LENGTHS).

        They are counted by encoding, so that no length can differ from the encoded one.
        """
        # 0 tokens: the row of a sample that cannot be used
        table = np.zeros(stop - start, LENGTHS)
        for first in range(start, stop, _BATCH):
            batch = range(first, min(first + _BATCH, stop))
            read = zip(batch, self.dataset.samples(batch), strict=True)
            # of an unreadable one the row stays 0; the stream writes down why when it opens the dataset
            samples = {index: sample for index, sample in read if isinstance(sample, Sample)}
            rows = self._rows(list(samples.values()))
            for index, row in zip(samples, rows, strict=True):
                table[index - start] = row
        return table

    def _rows(
        self,
        samples: list[Sample],
    ) -> list[tuple[int, int, int, int]]:
        """Return the rows of samples; one that cannot be encoded has zeros."""
        names = [self.dataset.name] * len(samples)
        encoded = encode_each(samples, self.tokenizer, self.rules, names)
        try:
            return [row_of(sample) for sample in encoded]
        except SampleError:
            if len(samples) == 1:
                return [(0, 0, 0, 0)]
        # which of them it is, the error of a batch does not say: one at a time
        rows = []
        for sample in samples:
            rows += self._rows([sample])
        return rows


def row_of(sample: EncodedSample) -> tuple[int, int, int, int]:
    """Return tokens, patches, supervised tokens and pairs of patches of a sample: its row in a table."""
    time, height, width = sample.grids.astype(np.int64).T
    # the frames of a video do not attend to each other
    pairs = int((time * (height * width) ** 2).sum())
    return len(sample.input_ids), sample.patch_count, sample.supervised_tokens, pairs
