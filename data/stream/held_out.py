"""Held-out samples of a run: packs for the loss, single questions for greedy answers."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.data.encode.encode import EncodedSample, encode
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.dataset_with_lengths import DatasetWithLengths
from visionloom.data.plan.deal import deal
from visionloom.data.plan.mixture import key_of, permutation
from visionloom.data.plan.open import StreamOptions
from visionloom.data.shards.sample import SampleError
from visionloom.data.stream.batch import PackedBatch, PackLayout
from visionloom.data.stream.in_order import pack_in_order
from visionloom.data.stream.quarantine import Quarantine
from visionloom.data.stream.reader import Reader
from visionloom.parallel.share import ALONE, Share


class EvaluationSet:
    """Held-out samples of one dataset of data.validation: for the loss as packs, for answers one by one.

    At most `limit` samples, the same ones every time.

    Raises:
        UserError: for an unknown name or a missing folder.
    """

    def __init__(self, data: DataConfig, name: str, limit: int) -> None:
        if name not in data.validation:
            raise UserError(
                f"data.validation has no dataset {name}: {', '.join(data.validation) or 'it is empty'}"
            )
        self.data, self.name = data, name
        self.tokenizer = Tokenizer.of(data)
        self.dataset = DatasetWithLengths(
            "data.validation", name, data.validation[name], data, self.tokenizer
        )
        self.indices = _spread(len(self.dataset.shards), limit, name)

    def __len__(self) -> int:
        return len(self.indices)

    def batches(
        self, sequence_length: int, micro_batch: int, loss: str, share: Share
    ) -> Iterator[PackedBatch]:
        """Yield a rank's share of the samples in packs; every rank gets as many batches, some may hold padding only.

        The pictures are dealt as in PackStream.micro_batches.

        Raises:
            UserError: for samples longer than the pack, unless the dataset's policy is to drop them.
        """
        # what is only of training, the batch and the seed, plays no part here
        options = StreamOptions(self.data, "", sequence_length, 0, {}, loss, 0)
        parts = self.dataset.parts(
            options.longest_sample, options.patch_budget, "the sequence length"
        )
        rows, _ = parts.of(self.indices)
        packs = pack_in_order(rows, 0, options, share.data_size * micro_batch)
        reader = Reader([self.dataset], [parts], self.data, self.tokenizer, Quarantine())
        layout = PackLayout.of(options, (self.name,), self.tokenizer.pad_id)
        for micro in deal(packs, share.data_size, micro_batch)[share.data_rank]:
            yield reader.batch([one.places for one in micro], layout, share)

    def questions(self, share: Share = ALONE) -> Iterator[EncodedSample]:
        """Yield a rank's share of the samples that have an answer, with their patches; unreadable ones are left out.

        `prompt_of` cuts one at its answer, `extend` continues it with generated tokens, `pack_prompts` makes the batch.
        """
        reader = Reader([self.dataset], [], self.data, self.tokenizer, Quarantine())
        for index in self.indices[share.data_rank :: share.data_size].tolist():
            try:
                sample = encode(
                    self.dataset.shards.sample(index), self.tokenizer, self.data.media, self.name
                )
                if sample.answer is not None:
                    yield reader.decoded((0, index, 0), sample)
            # an evaluation goes on without it, on the same samples every time
            except SampleError:
                continue


def _spread(size: int, limit: int, name: str) -> NDArray[np.int64]:
    """Return at most `limit` indices below `size` (int64, ascending), chosen by the name alone."""
    places = np.arange(min(size, limit))
    keys = np.full(len(places), key_of(0, f"evaluation {name}"))
    return np.sort(permutation(places, size, keys))
