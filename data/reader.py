"""Datasets as the stream reads them: samples by place, encoded and decoded, with unreadable ones kept out of the loss."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.config import DataConfig
from visionloom.data.corpus import Corpus
from visionloom.data.decode import Unit, decode_into, decode_patches
from visionloom.data.encode import EncodedSample, encode
from visionloom.data.pack import Decode, PackedBatch, pack
from visionloom.data.quarantine import Quarantine, stand_in
from visionloom.data.sample import Sample, SampleError
from visionloom.data.tokenizer import Tokenizer
from visionloom.data.views import View, Views, encode_views
from visionloom.parallel.errors import UserError

CACHED_TOKENS: Final = 1 << 20
"""Tokens of encoded samples that a process keeps (20 bytes each): a small dataset is tokenised once."""

Place = tuple[int, int, int]
"""Number of the dataset, index of the sample, number of its view."""


class Reader:
    """Reads samples of several datasets; an unreadable one is quarantined and keeps its place without a loss."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        views: Sequence[Views],
        data: DataConfig,
        tokenizer: Tokenizer,
        quarantine: Quarantine,
    ) -> None:
        """`views`: what is trained on of the samples of each corpus."""
        self.corpora, self.views = corpora, views
        self.rules, self.tokenizer, self.quarantine = data.media, tokenizer, quarantine
        self._encoded: dict[Place, EncodedSample] = {}
        self._cached_tokens = 0
        self._lock = threading.Lock()

    def read(self, places: Sequence[Place]) -> list[EncodedSample]:
        """The samples at these places, without their patches."""
        self.quarantine.passed(len(places))
        with self._lock:
            encoded = self._encode(places)
        return [encoded[place] for place in places]

    def _encode(self, places: Sequence[Place]) -> dict[Place, EncodedSample]:
        encoded = {place: self._encoded[place] for place in places if place in self._encoded}
        samples: dict[Place, Sample] = {}
        views: list[View] = []
        for place in dict.fromkeys(place for place in places if place not in encoded):
            number, index, part = place
            view = self.views[number].view(index, part)
            try:
                samples[place] = self.corpora[number].dataset.sample(index)
                views.append(view)
            except SampleError as error:
                self._report(place, error)
                name = self.corpora[number].name
                encoded[place] = stand_in(error.sample_id, name, view.tokens, self.tokenizer.pad_id)
        sources = [self.corpora[place[0]].name for place in samples]
        made = encode_views(list(samples.values()), views, self.tokenizer, self.rules, sources)
        for sample, view in zip(made, views, strict=True):
            _check_length(sample, view)
        found = dict(zip(samples, made, strict=True))
        self._keep(found)
        return encoded | found

    def report_unreadable(self) -> None:
        """Write down the samples that could not be counted and so are never drawn, with their reasons."""
        for number, corpus in enumerate(self.corpora):
            for index in corpus.unreadable.tolist():
                try:
                    encode(corpus.dataset.sample(index), self.tokenizer, self.rules)
                except SampleError as error:
                    self._report((number, index, 0), error)

    def _keep(self, found: Mapping[Place, EncodedSample]) -> None:
        self._encoded.update(found)
        self._cached_tokens += sum(len(sample.input_ids) for sample in found.values())
        while self._cached_tokens > CACHED_TOKENS:
            oldest = self._encoded.pop(next(iter(self._encoded)))
            self._cached_tokens -= len(oldest.input_ids)

    def batch(
        self,
        packs: Sequence[Sequence[Place]],
        sequence_length: int,
        loss: str,
        encoder_rank: int = 0,
        encoder_ranks: int = 1,
    ) -> PackedBatch:
        """The samples at these places laid into packs, with the pictures that this encoder rank encodes; see `pack`."""
        places = [place for one in packs for place in one]
        samples = self.read(places)
        ready = iter(samples)
        laid_out = [[next(ready) for _ in one] for one in packs]
        names = [corpus.name for corpus in self.corpora]
        decode, pad_id = self._decoder(places, samples), self.tokenizer.pad_id
        return pack(laid_out, sequence_length, loss, names, pad_id, decode, encoder_rank, encoder_ranks)

    def _decoder(self, places: Sequence[Place], samples: Sequence[EncodedSample]) -> Decode:
        """What writes the patches of these samples, read at these places, into a batch; an unreadable one is reported."""

        def decode(number: int, units: Sequence[Unit], out: NDArray[np.uint8]) -> bool:
            try:
                decode_into(out, samples[number], units, self._member(places[number]), self.rules)
            except SampleError as error:
                self._report(places[number], error)
                return False
            return True

        return decode

    def decoded(self, place: Place, sample: EncodedSample) -> EncodedSample:
        """The sample with its patches; raises SampleError."""
        return replace(sample, patches=decode_patches(sample, self._member(place), self.rules))

    def _member(self, place: Place) -> Callable[[str], bytes]:
        return partial(self.corpora[place[0]].dataset.member, place[1])

    def _report(self, place: Place, error: SampleError) -> None:
        corpus = self.corpora[place[0]]
        location = corpus.dataset.location(place[1])
        self.quarantine.report(corpus.name, {"shard": location.shard, "key": location.key, "offset": location.offset}, error)


def _check_length(sample: EncodedSample, view: View) -> None:
    if (len(sample.input_ids), sample.patch_count) != (view.tokens, view.patches):
        raise UserError(
            f"sample {sample.sample_id} of dataset {sample.source} has {len(sample.input_ids)} tokens and"
            f" {sample.patch_count} patches, its length table says {view.tokens} and {view.patches}: the tables were made by"
            f" another version of a library; remove them (cache/ in the dataset's folder, or data.cache)"
        )
