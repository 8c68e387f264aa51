"""Held-out samples of a run: packs for the loss, single questions for greedy answers."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.data.encode.encode import EncodedSample, encode
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.best_fit import pack_samples
from visionloom.data.plan.corpus import Corpus
from visionloom.data.plan.deal import CostModel, PlannedPack, deal
from visionloom.data.plan.mixture import key_of, permutation
from visionloom.data.plan.plan import pack_work
from visionloom.data.plan.resumable import Rows
from visionloom.data.shards.sample import SampleError
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.quarantine import Quarantine
from visionloom.data.stream.reader import Reader


class EvaluationSet:
    """Held-out samples of one dataset of data.validation: for the loss as packs, for answers one by one.

    At most `limit` samples, the same ones every time. Raises UserError for an unknown name or a missing folder.
    """

    def __init__(self, data: DataConfig, name: str, limit: int) -> None:
        if name not in data.validation:
            raise UserError(
                f"data.validation has no dataset {name}: {', '.join(data.validation) or 'it is empty'}"
            )
        self.data, self.name = data, name
        self.tokenizer = Tokenizer(data.tokenizer)
        self.corpus = Corpus("data.validation", name, data.validation[name], data, self.tokenizer)
        self.indices = _spread(len(self.corpus.dataset), limit, name)

    def __len__(self) -> int:
        return len(self.indices)

    def batches(
        self,
        sequence_length: int,
        micro_batch: int,
        loss: str,
        dp_rank: int,
        dp_size: int,
        encoder_rank: int = 0,
        encoder_ranks: int = 1,
    ) -> Iterator[PackedBatch]:
        """This rank's share of the samples in packs; every rank gets as many batches, some may hold padding only.

        The pictures are dealt as in PackStream.micro_batches. Raises UserError for samples longer than the pack, unless the
        dataset's policy is to drop them.
        """
        multiple, budget = (
            self.data.sample_token_multiple,
            int(self.data.max_patches_per_token * sequence_length),
        )
        parts = self.corpus.parts(
            sequence_length // multiple * multiple, budget, "the sequence length"
        )
        reader = Reader([self.corpus], [parts], self.data, self.tokenizer, Quarantine())
        rows, _ = parts.of(self.indices)
        tokens = -(-rows["tokens"].astype(np.int64) // multiple) * multiple
        packed = pack_samples(
            tokens.tolist(),
            rows["patches"].tolist(),
            sequence_length,
            budget,
            self.data.packing_window_samples,
        )
        for micro in deal(self._packs(rows, packed, dp_size * micro_batch), dp_size, micro_batch)[
            dp_rank
        ]:
            places = [pack_.places for pack_ in micro]
            yield reader.batch(places, sequence_length, loss, encoder_rank, encoder_ranks, multiple)

    def _packs(self, rows: Rows, packed: list[list[int]], multiple: int) -> list[PlannedPack]:
        """Packs of the dataset's parts, with empty ones up to a multiple."""
        packs = []
        for numbers in packed:
            found = rows[numbers]
            places = tuple(
                (0, sample, part_number)
                for sample, part_number in zip(
                    *(found[f].tolist() for f in ("sample", "part_number")), strict=True
                )
            )
            packs.append(
                PlannedPack(
                    places, float(CostModel().of(pack_work(found, np.array([0, len(found)])))[0])
                )
            )
        return packs + [PlannedPack((), 0.0)] * (-len(packs) % multiple)

    def questions(self, dp_rank: int = 0, dp_size: int = 1) -> Iterator[EncodedSample]:
        """This rank's share of the samples that have an answer, with their patches; unreadable ones are left out.

        `prompt_of` cuts one at its answer, `extend` continues it with generated tokens, `pack_prompts` makes the batch.
        """
        reader = Reader([self.corpus], [], self.data, self.tokenizer, Quarantine())
        for index in self.indices[dp_rank::dp_size].tolist():
            try:
                sample = encode(
                    self.corpus.dataset.sample(index), self.tokenizer, self.data.media, self.name
                )
                if sample.answer is not None:
                    yield reader.decoded((0, index, 0), sample)
            except SampleError:
                continue


def _spread(size: int, limit: int, name: str) -> NDArray[np.int64]:
    """At most `limit` indices, chosen by the name alone, in order."""
    places = np.arange(min(size, limit))
    return np.sort(permutation(places, size, np.full(len(places), key_of(0, f"evaluation {name}"))))
